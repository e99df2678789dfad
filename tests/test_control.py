import math

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone
from helpers import seed
from torch import nn

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    DiffusionSchedule,
    EnergyConfig,
    ExecutionConfig,
    LabelSet,
    LangevinConfig,
)
from hvae_ebm_prior.control import edit, interpolate, resample, sample_in_turn


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "context"])
def prior(request):
    torch.manual_seed(0)
    sets = {"top": LabelSet(2, layers=(0,)), "low": LabelSet(2, layers=(1, 2))}
    settings = {
        "energy": EnergyConfig(context=request.param, vector_width=8),
        "langevin": LangevinConfig(steps=3),
        "coupling": Coupling(sets),
    }
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (3,), (4,)]), **settings)
    for name, parameter in prior.named_parameters():
        if "readout" in name:
            nn.init.normal_(parameter, std=0.3)
    return prior


def test_resampling_keeps_held_layers_and_draws_the_others(prior):
    u = prior.sample_noise(4, generator=seed(0))
    new = resample(prior, u, (0, 2), labels={"low": 1}, generator=seed(1))
    for i, kept in enumerate((True, False, True)):
        assert torch.equal(prior.split(new)[i], prior.split(u)[i]) == kept
    assert torch.equal(resample(prior, u, (0, 1, 2), generator=seed(1)), u)
    assert torch.equal(resample(prior, u, (), generator=seed(0)), prior.sample_noise(4, generator=seed(0)))


def test_an_edit_encodes_resamples_and_decodes(prior):
    images = torch.rand(3, 1, 2, 2, generator=seed(0))
    g = seed(1)
    u = prior.encode(images, generator=g)
    expected = prior.decode(resample(prior, u, (0,), labels={"low": 0}, generator=g))
    torch.testing.assert_close(edit(prior, images, (0,), labels={"low": 0}, generator=seed(1)), expected)
    kept = edit(prior, images, (0, 1, 2), generator=seed(1))
    torch.testing.assert_close(kept, prior.decode(u))


def test_sampling_in_turn_holds_what_earlier_stages_drew(prior):
    first, second = sample_in_turn(prior, 5, [({"top": 1}, (0,)), ({"low": 0}, (1, 2))], generator=seed(0))
    assert torch.equal(first, prior.sample_noise(5, labels={"top": 1}, generator=seed(0)))
    assert torch.equal(prior.split(first)[0], prior.split(second)[0])
    assert not torch.allclose(prior.split(first)[1], prior.split(second)[1])


def test_interpolation_stays_on_the_great_circle():
    prior = DiffusionEBMPrior(IdentityBackbone((2,), (1,)))
    a, b = torch.tensor([[3.0, 0, 0]]), torch.tensor([[0.0, 3, 0]])
    path = interpolate(prior, a, b, 4)
    angles = torch.tensor([0, 30, 60, 90]) * math.pi / 180
    torch.testing.assert_close(
        path[:, 0], 3 * torch.stack((angles.cos(), angles.sin(), 0 * angles), 1), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(interpolate(prior, a, a, 3), a.expand(3, 1, 3))
    held = interpolate(prior, torch.tensor([[1.0, 2, 5]]), torch.tensor([[2.0, 1, -5]]), 5, layers=(0,))
    assert (held[:, :, 2] == 5).all()
    torch.testing.assert_close(held[-1, 0, :2], torch.tensor([2.0, 1]))
    noise = torch.randn(2, 50, generator=seed(0))
    wide = DiffusionEBMPrior(IdentityBackbone((50,)))
    middle = interpolate(wide, noise[:1], noise[1:], 3)[1]
    assert middle.norm() == pytest.approx(noise.norm(dim=1).mean().item(), rel=0.1)


def test_posterior_samples_of_a_conjugate_observation():
    """The prior N(0, 1) tilted by exp(w z) is N(w, 1); given y = z + s noise it is N((y / s^2 + w) / (1 + 1 / s^2), 1 /
    (1 + 1 / s^2)).
    """
    w, y, s = 0.6, 2.0, 0.8
    settings = {"schedule": DiffusionSchedule.marginal(), "langevin": LangevinConfig(steps=60, step_size=0.05)}
    prior = DiffusionEBMPrior(
        IdentityBackbone((6,)), energy=[Quadratic(6, w)], execution=ExecutionConfig(backend="naive"), **settings
    )

    def log_likelihood(images):
        z = 20 * images.flatten(1) - 10
        return -((z[:, :3] - y) ** 2).sum(1) / (2 * s**2)  # the other half is hidden

    images = prior.posterior_sample(log_likelihood, 1500, generator=seed(0))
    z = 20 * images.flatten(1) - 10
    precision = 1 + 1 / s**2
    assert z[:, :3].mean().item() == pytest.approx((y / s**2 + w) / precision, abs=0.04)
    assert z[:, :3].var().item() == pytest.approx(1 / precision, rel=0.1)
    assert z[:, 3:].mean().item() == pytest.approx(w, abs=0.06)
    assert z[:, 3:].var().item() == pytest.approx(1, rel=0.1)


def test_posterior_samples_join_at_every_level():
    """With T levels the state of every level is drawn to the observation."""
    prior = DiffusionEBMPrior(
        IdentityBackbone((4,)), schedule=DiffusionSchedule.cosine(3), langevin=LangevinConfig(steps=20)
    )
    calls = []

    def log_likelihood(images):
        calls.append(images.shape)
        return -((20 * images.flatten(1) - 10 - 1.5) ** 2).sum(1)

    free = prior.sample(200, generator=seed(0))
    drawn = prior.posterior_sample(log_likelihood, 200, langevin=LangevinConfig(steps=7), generator=seed(0))
    assert len(calls) == 3 * 7
    assert calls[0] == (200, 1, 1, 4)
    assert ((20 * drawn - 10) - 1.5).square().mean() < 0.5 * ((20 * free - 10) - 1.5).square().mean()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: resample(p, torch.zeros(2, 9), (3,)), ValueError, r"0 \(top\) to 2"),
        (lambda p: resample(p, torch.zeros(2, 8), (0,)), ValueError, r"\(N, 9\)"),
        (lambda p: sample_in_turn(p, 2, []), ValueError, "at least one pair"),
        (lambda p: sample_in_turn(p, 2, [(None, (0,)), (None, (0,))]), ValueError, r"\[0\] are held"),
        (lambda p: interpolate(p, torch.zeros(1, 9), torch.zeros(2, 9), 3), ValueError, "one shape"),
        (lambda p: interpolate(p, torch.zeros(1, 9), torch.zeros(1, 9), 1), ValueError, "2 steps"),
        (lambda p: p.posterior_sample("y", 2), TypeError, "function of images"),
        (lambda p: p.posterior_sample(lambda x: x.sum(), 2), ValueError, "sum over pixels"),
        (lambda p: p.posterior_sample(lambda x: torch.zeros(len(x)), 2), TypeError, "differentiable"),
    ],
)
def test_errors_say_what_is_wrong(prior, call, error, message):
    with pytest.raises(error, match=message):
        call(prior)
