"""Ancestral drawing and the density of a prior, against closed forms."""

import math

import pytest
import torch
from backbones import PAIR_ENERGIES, ExactGaussian, ExactMixture, IdentityBackbone, Pair, RandomBackbone
from helpers import check_moments, seed
from torch import Tensor

from hvae_ebm_prior import (
    NOT,
    DiffusionEBMPrior,
    DiffusionSchedule,
    DrawingConfig,
    EnergyConfig,
    Expert,
    LangevinConfig,
)
from hvae_ebm_prior.backbone.transform import LayerState
from hvae_ebm_prior.chains.flow import follow_flow
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.density.ancestral import draw_layers
from hvae_ebm_prior.density.sampling import SamplingRequest

SCHEDULE = DiffusionSchedule.from_snr([2000, 15, 3, 0])
CHAINS = LangevinConfig(steps=30, step_size=0.3)
TINY = EnergyConfig(width=16, vector_width=16)


def pair(**settings) -> DiffusionEBMPrior:
    return DiffusionEBMPrior(Pair((1,), (1,)), schedule=SCHEDULE, energy=list(PAIR_ENERGIES), **settings)


def check_pair(u: Tensor) -> None:
    """Noise of a Pair has the moments of its data, to what few levels and steps leave."""
    u_1, u_2 = u.unbind(1)
    for found, expected in (
        (u_1.mean(), 0.5),
        (u_1.std(), 0.8),
        (u_2.mean(), -0.8 * 0.5 + 0.2),
        (u_2.std(), math.hypot(0.8 * 0.8, 0.8)),
        (torch.corrcoef(u.T)[0, 1], -0.8 * 0.8 / math.hypot(0.8 * 0.8, 0.8)),
    ):
        assert found.item() == pytest.approx(expected, abs=0.03)


def test_gradient_of_the_potential_is_the_velocity():
    """v = E[cos eps - sin u | u_phi] of a Gaussian, from its posterior mean of u."""
    m, s = 0.5, 0.8
    u, phi = torch.linspace(-2, 2, 9, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    clean = m + s**2 * phi.cos() / ((phi.cos() * s) ** 2 + phi.sin() ** 2) * (u - phi.cos() * m)
    noise = (u - phi.cos() * clean) / phi.sin()
    at = u[:, None].clone().requires_grad_()
    state = LayerState(at, at, torch.zeros_like(at), torch.ones_like(at))
    f = ExactGaussian(0.0, m, s)(state, torch.stack((phi, phi * 0)).expand(9, 2))
    velocity = -phi.tan() * torch.autograd.grad(f.sum(), at)[0][:, 0]
    torch.testing.assert_close(velocity, phi.cos() * noise - phi.sin() * clean)


def test_the_flow_is_of_second_order_and_stops_where_asked():
    """A v that does more than turn: of x ~ N(0, s^2) and noise, where u is proportional to its std at every angle."""
    s = 0.3

    def velocity(u: Tensor, angle: float) -> Tensor:
        variance = (s * math.cos(angle)) ** 2 + math.sin(angle) ** 2
        return u * math.sin(angle) * math.cos(angle) * (1 - s**2) / variance

    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(follow_flow(velocity, start, steps)[0].item() - s) for steps in (40, 80, 160)]
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3
    stops = [0.35, 1.0, math.pi / 2]
    exact = [math.hypot(s * math.cos(stop), math.sin(stop)) for stop in stops]
    found = [state.item() for state in follow_flow(velocity, start, 160, stops)[1:]]
    assert found == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"drawing": DrawingConfig(flow_steps=0), "langevin": CHAINS},
        {"langevin": LangevinConfig(step_size=0.3, corrector_steps=20), "drawing": DrawingConfig(flow_steps=6)},
        {"drawing": DrawingConfig(ancestral=False), "langevin": LangevinConfig(steps=50, step_size=0.15)},
    ],
    ids=["flow", "chains", "flow and corrector", "joint"],
)
def test_every_way_of_drawing_has_the_moments_of_the_density(settings):
    check_pair(pair(**settings).sample_noise(12_000, generator=seed(0)))


def test_zero_energies_are_the_gaussian_for_every_way_of_drawing():
    for drawing in (DrawingConfig(), DrawingConfig(flow_steps=0), DrawingConfig(ancestral=False)):
        prior = DiffusionEBMPrior(RandomBackbone([(2,), (1, 5, 5)]), energy=TINY, drawing=drawing)
        draws = prior.sample_noise(2000, generator=seed(0))
        check_moments(draws.flatten(), 0, 1)
        check_moments(draws.flatten() ** 2, 1, 2)
        assert (draws.T.corrcoef() - torch.eye(prior.dim)).abs().max() < 0.1


def test_held_layers_and_temperature():
    prior = pair()
    top = torch.full((1, 1), 1.5)
    u = prior.sample_noise(4000, fixed={0: top}, generator=seed(0))
    assert bool((u[:, 0] == 1.5).all())
    check_moments(u[:, 1], -0.8 * 1.5 + 0.2, 0.64)
    # exp f N(0, tau^2) of the top layer, whose f is that of N(.5, .8^2) over N(0, 1).
    tau = 0.7
    precision = 1 / 0.8**2 - 1 + 1 / tau**2
    cool = pair(drawing=DrawingConfig(flow_steps=0), langevin=LangevinConfig(steps=30, step_size=0.2))
    u = cool.sample_noise(6000, temperature=tau, tempering="before", generator=seed(1))[:, 0]
    assert u.mean().item() == pytest.approx(0.5 / 0.8**2 / precision, abs=0.04)
    assert u.std().item() == pytest.approx(precision**-0.5, abs=0.03)


def test_samples_are_their_own_at_any_chunking_and_trajectories_hold_every_level():
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (2, 8, 8)]), energy=TINY, schedule=SCHEDULE)
    for network in prior.energies:
        for i, parameter in enumerate(network.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=seed(i))
    whole = prior.sample_noise(5, generator=seed(0))
    torch.testing.assert_close(prior.sample_noise(2, generator=seed(0)), whole[:2], atol=1e-5, rtol=1e-5)
    images = prior.sample(5, generator=seed(0))
    torch.testing.assert_close(prior.sample(5, chunk_size=2, generator=seed(0)), images, atol=1e-5, rtol=1e-5)
    states = prior.sample_noise(5, trajectory=True, generator=seed(0))
    assert states.shape == (4, 5, prior.dim)
    assert torch.equal(states[0], whole)
    exact = pair().sample_noise(4000, trajectory=True, generator=seed(0))
    for level, std in enumerate(exact[:, :, 0].std(1).tolist()):
        phi = SCHEDULE.angle[level].item()
        assert std == pytest.approx(math.hypot(0.8 * math.cos(phi), math.sin(phi)), abs=0.03)


def test_log_prob_is_the_closed_form():
    prior = pair()
    u = torch.randn(50, 2, generator=seed(0))
    phi = SCHEDULE.angle[0].item()
    expected = torch.zeros(50)
    for i, centre in enumerate((torch.full((50,), 0.5), -0.8 * u[:, 0] + 0.2)):
        variance = (0.8 * math.cos(phi)) ** 2 + math.sin(phi) ** 2
        expected += torch.distributions.Normal(math.cos(phi) * centre, variance**0.5).log_prob(u[:, i])
    torch.testing.assert_close(prior.log_prob(u), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(prior.log_prob(u[:7]), prior.log_prob(u)[:7], atol=1e-5, rtol=1e-5)


def test_log_prob_of_two_dimensions_integrates_to_one():
    mixture = ExactMixture((0.7, 0.3), ((-1.0, 0.0), (1.0, 0.5)), 0.35)
    grid = torch.linspace(-4, 4, 81)
    points = torch.cartesian_prod(grid, grid)
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), schedule=SCHEDULE, energy=[mixture])
    assert prior.log_prob(points, steps=20).exp().sum().item() * 0.1**2 == pytest.approx(1, abs=1e-3)
    # Also where the energy is no diffusion's, so that exp f N has any normaliser.
    network = DiffusionEBMPrior(IdentityBackbone((2,)), schedule=SCHEDULE, energy=EnergyConfig(vector_width=8))
    for i, parameter in enumerate(network.parameters()):
        torch.nn.init.normal_(parameter, std=0.08, generator=seed(i))
    assert network.log_prob(points, steps=20).exp().sum().item() * 0.1**2 == pytest.approx(1, abs=5e-3)


def test_hutchinsons_estimate_agrees_with_the_exact_trace():
    prior = DiffusionEBMPrior(IdentityBackbone((70,)), schedule=SCHEDULE, energy=[ExactGaussian(0.0, 0.3, 0.8)])
    u = 0.3 + 0.8 * torch.randn(6, 70, generator=seed(0))
    phi = SCHEDULE.angle[0].item()
    scale = math.hypot(0.8 * math.cos(phi), math.sin(phi))
    expected = torch.distributions.Normal(0.3 * math.cos(phi), scale).log_prob(u).sum(1)
    # The Jacobian is diagonal, where random signs are exact.
    torch.testing.assert_close(prior.log_prob(u), expected, atol=2e-2, rtol=0)


def test_compositions_weight_priors_as_their_densities():
    """Layer by layer, OR of two densities is their even mixture in all layers together, AND their product."""
    backbone = IdentityBackbone((1,), (1,))
    left, right = (
        DiffusionEBMPrior(backbone, schedule=SCHEDULE, energy=[ExactGaussian(0.0, m, 0.4), ExactGaussian(0.0, m, 0.4)])
        for m in (-1.5, 1.5)
    )
    u = left.sample_noise(3000, labels=Expert(left) | Expert(right), generator=seed(0))
    both_left, both_right = ((u < 0).all(1), (u > 0).all(1))
    assert (both_left | both_right).float().mean().item() > 0.99
    assert both_left.float().mean().item() == pytest.approx(0.5, abs=0.03)
    near, far = (
        DiffusionEBMPrior(
            backbone, schedule=SCHEDULE, energy=[ExactGaussian(0.0, m, 0.4), ExactGaussian(0.0, 0.0, 1.0)]
        )
        for m in (-0.5, 1.5)
    )
    away = near.sample_noise(2000, labels=Expert(near) & NOT(far), generator=seed(0))
    assert away[:, 0].mean().item() < near.sample_noise(2000, generator=seed(0))[:, 0].mean().item() + 0.02


def test_layers_above_a_held_one_need_joint_drawing():
    prior = pair(langevin=LangevinConfig(steps=30, step_size=0.2))
    below = torch.full((1, 1), 1.0)
    u = prior.sample_noise(3000, fixed={1: below}, generator=seed(0))
    assert bool((u[:, 1] == 1).all())
    # Near p(u_1 | u_2 = 1) of the joint Gaussian, as few levels have it.
    gain = -0.8 * 0.64 / (0.8**2 * 0.64 + 0.64)
    assert u[:, 0].mean().item() == pytest.approx(0.5 + gain * (1 - (-0.2)), abs=0.15)


def test_half_precision_draws_the_same_samples():
    """Angles near pure noise, where tangents are large, are not rounded with the rest."""
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(RandomBackbone([(3,), (2, 8, 8)]), energy=TINY)
    for i, parameter in enumerate(prior.parameters()):
        torch.nn.init.normal_(parameter, std=0.08, generator=seed(i))
    start = torch.randn(8, prior.dim, generator=seed(0))

    def flow(prior: DiffusionEBMPrior) -> Tensor:
        noise = iter(prior.split(start))
        prior.drawing, streams = DrawingConfig(), open_streams(0, range(8), prior.device, prior.dtype, "torch")
        streams.normal = lambda count: next(noise).flatten(1).to(prior.dtype)
        return draw_layers(prior, streams, prior.drawing, SamplingRequest())[0].float()

    exact = flow(prior)
    assert (exact - start).abs().mean() > 0.1
    assert (flow(prior.half()) - exact).abs().mean() < 0.003
