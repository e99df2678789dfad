"""Score matching, teacher-forced recovery and the calibration of levels, against closed forms and known densities."""

import math
from typing import get_args

import pytest
import torch
from backbones import (
    PAIR_ENERGIES,
    ExactGaussian,
    ExactMixture,
    IdentityBackbone,
    Pair,
    RandomBackbone,
    Seeing,
    images_of,
)
from helpers import seed, state
from torch import Tensor, nn

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, EnergyConfig, Expert, LangevinConfig, TrainingConfig
from hvae_ebm_prior.backbone.posterior import Posterior
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.energies.context import SMALLEST_ANGLE
from hvae_ebm_prior.training.config import ObjectiveName
from hvae_ebm_prior.training.objective import SCORE, Objective
from hvae_ebm_prior.training.recovery import teacher_forced_loss
from hvae_ebm_prior.training.score import score_loss
from hvae_ebm_prior.training.score_data import mean_velocity, noisy_contexts, spread_angles

SCHEDULE = DiffusionSchedule.from_snr([200, 15, 3, 0])
MIXTURE = ExactMixture((0.9, 0.1), ((-0.8, 0.0), (1.2, 0.6)), 0.3)
TRAINING = TrainingConfig(iterations=400, batch_size=128, learning_rate=8e-3, warmup=20, ema_decay=0.98)


class Scaled(nn.Module):
    """Another network with context, its energy times a factor."""

    context = True

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, nn.Parameter(torch.tensor(factor))

    def forward(self, state, angles):
        return self.factor * self.network(state, angles)


def pair_noise(n: int, generator: torch.Generator) -> Tensor:
    u_1 = 0.5 + 0.8 * torch.randn(n, generator=generator)
    u_2 = -0.8 * u_1 + 0.2 + 0.8 * torch.randn(n, generator=generator)
    return torch.stack((u_1, u_2), dim=1)


def fitted(objective: str, value: int = 0, **changes) -> DiffusionEBMPrior:
    """A prior over two dimensions that learned the mixture."""
    torch.manual_seed(value)
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), schedule=SCHEDULE, energy=EnergyConfig(vector_width=48))
    images = images_of(MIXTURE.draw(4000, seed(1)))
    settings = {"objective": objective, **changes}
    prior.fit(images, training=TrainingConfig(**{**vars(TRAINING), **settings}), generator=seed(value), progress=False)
    return prior


@pytest.fixture(scope="module")
def learned():
    return fitted("score-recovery", recovery_share=0.2)


def test_the_exact_energy_has_the_least_loss():
    u = pair_noise(4000, seed(0))
    losses = {}
    for factor in (0.8, 1.0, 1.2):
        prior = DiffusionEBMPrior(Pair((1,), (1,)), energy=[Scaled(each, factor) for each in PAIR_ENERGIES])
        loss = score_loss(prior, u, None, seed(1), None, SCORE)
        losses[factor] = loss.total.mean().item()
        gradient = torch.stack(torch.autograd.grad(loss.total.mean(), list(prior.parameters())))
        assert (gradient.abs().max() < 0.05) == (factor == 1.0)
    assert losses[1.0] < min(losses[0.8], losses[1.2])


def test_the_loss_of_the_exact_energy_is_minus_the_mean_square_of_the_velocity():
    """E |v_hat - v|^2 - |v|^2 = -E |v_hat|^2 for v_hat = E[v | u_phi], in closed form for N(0, s^2)."""
    s = 0.5
    prior = DiffusionEBMPrior(IdentityBackbone((1,)), energy=[ExactGaussian(0.0, 0.0, s)])
    u = s * torch.randn(8000, 1, generator=seed(0))
    found = score_loss(prior, u, None, seed(1), None, Objective(score=1.0, noisy_context=0.0)).score.mean().item()
    phi = torch.linspace(math.sin(SMALLEST_ANGLE) ** 2, 1, 10_000, dtype=torch.float64).sqrt().asin()
    variance = (s * phi.cos()) ** 2 + phi.sin() ** 2
    expected = -((phi.sin() * phi.cos() * (1 - s**2)) ** 2 / variance).mean().item()
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4), (-2.0, 0.05)])
def test_the_mean_velocity_is_that_of_numerical_integration(mean, std):
    """Over u_0 given u: eps is (u - cos u_0) / sin, and densities are those of u_0 and eps."""
    u, phi = torch.tensor([-1.5, 0.0, 0.3, 2.0]).double(), torch.tensor([0.1, 0.5, 1.0, 1.4]).double()
    u_0 = torch.linspace(mean - 10 * std, mean + 10 * std, 20_001, dtype=torch.float64)[:, None]
    eps = (u - phi.cos() * u_0) / phi.sin()
    weights = (-0.5 * ((u_0 - mean) / std) ** 2 - 0.5 * eps**2).softmax(0)
    expected = (weights * (phi.cos() * eps - phi.sin() * u_0)).sum(0)
    found = mean_velocity(u[:, None], phi, torch.full((4, 1), mean).double(), torch.full((4, 1), std).double())
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-4)
    if (mean, std) == (0.0, 1.0):
        assert not found.any()


def test_a_known_posterior_takes_the_noise_from_the_gradient_and_not_its_mean():
    """Of images whose noise is N(.2 y, .95^2) with y = -1 or 1: as without knowing it on average, in a fraction of the
    variance; and a posterior without width is the draw itself.
    """
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), energy=[Scaled(ExactGaussian(0.0, 0.1, 0.8), 0.9)])
    mean = 0.2 * (1 - 2 * (torch.arange(20_000) % 2).float())[:, None].expand(-1, 2)
    u = mean + 0.95 * torch.randn(mean.shape, generator=seed(0))
    clean = Objective(score=1.0, noisy_context=0.0)
    known, plain, narrow = (
        score_loss(prior, u, None, seed(1), None, clean, posterior).score.detach()
        for posterior in (Posterior(mean, torch.full_like(u, 0.95)), None, Posterior(u, torch.full_like(u, 1e-6)))
    )
    assert abs((known - plain).mean()) < 4 * (known - plain).std() / len(u) ** 0.5
    assert known.var() < plain.var() / 4
    torch.testing.assert_close(narrow, plain, atol=1e-4, rtol=1e-4)


def test_training_takes_the_posterior_of_an_adapter(monkeypatch):
    """Of a whole batch, of its parts, and of images that are encoded a few at a time."""
    prior = DiffusionEBMPrior(Seeing([(3,), (2, 2)]), energy=EnergyConfig(vector_width=8))
    images = torch.rand(6, 1, 2, 2, generator=seed(0))
    assert torch.equal(
        prior.encode_with_posterior(images, generator=seed(1))[0], prior.encode(images, generator=seed(1))
    )
    seen, plain = [], DiffusionEBMPrior.batch_loss

    def loss(self, u, *others):
        seen.append((u, *others[-1]))
        return plain(self, u, *others)

    monkeypatch.setattr(DiffusionEBMPrior, "batch_loss", loss)
    for settings in ({}, {"micro_batch": 2}, {"encode_batch": 4}):
        training = TrainingConfig(iterations=1, batch_size=6, activity_images=0, **settings)
        prior.fit(images, training=training, generator=seed(2), progress=False)
    (whole, *parts, blocks) = seen
    torch.testing.assert_close(tuple(map(torch.cat, zip(*parts, strict=True))), whole)
    # The noise is drawn from these Gaussians, which are not one for all images.
    for u, mean, std in (whole, blocks):
        assert mean.std() > 0.5
        assert ((u - mean) / std).std().item() == pytest.approx(1, abs=0.3)


def test_a_known_density_is_learned(learned):
    """Density, samples, and the weights of two modes, 9:1."""
    u = MIXTURE.draw(2000, seed(2))
    level = SCHEDULE.angle[0].item()
    smooth = ExactMixture(
        (0.9, 0.1), (MIXTURE.centres * math.cos(level)).tolist(), math.hypot(0.3 * math.cos(level), math.sin(level))
    )
    log_density = smooth(FlatState(u), torch.zeros(len(u), 2)) - u.square().sum(1) / 2 - math.log(2 * math.pi)
    assert (learned.log_prob(u) - log_density).abs().mean().item() < 0.25
    samples = learned.sample_noise(4000, generator=seed(3))
    weight = (samples[:, 0] > 0.2).float().mean().item()
    assert weight == pytest.approx(0.1, abs=0.03)
    assert samples[samples[:, 0] < 0.2].mean(0).tolist() == pytest.approx([-0.8, 0.0], abs=0.05)
    chains = DiffusionEBMPrior(
        IdentityBackbone((2,)),
        schedule=SCHEDULE,
        energy=list(learned.energies),
        drawing=type(learned.drawing)(ancestral=False),
        langevin=LangevinConfig(steps=20),
    )
    weight = (chains.sample_noise(4000, generator=seed(3))[:, 0] > 0.2).float().mean().item()
    assert weight == pytest.approx(0.1, abs=0.05)


def test_offsets_are_calibrated(learned):
    """exp F N integrates to 1 at every level, as the cross-entropy of levels wants; without it, it need not."""
    grid = torch.linspace(-4, 4, 81)
    points = torch.cartesian_prod(grid, grid)
    for t in range(SCHEDULE.steps):
        log_density = -learned.energy(points, t).detach() - points.square().sum(1) / 2 - math.log(2 * math.pi)
        assert log_density.exp().sum().item() * 0.1**2 == pytest.approx(1, abs=0.25)


def test_or_of_two_priors_weights_them_as_their_data(learned):
    """Each prior counts once: the modes of an even mixture of 9:1 and of its mirror image are as heavy."""
    torch.manual_seed(5)
    mirrored = DiffusionEBMPrior(learned.backbone, schedule=SCHEDULE, energy=EnergyConfig(vector_width=48))
    images = images_of(-MIXTURE.draw(4000, seed(4)))
    training = TrainingConfig(**{**vars(TRAINING), "objective": "score-recovery", "recovery_share": 0.2})
    mirrored.fit(images, training=training, generator=seed(1), progress=False)
    u = learned.sample_noise(4000, labels=Expert(learned) | Expert(mirrored), generator=seed(0))
    assert (u[:, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_layers_learn_their_conditionals():
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(Pair((1,), (1,)), schedule=SCHEDULE, energy=EnergyConfig(vector_width=32))
    noise = pair_noise(4000, seed(0))
    z_1 = noise[:, 0]
    images = images_of(torch.stack((z_1, z_1 + 0.5 * noise[:, 1]), dim=1))
    settings = TrainingConfig(**{**vars(TRAINING), "objective": "score"})
    prior.fit(images, training=settings, generator=seed(0), progress=False)
    prior.langevin = LangevinConfig(steps=30)
    # Joint chains also need every normaliser over contexts, of which short training knows less.
    for drawing, tolerance in ((prior.drawing, 0.06), (type(prior.drawing)(ancestral=False), 0.2)):
        prior.drawing = drawing
        u = prior.sample_noise(4000, generator=seed(1))
        assert u.mean(0).tolist() == pytest.approx([0.5, -0.2], abs=tolerance)
        assert torch.corrcoef(u.T)[0, 1].item() == pytest.approx(-0.64 / math.hypot(0.64, 0.8), abs=tolerance)


@pytest.mark.slow
def test_eight_times_the_iterations_are_no_worse():
    u = MIXTURE.draw(4000, seed(2))
    short, long = (
        fitted("score-recovery", iterations=iterations).log_prob(u).mean().item() for iterations in (300, 2400)
    )
    assert long > short - 0.02


def test_teacher_forced_chains_agree_with_exact_energies():
    """Chains from the exact conditionals look like the data: the loss of each energy's factor is flat at 1."""
    prior = DiffusionEBMPrior(
        Pair((1,), (1,)),
        schedule=SCHEDULE,
        energy=[Scaled(each, 1.0) for each in PAIR_ENERGIES],
        langevin=LangevinConfig(steps=20),
    )
    loss = teacher_forced_loss(prior, pair_noise(6000, seed(0)), seed(1))
    gradient = torch.stack(torch.autograd.grad(loss.total.mean(), list(prior.parameters())))
    assert gradient.abs().max() < 0.04
    assert loss.displacement.mean() > 0.3


JOINTLY = Objective(score=1.0, recovery=1.0, joint=True)
OBJECTIVES = [SCORE, Objective(recovery=1.0), Objective(score=1.0, recovery=1.0, calibration=1.0), JOINTLY, None]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["score", "recovery", "both", "both, joint", "default"])
def test_a_sample_has_the_same_loss_in_any_part_of_a_batch(objective):
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(RandomBackbone([(3,), (2, 8, 8)]), energy=EnergyConfig(width=16, vector_width=8))
    for i, parameter in enumerate(prior.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=seed(i))
    u = torch.randn(6, prior.dim, generator=seed(0))
    whole = prior.batch_loss(u, None, seed(1), objective=objective)
    for rows in (range(0, 1), range(1, 6)):
        part = prior.batch_loss(u[rows.start : rows.stop], None, seed(1), rows, objective)
        torch.testing.assert_close(part.total, whole.total[rows.start : rows.stop], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_no_objective_touches_the_backbone_or_global_randomness(objective):
    torch.manual_seed(0)
    backbone = RandomBackbone([(3,), (2, 8, 8)])
    prior = DiffusionEBMPrior(backbone, energy=EnergyConfig(width=16, vector_width=8))
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    before = state(prior)
    random_state = torch.get_rng_state()
    history = prior.fit(
        torch.rand(20, 1, 2, 2, generator=seed(0)),
        training=TrainingConfig(iterations=3, batch_size=8, objective=objective, activity_images=8),
        generator=seed(0),
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.model.state_dict().items())
    assert not all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    assert all(math.isfinite(record.loss) for record in history)
    assert math.isnan(history[-1].score) == (objective in ("recovery", "joint-recovery"))
    assert math.isnan(history[-1].gaps[0]) == (objective == "score") or objective != "score"


def test_shares_of_noise_are_uniform_and_angles_belong_to_samples():
    angles = spread_angles(7, range(1000), 4, 0)
    assert torch.equal(spread_angles(7, range(10, 20), 4, 0), angles[10:20])
    assert not torch.equal(spread_angles(7, range(1000), 4, 1), angles)
    counts = torch.histc(angles.sin().square().float(), bins=10, min=0, max=1)
    assert counts.std() < 0.05 * counts.mean()
    assert abs(torch.corrcoef(angles[:, :2].T)[0, 1].item()) < 1


def test_contexts_of_an_eighth_of_the_images_are_noisy():
    """At shares of noise that are uniform over batches; the others are the data's own."""
    prior, u = DiffusionEBMPrior(Pair((1,), (1,))), pair_noise(80, seed(0))
    shares = []
    for key in range(300):
        streams = open_streams(key, range(80), u.device, u.dtype, prior.execution.backend)
        states, angle = noisy_contexts(prior, u, key, range(80), streams, SCORE)
        noisy = angle > 0
        assert noisy.float().mean().item() == pytest.approx(SCORE.noisy_context, abs=0.03)
        assert torch.equal(states[0].z[~noisy], u[~noisy, :1])
        assert not torch.equal(states[0].z[noisy], u[noisy, :1])
        shares.append(angle[noisy].sin().square())
    counts = torch.histc(torch.cat(shares), bins=5, min=0, max=1)
    assert counts.std() < 0.15 * counts.mean()


def test_objectives_need_energies_with_context():
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), energy=EnergyConfig(context=False, vector_width=8))
    with pytest.raises(ValueError, match="score is for energies with context"):
        prior.fit(torch.rand(4, 1, 1, 2), iterations=1, objective="score", progress=False)
    with pytest.raises(ValueError, match="expected one of score"):
        TrainingConfig(objective="flow")
    with pytest.raises(ValueError, match="noise_draws"):
        TrainingConfig(noise_draws=0)


class FlatState:
    """What an exact energy reads of a layer's state."""

    def __init__(self, u: Tensor) -> None:
        self.u, self.mean = u, torch.zeros_like(u)
