"""Metrics against closed forms, and against a few lines of arithmetic."""

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import seed

from hvae_ebm_prior.evaluation.metrics import (
    fidelity,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)


@pytest.mark.parametrize("n", [4, 200])
def test_frechet_distance_is_the_textbook_formula(n):
    """With scipy's matrix square root; n = 4 makes the covariances singular."""
    a, b = (
        torch.randn(n, 6, generator=seed(0)).double(),
        (1 + torch.randn(300, 6, generator=seed(1)) @ torch.randn(6, 6, generator=seed(2))).double(),
    )
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    a, b = torch.randn(200_000, 2, generator=seed(0)), 3 + 2 * torch.randn(200_000, 2, generator=seed(1))
    # |3 - 0|^2 + (2 - 1)^2 in each of two dimensions.
    assert frechet_distance(a, b) == pytest.approx(20, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_bad_features_are_refused():
    for bad in (torch.zeros(3), torch.zeros(1, 2), torch.zeros(4, 3), torch.full((4, 2), math.nan)):
        with pytest.raises(ValueError, match="features: expected"):
            frechet_distance(bad, torch.zeros(5, 2))


def test_frechet_distance_is_torch_fidelitys(torch_fidelity):
    metric = fidelity("metric_fid")
    a, b = (
        torch.randn(300, 8, generator=seed(0)),
        1 + torch.randn(200, 8, generator=seed(1)) @ torch.randn(8, 8, generator=seed(2)),
    )
    theirs = metric.fid_statistics_to_metric(
        metric.fid_features_to_statistics(a), metric.fid_features_to_statistics(b), False
    )
    assert frechet_distance(a, b) == pytest.approx(theirs[torch_fidelity.KEY_METRIC_FID], rel=1e-5)
    assert frechet_distance(moments(a), b) == frechet_distance(a, b)


def test_kernel_distance_is_the_unbiased_mmd(torch_fidelity):
    """With as many features as a subset holds, all subsets are alike: the statistic of Gretton et al., term by term."""
    x, y = torch.randn(20, 3, generator=seed(0)), 0.5 + torch.randn(20, 3, generator=seed(1))
    kernel = lambda a, b: sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 3 + 1  # noqa: E731
    within = sum(kernel(z[i], z[j]) ** 3 for z in (x, y) for i in range(20) for j in range(20) if i != j) / (20 * 19)
    between = sum(kernel(x[i], y[j]) ** 3 for i in range(20) for j in range(20)) / 20**2
    found = kernel_distance(x, y)
    assert found["kid"] == pytest.approx(within - 2 * between, rel=1e-4)
    assert found["kid_std"] == pytest.approx(0, abs=1e-5)


def test_kernel_distance_of_equal_distributions_is_zero_on_average(torch_fidelity):
    x, y = torch.randn(200, 4, generator=seed(0)), torch.randn(300, 4, generator=seed(1))
    found = kernel_distance(x, y)
    assert abs(found["kid"]) < 0.1
    assert found == kernel_distance(x, y)
    assert kernel_distance(x + 1, y)["kid"] > 1


def test_precision_and_recall_of_points_on_a_line(torch_fidelity):
    """Real points 0..9: balls of radius 3 at the ends, 2 elsewhere, so they cover [-3, 12] but nothing beyond."""
    real = torch.arange(10.0)[:, None]
    samples = torch.tensor([[4.2], [4.4], [4.6], [4.8], [5.0], [11.0], [13.0], [20.0]])
    found = precision_recall(samples, real)
    assert found["precision"] == pytest.approx(6 / 8)
    # Radii of the samples (distance to the 3rd nearest): .6, .4, .4, .6, .8, 6.2, 8.2, 9: 4 and 5 are near the first
    # five, 5..9 are within 6.2 of 11.
    assert found["recall"] == pytest.approx(6 / 10)


def test_inception_score_of_known_predictions(torch_fidelity):
    """Sure and evenly spread over 4 classes: 4. All the same: 1. Each split holds all classes only on average, so many
    images.
    """
    classes = torch.arange(8000) % 4
    sure = inception_score(50.0 * torch.nn.functional.one_hot(classes, 4))
    assert sure["inception_score"] == pytest.approx(4, rel=1e-2)
    assert inception_score(torch.ones(100, 4))["inception_score"] == pytest.approx(1)


def test_without_torch_fidelity_the_error_names_both_commands(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_kid", None)
    with pytest.raises(ImportError, match=r"pip install --no-deps torch-fidelity.*install hvae-ebm-prior\[evaluate\]"):
        kernel_distance(torch.randn(20, 2), torch.randn(20, 2))
