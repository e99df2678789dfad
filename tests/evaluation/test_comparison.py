"""Comparisons: what a run costs and measures, what stands in the file, and the table."""

import json
import math
import statistics
import time

import pytest
import torch
from backbones import IdentityBackbone, Quadratic

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, LangevinConfig, TrainingConfig
from hvae_ebm_prior.evaluation.comparison import (
    Budget,
    Candidate,
    FrechetMetric,
    affordable,
    clock,
    compare,
    comparison_table,
    run,
)
from hvae_ebm_prior.evaluation.protocol import frechet_distance

DIM = 2
TRAINING = TrainingConfig(iterations=1, batch_size=64, learning_rate=0.1, warmup=0, activity_images=0, ema_decay=0.5)


def to_features(images):
    return 20 * images.flatten(1) - 10


def make_images(n: int, seed: int) -> torch.Tensor:
    """Latents N(1, 0.8^2), as `IdentityBackbone` shows them."""
    return (1 + 0.8 * torch.randn(n, 1, 1, DIM, generator=torch.Generator().manual_seed(seed)) + 10) / 20


def make_prior(backbone) -> DiffusionEBMPrior:
    return DiffusionEBMPrior(
        backbone,
        schedule=DiffusionSchedule.marginal(),
        energy=[Quadratic(DIM)],
        langevin=LangevinConfig(steps=3, start="gaussian", step_size=0.5),
    )


@pytest.fixture(scope="module")
def metric():
    return FrechetMetric(
        make_images(500, 1), make_images(1000, 2), {"latents": to_features, "first": lambda x: to_features(x)[:, :1]}
    )


@pytest.mark.parametrize("wrong", [{}, {"seconds": 1.0, "gradients": 2}, {"iterations": 0}])
def test_a_budget_is_one_positive_number(wrong):
    with pytest.raises(ValueError, match="one positive number"):
        Budget(**wrong)


def test_a_run_takes_the_gradients_it_was_given(metric):
    backbone, candidate, images = IdentityBackbone((DIM,)), Candidate(make_prior, TRAINING), make_images(640, 0)
    iterations = affordable(backbone, candidate, images, Budget(gradients=83))
    result = run(backbone, candidate, images, metric, iterations, seed=0)
    # Three steps of a chain and one to learn from: 20 iterations take 80 gradients.
    assert (result.iterations, result.gradients) == (20, 80)
    seconds = [point[0] for point in result.curve]
    assert len(seconds) == 4
    assert seconds == sorted(seconds)
    assert result.curve[-1] == (result.seconds, result.distances["latents"])


def test_waiting_for_others_costs_no_time_on_a_cpu():
    cpu = torch.device("cpu")
    begin = clock(cpu)
    time.sleep(0.3)
    slept = clock(cpu) - begin
    assert slept < 0.1
    working = time.monotonic()
    while clock(cpu) - begin < slept + 0.05:
        torch.ones(300, 300) @ torch.ones(300, 300)
        assert time.monotonic() - working < 30


def test_seconds_buy_iterations_in_proportion():
    backbone, candidate, images = IdentityBackbone((DIM,)), Candidate(make_prior, TRAINING), make_images(640, 0)
    few, many = (affordable(backbone, candidate, images, Budget(seconds=seconds)) for seconds in (10.0, 1000.0))
    # A wide margin: the machine may be busy with other things at one time and not at another.
    assert 20 < many / few < 500


def test_a_longer_run_closes_the_hole_that_distances_show(metric):
    """The Gaussian prior is N(0, 1): a distance of 1 + 0.2^2 per dimension. The quadratic energy can learn N(1, 0.8^2)
    exactly.
    """
    backbone, candidate = IdentityBackbone((DIM,)), Candidate(make_prior, TRAINING)
    short, long = (run(backbone, candidate, make_images(640, 0), metric, n, seed=0) for n in (1, 150))
    assert short.distances["latents"] == pytest.approx(2 * 1.04, rel=0.15)
    assert long.distances["latents"] < 0.3
    assert long.distances["first"] < long.distances["latents"]


def test_interrupted_comparisons_go_on(tmp_path, metric):
    made = []

    def make(backbone):
        made.append(1)
        return make_prior(backbone)

    class AtOnce(DiffusionEBMPrior):
        def fit(self, data, *, generator):
            return []

    path, lines = tmp_path / "compare.json", []
    candidates = {"ours": Candidate(make, TRAINING), "at once": Candidate(AtOnce)}
    arguments = (IdentityBackbone((DIM,)), candidates, make_images(640, 0), metric)
    budget = Budget(iterations=5)
    runs = compare(*arguments, budgets=[budget], seeds=[0], path=path, report=lines.append)
    assert json.loads(path.read_text())["runs"] == json.loads(json.dumps(runs))
    assert set(runs) == {
        "real images | none | seed 0",
        "reconstructions | none | seed 0",
        "Gaussian prior | none | seed 0",
        "ours | 5 iterations | seed 0",
        "at once | none | seed 0",
    }
    assert len(lines) == 5
    assert len(made) == 1
    compare(*arguments, budgets=[budget], seeds=[0], path=path, report=lines.append)
    assert len(made) == 1
    # 20 gradients are five iterations: the run that stands there is taken.
    same = compare(*arguments, budgets=[budget, Budget(gradients=20)], seeds=[0], path=path, report=lines.append)
    assert same["ours | 20 gradients | seed 0"] == same["ours | 5 iterations | seed 0"]
    more = compare(*arguments, budgets=[budget], seeds=[0, 1], path=path, report=lines.append)
    assert len(more) == 11
    # The same seed again is the same run.
    again = compare(*arguments, budgets=[budget], seeds=[0], path=tmp_path / "again.json", report=lines.append)
    assert again["ours | 5 iterations | seed 0"]["distances"] == runs["ours | 5 iterations | seed 0"]["distances"]


def test_the_table_has_means_and_standard_errors(tmp_path, metric):
    candidates = {"ours": Candidate(make_prior, TRAINING)}
    results = compare(
        IdentityBackbone((DIM,)),
        candidates,
        make_images(640, 0),
        metric,
        budgets=[Budget(iterations=5)],
        seeds=[0, 1, 2],
        path=tmp_path / "compare.json",
        report=lambda line: None,
    )
    lines = comparison_table(results, candidates, "5 iterations", [0, 1, 2]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "prior",
        "---",
        "real images",
        "reconstructions",
        "Gaussian prior",
        "ours",
    ]
    assert len({line.count("|") for line in lines}) == 1
    values = [results[f"ours | 5 iterations | seed {seed}"]["distances"]["latents"] for seed in range(3)]
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / math.sqrt(3):.2f}" in lines[-1]
    # Closure of every seed is between that seed's own ends.
    gaussian, recon = (
        [results[f"{end} | none | seed {seed}"]["distances"]["latents"] for seed in range(3)]
        for end in ("Gaussian prior", "reconstructions")
    )
    closed = [(g - v) / (g - r) for g, v, r in zip(gaussian, values, recon, strict=True)]
    assert f"{statistics.mean(closed):.3f}" in lines[-1]


def test_training_that_gives_up_counts_by_its_last_good_state(metric):
    hopeless = TrainingConfig(
        iterations=1, batch_size=64, learning_rate=1e6, warmup=0, activity_images=0, restarts=0, clip_norm=math.inf
    )
    result = run(IdentityBackbone((DIM,)), Candidate(make_prior, hopeless), make_images(640, 0), metric, 50, seed=0)
    assert result.diverged
    assert result.iterations < 50
    assert math.isfinite(result.distances["latents"])


def test_the_metric_is_the_frechet_distance(metric):
    images = make_images(300, 5)
    expected = frechet_distance(to_features(images), to_features(make_images(1000, 2)))
    assert metric.distances(images)["latents"] == pytest.approx(expected, rel=1e-9)


def test_nothing_to_compare_is_an_error(tmp_path, metric):
    with pytest.raises(ValueError, match="budgets: expected at least one"):
        compare(
            IdentityBackbone((DIM,)),
            {"ours": Candidate(make_prior, TRAINING)},
            make_images(9, 0),
            metric,
            budgets=[],
            path=tmp_path / "none.json",
        )
