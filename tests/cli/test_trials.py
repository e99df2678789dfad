"""The commands `compare` and `ablate`, on a backbone small enough to train in a test."""

import json

import numpy as np
import pytest
import torch
from backbones import RandomBackbone

from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.density.latent_prior import LatentPrior
from hvae_ebm_prior.evaluation.candidates import ablations, candidates
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.prior import DiffusionEBMPrior


@pytest.fixture
def files(tmp_path):
    """Images, and a module with a backbone and features."""
    g = np.random.default_rng(0)
    for name, count in (("train", 80), ("test", 24)):
        np.save(tmp_path / f"{name}.npy", g.random((count, 1, 2, 2), dtype=np.float32))
    (tmp_path / "mine.py").write_text(
        "from backbones import RandomBackbone\n"
        "def backbone():\n    return RandomBackbone([(2,), (3,)])\n"
        "def pixels():\n    return lambda images: images.flatten(1)\n"
        "def first():\n    return lambda images: images.flatten(1)[:, :2]\n"
    )
    return tmp_path


def call(files, command, *arguments):
    given = [
        command,
        f"{files}/mine.py:backbone",
        "--train",
        f"{files}/train.npy",
        "--images",
        f"{files}/test.npy",
        "--out",
        f"{files}/out/{command}",
    ]
    return main([*given, *arguments])


def test_compare_writes_tables_results_and_a_plot(files, capsys):
    features = ["--features", f"{files}/mine.py:pixels", f"{files}/mine.py:first"]
    only = ["--only", "ours", "joint-ebm", "ncp-sir", "gaussian-0.9"]
    assert call(files, "compare", *features, *only, "--iterations", "2", "--gradients", "12", "--seeds", "0", "1") == 0
    printed = capsys.readouterr().out
    assert printed.count("| prior |") == 2
    assert "12 gradients each" in printed
    assert (files / "out" / "compare.md").read_text().strip() == printed.strip()
    assert (files / "out" / "compare.png").stat().st_size > 5_000
    assert sorted(path.name for path in (files / "out").iterdir()) == ["compare.json", "compare.md", "compare.png"]
    runs = json.loads((files / "out" / "compare.json").read_text())["runs"]
    assert set(runs["ours | 2 iterations | seed 1"]["distances"]) == {"mine:pixels", "mine:first"}
    # Two steps of ours take 12 gradients; NCP takes one gradient a step.
    steps = PRESETS["fast"].langevin.steps + 1
    assert runs["ours | 12 gradients | seed 0"]["iterations"] == 12 // steps
    assert runs["ncp-sir | 12 gradients | seed 0"]["iterations"] == 12


def test_ablate_names_what_changed(files, capsys):
    only = ["--only", "ours", "K = 3", "z-space"]
    assert (
        call(files, "ablate", "--features", f"{files}/mine.py:pixels", *only, "--iterations", "1", "--seeds", "0") == 0
    )
    assert "| K = 3 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "1", "--only", "theirs"], "only: expected some of ours, ours-layerwise, joint-ebm"),
        ([], "at least one of --seconds, --gradients, --iterations"),
        (["--seconds", "-1"], "one positive number"),
    ],
)
def test_what_cannot_be_compared_is_refused(files, capsys, arguments, message):
    assert call(files, "compare", "--features", f"{files}/mine.py:pixels", *arguments) == 2
    assert message in capsys.readouterr().err


def test_every_candidate_is_a_prior_over_any_backbone():
    for candidate in (*candidates().values(), *ablations().values()):
        prior = candidate.make(RandomBackbone([(2,), (3,)]))
        assert isinstance(prior, LatentPrior)
        assert callable(prior.fit)


def test_ablations_change_one_thing():
    made = {name: candidate.make(RandomBackbone([(2,)])) for name, candidate in ablations().items()}
    ours = made.pop("ours")

    def settings(prior: DiffusionEBMPrior) -> tuple:
        return prior.schedule, prior.langevin, type(prior)

    for name, prior in made.items():
        changed = sum(a != b for a, b in zip(settings(prior), settings(ours), strict=True))
        training = ablations()[name].training != ablations()["ours"].training
        assert changed + training == 1, name
    assert {torch.is_tensor(prior.energies[0].readout.weight) for prior in made.values()} == {True}
