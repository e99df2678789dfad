"""Which dimensions count as active, and what becomes of layers where none is."""

import torch
from backbones import Seeing
from helpers import IMAGES, TINY, seed, state

from hvae_ebm_prior import DiffusionEBMPrior, DrawingConfig, TrainingConfig
from hvae_ebm_prior.training.activity import tell_apart

SHAPES = [(2,), (3,)]
SETTINGS = TrainingConfig(iterations=10, batch_size=8, recovery_share=0.5, activity_images=0)


class HalfSeeing(Seeing):
    """Posteriors of the first layer alone depend on the images."""

    def infer(self, images):
        first, second = super().infer(images)
        return [first, second + 2 - 4 * images.flatten(1)[:, :3]]


def test_a_large_layer_of_chance_has_no_active_dimension():
    """Of 20,000 correlations of noise 2 % are above two standard errors, and nearly always none is by our rule; of a
    hundred that are more than noise nearly all are, and few others beside them.
    """
    n = 1024
    found = [
        tell_apart(torch.randn(20_000, generator=seed(i)).clamp(min=0) * n**-0.5, n).count_nonzero() for i in range(40)
    ]
    assert sum(bool(count) for count in found) <= 6  # of 40, with a chance of .05 each
    noise = torch.randn(20_000, generator=seed(50)) * n**-0.5
    noise[:100] += 0.2
    active = tell_apart(noise.clamp(0, 1), n) > 0
    assert active[:100].sum() >= 90
    assert active[100:].sum() <= 15


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
