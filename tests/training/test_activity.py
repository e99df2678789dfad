"""Which dimensions count as active, and what becomes of layers where none is."""

import pytest
import torch
from backbones import IdentityBackbone, RandomBackbone, Seeing
from helpers import IMAGES, TINY, seed, state
from torch.distributions import Normal

from hvae_ebm_prior import DiffusionEBMPrior, DrawingConfig, TrainingConfig
from hvae_ebm_prior.baselines import GaussianPrior
from hvae_ebm_prior.training.activity import estimate, measure
from hvae_ebm_prior.training.batches import Batches
from hvae_ebm_prior.training.posterior_cache import PosteriorCache

SHAPES = [(2,), (3,)]
# Pairs of posterior draws that activity is measured on.
N = 1024
SETTINGS = TrainingConfig(iterations=10, batch_size=8, recovery_share=0.5, activity_images=0)


class HalfSeeing(Seeing):
    """Posteriors of the first layer alone depend on the images."""

    def infer(self, images):
        first, second = super().infer(images)
        return [first, second + 2 - 4 * images.flatten(1)[:, :3]]


def measured(activity, *, layer):
    """Correlations of dimensions of these activities, as measured on N pairs."""
    return activity + torch.randn(activity.shape, generator=seed(layer)) * N**-0.5


@pytest.mark.parametrize("draws", [None, 3])
def test_noise_of_correlations_is_that_of_all_pairs_of_draws(draws, tmp_path):
    """Draws that say nothing of their images are independent, and so are the products of their pairs."""
    prior, images = GaussianPrior(RandomBackbone([(400,), (300,)])), torch.rand(64, 1, 2, 2, generator=seed(0))
    data = images if draws is None else PosteriorCache.build(prior, images, tmp_path, draws=draws, generator=seed(1))
    layers, _, pairs = measure(prior, Batches(data, 32, seed(2)), len(images), seed(3), progress=False)
    assert pairs == 64 * {None: 28, 3: 3}[draws]
    correlation = torch.cat([layer.flatten() for layer in layers])
    assert correlation.square().mean().sqrt() == pytest.approx(pairs**-0.5, rel=0.15)


def test_constants_have_no_correlation():
    """Whatever is left of them by rounding."""

    class Constant(IdentityBackbone):
        def infer(self, images):
            return [torch.linspace(-2, 2, 300).expand(len(images), -1)]

    prior, images = GaussianPrior(Constant((300,))), torch.rand(99, 1, 1, 300, generator=seed(0))
    (correlation,), _, _ = measure(prior, Batches(images, 33, seed(1)), 500, seed(2), progress=False)
    assert not correlation.any()


@pytest.mark.parametrize("shape", [(20_000,), (8, 16, 16), (512, 2, 2), (4,)])
def test_a_layer_of_chance_has_no_active_dimension(shape):
    assert sum(bool(estimate(measured(torch.zeros(shape), layer=i), N).any()) for i in range(40)) <= 1


def test_few_dimensions_that_say_much_are_told_from_the_rest():
    activity = torch.zeros(20_000)
    activity[:100] = 0.2
    found = estimate(measured(activity, layer=0), N)
    assert found[:100].count_nonzero() >= 95
    assert found[100:].count_nonzero() <= 15
    torch.testing.assert_close(found[found > 0.1], torch.full_like(found[found > 0.1], 0.2), atol=0.12, rtol=0)


def test_many_dimensions_that_say_little_are_all_found():
    """One by one they are no further from 0 than noise."""
    activity = torch.zeros(8, 16, 16)
    activity[3] = 0.03
    found = estimate(measured(activity, layer=0), N)
    assert found[3].count_nonzero() > 230
    assert not found[[0, 1, 2, 4, 5, 6, 7]].any()
    assert 0.02 < found[3].mean() < 0.035


def test_activity_is_its_mean_given_the_correlation():
    """Against numerical integration with the distribution that activities were drawn from."""
    share, scale, count = 0.4, 0.15, 10_000
    drawn = scale * torch.randn(count, generator=seed(1)).abs()
    activity = torch.where(torch.rand(count, generator=seed(2)) < share, drawn, 0.0)
    correlation = measured(activity, layer=3)
    found = estimate(correlation, N)
    grid = torch.linspace(0, 6 * scale, 2000, dtype=torch.float64)
    density = 2 * share * torch.exp(Normal(0, scale).log_prob(grid)) * (grid[1] - grid[0])
    r = torch.tensor([0.06, 0.1, 0.2, 0.4], dtype=torch.float64)
    likelihood = Normal(r[:, None], N**-0.5).log_prob(grid).exp()
    active = (density * likelihood).sum(1)
    null = (1 - share) * Normal(0, N**-0.5).log_prob(r).exp()
    expected = (grid * density * likelihood).sum(1) / (active + null)
    for value, mean in zip(r, expected, strict=True):
        nearest = (correlation - value).abs().argmin()
        assert found[nearest] == pytest.approx(float(mean), abs=0.01)
    # Where they are as likely as not inactive.
    r = torch.linspace(0, 0.1, 1001, dtype=torch.float64)
    likelihood = Normal(r[:, None], N**-0.5).log_prob(grid).exp()
    odds = (density * likelihood).sum(1) / ((1 - share) * Normal(0, N**-0.5).log_prob(r).exp())
    boundary = float(r[odds > 1][0])
    assert correlation[found > 0].min() == pytest.approx(boundary, abs=0.01)


def test_a_layer_that_says_nothing_of_images_stays_gaussian():
    """Its weights stay as they are, whatever is learned above it, and samples of it are its noise."""
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(HalfSeeing(SHAPES), energy=TINY)
    before = state(prior.energies[1])
    prior.fit(IMAGES, training=SETTINGS, generator=seed(0), progress=False)
    assert not all(torch.equal(value, before[name]) for name, value in state(prior.energies[1]).items())
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(HalfSeeing(SHAPES), energy=TINY)
    for network, active in zip(prior.energies, (1.0, 0.0), strict=True):
        shape = network.activity.shape
        network.set_statistics(torch.full(shape, active), torch.zeros(2, *shape), torch.ones(2, *shape))
    before = state(prior)
    prior.fit(IMAGES, training=SETTINGS, generator=seed(0), progress=False)
    changed = {name for name, value in state(prior).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("energies.0.") for name in changed)
    for drawing in (DrawingConfig(), DrawingConfig(flow_steps=0), DrawingConfig(ancestral=False)):
        prior.drawing = drawing
        u = prior.sample_noise(4000, generator=seed(1))[:, 2:]
        assert u.mean(0).abs().max() < 4 * 4000**-0.5
        torch.testing.assert_close(torch.cov(u.T), torch.eye(3), atol=0.1, rtol=0)


def test_where_nothing_is_active_every_dimension_counts():
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(HalfSeeing(SHAPES), energy=TINY)
    settings = TrainingConfig(iterations=1, batch_size=8, activity_images=8)
    prior.fit(torch.full((20, 1, 2, 2), 0.5), training=settings, generator=seed(0), progress=False)
    assert all(bool((network.activity == 1).all()) for network in prior.energies)
