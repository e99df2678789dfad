import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import check_strip, find_color, read_strips, seed

from hvae_ebm_prior.cli.loading import load_function
from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.saving.grid import GREY
from hvae_ebm_prior.training.array_data import load_images

LOADER = """
import torch
from hvae_ebm_prior.adapters import HVAE, HVAEConfig

def load():
    torch.manual_seed(0)
    return HVAE(HVAEConfig(image_size=8, widths=(8, 8), latent_channels=(2, 1)))

number = 3

def load_prior():
    from hvae_ebm_prior import Coupling, DiffusionEBMPrior, LabelSet, LangevinConfig
    torch.manual_seed(0)
    coupling = Coupling({"class": LabelSet(("cup", "hat")), "smile": LabelSet(2)})
    return DiffusionEBMPrior(load(), langevin=LangevinConfig(steps=2), coupling=coupling)

def load_ncp():
    from hvae_ebm_prior import EnergyConfig, LangevinConfig
    from hvae_ebm_prior.baselines import NCPPrior
    torch.manual_seed(0)
    return NCPPrior(load(), langevin=LangevinConfig(steps=2), energy=EnergyConfig(context=False, width=8))
"""


BROKEN = """
import torch

class Means:
    def top_down(self, batch_size):
        zeros = torch.zeros(batch_size, 1, 8, 8)
        z = yield zeros, zeros + 0.5
        return z

    def infer(self, images):
        return [torch.logit(images, eps=1e-3)]

    def decode(self, features):
        return torch.sigmoid(features)

def load():
    return Means()
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "mine.py").write_text(LOADER)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    return tmp_path


def test_diagnose_prints_the_table(files, capsys):
    assert main(["diagnose", f"{files / 'mine.py'}:load", "--images", str(files / "images.npy")]) == 0
    printed = capsys.readouterr().out
    assert "2x2x2" in printed
    assert "1x4x4" in printed
    assert "rior hole" in printed
    assert "shows against samples of its own alone: --samples" in printed


def test_diagnose_says_what_is_wrong_before_the_table(files, capsys):
    """Once, also where the table cannot be made; samples of the model itself show what nothing else does."""
    (files / "broken.py").write_text(BROKEN)
    load, images = f"{files / 'broken.py'}:load", str(files / "images.npy")
    assert main(["diagnose", load, "--images", images]) == 0
    printed = capsys.readouterr().out
    assert "Means breaks 1 promise:\n- infer: two seeds gave equal latents in all layers" in printed
    assert printed.count("two seeds") == 1
    assert printed.index("two seeds") < printed.index("layer  shape") < printed.index(" inf ")
    own, wrong = str(files / "own.npy"), str(files / "wrong.npy")
    samples = np.random.default_rng(0).normal(size=(2, 200, 1, 8, 8)) * np.array([0.5, 0.4])[:, None, None, None, None]
    np.save(own, (255 / (1 + np.exp(-samples[0]))).astype(np.uint8))
    np.save(wrong, (255 / (1 + np.exp(-samples[1]))).astype(np.uint8))
    assert main(["diagnose", load, "--images", images, "--samples", own]) == 0
    assert "breaks 1 promise" in capsys.readouterr().out
    assert main(["diagnose", load, "--images", images, "--samples", wrong]) == 0
    assert "breaks 2 promises" in (printed := capsys.readouterr().out)
    assert "- samples: 200 images of the layers differ from the model's own" in printed


def test_a_checkpoint_that_is_missing_is_asked_for(files, capsys):
    (files / "needs.py").write_text("def load(checkpoint): ...")
    assert main(["diagnose", f"{files / 'needs.py'}:load", "--images", str(files / "images.npy")]) == 2
    assert "load cannot be called without a CHECKPOINT, which goes after it" in capsys.readouterr().err


def test_diagnose_of_images_of_another_size(files, capsys):
    np.save(files / "large.npy", np.zeros((20, 16, 16), dtype=np.uint8))
    assert main(["diagnose", f"{files / 'mine.py'}:load", "--images", str(files / "large.npy")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    expected = "large.npy: expected images (1, 8, 8) (channels, height, width), as the backbone draws, got (1, 16, 16)"
    assert shown.err.count(expected) == 1


def test_diagnose_hands_on_the_checkpoint(files, capsys):
    from hvae_ebm_prior.adapters import HVAE, HVAEConfig

    HVAE(HVAEConfig(image_size=8, widths=(8,), latent_channels=(3,))).save(files / "model.safetensors")
    arguments = [
        "diagnose",
        "hvae_ebm_prior.adapters:HVAE.load",
        str(files / "model.safetensors"),
        "--images",
        str(files / "images.npy"),
        "--limit",
        "10",
    ]
    assert main(arguments) == 0
    assert "3x4x4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("mine", "expected package.module:function"),
        ("nowhere.py:load", "there is no file nowhere.py"),
        ("no_such_module:load", "No module named 'no_such_module'"),
        ("{}/mine.py:number", "has no function number"),
        ("json:JSONDecoder", "is not a backbone adapter"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(files, capsys, loader, message):
    assert main(["diagnose", loader.format(files), "--images", str(files / "images.npy")]) == 2
    assert message in capsys.readouterr().err


def test_images_of_every_form(tmp_path):
    path = str(tmp_path / "images.npy")
    for array, shape in (
        (np.full((4, 8, 8), 255, np.uint8), (4, 1, 8, 8)),
        (np.full((4, 8, 8, 3), 255, np.uint8), (4, 3, 8, 8)),
        (np.full((4, 3, 8, 8), 1.0), (4, 3, 8, 8)),
    ):
        np.save(path, array)
        images = load_images(path)
        assert tuple(images.shape) == shape
        assert images.min() == images.max() == 1
    np.save(path, np.zeros((4, 8, 8), np.int64))
    with pytest.raises(ValueError, match=r"got int64 \(4, 8, 8\)"):
        load_images(path)
    np.savez(tmp_path / "images.npz", train=np.zeros((4, 8, 8), np.uint8), test=np.zeros((2, 8, 8), np.uint8))
    assert tuple(load_images(str(tmp_path / "images.npz") + ":test").shape) == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="a name out of train, test"):
        load_images(str(tmp_path / "images.npz"))


def test_the_command_is_installed(capsys):
    command = Path(sys.executable).parent / "hvae-ebm-prior"
    done = subprocess.run([command, "--help"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prior hole" in done.stdout
    with pytest.raises(SystemExit, match="0"):
        main(["diagnose", "--help"])
    assert "--images" in capsys.readouterr().out


def test_info_names_versions_and_backends(capsys, monkeypatch):
    import torch

    monkeypatch.delenv("HVAE_EBM_PRIOR_BACKEND", raising=False)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "cpu             Langevin steps by torch" in printed
    monkeypatch.setenv("HVAE_EBM_PRIOR_BACKEND", "naive")
    main(["info"])
    printed = capsys.readouterr().out
    assert "Langevin steps by naive" in printed
    assert "HVAE_EBM_PRIOR_BACKEND is set to naive" in printed


@pytest.mark.parametrize(
    ("command", "pictures", "figures"),
    [
        (
            ["sample", "--count", "32", "--labels", "class=hat", "smile=1", "--guidance", "2"],
            ["sample"],
            {"samples": 32, "guidance": 2.0},
        ),
        (["edit", "--images", "images.npy", "--limit", "3"], ["edit"], {"images": 3}),
        (
            ["edit", "--images", "images.npy", "--hold", "0", "--labels", "class=0"],
            ["edit"],
            {"images": 8, "labels": {"class": 0}},
        ),
        (["edit", "--count", "3"], ["edit"], {"images": 3}),
        (["interpolate", "--count", "3", "--frames", "4"], ["interpolate"], {"pairs": 3, "frames": 4}),
        (["interpolate", "--images", "images.npy", "--limit", "5"], ["interpolate"], {"pairs": 2}),
        (
            ["transitions", "--count", "3", "--steps", "9"],
            ["transitions", "transitions_energies", "transitions_pixels"],
            {"chains": 3},
        ),
        (
            ["ood", "--images", "images.npy", "--outliers", "images.npy"],
            ["ood", "ood_inference", "ood_diffusion", "ood_density"],
            {"outliers": 20},
        ),
        (
            [
                "ood",
                "--images",
                "images.npy",
                "--outliers",
                "images.npy",
                "--scheme",
                "typicality",
                "--reference",
                "images.npy",
            ],
            ["ood", "ood_typicality"],
            {"images": 20},
        ),
        (
            ["ood", "--images", "images.npy", "--outliers", "images.npy", "--scheme", "ratio"],
            ["ood", "ood_ratio"],
            {"images": 20},
        ),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, list) else "",
)
def test_commands_of_a_prior_write_pictures_and_figures(files, monkeypatch, command, pictures, figures):
    monkeypatch.chdir(files)
    assert main([command[0], "mine.py:load_prior", *command[1:]]) == 0
    written = json.loads((files / f"{command[0]}.json").read_text())
    assert figures.items() <= written.items()
    assert sorted(path.stem for path in files.glob("*.png")) == sorted(pictures)
    strips = read_strips(files / f"{pictures[0]}.png")
    if command[0] == "sample":
        labels = {"class": "hat", "smile": 1}
        images = load_function("mine.py:load_prior")().sample(32, labels=labels, guidance=2.0, generator=seed(0))
        prior = load_function("mine.py:load_prior")()
        gaussian = prior.decode(torch.randn(16, prior.dim, generator=seed(0)))
        for strip, row in zip(strips, (gaussian, *images.split(16)), strict=True):
            check_strip(strip, row)
    if command[0] == "edit":
        assert len(strips) == 1 + len(written["edits"])
        if "--images" in command:
            check_strip(strips[0], load_images("images.npy")[: written["images"]])
        if "--hold" not in command:
            assert [edit["held"] for edit in written["edits"]] == [[0, 1], [0], []]
            height = min(len(strip) for strip in strips)
            assert np.abs(strips[1][:height] - strips[3][:height]).mean() > 0.01
    if command[0] == "interpolate":
        assert len(strips) == written["pairs"]
    if command[0] == "transitions":
        assert len(strips) == 1
        for name, colors in (("energies", ("C0", "C1", GREY)), ("pixels", ("C0", "C1", "C2"))):
            assert all(len(find_color(f"transitions_{name}.png", color)) > 50 for color in colors)
    if command[0] == "ood":
        assert [len(find_color("ood.png", f"C{i}")) > 20 for i in range(4)] == [i < len(pictures) - 1 for i in range(4)]
        for name in pictures[1:]:
            assert all(len(find_color(f"{name}.png", color, 0.6)) > 50 for color in ("C0", "C1"))
        # The same images under another seed: nobody can tell them apart.
        assert all(0.3 < cut["auroc"] < 0.7 for cut in written[pictures[1].partition("_")[2]])
    assert not list(files.glob("*.part*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "mine.py:load"], "expected a function that returns a trained DiffusionEBMPrior, got HVAE"),
        (["sample", "mine.py:load_prior", "--labels", "class"], "expected set=category"),
        (["sample", "mine.py:load_prior", "--labels", "colour=1"], "expected one of the label sets class, smile"),
        (["sample", "mine.py:load_prior", "--labels", "class=shoe"], "expected one of cup, hat"),
        (["sample", "mine.py:load_ncp", "--labels", "class=hat"], "labels: NCPPrior.sample takes no labels"),
        (["edit", "mine.py:load_ncp", "--labels", "class=hat"], "labels: NCPPrior.sample takes no labels"),
        (["edit", "mine.py:load_prior", "--images", "images.npy", "--hold", "a"], "layer indices such as 0,1"),
        (["edit", "mine.py:load_prior", "--images", "images.npy", "--hold", "5"], "0 (top) to 1 (bottom)"),
        (["interpolate", "mine.py:load_prior", "--images", "images.npy", "--limit", "1"], "at least two images"),
        (
            [
                "ood",
                "mine.py:load_prior",
                "--images",
                "images.npy",
                "--outliers",
                "images.npy",
                "--scheme",
                "typicality",
            ],
            "--reference",
        ),
    ],
)
def test_commands_of_a_prior_say_what_is_wrong(files, monkeypatch, capsys, command, message):
    monkeypatch.chdir(files)
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--count", "3", "--temperature", "0.8"],
        ["edit", "--images", "images.npy", "--limit", "2"],
        ["interpolate", "--count", "2", "--frames", "3"],
        ["transitions", "--count", "2", "--steps", "2"],
        ["ood", "--images", "images.npy", "--outliers", "images.npy"],
    ],
    ids=lambda command: command[0],
)
def test_commands_take_saved_priors_of_other_classes(files, monkeypatch, command):
    monkeypatch.chdir(files)
    prior = load_function("mine.py:load_ncp")()
    prior.save_pretrained("saved")
    assert main([command[0], "mine.py:load", "--prior", "saved", *command[1:]]) == 0
    assert (files / f"{command[0]}.png").exists()
    if command[0] == "sample":
        _, row = read_strips(files / "sample.png")
        check_strip(row, prior.sample(3, temperature=0.8, generator=seed(0)))
