"""Flow matching against closed forms: of N(0, I), of a correlated Gaussian, and of the velocity."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from azula.noise import RectifiedSchedule
from backbones import IdentityBackbone, RandomBackbone, images_of
from helpers import IMAGES, check_moments, seed
from torch import nn

from hvae_ebm_prior.baselines import FlowMatchingPrior
from hvae_ebm_prior.baselines.flow_matching import FLOW_TRAINING, flow_matching_loss
from hvae_ebm_prior.baselines.latent_unet import LatentUNet
from hvae_ebm_prior.training.record import StopTraining

# A vector, a map read as one, maps that are folded, with odd sides, and small.
SHAPES = [(3,), (2, 2, 2), (2, 5, 7), (1, 12, 10), (3, 12, 10), (2, 1, 30)]


def test_untrained_it_is_the_gaussian_prior():
    prior = FlowMatchingPrior(RandomBackbone(SHAPES), width=16, vector_width=16)
    check_moments(prior.sample_noise(100, generator=seed(0)), 0, 1)


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:2], SHAPES[3:5]], ids=["all", "vectors", "maps"])
def test_every_velocity_sees_all_layers(shapes):
    torch.manual_seed(0)
    network = LatentUNet(tuple(shapes), 16, 16, 2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    x = torch.randn(2, sum(sizes), generator=seed(0), requires_grad=True)
    velocity = network(x, torch.zeros(2))
    assert velocity.shape == x.shape
    for part in velocity.split(sizes, dim=1):
        gradient = torch.autograd.grad(part[0].square().sum(), x, retain_graph=True)[0]
        assert all(float(each[0].abs().sum()) > 0 for each in gradient.split(sizes, dim=1))
        assert float(gradient[1].abs().sum()) == 0


class GaussianDenoiser:
    """E[u | u_t] of u ~ N(mean, variance), by the closed form."""

    schedule = staticmethod(RectifiedSchedule())

    def __init__(self, mean, variance):
        self.mean, self.variance = mean, variance

    def __call__(self, u_t, t):
        alpha, sigma = (scale[:, None] for scale in self.schedule(t))
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return SimpleNamespace(mean=self.mean + gain * (u_t - alpha * self.mean))


def test_loss_is_that_of_the_velocity():
    """Of u ~ N(m, S) the exact velocity leaves a variance with a closed form, and N(0, I)'s a larger one."""
    mean, variance = torch.tensor([1.0, -0.5]), torch.tensor([0.25, 2.0])
    u = mean + variance.sqrt() * torch.randn(50_000, 2, generator=seed(0))
    found = flow_matching_loss(GaussianDenoiser(mean, variance), u, seed(1)).mean().item()

    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:, None]
    total = variance + 1
    with_state = t - (1 - t) * variance  # covariance of eps - u and u_t
    spread = (1 - t) ** 2 * variance + t**2
    learned = total - with_state**2 / spread
    # The velocity of N(0, I) is this times u_t.
    factor = (2 * t - 1) / (t**2 + (1 - t) ** 2)
    product, square = with_state - (1 - t) * mean**2, spread + ((1 - t) * mean) ** 2
    untrained = total + mean**2 - 2 * factor * product + factor**2 * square
    expected = torch.trapezoid((learned - untrained).sum(1), t[:, 0]).item()
    assert found == pytest.approx(expected, rel=0.02)


class HalfSeen(IdentityBackbone):
    """Images hold the first layer; the second one's posterior is its prior."""

    def infer(self, images):
        first, second = super().infer(images)
        return [first, torch.randn_like(second)]


@pytest.mark.usefixtures("counters")
def test_what_images_do_not_determine_stays_gaussian():
    """Bit for bit, however large the network's weights are; what they determine moves."""
    prior = FlowMatchingPrior(HalfSeen((3,), (2,)), vector_width=16, steps=4)
    u = 0.3 * torch.randn(2000, 5, generator=seed(0))
    prior.fit(images_of(u), training=replace(FLOW_TRAINING, iterations=1, activity_images=2000), generator=seed(1))
    assert prior.network.activity[:3].min() > 0.99
    assert not prior.network.activity[3:].any()
    before = FlowMatchingPrior(prior.backbone, steps=4)
    for parameter in prior.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    moved, gaussian = (each.sample_noise(50, generator=seed(2)) for each in (prior, before))
    torch.testing.assert_close(moved[:, 3:], gaussian[:, 3:])
    assert (moved[:, :3] - gaussian[:, :3]).abs().min() > 0


@pytest.mark.usefixtures("counters")
def test_a_correlated_gaussian_is_recovered():
    """Across layers too: the mean and covariance of samples are those of the data."""
    mean, factor = torch.tensor([1.0, -0.5, 0.0]), torch.tensor([[0.5, 0.0, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]])
    u = mean + torch.randn(4000, 3, generator=seed(0)) @ factor.T
    torch.manual_seed(0)
    prior = FlowMatchingPrior(IdentityBackbone((1,), (2,)), vector_width=64, blocks=1)
    training = replace(FLOW_TRAINING, iterations=600, batch_size=256, noise_draws=1, ema_decay=0.98)
    prior.fit(images_of(u), training=training, generator=seed(1))
    draws = prior.sample_noise(4000, generator=seed(2))
    torch.testing.assert_close(draws.mean(0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(draws.T.cov(), factor @ factor.T, atol=0.08, rtol=0)


def test_defaults_of_pytorch_do_not_matter():
    backbone = RandomBackbone(SHAPES[:2])

    def draw():
        torch.manual_seed(0)
        prior = FlowMatchingPrior(backbone, width=16, vector_width=16, steps=2)
        prior.fit(IMAGES, training=replace(FLOW_TRAINING, iterations=2), generator=seed(0))
        return prior.sample_noise(3, generator=seed(1))

    expected, dtype = draw(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = draw()
    finally:
        torch.set_default_dtype(dtype)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_callback_may_end_training():
    def stop(prior, record):
        if record.iteration == 2:
            raise StopTraining

    prior = FlowMatchingPrior(RandomBackbone(SHAPES[:2]), width=16, vector_width=16)
    assert len(prior.fit(IMAGES, callback=stop, generator=seed(0))) == 2


def test_without_azula_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "azula.denoise", None)
    with pytest.raises(ImportError, match="pip install --no-deps azula"):
        FlowMatchingPrior(RandomBackbone(SHAPES[:2]), width=16, vector_width=16).fit(IMAGES)
