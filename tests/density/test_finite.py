"""What is not finite is refused where it comes in, and said where it arises; nobody is handed NaN."""

import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY, seed

from hvae_ebm_prior import DiffusionEBMPrior, LangevinConfig
from hvae_ebm_prior.chains.langevin import ChainDiverged
from hvae_ebm_prior.control import edit, interpolate, resample

SHAPES = [(2,), (3,)]
IMAGES = torch.rand(2, 1, 2, 2, generator=seed(0))


def make(backbone=None):
    return DiffusionEBMPrior(backbone or RandomBackbone(SHAPES), energy=TINY, langevin=LangevinConfig(steps=2))


USES = {
    "energy": lambda p, u: p.energy(u, 0),
    "layer_energies": lambda p, u: p.layer_energies(u, 0),
    "score": lambda p, u: p.score(u, 0),
    "conditional_score": lambda p, u: p.conditional_score(torch.zeros_like(u), u, 0),
    "log_prob": lambda p, u: p.log_prob(u),
    "to_latents": lambda p, u: p.to_latents(u),
    "log_abs_det": lambda p, u: p.log_abs_det(u),
    "resample": lambda p, u: resample(p, u, [0]),
    "interpolate from": lambda p, u: interpolate(p, u, torch.ones_like(u), 3),
    "interpolate to": lambda p, u: interpolate(p, torch.ones_like(u), u, 3),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_noise_that_is_not_finite_is_refused(use, bad):
    u = torch.zeros(3, 5)
    u[1, 4] = bad
    with pytest.raises(ValueError, match="u: 1 of 3 hold NaN or infinite noise"):
        USES[use](make(), u)


def test_latents_that_are_not_finite_are_refused():
    prior = make()
    z = [each.clone() for each in prior.to_latents(torch.zeros(2, prior.dim))]
    assert prior.to_noise(z).abs().max() < 1e-5
    z[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match="u: 1 of 2 hold NaN or infinite noise"):
        prior.to_noise(z)


def test_images_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 of 2 hold NaN or infinite pixels"):
        edit(make(), torch.stack((IMAGES[0], IMAGES[1] * torch.nan)), [0])


def test_a_backbone_that_draws_nan_is_said():
    prior = make()
    prior.backbone.decode = lambda features: features[:, :4].reshape(-1, 1, 2, 2) * torch.nan
    for use in (lambda: edit(prior, IMAGES, [0]), lambda: prior.decode(torch.zeros(1, prior.dim))):
        with pytest.raises(ChainDiverged, match="images are not finite"):
            use()


def test_noise_is_no_pixel_although_a_backbone_makes_one_of_it():
    prior = make()
    decode = prior.backbone.decode
    prior.backbone.decode = lambda features: decode(features).nan_to_num(0.5)
    with pytest.raises(ChainDiverged, match="not finite"):
        prior.decode(torch.full((1, prior.dim), torch.nan))


class Cliff(RandomBackbone):
    """Its second layer is not finite where the first is large."""

    def top_down(self, batch_size):
        walk = super().top_down(batch_size)
        mean, std = next(walk)
        z = yield mean, std
        mean, std = walk.send(z)
        z = yield mean / (z[:, :1] < 50), std
        try:
            walk.send(z)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("use", ["energy", "score"])
def test_energies_and_gradients_that_are_not_finite_are_said(use):
    prior = make(Cliff(SHAPES))
    u = torch.zeros(2, prior.dim)
    assert bool(torch.isfinite(USES[use](prior, u)).all())
    u[1] = 1e4
    with pytest.raises(ChainDiverged, match="are not finite"):
        USES[use](prior, u)
