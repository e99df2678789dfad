"""The command `evaluate`, end to end on a tiny model."""

import json
import sys

import numpy as np
import pytest
import torch

from hvae_ebm_prior.cli.main import main

LOADER = """
import torch
from backbones import RandomBackbone
from torch import nn
from hvae_ebm_prior import DiffusionEBMPrior, LangevinConfig

def load():
    torch.manual_seed(0)
    return DiffusionEBMPrior(RandomBackbone([(2,), (3,)]), langevin=LangevinConfig(steps=2))

class Tap(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return self.scale * images.flatten(1)[:, :3], images.flatten(1)

def features():
    return Tap(2.0)

def other_features():
    return Tap(3.0)

def no_features():
    return 3

def nothing():
    return object()
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER)
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz",
        test=rng.integers(0, 256, (40, 2, 2), dtype=np.uint8),
        train=rng.integers(0, 256, (60, 2, 2), dtype=np.uint8),
    )
    return tmp_path


def run(*arguments, features="mine.py:features"):
    return main(["evaluate", "mine.py:load", "--images", "images.npz:test", "--features", features, *arguments])


def figures(path):
    """The rows of a record but for the time they took."""
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in json.loads(path.read_text())["rows"]
    ]


def test_the_record_holds_all_that_figures_depend_on(torch_fidelity, files, capsys):
    assert (
        run(
            "--reference",
            "images.npz:train",
            "--limit",
            "30",
            "--seed",
            "5",
            "--temperatures",
            "0.8",
            "--out",
            "out/a.json",
        )
        == 0
    )
    record = json.loads((files / "out" / "a.json").read_text())
    assert [row["name"] for row in record["rows"]] == [
        "real",
        "reconstruction",
        "Gaussian",
        "Gaussian, temperature 0.8",
        "prior",
    ]
    wanted = {"kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std"}
    assert all(set(row["metrics"]) == wanted and row["distance"] >= 0 for row in record["rows"])
    assert record["distance"] == "FD"
    assert (record["images"]["count"], record["reference"]["count"], record["seed"], record["batch_size"]) == (
        30,
        60,
        5,
        250,
    )
    assert (record["temperature"], record["temperatures_tried_for_gaussian"]) == (1.0, [0.8])
    assert record["features"]["name"] == record["features"]["reference"] == "mine:features"
    assert record["decoder"] == {"adapter": "RandomBackbone", "output": "the adapter's own"}
    assert record["prior"]["type"] == "DiffusionEBMPrior"
    assert "moving average" in record["prior"]["weights"]
    assert all(len(record[part]["sha256"]) == 64 for part in ("images", "reference", "features", "prior"))
    assert record["torch_fidelity"]["kid_subset_size"] == 30
    assert record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["FD", "closure", "KID", "+-", "precision", "recall", "IS", "+-", "seconds"]
    assert printed[-1] == "30 images a row, against 60 real ones; mine:features; seed 5"
    # Again, it is the same; with another seed, the samples are others.
    run("--reference", "images.npz:train", "--limit", "30", "--seed", "5", "--temperatures", "0.8", "--out", "b.json")
    run("--reference", "images.npz:train", "--limit", "30", "--seed", "6", "--temperatures", "0.8", "--out", "c.json")
    assert figures(files / "b.json") == figures(files / "out" / "a.json")
    assert figures(files / "c.json")[-1] != figures(files / "b.json")[-1]
    # Real images stay what they are, but for the closure, which goes by the other rows.
    assert figures(files / "c.json")[0]["metrics"] == figures(files / "b.json")[0]["metrics"]


def test_saved_statistics_give_the_same_figures(torch_fidelity, files, capsys):
    assert run("--reference", "images.npz:train", "--save-statistics", "kept/train.safetensors", "--out", "a.json") == 0
    assert run("--statistics", "kept/train.safetensors", "--out", "b.json") == 0
    assert figures(files / "a.json") == figures(files / "b.json")
    assert json.loads((files / "b.json").read_text())["reference"]["count"] == 60
    # The same network under the same name, with other weights.
    # Its source is longer, as Python takes compiled code of the same second and size for its own.
    (files / "mine.py").write_text(LOADER.replace("Tap(2.0)", "Tap(3.25)"))
    assert run("--statistics", "kept/train.safetensors") == 2
    assert "statistics of another extractor: mine:features" in capsys.readouterr().err


def test_moments_and_no_torch_fidelity_give_the_distance_alone(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.setitem(sys.modules, name, None)
    seen = np.load(files / "images.npz")["train"].reshape(60, 4)[:, :3] / 255 * 2
    np.savez(files / "moments.npz", mu=seen.mean(0), sigma=np.cov(seen.T))
    assert run("--statistics", "moments.npz", "--out", "a.json") == 2
    assert "install hvae-ebm-prior[evaluate]" in capsys.readouterr().err
    assert run("--statistics", "moments.npz", "--metrics", "--out", "a.json") == 0
    assert run("--reference", "images.npz:train", "--metrics", "--out", "b.json") == 0
    for moments, full in zip(figures(files / "a.json"), figures(files / "b.json"), strict=True):
        assert moments["distance"] == pytest.approx(full["distance"], rel=1e-4)
        assert moments["metrics"] == {}
    assert json.loads((files / "a.json").read_text())["reference"]["count"] is None


def test_closure_is_null_where_there_is_no_hole(files):
    assert run("--reference", "images.npz:train", "--metrics", "--temperatures") == 0
    rows = {row["name"]: row for row in json.loads((files / "evaluate.json").read_text())["rows"]}
    hole = rows["reconstruction"]["distance"] < rows["Gaussian"]["distance"]
    assert (rows["prior"]["closure"] is not None) == hole


@pytest.mark.parametrize(
    ("arguments", "features", "message"),
    [
        (["--reference", "images.npz:test"], "mine.py:features", "40 of 40 are among those of the reference"),
        (["--statistics", "test.safetensors"], "mine.py:features", "40 of 40 are among those of the reference"),
        (["--statistics", "nowhere.safetensors"], "mine.py:features", "nowhere.safetensors"),
        (
            ["--statistics", "test.safetensors", "--save-statistics", "b.safetensors"],
            "mine.py:features",
            "save-statistics: expected --reference",
        ),
        (
            ["--reference", "images.npz:train"],
            "mine.py:no_features",
            "expected mine.py:no_features to return a function of images",
        ),
        (["--reference", "images.npz:train"], "features", "features: expected package.module:function"),
        (
            ["--reference", "images.npz:train", "--weights", "w.pth"],
            "mine.py:features",
            "weights: they are Inception's",
        ),
        (
            ["--reference", "images.npz:train", "--weights", "w.pth"],
            "inception",
            "there is no file w.pth; it should be weights-inception-2015",
        ),
        (
            ["--reference", "images.npz:train", "--temperatures", "0"],
            "mine.py:features",
            "temperature: expected a positive number",
        ),
        (["--reference", "images.npz:train", "--limit", "5"], "mine.py:features", "expected at least 10, got 5"),
    ],
)
def test_refusals(torch_fidelity, files, capsys, arguments, features, message):
    from hvae_ebm_prior.cli.loading import load_function
    from hvae_ebm_prior.evaluation.features import custom_extractor
    from hvae_ebm_prior.evaluation.reference import make_reference, save_reference
    from hvae_ebm_prior.training.array_data import load_images

    extractor = custom_extractor("mine.py:features", load_function("mine.py:features")())
    save_reference(make_reference(load_images("images.npz:test"), extractor, torch.device("cpu")), "test.safetensors")
    assert run(*arguments, features=features) == 2
    assert message in capsys.readouterr().err


def test_a_prior_lacks_methods(files, capsys):
    arguments = ["--images", "images.npz:test", "--reference", "images.npz:train", "--features", "mine.py:features"]
    assert main(["evaluate", "mine.py:nothing", *arguments]) == 2
    assert "object lacks sample, encode, decode" in capsys.readouterr().err


def test_adapters_say_what_their_images_are():
    from hvae_ebm_prior.adapters import HVAEAdapter, LadderAdapter

    assert HVAEAdapter.output == LadderAdapter.output == "mean"
