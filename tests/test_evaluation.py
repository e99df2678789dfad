import math

import numpy as np
import pytest
import scipy.linalg
import torch
from backbones import IdentityBackbone, Quadratic

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, LangevinConfig
from hvae_ebm_prior.evaluation import closure, evaluate, frechet_distance


def seed(value):
    return torch.Generator().manual_seed(value)


@pytest.mark.parametrize("n", [4, 200])
def test_frechet_distance_is_the_textbook_formula(n):
    """With scipy's matrix square root; n = 4 makes the covariances singular."""
    a, b = torch.randn(n, 6, generator=seed(0)).double(), (1 + torch.randn(300, 6, generator=seed(1)) @ torch.randn(6, 6, generator=seed(2))).double()
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    a, b = torch.randn(200_000, 2, generator=seed(0)), 3 + 2 * torch.randn(200_000, 2, generator=seed(1))
    # |3 - 0|^2 + (2 - 1)^2 in each of two dimensions.
    assert frechet_distance(a, b) == pytest.approx(20, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_closure():
    assert closure(37.73, 37.73, 0.68) == 0
    assert closure(0.68, 37.73, 0.68) == 1
    assert closure(8.93, 37.73, 0.68) == pytest.approx(0.777, abs=5e-4)
    with pytest.raises(ValueError, match="no prior hole"):
        closure(1.0, 2.0, 3.0)


def test_bad_features_are_refused():
    for bad in (torch.zeros(3), torch.zeros(1, 2), torch.zeros(4, 3), torch.full((4, 2), math.nan)):
        with pytest.raises(ValueError, match="two finite matrices"):
            frechet_distance(bad, torch.zeros(5, 2))


def test_evaluate_rows_have_the_distances_of_known_gaussians():
    """z = u in one dimension, features = z; data N(1, 0.8^2); a prior exactly right is N(1, 0.8^2) too."""
    # exp(w z + v z^2) N(z; 0, 1) has precision 1 - 2v and mean w / (1 - 2v).
    v = (1 - 1 / 0.64) / 2
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,)),
        schedule=DiffusionSchedule.marginal(),
        energy=[Quadratic(1, w=1 / 0.64, v=v)],
        langevin=LangevinConfig(steps=60, step_size=0.1),
    )
    images = (1 + 0.8 * torch.randn(6000, 1, 1, 1, generator=seed(0)) + 10) / 20
    rows = evaluate(prior, images[:3000], images[3000:], lambda x: 20 * x.flatten(1) - 10, temperatures=(0.9, 0.8, 0.2), generator=seed(1))
    assert [row.name for row in rows] == ["real", "reconstruction", "Gaussian", "Gaussian, temperature 0.8", "ours"]
    real, reconstruction, gaussian, tempered, ours = rows
    assert reconstruction.distance == pytest.approx(real.distance, abs=1e-3)
    assert gaussian.distance == pytest.approx(1 + 0.2**2, rel=0.1)
    assert gaussian.closure == 0
    assert tempered.distance == pytest.approx(1, rel=0.1)
    assert ours.distance < 0.01
    assert ours.closure > 0.99
    assert reconstruction.closure == 1
