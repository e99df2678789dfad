"""The Metropolis test against densities written out by hand, closed forms and numerical integration."""

import math

import pytest
import torch
from backbones import Quadratic, RandomBackbone
from helpers import check_moments, seed
from torch.distributions import Normal

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, LangevinConfig, langevin_update
from hvae_ebm_prior.chains.langevin import ChainDiverged, langevin_chain, langevin_coefficients
from hvae_ebm_prior.chains.metropolis import Visit, log_acceptance, metropolis_chain, plain_proposal, propose, visit
from hvae_ebm_prior.chains.streams import SampleStreams, open_streams

SCHEDULE = DiffusionSchedule.ddpm(3)
CPU = torch.device("cpu")


class OneGenerator:
    """Noise of all samples from one generator, for moments of many samples: fast, with the interface of streams."""

    def __init__(self, n, value=0):
        self.n, self.generator = n, seed(value)

    def normal(self, dim):
        return torch.randn(self.n, dim, generator=self.generator)

    def begin(self):
        pass

    def move(self, u, u_next, gradient, coefficients, *, part, previous, **settings):
        assert not previous
        return langevin_update(u, u_next, gradient, coefficients, noise=self.normal(u.shape[1]), **settings)


def quadratic(w, v):
    return lambda u: ((w * u + v * u**2).sum(1), w + 2 * v * u)


def bayes(t, u_next):
    """Mean and precision of the Gaussian part, from N(u; 0, 1) N(u_next; alpha u, sigma^2)."""
    alpha, sigma = SCHEDULE.alpha[t + 1].double(), SCHEDULE.sigma[t + 1].double()
    precision = 1 + alpha**2 / sigma**2
    return alpha * u_next / sigma**2 / precision, precision


@pytest.mark.parametrize("drift_limit", [math.inf, 0.3])
@pytest.mark.parametrize("integrator", ["exponential", "strang", "euler"])
def test_acceptance_is_the_ratio_of_densities(integrator, drift_limit):
    """Both directions, so that min(1, .) hides nothing: their difference is log r, here from the log-densities of
    target and proposals.
    """
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (1, 2, 2)], dtype=torch.float64),
        schedule=SCHEDULE,
        energy=[Quadratic(2, 0.9, -0.8), Quadratic(4, -1.5, 0.4)],
    ).double()
    config = LangevinConfig(step_size=0.6, integrator=integrator, drift_limit=drift_limit)
    g = seed(0)
    u, u_next = (torch.randn(6, 6, dtype=torch.float64, generator=g) for _ in range(2))
    other = u + 0.7 * torch.randn(6, 6, dtype=torch.float64, generator=g)
    t = torch.arange(3).repeat(2)
    a, b, c, d = langevin_coefficients(t, SCHEDULE, config, torch.float64)[:, :, None].unbind(1)
    alpha, sigma = SCHEDULE.alpha.double()[t + 1, None], SCHEDULE.sigma.double()[t + 1, None]

    def value_and_gradient(u):
        u = u.detach().clone().requires_grad_()
        value = -prior.energy(u, t)
        return value.detach(), torch.autograd.grad(value.sum(), u)[0]

    def log_target(u):
        return -prior.energy(u, t).detach() + (
            Normal(0.0, 1.0).log_prob(u) + Normal(alpha * u, sigma).log_prob(u_next)
        ).sum(1)

    def log_step(start, end):
        gradient = value_and_gradient(start)[1]
        drift = c * gradient * torch.clamp(drift_limit * 6**0.25 * d / (c * gradient).norm(dim=1, keepdim=True), max=1)
        return Normal(a * start + b * u_next + drift, d).log_prob(end).sum(1)

    expected = log_target(other) + log_step(other, u) - log_target(u) - log_step(u, other)
    proposal = plain_proposal(u_next, t, schedule=SCHEDULE, config=config)
    here, there = (visit(value_and_gradient, x, proposal) for x in (u, other))
    torch.testing.assert_close(log_acceptance(here, there, proposal), expected.clamp(max=0), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(
        log_acceptance(here, there, proposal) - log_acceptance(there, here, proposal), expected, atol=1e-9, rtol=1e-7
    )
    assert expected.abs().max() > 0.5


@pytest.mark.parametrize("integrator", ["exponential", "euler"])
def test_proposals_are_the_langevin_chains_own_steps(integrator):
    """With the same noise, also where the drift limit acts."""
    config = LangevinConfig(steps=1, step_size=0.7, integrator=integrator, start="next", drift_limit=0.5)
    u, t = SampleStreams([1, 2, 3], CPU, torch.float32).normal(10), torch.arange(3)
    f = quadratic(2.0, -1.5)
    expected = langevin_chain(
        lambda u: f(u)[1], u, t, schedule=SCHEDULE, config=config, streams=SampleStreams([4, 5, 6], CPU, torch.float32)
    )
    proposal = plain_proposal(u, t, schedule=SCHEDULE, config=config)
    proposed = propose(visit(f, u, proposal), u, proposal, SampleStreams([4, 5, 6], CPU, torch.float32))
    torch.testing.assert_close(proposed, expected)


@pytest.mark.parametrize(
    ("integrator", "step_size", "v"),
    [("exponential", 1.0, -0.9), ("exponential", 20.0, -0.3), ("euler", 0.6, -0.9), ("strang", 1.0, -0.9)],
)
def test_stationary_moments_at_a_step_that_is_too_large(integrator, step_size, v):
    """exp(w u + v u^2) N(u; mu, 1/lambda) is Gaussian. The chain without the test is far off, with it exact."""
    n, w, t, u_next = 6000, 0.8, 1, 0.6
    mu, lam = (x.item() for x in bayes(t, torch.tensor(u_next).double()))
    mean, variance = (lam * mu + w) / (lam - 2 * v), 1 / (lam - 2 * v)
    config = LangevinConfig(
        steps=60, step_size=step_size, integrator=integrator, start="gaussian", drift_limit=math.inf
    )
    settings = {"schedule": SCHEDULE, "config": config}
    f, noisier, levels = quadratic(w, v), torch.full((n, 2), u_next), torch.full((n,), t)
    start = mu + OneGenerator(n, 1).normal(2) / lam**0.5
    biased = langevin_chain(lambda u: f(u)[1], noisier, levels, streams=OneGenerator(n), **settings)
    assert abs(biased.var().item() - variance) > 20 * variance * math.sqrt(2 / (2 * n))
    u, acceptance = metropolis_chain(f, start, noisier, levels, steps=60, streams=OneGenerator(n), **settings)
    check_moments(u, mean, variance)
    assert 0.3 < acceptance.mean() < 0.95


@pytest.mark.parametrize(
    ("integrator", "drift_limit"), [("exponential", math.inf), ("exponential", 0.5), ("euler", math.inf)]
)
def test_double_well_against_numerical_integration(integrator, drift_limit):
    """F = 4 u^2 - 1.5 u^4 + .3 u: two wells of unequal weight; moments, and the weight of a well, by the rectangle
    rule.
    """
    n, t, u_next = 6000, 2, 0.3
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    mu, lam = bayes(t, torch.tensor(u_next).double())
    log_density = 4 * grid**2 - 1.5 * grid**4 + 0.3 * grid - lam / 2 * (grid - mu) ** 2
    weight = torch.softmax(log_density, dim=0)

    def value_and_gradient(u):
        return (4 * u**2 - 1.5 * u**4 + 0.3 * u).sum(1), 8 * u - 6 * u**3 + 0.3

    config = LangevinConfig(step_size=0.5, integrator=integrator, drift_limit=drift_limit)
    u, acceptance = metropolis_chain(
        value_and_gradient,
        OneGenerator(n, 1).normal(1).clamp(-1.5, 1.5),
        torch.full((n, 1), u_next),
        torch.full((n,), t),
        schedule=SCHEDULE,
        config=config,
        steps=120,
        streams=OneGenerator(n),
    )
    for function in (lambda x: x, lambda x: x**2, lambda x: (x > 0).double(), lambda x: (x.abs() < 0.5).double()):
        expected = (weight * function(grid)).sum()
        spread = ((weight * function(grid) ** 2).sum() - expected**2).sqrt()
        assert abs(function(u.double()).mean() - expected) < 5 * spread / math.sqrt(n)
    # A well is not a Gaussian about mu: the test must matter.
    assert 0.2 < acceptance.mean() < 0.9


@pytest.mark.parametrize("integrator", ["exponential", "euler", "strang", "leimkuhler-matthews"])
def test_small_steps_are_nearly_always_taken(integrator):
    """The rate of refusals falls with the step, at least like h^(3/2); every factor of 4 must thus bring 8, here at
    least 6.
    """
    n, t = 400, torch.full((400,), 1)
    u, refused = OneGenerator(n, 1).normal(5), []
    for h in (0.16, 0.04, 0.01):
        config = LangevinConfig(step_size=h, integrator=integrator)
        settings = {"schedule": SCHEDULE, "config": config, "steps": 20, "streams": OneGenerator(n)}
        _, acceptance = metropolis_chain(quadratic(0.5, -0.5), u, torch.zeros(n, 5), t, **settings)
        refused.append(1 - acceptance.mean().item())
    assert refused[0] > 6 * refused[1] > 36 * refused[2]
    assert refused[2] < 0.01


@pytest.mark.parametrize("integrator", ["exponential", "strang"])
def test_every_step_is_taken_where_the_step_is_exact(integrator):
    """F = 0, 30,000 dimensions, single precision: probability 1, not nearly 1."""
    t = torch.arange(3)
    settings = {
        "schedule": SCHEDULE,
        "config": LangevinConfig(step_size=0.9, integrator=integrator),
        "steps": 3,
        "streams": OneGenerator(3),
    }
    u = OneGenerator(3, 1).normal(30_000)
    _, acceptance = metropolis_chain(lambda u: (torch.zeros(3), torch.zeros_like(u)), u, u, t, **settings)
    assert torch.equal(acceptance, torch.ones(3))


def test_held_dimensions_are_exact_and_condition_the_others():
    """F = -a b - b^2 / 2 with a held at 2: b is Gaussian of precision lambda + 1 and mean (lambda mu - 2) / (lambda +
    1).
    """
    n, t, u_next = 6000, 1, 0.5
    mu, lam = (x.item() for x in bayes(t, torch.tensor(u_next).double()))

    def value_and_gradient(u):
        a, b = u.unbind(1)
        return -a * b - b**2 / 2, torch.stack((-b, -a - b), dim=1)

    held = torch.full((n, 2), 2.0)
    u, _ = metropolis_chain(
        value_and_gradient,
        OneGenerator(n, 1).normal(2),
        torch.full((n, 2), u_next),
        torch.full((n,), t),
        schedule=SCHEDULE,
        config=LangevinConfig(step_size=1.5, drift_limit=math.inf),
        steps=40,
        streams=OneGenerator(n),
        hold=(torch.tensor([True, False]), held),
    )
    assert torch.equal(u[:, 0], held[:, 0])
    check_moments(u[:, 1], (lam * mu - 2) / (lam + 1), 1 / (lam + 1))


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_samples_do_not_depend_on_the_batch(backend):
    def run(samples):
        t, start = torch.arange(6)[samples] % 3, torch.linspace(-1, 1, 6)[samples, None].expand(-1, 4)
        streams = open_streams(7, range(6)[samples], CPU, torch.float32, backend)
        return metropolis_chain(
            quadratic(1.0, -1.0),
            start,
            start,
            t,
            schedule=SCHEDULE,
            config=LangevinConfig(step_size=1.5),
            steps=8,
            streams=streams,
        )

    u, acceptance = run(slice(0, 6))
    for samples in (slice(0, 2), slice(2, 5), slice(5, 6)):
        part, accepted = run(samples)
        torch.testing.assert_close(part, u[samples], atol=1e-6, rtol=0)
        torch.testing.assert_close(accepted, acceptance[samples], atol=1e-6, rtol=0)
    assert ((acceptance > 0) & (acceptance < 1)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "gradient"])
def test_a_proposal_that_is_not_finite_is_refused(bad, where):
    """F = 0 but not finite beyond u = 1: a truncated normal is left, whose moments are known."""
    n = 6000

    def value_and_gradient(u):
        beyond = torch.where(u > 1, bad, 0.0)
        value, gradient = beyond.sum(1), torch.zeros_like(u) + beyond
        return (value, torch.zeros_like(u)) if where == "value" else (torch.zeros(n), gradient)

    settings = {
        "schedule": DiffusionSchedule.marginal(),
        "config": LangevinConfig(step_size=0.8),
        "steps": 25,
        "streams": OneGenerator(n),
    }
    start = torch.zeros(n, 1)
    u, acceptance = metropolis_chain(value_and_gradient, start, start, torch.zeros(n, dtype=torch.long), **settings)
    assert u.max() <= 1
    assert torch.isfinite(acceptance).all()
    below, density = 0.5 * (1 + math.erf(1 / math.sqrt(2))), math.exp(-0.5) / math.sqrt(2 * math.pi)
    mean = -density / below
    check_moments(u, mean, 1 - density / below - mean**2)


def test_steps_are_taken_as_often_as_their_probability_says():
    """One step of 200,000 samples; among those of a probability near any given one, that share has moved."""
    n = 200_000
    u, t = 2 * OneGenerator(n, 1).normal(2), torch.ones(n, dtype=torch.long)
    settings = {
        "schedule": SCHEDULE,
        "config": LangevinConfig(step_size=1.0, drift_limit=math.inf),
        "steps": 1,
        "streams": OneGenerator(n),
    }
    moved, acceptance = metropolis_chain(quadratic(0.3, -0.9), u, u, t, **settings)
    taken = (moved != u).any(dim=1).double()
    order = acceptance.argsort()
    for tenth in order.chunk(10):
        expected = acceptance[tenth].double()
        assert (
            abs(taken[tenth].mean() - expected.mean())
            < 5 * (expected * (1 - expected)).mean().sqrt() / math.sqrt(len(tenth)) + 1e-4
        )
    assert acceptance.quantile(0.2) < 0.5 < acceptance.quantile(0.8)


def test_energies_are_evaluated_once_per_step():
    calls = []

    def value_and_gradient(u):
        calls.append(u)
        return quadratic(0.1, -0.1)(u)

    u, t = torch.zeros(3, 2), torch.arange(3)
    metropolis_chain(
        value_and_gradient, u, u, t, schedule=SCHEDULE, config=LangevinConfig(), steps=5, streams=OneGenerator(3)
    )
    assert len(calls) == 6


def test_a_bad_start_is_reported():
    def value_and_gradient(u):
        return torch.where(u[:, 0] > 0, torch.nan, 0.0), torch.zeros_like(u)

    u, settings = (
        torch.tensor([[0.0], [1.0]]),
        {"schedule": SCHEDULE, "config": LangevinConfig(), "streams": OneGenerator(2)},
    )
    with pytest.raises(
        ChainDiverged, match=r"1 of 2 Metropolis chains start where .* at t = \[2\]; start from a finite chain"
    ):
        metropolis_chain(value_and_gradient, u, u, torch.tensor([0, 2]), steps=1, **settings)
    with pytest.raises(ValueError, match="expected at least one Metropolis step, got 0"):
        metropolis_chain(value_and_gradient, u, u, torch.tensor([0, 2]), steps=0, **settings)


def test_a_step_to_nowhere_has_probability_zero():
    """Also where infinities would cancel to a finite or undefined ratio."""
    proposal = plain_proposal(torch.zeros(1, 2), torch.tensor([1]), schedule=SCHEDULE, config=LangevinConfig())
    now = Visit(torch.zeros(1, 2), torch.tensor([0.5]), torch.zeros(1, 2))
    for value, drift in ((math.nan, 0.0), (math.inf, 0.0), (0.0, math.nan), (math.inf, math.inf)):
        there = Visit(torch.ones(1, 2), torch.tensor([value]), torch.full((1, 2), drift))
        assert log_acceptance(now, there, proposal).item() == -math.inf
