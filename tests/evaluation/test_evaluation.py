import math

import pytest
import torch
from backbones import IdentityBackbone, Quadratic
from helpers import seed

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, LangevinConfig
from hvae_ebm_prior.evaluation.protocol import closure, evaluate
from hvae_ebm_prior.evaluation.reference import Reference, make_reference


def test_closure():
    assert closure(37.73, 37.73, 0.68) == 0
    assert closure(0.68, 37.73, 0.68) == 1
    assert closure(8.93, 37.73, 0.68) == pytest.approx(0.777, abs=5e-4)
    with pytest.raises(ValueError, match="no prior hole"):
        closure(1.0, 2.0, 3.0)


@pytest.mark.usefixtures("counters")
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
    rows = evaluate(
        prior,
        images[:3000],
        images[3000:],
        lambda x: 20 * x.flatten(1) - 10,
        temperatures=(0.9, 0.8, 0.2),
        generator=seed(1),
    )
    assert [row.name for row in rows] == ["real", "reconstruction", "Gaussian", "Gaussian, temperature 0.8", "ours"]
    real, reconstruction, gaussian, tempered, ours = rows
    assert reconstruction.distance == pytest.approx(real.distance, abs=1e-3)
    assert gaussian.distance == pytest.approx(1 + 0.2**2, rel=0.1)
    assert gaussian.closure == 0
    assert tempered.distance == pytest.approx(1, rel=0.1)
    assert ours.distance < 0.01
    assert ours.closure > 0.99
    assert reconstruction.closure == 1


class Posterior:
    """A prior that is no DiffusionEBMPrior: images are noise, as of `IdentityBackbone`, and samples are what it was
    made with.
    """

    dim, device, dtype = 2, torch.device("cpu"), torch.float32

    def __init__(self, mean=0.0, shift=0.0):
        self.mean, self.shift, self.asked = mean, shift, []

    def sample(self, n, *, generator=None):
        self.asked.append(n)
        return self.decode(self.mean + torch.randn(n, 2, generator=generator))

    def encode(self, images, *, generator=None):
        return (20 * images - 10).flatten(1) + self.shift

    def decode(self, u):
        return ((u + 10) / 20).clamp(0, 1)[:, None, None]


def flat(images):
    return 20 * images.flatten(1) - 10


def data(n, value, mean=2.0):
    return ((mean + torch.randn(n, 1, 1, 2, generator=seed(value)) + 10) / 20).clamp(0, 1)


@pytest.mark.usefixtures("counters")
def test_any_prior_with_the_same_methods_is_evaluated(torch_fidelity):
    rows = evaluate(
        Posterior(mean=2.0),
        data(300, 0),
        data(400, 1),
        flat,
        metrics=None,
        name="prior",
        temperatures=(),
        generator=seed(2),
    )
    assert [row.name for row in rows] == ["real", "reconstruction", "Gaussian", "prior"]
    # |2 - 0|^2 in both dimensions.
    assert rows[2].distance == pytest.approx(8, rel=0.1)
    assert rows[3].closure > 0.98
    assert set(rows[3].metrics) == {"kid", "kid_std", "precision", "recall"}
    assert rows[2].metrics["kid"] > 10 * abs(rows[3].metrics["kid"])
    assert rows[3].metrics["precision"] > 0.9 > rows[2].metrics["precision"]
    # Distances do not depend on what else is measured, nor on how many images are seen at a time where encoding draws
    # nothing.
    alone = evaluate(
        Posterior(mean=2.0), data(300, 0), data(400, 1), flat, temperatures=(), chunk_size=7, generator=seed(2)
    )
    assert [row.distance for row in alone] == pytest.approx([row.distance for row in rows], rel=1e-6)
    assert not alone[0].metrics


def test_logits_give_the_inception_score(torch_fidelity):
    both = lambda images: (flat(images), flat(images))  # noqa: E731
    rows = evaluate(
        Posterior(), data(100, 0), data(100, 1), both, metrics=["inception-score"], temperatures=(), generator=seed(2)
    )
    assert set(rows[0].metrics) == {"inception_score", "inception_score_std"}
    moments = Reference(make_reference(data(100, 1), flat, torch.device("cpu")).moments)
    assert set(evaluate(Posterior(), data(100, 0), moments, both, metrics=None, temperatures=())[0].metrics) == set(
        rows[0].metrics
    )
    for metric, features, need in (("inception-score", flat, "class logits"), ("kid", both, "not moments alone")):
        with pytest.raises(ValueError, match=f"{metric} needs .*{need}"):
            evaluate(Posterior(), data(100, 0), moments, features, metrics=[metric])


def test_where_there_is_no_hole_there_is_no_closure():
    rows = evaluate(Posterior(shift=3.0), data(100, 0, mean=0.0), data(100, 1, mean=0.0), flat, generator=seed(2))
    assert all(math.isnan(row.closure) for row in rows)
    assert rows[1].distance > rows[2].distance


def test_large_numbers_of_samples_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr("hvae_ebm_prior.evaluation.protocol.SAMPLES", 40)
    prior = Posterior()
    evaluate(prior, data(100, 0), data(100, 1), flat)
    assert prior.asked == [40, 40, 20]


def test_what_cannot_be_measured_is_refused_before_anything_is_computed(torch_fidelity):
    def never(images):
        raise AssertionError

    with pytest.raises(ValueError, match="expected some of kid, precision-recall, inception-score, got fid"):
        evaluate(Posterior(), data(100, 0), data(100, 1), never, metrics=["fid"])
    with pytest.raises(ValueError, match="expected at least 10, got 9"):
        evaluate(Posterior(), data(9, 0), data(100, 1), never, metrics=["kid"])
