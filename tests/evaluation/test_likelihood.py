"""Normalisers and likelihood bounds against closed forms, numerical integration and torch.distributions."""

import math
import operator

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone
from helpers import COSINE, seed
from torch import nn
from torch.distributions import Normal

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, LangevinConfig
from hvae_ebm_prior.chains.langevin import ChainDiverged
from hvae_ebm_prior.evaluation.likelihood import (
    AnnealingConfig,
    bits_per_dimension,
    log_likelihood_bound,
    log_normalizer,
)
from hvae_ebm_prior.presets import PRESETS

W, V = 0.8, -0.6


class Sine(nn.Module):
    def forward(self, z, t):
        return 1.5 * torch.sin(2 * z.flatten(1)).sum(1) + 0.3 * t


class LinearGaussian(IdentityBackbone):
    """x = .5 + .05 z + .05 noise per dimension; q(z|x) is the exact posterior under the prior z ~ N(mean, variance),
    its std times `wider`.
    """

    gain, noise = 0.05, 0.05

    def __init__(self, size, mean=0.0, variance=1.0, wider=1.0):
        super().__init__((size,))
        self.mean, self.variance, self.wider = mean, variance, wider

    def infer_with_density(self, images):
        precision = 1 / self.variance + self.gain**2 / self.noise**2
        mean = (self.mean / self.variance + self.gain * (images.flatten(1) - 0.5) / self.noise**2) / precision
        posterior = Normal(mean, self.wider * precision**-0.5)
        z = posterior.sample()
        return [(z, posterior.log_prob(z).sum(1))]

    def log_likelihood(self, features, images):
        return Normal(0.5 + self.gain * features, self.noise).log_prob(images.flatten(1)).sum(1)

    def log_evidence(self, images, mean, variance):
        """log p(x) under the prior z ~ N(mean, variance)."""
        std = (self.gain**2 * variance + self.noise**2) ** 0.5
        return Normal(0.5 + self.gain * mean, std).log_prob(images.flatten(1)).sum(1)


def levels(schedule, t):
    """Mean factor alpha and variance sigma^2 of the Gaussian part, from the schedule alone."""
    return schedule.alpha[t + 1].item(), schedule.sigma[t + 1].item() ** 2


def quadratic_log_normalizer(schedule, u_next, t, w=W, v=V):
    """log of the integral of exp(w u + v u^2) N(u; alpha u_next, sigma^2), summed over dimensions."""
    alpha, variance = levels(schedule, t)
    mean, precision = alpha * u_next, 1 / variance - 2 * v
    each = (
        (mean / variance + w) ** 2 / (2 * precision) - mean**2 / (2 * variance) - 0.5 * math.log(precision * variance)
    )
    return each.sum(1)


def quadratic_draws(schedule, u_next, t, noise):
    """Exact draws of p(u_t | u_next) with F = w u + v u^2."""
    alpha, variance = levels(schedule, t)
    precision = 1 / variance - 2 * V
    return (alpha * u_next / variance + W) / precision + noise / precision**0.5


def quadratic_prior(size, schedule=COSINE):
    return DiffusionEBMPrior(IdentityBackbone((size,)), schedule=schedule, energy=[Quadratic(size, W, V)])


@pytest.mark.parametrize("schedule", [COSINE, PRESETS["joint-recovery"].schedule, DiffusionSchedule.ddpm(3)])
def test_normalizer_of_a_quadratic_energy(schedule):
    prior, u_next = quadratic_prior(3, schedule), torch.randn(6, 3, generator=seed(0))
    t = torch.tensor([0, 1, 2, 2, 1, 0])
    expected = torch.cat(
        [quadratic_log_normalizer(schedule, u_next[i : i + 1], level) for i, level in enumerate(t.tolist())]
    )
    u = torch.cat(
        [
            quadratic_draws(schedule, u_next[i : i + 1], level, torch.randn(1, 3, generator=seed(i)))
            for i, level in enumerate(t.tolist())
        ]
    )
    estimate = log_normalizer(prior, u_next, t, u=u, annealing=AnnealingConfig(20, 200), generator=seed(1))
    torch.testing.assert_close(estimate.forward, expected, atol=0.06, rtol=0)
    torch.testing.assert_close(estimate.reverse, expected, atol=0.06, rtol=0)
    assert estimate.effective_sample_size.min() > 100
    assert estimate.acceptance.min() > 0.8


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_weights_are_unbiased_and_bounds_lie_on_their_sides(steps):
    """E w = Z for forward paths and E 1/w = 1/Z for paths back from exact draws, however few the temperatures; so log w
    is below, or above.
    """
    n, t, schedule = 5000, 1, DiffusionSchedule.cosine(3)
    prior, u_next = quadratic_prior(2), torch.tensor([[1.0, -0.5]]).expand(n, 2)
    u = quadratic_draws(schedule, u_next, t, torch.randn(n, 2, generator=seed(1)))
    config = AnnealingConfig(steps, 1, step_size=0.7)
    estimate = log_normalizer(prior, u_next, t, u=u, annealing=config, chunk_size=n, generator=seed(0))
    truth = quadratic_log_normalizer(schedule, u_next[:1], t)
    for ratio in ((estimate.forward - truth).exp(), (truth - estimate.reverse).exp()):
        assert ratio.mean().item() == pytest.approx(1, abs=4 * ratio.std().item() / n**0.5)
    for above in (truth - estimate.forward, estimate.reverse - truth):
        assert above.mean() > 4 * above.std() / n**0.5


def test_bounds_close_in_as_temperatures_grow():
    prior, u_next = quadratic_prior(20), torch.randn(300, 20, generator=seed(0))
    u = quadratic_draws(prior.schedule, u_next, 2, torch.randn(300, 20, generator=seed(1)))
    gaps = []
    for steps in (1, 5, 25):
        estimate = log_normalizer(
            prior, u_next, 2, u=u, annealing=AnnealingConfig(steps, 1, step_size=0.5), generator=seed(2)
        )
        gaps.append((estimate.reverse - estimate.forward).mean().item())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_normalizer_against_numerical_integration():
    """F = sum of sines of two layers, the second one's Gaussian a function of the first: E exp F(T(u)) on a grid."""
    prior = DiffusionEBMPrior(RandomBackbone([(1,), (1,)]), schedule=COSINE, energy=[Sine(), Sine()])
    n, u_next, t = 1500, torch.tensor([[0.4, -1.2], [2.0, 0.3], [-0.7, 0.9]]), torch.tensor([0, 1, 2])
    states, config = u_next.repeat_interleave(n, 0), AnnealingConfig(6, 1, step_size=0.7)
    estimate = log_normalizer(
        prior, states, t.repeat_interleave(n), annealing=config, chunk_size=3 * n, generator=seed(0)
    )
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 401)] * 2)
    cell = (12 / 400) ** 2
    for i in range(3):
        alpha, variance = levels(prior.schedule, i)
        log_gaussian = Normal(alpha * u_next[i], variance**0.5).log_prob(grid).sum(1)
        z = prior.to_latents(grid)
        f = sum(1.5 * torch.sin(2 * part[:, 0]) + 0.3 * i for part in z)
        truth = torch.logsumexp(log_gaussian + f, 0) + math.log(cell)
        ratio = (estimate.forward[i * n : (i + 1) * n] - truth).exp()
        assert ratio.mean().item() == pytest.approx(1, abs=4 * ratio.std().item() / n**0.5)
        assert abs(truth) > 10 * ratio.std() / n**0.5


def test_constant_energy_needs_no_annealing():
    class Constant(nn.Module):
        def forward(self, z, t):
            return 0.7 * (1 + t) + 0 * z.flatten(1).sum(1)

    prior = DiffusionEBMPrior(IdentityBackbone((3,)), energy=[Constant()])
    u_next = torch.randn(5, 3, generator=seed(0))
    estimate = log_normalizer(prior, u_next, 2, u=u_next, annealing=AnnealingConfig(4, 7), generator=seed(1))
    for value, expected in (
        (estimate.forward, 2.1),
        (estimate.reverse, 2.1),
        (estimate.effective_sample_size, 7.0),
        (estimate.acceptance, 1.0),
    ):
        torch.testing.assert_close(value, torch.full((5,), expected))


def test_reverse_bounds_the_density_of_the_sampler_for_any_state():
    """One temperature, one particle: of two Gaussian draws one is kept by its weight exp F. Its density, and the bound,
    integrated on a grid.
    """
    n, t = 4000, 1
    prior = DiffusionEBMPrior(IdentityBackbone((1,)), energy=[Sine()])
    alpha, variance = levels(prior.schedule, t)
    grid = torch.linspace(-8, 8, 4001)
    density = Normal(alpha * 0.5, variance**0.5).log_prob(grid).exp() * (16 / 4000)
    other = Sine()(grid[:, None], t).exp()
    for state in (-1.5, 0.2, 0.8, 2.5):
        f = Sine()(torch.tensor([[state]]), t)
        log_density = f + ((2 / (f.exp() + other)) * density).sum().log()  # over that of the Gaussian part
        expected = f - (((f.exp() + other) / 2).log() * density).sum()
        u, u_next = torch.full((n, 1), state), torch.full((n, 1), 0.5)
        bounds = f - log_normalizer(prior, u_next, t, u=u, annealing=AnnealingConfig(1, 1), generator=seed(0)).reverse
        assert bounds.mean().item() == pytest.approx(expected.item(), abs=4 * bounds.std().item() / n**0.5)
        assert bounds.mean() < log_density
        assert log_density - expected > 0.01


def test_bound_is_exact_for_a_linear_gaussian_model_without_energies():
    """q is the exact posterior and the forward diffusion the exact reverse one: every draw gives log p(x)."""
    backbone, images = LinearGaussian(3), torch.rand(5, 1, 1, 3, generator=seed(0))
    prior = DiffusionEBMPrior(backbone, schedule=PRESETS["joint-recovery"].schedule, energy=[Quadratic(3)])
    bound = log_likelihood_bound(prior, images, annealing=AnnealingConfig(3, 2), generator=seed(1))
    truth = backbone.log_evidence(images, 0.0, 1.0)
    for value in (bound.elbo, bound.lower, bound.optimistic):
        torch.testing.assert_close(value, truth, atol=1e-4, rtol=0)
    assert torch.equal(bound.gains, torch.zeros(5, 3))
    torch.testing.assert_close(bits_per_dimension(bound.lower, images), -truth / 3 / math.log(2), atol=1e-4, rtol=0)


def test_bound_is_below_the_truth_for_a_posterior_that_is_too_wide():
    """By the divergence of q from the posterior, (s^2 - 1)/2 - log s per dimension for a std s times too wide."""
    backbone, images = LinearGaussian(4, wider=1.4), torch.full((500, 1, 1, 4), 0.6)
    prior = DiffusionEBMPrior(backbone, energy=[Quadratic(4)])
    bound = log_likelihood_bound(prior, images, annealing=AnnealingConfig(1, 1), generator=seed(0)).lower
    divergence = 4 * ((1.4**2 - 1) / 2 - math.log(1.4))
    expected = (backbone.log_evidence(images[:1], 0.0, 1.0) - divergence).item()
    assert bound.mean().item() == pytest.approx(expected, abs=4 * bound.std().item() / len(images) ** 0.5)


def test_bound_is_exact_for_a_marginal_prior_with_its_own_posterior():
    """T = 1: the prior is the Gaussian N(w / p, 1 / p) with p = 1 - 2v. Only the error of log Z is left."""
    mean, variance = W / (1 - 2 * V), 1 / (1 - 2 * V)
    backbone, images = LinearGaussian(2, mean, variance), torch.rand(6, 1, 1, 2, generator=seed(0))
    prior = DiffusionEBMPrior(backbone, schedule=DiffusionSchedule.marginal(), energy=[Quadratic(2, W, V)])
    bound = log_likelihood_bound(prior, images, annealing=AnnealingConfig(20, 400), generator=seed(1))
    truth = backbone.log_evidence(images, mean, variance)
    torch.testing.assert_close(bound.lower, truth, atol=0.05, rtol=0)
    torch.testing.assert_close(bound.optimistic, truth, atol=0.05, rtol=0)
    assert (bound.elbo - truth).abs().max() > 0.2


@pytest.mark.parametrize("last_step", [False, True])
def test_bound_of_a_diffusion_is_the_sum_of_all_log_densities(last_step):
    """The bound as METHOD states it, with every Gaussian written out and Z in closed form, from other draws; and it is
    below log p(x).
    """
    n, schedule = 600, DiffusionSchedule.from_snr([20, 3, 0])
    backbone, images = LinearGaussian(2), torch.tensor([0.56, 0.47]).expand(n, 1, 1, 2)
    prior = DiffusionEBMPrior(backbone, schedule=schedule, energy=[Quadratic(2, W, V)])
    settings = {"annealing": AnnealingConfig(6, 4, step_size=0.4), "chunk_size": n, "generator": seed(0)}
    bound = log_likelihood_bound(prior, images, last_step=last_step, **settings)

    torch.manual_seed(0)
    ((z, log_q),) = backbone.infer_with_density(images)
    total, states = backbone.log_likelihood(z, images) - log_q, [z]
    if last_step:
        kept, added = schedule.alpha_bar[0].item(), schedule.sigma_bar[0].item()
        states = [kept * z + added * torch.randn(n, 2)]
        total = total + (Normal(kept * states[0], added).log_prob(z) - Normal(kept * z, added).log_prob(states[0])).sum(
            1
        )
    mean, variance = 0.0, 1.0
    for t in range(2):
        alpha, noise = levels(schedule, t)
        states.append(alpha * states[-1] + noise**0.5 * torch.randn(n, 2))
        f = (W * states[t] + V * states[t] ** 2).sum(1)
        conditional = (
            f
            + Normal(alpha * states[t + 1], noise**0.5).log_prob(states[t]).sum(1)
            - quadratic_log_normalizer(schedule, states[t + 1], t)
        )
        total = total + conditional - Normal(alpha * states[t], noise**0.5).log_prob(states[t + 1]).sum(1)
    total = total + Normal(0.0, 1.0).log_prob(states[2]).sum(1)
    for t in (1, 0):
        alpha, noise = levels(schedule, t)
        precision = 1 / noise - 2 * V
        mean, variance = (
            (alpha * mean / noise + W) / precision,
            1 / precision + (alpha / noise / precision) ** 2 * variance,
        )
    if last_step:
        mean, variance = kept * mean, kept**2 * variance + added**2

    error = 4 * ((bound.lower.var() + total.var()) / n).item() ** 0.5
    assert bound.lower.mean().item() == pytest.approx(total.mean().item(), abs=error + 0.01)
    assert bound.optimistic.mean().item() == pytest.approx(total.mean().item(), abs=error + 0.01)
    assert bound.lower.mean() < backbone.log_evidence(images[:1], mean, variance)


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_results_are_reproducible_at_any_chunking(chunk_size):
    prior, images = (
        DiffusionEBMPrior(LinearGaussian(3), energy=[Quadratic(3, W, V)]),
        torch.rand(4, 1, 1, 3, generator=seed(0)),
    )
    whole, again, chunked = (
        log_likelihood_bound(prior, images, annealing=AnnealingConfig(4, 3), chunk_size=size, generator=seed(1))
        for size in (None, None, chunk_size)
    )
    few = log_likelihood_bound(prior, images[:2], annealing=AnnealingConfig(4, 3), generator=seed(1))
    for part in (
        "elbo",
        "corrections",
        "normalizers.forward",
        "normalizers.reverse",
        "normalizers.effective_sample_size",
        "normalizers.acceptance",
    ):
        value = operator.attrgetter(part)
        assert torch.equal(value(again), value(whole))
        torch.testing.assert_close(value(chunked), value(whole), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value(few), value(whole)[:2], atol=1e-5, rtol=1e-5)
    other = log_likelihood_bound(prior, images, annealing=AnnealingConfig(4, 3), generator=seed(2))
    assert not torch.allclose(other.lower, whole.lower)
    forward_alone = log_normalizer(prior, images.flatten(1), 0, generator=seed(3))
    with_reverse = log_normalizer(prior, images.flatten(1), 0, u=images.flatten(1), generator=seed(3))
    assert torch.equal(forward_alone.forward, with_reverse.forward)
    assert forward_alone.reverse.isnan().all()


def test_adapters_without_densities_are_refused():
    class Half(LinearGaussian):
        log_likelihood = None

    images = torch.rand(2, 1, 1, 3)
    with pytest.raises(
        TypeError, match="IdentityBackbone gives no densities.*no method infer_with_density, log_likelihood; see"
    ):
        log_likelihood_bound(quadratic_prior(3), images)
    with pytest.raises(TypeError, match="Half gives no densities.*no method log_likelihood; see"):
        log_likelihood_bound(DiffusionEBMPrior(Half(3), energy=[Quadratic(3)]), images)


def test_densities_of_a_wrong_shape_are_refused():
    class PerDimension(LinearGaussian):
        def log_likelihood(self, features, images):
            return features

    with pytest.raises(
        ValueError, match=r"log_likelihood: expected finite nats of shape \(1,\), one per image, got shape \(1, 3\)"
    ):
        log_likelihood_bound(DiffusionEBMPrior(PerDimension(3), energy=[Quadratic(3)]), torch.rand(2, 1, 1, 3))


@pytest.mark.parametrize(
    "langevin",
    [
        LangevinConfig(kernel_at_top=False),
        LangevinConfig(step_size=1e-5, integrator="euler", step_rule="published"),
    ],
)
def test_priors_that_are_no_joint_density_are_refused(langevin):
    prior = DiffusionEBMPrior(
        LinearGaussian(2), schedule=DiffusionSchedule.ddpm(3), energy=[Quadratic(2)], langevin=langevin
    )
    for call in (
        lambda: log_normalizer(prior, torch.zeros(1, 2), 0),
        lambda: log_likelihood_bound(prior, torch.rand(1, 1, 1, 2)),
    ):
        with pytest.raises(ValueError, match="expected step_rule='relative' and kernel_at_top=True, got"):
            call()


def test_wrong_arguments_are_refused():
    prior = quadratic_prior(2)
    with pytest.raises(ValueError, match=r"u: expected shape \(N, 2\)"):
        log_normalizer(prior, torch.zeros(3, 5), 0)
    with pytest.raises(ValueError, match="t: expected levels 0..2"):
        log_normalizer(prior, torch.zeros(3, 2), 3)
    with pytest.raises(ValueError, match="u: expected one state per u_next, 3, got 4"):
        log_normalizer(prior, torch.zeros(3, 2), 0, u=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="chunk_size: expected a positive integer, got 0"):
        log_normalizer(prior, torch.zeros(3, 2), 0, chunk_size=0)
    for settings, message in (
        ({"steps": 0}, "steps"),
        ({"particles": 0}, "particles"),
        ({"step_size": 0.0}, r"step_size must be positive.*got 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            AnnealingConfig(**settings)


def test_energies_that_are_not_finite_are_reported():
    prior = quadratic_prior(2)
    nn.init.constant_(prior.energies[0].w, torch.inf)
    with pytest.raises(ChainDiverged, match="annealed weights are not finite"):
        log_normalizer(prior, torch.zeros(3, 2), 0, generator=seed(0))
