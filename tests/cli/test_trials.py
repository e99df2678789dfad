"""The commands `compare` and `ablate`, on a backbone small enough to train in a test."""

import json

import numpy as np
import pytest
from backbones import RandomBackbone
from helpers import find_color

from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.density.latent_prior import LatentPrior
from hvae_ebm_prior.evaluation.candidates import ablations, candidates
from hvae_ebm_prior.presets import PRESETS


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
    only = ["--only", "ours", "joint-recovery", "ncp-sir", "gaussian-0.9"]
    assert call(files, "compare", *features, *only, "--iterations", "2", "--gradients", "12", "--seeds", "0", "1") == 0
    printed = capsys.readouterr().out
    assert printed.count("| prior |") == 2
    assert "12 gradients each" in printed
    assert (files / "out" / "compare.md").read_text().strip() == printed.strip()
    # A line for each of the three that are trained.
    counts = [len(find_color(files / "out" / "compare.png", f"C{i}")) for i in range(4)]
    assert min(counts[:3]) > 50 > counts[3]
    assert sorted(path.name for path in (files / "out").iterdir()) == ["compare.json", "compare.md", "compare.png"]
    runs = json.loads((files / "out" / "compare.json").read_text())["runs"]
    assert set(runs["ours | 2 iterations | seed 1"]["distances"]) == {"mine:pixels", "mine:first"}
    # A step of ours takes two gradients, one of joint recovery six, one of NCP a single one.
    assert runs["ours | 12 gradients | seed 0"]["iterations"] == 6
    assert runs["joint-recovery | 12 gradients | seed 0"]["iterations"] == 2
    assert runs["ncp-sir | 12 gradients | seed 0"]["iterations"] == 12
    for name in ("ours", "joint-recovery", "ncp-sir"):
        assert runs[f"{name} | 12 gradients | seed 0"]["gradients"] == 12


def test_runs_of_other_images_are_none_of_these(files, capsys):
    options = ["--features", f"{files}/mine.py:pixels", "--only", "ours", "--iterations", "1", "--seeds", "0"]
    assert call(files, "compare", *options) == 0
    np.save(files / "test.npy", np.load(files / "test.npy")[::-1])
    capsys.readouterr()
    assert call(files, "compare", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: 1 iterations are far too few")
    assert "compare.json: its runs are of other held-out images; delete it to begin anew" in lines[1]


@pytest.mark.parametrize(
    ("budget", "warned"),
    [
        (["--iterations", "5"], ["5 iterations are far too few"]),
        (["--iterations", "101", "--gradients", "8"], ["8 gradients are far too few"]),
        (["--iterations", "101"], []),
        (["--seconds", "0.01"], ["0.01 seconds are far too few"]),
    ],
)
def test_budgets_that_rank_chance_are_warned_of(budget, warned, files, capsys):
    features = ["--features", f"{files}/mine.py:pixels", "--only", "ncp-sir", "gaussian-0.9", "--seeds", "0"]
    assert call(files, "compare", *features, "--json", *budget) == 0
    shown = capsys.readouterr()
    warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(warned)
    assert all(text in line for text, line in zip(warned, warnings, strict=True))
    runs = json.loads((files / "out" / "compare.json").read_text())["runs"]
    assert json.loads(shown.out)["runs"] == runs


def test_ablate_names_what_changed(files, capsys):
    only = ["--only", "ours", "K = 3", "z-space"]
    assert (
        call(files, "ablate", "--features", f"{files}/mine.py:pixels", *only, "--iterations", "1", "--seeds", "0") == 0
    )
    assert "| K = 3 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "1", "--only", "theirs"], "only: expected some of ours, joint-recovery, joint-ebm"),
        ([], "at least one of --seconds, --gradients, --iterations"),
        (["--seconds", "-1"], "one positive number"),
    ],
)
def test_what_cannot_be_compared_is_refused(files, capsys, arguments, message):
    assert call(files, "compare", "--features", f"{files}/mine.py:pixels", *arguments) == 2
    assert message in capsys.readouterr().err


def test_every_candidate_is_a_prior_over_any_backbone():
    trials = (candidates(), ablations(), ablations(PRESETS["paper-cifar10"]))
    for candidate in (each for some in trials for each in some.values()):
        prior = candidate.make(RandomBackbone([(2,), (3,)]))
        assert isinstance(prior, LatentPrior)
        assert callable(prior.fit)


@pytest.mark.parametrize("preset", ["joint-recovery", "paper-cifar10"])
def test_ablations_change_one_thing(preset):
    """The one that they are named after."""
    backbone = RandomBackbone([(2,)])
    trials = ablations(PRESETS[preset])
    made = {name: (candidate.make(backbone), candidate.training) for name, candidate in trials.items()}
    ours, training = made.pop("ours")

    def values(prior, training):
        settings = prior.settings()
        langevin = settings.pop("langevin")
        settings.pop("drawing", None)  # which a prior of another space has not
        return {**settings, **vars(langevin), **vars(training), "class": type(prior).__name__}

    before, changes = values(ours, training), {}
    for name, (prior, training) in made.items():
        after = values(prior, training)
        changes[name] = [(key, after[key]) for key in before if after[key] != before[key]]
    # The published code has no moving average.
    assert changes.pop("no moving average") == [("ema_decay", 0.0)] * (training.ema_decay > 0)
    for name, found in changes.items():
        assert len(found) == 1, (name, found)
    changed = {name: found[0] for name, found in changes.items()}
    assert [changed[f"K = {k}"] for k in (3, 8, 15, 30, 100)] == [("steps", k) for k in (3, 8, 15, 30, 100)]
    assert [changed[f"T = {t}"][1].steps for t in (1, 2, 4, 6)] == [1, 2, 4, 6]
    integrators = [changed[name] for name in ("euler", "strang") if name in changed]
    assert integrators == ([("integrator", "euler"), ("integrator", "strang")] if preset == "joint-recovery" else [])
    assert [changed[f"batch of {n}"] for n in (32, 128)] == [("batch_size", 32), ("batch_size", 128)]
    assert changed["z-space"] == ("class", "LatentDiffusionPrior")
