"""The chain against closed forms. Moments of N x D independent draws are compared within five standard errors."""

import math
import weakref
from itertools import pairwise

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone
from helpers import check_moments, seed
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, ExecutionConfig, LangevinConfig, langevin_update
from hvae_ebm_prior.chains.autograd import walk_gradient
from hvae_ebm_prior.chains.langevin import ChainDiverged, gaussian_part, langevin_chain, langevin_coefficients
from hvae_ebm_prior.chains.streams import SampleStreams, draw_seeds, open_streams
from hvae_ebm_prior.density.conditional import draw_conditional

N, D = 500, 40


class ZeroEnergy(nn.Module):
    def forward(self, z, t):
        return 0.0 * z.flatten(1).sum(1)


def streams(n, value=0, dtype=torch.float32):
    return SampleStreams(draw_seeds(n, seed(value)), torch.device("cpu"), dtype)


@pytest.mark.parametrize("t", [0, 1, 2])
@pytest.mark.parametrize("step_size", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("start", ["next", "gaussian"])
@pytest.mark.parametrize("integrator", ["exponential", "strang"])
def test_splittings_are_the_exact_gaussian_at_any_step_size(t, step_size, start, integrator):
    schedule, u_next, steps = DiffusionSchedule.ddpm(3), 1.7, 3
    alpha, sigma = schedule.alpha[t + 1].item(), schedule.sigma[t + 1].item()
    config = LangevinConfig(steps=steps, step_size=step_size, start=start, integrator=integrator)
    u = langevin_chain(
        torch.zeros_like,
        torch.full((N, D), u_next),
        torch.full((N,), t),
        schedule=schedule,
        config=config,
        streams=streams(N),
    )
    # Bayes' rule for u ~ N(0, 1), u_next ~ N(alpha u, sigma^2); then the Ornstein-Uhlenbeck law after a time of `steps
    # * step_size`.
    precision = 1 + alpha**2 / sigma**2
    time = (steps if integrator == "exponential" else steps - 0.5) * step_size  # Strang's last step is half a one
    mean, left = alpha * u_next / sigma**2 / precision, math.exp(-time)
    if start == "gaussian":
        check_moments(u, mean, 1 / precision)
    else:
        check_moments(u, mean + left * (u_next - mean), (1 - left**2) / precision)


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_eulers_stationary_variance_on_a_standard_normal(eta):
    schedule, t = DiffusionSchedule.marginal(), torch.zeros(N, dtype=torch.long)
    config = LangevinConfig(steps=int(10 / eta), step_size=eta, integrator="euler")
    a, b, _, d = langevin_coefficients(t[:1], schedule, config, torch.float64)[0].tolist()
    assert b == 0
    assert d**2 / (1 - a**2) == pytest.approx(1 / (1 - eta / 2), rel=1e-12)
    u = langevin_chain(
        torch.zeros_like, streams(N, 1).normal(D), t, schedule=schedule, config=config, streams=streams(N)
    )
    check_moments(u, 0.0, 1 / (1 - eta / 2))


def variance_of(integrator, h, v, steps, lam):
    """Variance of the chain on exp(v u^2) N(u; 0, 1/lam) after `steps` steps from the Gaussian part, by the recursion
    of a linear map.
    """
    s, e = h / lam, math.exp(-h)
    variance = 1 / lam
    if integrator == "leimkuhler-matthews":
        # Joint second moments of (u, last noise): u' = a u + d (new + last).
        a, d, cross = 1 - s * (lam - 2 * v), math.sqrt(s / 2), 0.0
        for _ in range(steps):
            variance, cross = a * a * variance + 2 * a * d * cross + 2 * d * d, d
        return variance
    for step in range(steps):
        if integrator == "euler":
            factor, noise = 1 - s * (lam - 2 * v), 2 * s
        elif integrator == "exponential":
            factor, noise = e + (1 - e) / lam * 2 * v, (1 - e * e) / lam
        else:
            time = h / 2 if step == steps - 1 else h
            factor, noise = math.exp(-time) * (1 + 2 * v * s), (1 - math.exp(-2 * time)) / lam
        variance = factor**2 * variance + noise
    return variance


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("integrator", ["exponential", "strang", "euler", "leimkuhler-matthews"])
def test_variance_on_a_quadratic_energy(integrator, backend):
    """A large step, so that a wrong coefficient shows: the chain's variance against the recursion of its own
    definition.
    """
    h, v, t, steps, schedule = 0.5, -0.6, 1, 6, DiffusionSchedule.ddpm(3)
    lam = 1 + (schedule.alpha[t + 1] / schedule.sigma[t + 1]).item() ** 2
    config = LangevinConfig(steps=steps, step_size=h, integrator=integrator, start="gaussian", drift_limit=100.0)
    source = open_streams(3, range(N), torch.device("cpu"), torch.float32, backend)
    u = langevin_chain(
        lambda u: 2 * v * u, torch.zeros(N, D), torch.full((N,), t), schedule=schedule, config=config, streams=source
    )
    check_moments(u, 0.0, variance_of(integrator, h, v, steps, lam))


def test_orders_of_the_integrators():
    """Error of the stationary variance on a quadratic energy as the step is halved: of order 1, less of it with Strang,
    and none.
    """
    v, lam = -0.6, 1.7
    errors = {
        name: [abs(variance_of(name, h, v, 400, lam) - 1 / (lam - 2 * v)) for h in (0.1, 0.05)]
        for name in ("exponential", "euler", "strang", "leimkuhler-matthews")
    }
    assert errors["exponential"][0] / errors["exponential"][1] == pytest.approx(2, rel=0.1)
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.15)
    assert all(
        strang < 0.4 * exponential for strang, exponential in zip(errors["strang"], errors["exponential"], strict=True)
    )
    assert errors["leimkuhler-matthews"][0] < 1e-12


def test_leimkuhler_matthews_adds_the_noise_of_the_step_before():
    """Zero energy, counted noise: by hand from the numbers of the counters, and no chain shares its first noise with
    the chain before.
    """
    from hvae_ebm_prior.chains.kernels.noise import philox_normal

    schedule, t = DiffusionSchedule.marginal(), torch.zeros(2, dtype=torch.long)
    config = LangevinConfig(steps=3, step_size=0.4, integrator="leimkuhler-matthews", start="next")
    source = open_streams(9, range(2), torch.device("cpu"), torch.float32, "naive")
    key, used = torch.tensor([9, 0]), []
    for first in (1, 5):
        u = expected = torch.ones(2, 5)
        u = langevin_chain(torch.zeros_like, u, t, schedule=schedule, config=config, streams=source)
        noise = [philox_normal(key, torch.tensor([first + k]), 0, 2, 5) for k in range(4)]
        for before, now in pairwise(noise):
            expected = (1 - 0.4) * expected + math.sqrt(0.4 / 2) * (now + before)
        torch.testing.assert_close(u, expected)
        used += range(first, first + 4)
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("integrator", ["exponential", "leimkuhler-matthews"])
def test_no_noise_is_used_twice(integrator, monkeypatch):
    """Over chains, levels, parts, chunks and the loss: every (first sample, step, stream) at most once per call."""
    import hvae_ebm_prior.chains.streams as module

    seen = []
    update, noise, levels = module.langevin_update, module.drawn_noise, module.philox_levels

    def record(key, step, stream, previous=False):
        steps = [step - 1, step] if previous else [step]
        seen.append([(*key.tolist(), number, stream) for number in steps])

    def updating(*tensors, **arguments):
        number = int(arguments["step"]) + arguments["ahead"]
        record(arguments["key"], number, arguments["stream"], arguments["previous"])
        return update(*tensors, **arguments)

    def drawing(key, step, ahead, stream, *rest):
        record(key, int(step) + ahead, stream)
        return noise(key, step, ahead, stream, *rest)

    def choosing(key, step, stream, n, top):
        record(key, int(step), stream)
        return levels(key, step, stream, n, top)

    monkeypatch.setattr(module, "langevin_update", updating)
    monkeypatch.setattr(module, "drawn_noise", drawing)
    monkeypatch.setattr(module, "philox_levels", choosing)
    langevin = LangevinConfig(steps=3, top_steps=2, start="gaussian", integrator=integrator)
    settings = {"langevin": langevin, "execution": ExecutionConfig(backend="naive")}
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (3,)]), energy=[Quadratic(2, 0.1), Quadratic(3)], **settings)
    prior.sample(4, chunk_size=3, generator=seed(0))
    prior.loss(torch.rand(2, 1, 2, 2), generator=seed(1))
    fresh = [numbers[-1] for numbers in seen]
    assert len(set(fresh)) == len(fresh) > 40
    # What a step takes from the one before is that step's own noise, or, at a chain's first step, noise that nothing
    # else used.
    for numbers in seen:
        if len(numbers) == 2:
            assert sum(numbers[0] == other[-1] for other in seen) <= 1
            assert sum(numbers[0] == other[0] for other in seen if len(other) == 2) == 1


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_samples_do_not_depend_on_chunks_with_any_backend(backend):
    langevin = LangevinConfig(steps=3, integrator="leimkuhler-matthews", step_size=0.1)
    settings = {"langevin": langevin, "execution": ExecutionConfig(backend=backend)}
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (3,)]), energy=[Quadratic(2, 0.1), Quadratic(3, 0.3)], **settings)
    whole = prior.sample(5, generator=seed(0))
    for size in (1, 2):
        torch.testing.assert_close(prior.sample(5, chunk_size=size, generator=seed(0)), whole, atol=1e-6, rtol=0)
    held = torch.randn(5, 2, generator=seed(1))
    u = prior.sample_noise(5, fixed={0: held}, generator=seed(0))
    assert torch.equal(prior.split(u)[0], held)


def test_memory_does_not_grow_with_the_length_of_the_chain():
    """Of the states handed to the gradient, as many are alive at the end of 10 steps as of 1,000."""
    alive = []
    for steps in (10, 1000):
        seen = []

        def gradient(u, seen=seen):
            seen.append(weakref.ref(u))
            return -0.1 * u

        config = LangevinConfig(steps=steps, step_size=0.01, integrator="leimkuhler-matthews")
        settings = {"schedule": DiffusionSchedule.cosine(3), "config": config, "streams": streams(2)}
        langevin_chain(gradient, torch.zeros(2, 3), torch.tensor([0, 1]), **settings)
        alive.append(sum(reference() is not None for reference in seen))
    assert alive[0] == alive[1] <= 2


@pytest.mark.parametrize(
    "config", [LangevinConfig(), LangevinConfig(integrator="euler"), LangevinConfig(step_size=0.7)]
)
def test_drift_is_autograds_gradient_of_the_log_density(config):
    schedule = DiffusionSchedule.ddpm(3)
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (1, 2, 2)], dtype=torch.float64),
        schedule=schedule,
        langevin=config,
        energy=[Quadratic(2, 0.3, -0.2), Quadratic(4, -0.5, 0.1)],
    ).double()
    g = seed(0)
    u, u_next = (torch.randn(3, prior.dim, dtype=torch.float64, generator=g) for _ in range(2))
    t = torch.tensor([0, 1, 2])
    alpha, sigma = schedule.alpha.double()[t + 1, None], schedule.sigma.double()[t + 1, None]
    u.requires_grad_()
    log_p0 = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum()
    log_kernel = torch.distributions.Normal(alpha * u, sigma).log_prob(u_next).sum()
    log_density = -prior.energy(u, t).sum() + log_p0 + log_kernel
    gradient = torch.autograd.grad(log_density, u)[0]
    torch.testing.assert_close(prior.conditional_score(u.detach(), u_next, t), gradient)
    coefficients = langevin_coefficients(t, schedule, config, torch.float64)
    moved = (
        langevin_update(u.detach(), u_next, walk_gradient(prior._total, u, t), coefficients, noise=torch.zeros_like(u))
        - u.detach()
    )
    # C is the step that multiplies grad F; the Gaussian terms must come with the same one.
    torch.testing.assert_close(moved, coefficients[:, 2:3] * gradient, atol=1e-8, rtol=1e-6)
    # And the noise is that of a Langevin step: D^2 = 2 C to first order in the step.
    small = langevin_coefficients(
        t, schedule, LangevinConfig(step_size=1e-4, integrator=config.integrator), torch.float64
    )
    torch.testing.assert_close(small[:, 3] ** 2, 2 * small[:, 2], rtol=1e-3, atol=0)


def test_score_and_layer_energies():
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (3,)], dtype=torch.float64), energy=[Quadratic(2, 0.3, -0.2), Quadratic(3, -0.5, 0.1)]
    ).double()
    u = torch.randn(3, 5, dtype=torch.float64, generator=seed(0), requires_grad=True)
    (expected,) = torch.autograd.grad(-prior.energy(u, 1).sum() - 0.5 * (u**2).sum(), u)
    torch.testing.assert_close(prior.score(u, 1), expected)
    z = prior.to_latents(u)
    by_hand = torch.stack([-(0.3 * z[0] - 0.2 * z[0] ** 2).sum(1), -(-0.5 * z[1] + 0.1 * z[1] ** 2).sum(1)], dim=1)
    torch.testing.assert_close(prior.layer_energies(u, torch.tensor([0, 2, 1])), by_hand)
    torch.testing.assert_close(prior.energy(u, 2), by_hand.sum(1))


@pytest.mark.parametrize("integrator", ["exponential", "euler"])
def test_chain_samples_a_tilted_gaussian(integrator):
    # exp(w u + v u^2) N(u; 0, 1) N(u_next; alpha u, sigma^2) is a Gaussian of precision lambda - 2v and mean (lambda mu
    # + w) / (lambda - 2v).
    w, v, t, u_next, h = 0.8, -0.4, 1, 0.6, 0.05
    config = LangevinConfig(steps=150, step_size=h, integrator=integrator, start="gaussian")
    prior = DiffusionEBMPrior(IdentityBackbone((D,)), energy=[Quadratic(D, w, v)], langevin=config)
    u = draw_conditional(prior, torch.full((N, D), u_next), torch.full((N,), t), streams(N))
    alpha, sigma = prior.schedule.alpha[t + 1].item(), prior.schedule.sigma[t + 1].item()
    gaussian_precision = 1 + alpha**2 / sigma**2
    precision = gaussian_precision - 2 * v
    # Euler with step s widens a Gaussian of precision p to variance 1 / (p (1 - s p / 2)).
    widened = 1 / (1 - h / gaussian_precision * precision / 2) if integrator == "euler" else 1.0
    assert u.mean().item() == pytest.approx((alpha * u_next / sigma**2 + w) / precision, abs=0.025)
    assert u.var().item() == pytest.approx(widened / precision, rel=0.05)


def test_published_rule_is_the_published_update():
    # By hand: u + s/2 (grad log p0 + grad log kernel) + grad f / 2 + sqrt(s) noise, with s = b^2 (sigma_bar_t /
    # sigma_bar_0) sigma_{t+1}^2.
    b2, schedule = 3e-5, DiffusionSchedule.ddpm(3)
    config = LangevinConfig(step_size=b2, integrator="euler", step_rule="published", kernel_at_top=False)
    network = Quadratic(2, 0.3, -0.2)
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), schedule=schedule, langevin=config, energy=[network])
    g = seed(0)
    u, u_next, noise = (torch.randn(3, 2, generator=g) for _ in range(3))
    t = torch.arange(3)
    s = (b2 * schedule.sigma_bar[t] / schedule.sigma_bar[0] * schedule.sigma[t + 1] ** 2)[:, None]
    alpha, sigma = schedule.alpha[t + 1, None], schedule.sigma[t + 1, None]
    kernel = torch.where(t[:, None] < 2, -alpha * (alpha * u - u_next) / sigma**2, 0.0)
    by_hand = u + s / 2 * (kernel - u) + 0.5 * (network.w + 2 * network.v * u).detach() + s.sqrt() * noise
    coefficients = langevin_coefficients(t, schedule, config, torch.float32)
    torch.testing.assert_close(
        langevin_update(u, u_next, walk_gradient(prior._total, u, t), coefficients, noise=noise), by_hand
    )
    # The loss is divided by s_t as well: energies are f / s_t.
    torch.testing.assert_close(prior.energy(u, t), -network(u, t) / s[:, 0])


def test_kernel_can_be_dropped_at_the_top():
    t, schedule = torch.arange(3), DiffusionSchedule.ddpm(3)
    weight, precision = gaussian_part(t, schedule, LangevinConfig(kernel_at_top=False), torch.float32)
    assert weight[2] == 0
    assert precision[2] == 1
    assert (weight[:2] > 0).all()


def test_drift_limit_bounds_a_chain_that_overshoots():
    """F = -50 u^2 at step .5 with C = .4: without the limit each step multiplies u by -40; with it u stays near the
    Gaussian's width.
    """
    settings = {"schedule": DiffusionSchedule.marginal(), "streams": streams(200)}
    t, start = torch.zeros(200, dtype=torch.long), streams(200, 1).normal(D)
    free = langevin_chain(
        lambda u: -100 * u, start, t, config=LangevinConfig(steps=10, step_size=0.5, drift_limit=math.inf), **settings
    )
    bound = langevin_chain(lambda u: -100 * u, start, t, config=LangevinConfig(steps=10, step_size=0.5), **settings)
    assert free.norm(dim=1).min() > 1e10
    assert bound.norm(dim=1).max() < 3 * D**0.5


def test_drift_limit_is_idle_below_the_limit():
    # C = 1 - e^-h and D = sqrt(1 - e^-2h) at lambda = 1; the limit on |C g| is D^(1/4) noise stds.
    h = 0.3
    limit = D**0.25 * math.sqrt(1 - math.exp(-2 * h)) / (1 - math.exp(-h))
    for factor, clipped in ((0.99, False), (1.5, True)):
        direction = torch.full((1, D), factor * limit / D**0.5)
        config = {"schedule": DiffusionSchedule.marginal(), "config": LangevinConfig(steps=1, step_size=h)}
        u = langevin_chain(
            lambda u, d=direction: d, torch.zeros(1, D), torch.zeros(1, dtype=torch.long), streams=streams(1), **config
        )
        still = langevin_chain(
            torch.zeros_like, torch.zeros(1, D), torch.zeros(1, dtype=torch.long), streams=streams(1), **config
        )
        expected = (1 - math.exp(-h)) * direction / (factor if clipped else 1)
        torch.testing.assert_close(u - still, expected, atol=1e-6, rtol=1e-4)


def test_top_steps_of_a_single_layer_are_shorter_steps():
    """Where the top layer is all there is, K steps of n top steps are K n steps of h / n, with the same noise."""
    t, schedule, start = torch.arange(3), DiffusionSchedule.cosine(3), streams(3, 1).normal(D)
    coarse, fine = LangevinConfig(steps=3, step_size=0.4, top_steps=4), LangevinConfig(steps=12, step_size=0.1)
    u = langevin_chain(torch.cos, start, t, schedule=schedule, config=coarse, streams=streams(3), top=(D, torch.cos))
    expected = langevin_chain(torch.cos, start, t, schedule=schedule, config=fine, streams=streams(3))
    torch.testing.assert_close(u, expected)


def test_top_steps_sample_two_coupled_layers():
    """F = -3 a^2 - a b, a the top layer: a Gaussian whose precision matrix is known. The term a b is renewed at whole
    steps only.
    """
    h, t = 0.05, torch.zeros(4000, dtype=torch.long)
    config = LangevinConfig(steps=80, step_size=h, top_steps=5, start="gaussian", drift_limit=math.inf)
    u = langevin_chain(
        lambda u: torch.stack((-6 * u[:, 0] - u[:, 1], -u[:, 0]), dim=1),
        torch.randn(4000, 2, generator=seed(1)),
        t,
        schedule=DiffusionSchedule.marginal(),
        config=config,
        streams=open_streams(0, range(4000), torch.device("cpu"), torch.float32, "naive"),
        top=(1, lambda a: -6 * a),
    )
    expected = torch.linalg.inv(torch.tensor([[7.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(torch.cov(u.T), expected, atol=0.06, rtol=0.05)


def test_top_steps_follow_a_top_layer_that_is_too_curved_for_whole_steps():
    """F = -5 a^2 - b^2 / 2 at step .5: a whole step multiplies a by .6 - 10 * .4 and diverges; 5 top steps do not."""
    t, start, curvature = torch.zeros(500, dtype=torch.long), streams(500, 1).normal(2), torch.tensor([10.0, 1.0])
    settings = {"schedule": DiffusionSchedule.marginal(), "top": (1, lambda a: -10 * a)}
    whole, split = (
        LangevinConfig(steps=steps, step_size=0.5, top_steps=n, drift_limit=math.inf)
        for steps, n in ((100, 1), (40, 5))
    )
    with pytest.raises(ChainDiverged):
        langevin_chain(lambda u: -curvature * u, start, t, config=whole, streams=streams(500), **settings)
    u = langevin_chain(lambda u: -curvature * u, start, t, config=split, streams=streams(500), **settings)
    # The law of the affine map v -> A v - 10 C v + D noise with a step of .1.
    a = math.exp(-0.1)
    assert u[:, 0].var().item() == pytest.approx((1 - a**2) / (1 - (a - 10 * (1 - a)) ** 2), rel=0.2)


def test_only_the_top_layer_is_walked_in_top_steps():
    class Counting(RandomBackbone):
        drawn = 0

        def top_down(self, batch_size):
            coroutine = super().top_down(batch_size)
            gaussian = next(coroutine)
            for _ in self.shapes[1:]:
                z = yield gaussian
                self.drawn += 1
                gaussian = coroutine.send(z)
            yield gaussian

    backbone = Counting([(2,), (3,), (1, 2, 2)])
    langevin = LangevinConfig(steps=6, top_steps=4)
    prior = DiffusionEBMPrior(backbone, langevin=langevin, energy=[Quadratic(2, 0.1), Quadratic(3), Quadratic(4)])
    backbone.drawn = 0
    draw_conditional(prior, torch.zeros(2, 9), torch.zeros(2, dtype=torch.long), streams(2))
    # A walk of three layers sends two latents before it is closed, one of the top layer none.
    assert backbone.drawn == 6 * 2


def test_non_finite_chain_is_reported():
    with pytest.raises(ChainDiverged, match=r"1 of 3 Langevin chains .* at t = \[1\]; lower LangevinConfig.step_size"):
        langevin_chain(
            lambda u: torch.where(torch.arange(3)[:, None] == 1, torch.nan, u),
            torch.zeros(3, 2),
            torch.tensor([0, 1, 2]),
            schedule=DiffusionSchedule.cosine(3),
            config=LangevinConfig(steps=2),
            streams=streams(3),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"integrator": "heun"},
            "integrator: expected one of exponential, strang, euler, leimkuhler-matthews, got 'heun'",
        ),
        ({"start": "zero"}, "start: expected one of next, gaussian"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"sampling_steps": 0}, "sampling_steps must be a positive integer, got 0"),
        ({"top_steps": 0}, "top_steps must be a positive integer, got 0"),
        (
            {"integrator": "euler", "step_rule": "published", "step_size": 1e-5, "top_steps": 2},
            "the published step rule has no top_steps",
        ),
        (
            {"integrator": "euler", "step_rule": "published", "step_size": 1e-5, "corrector_steps": 1},
            "no top_steps and corrector_steps",
        ),
        ({"drift_limit": 0.0}, r"drift_limit must be positive, got 0\.0"),
        ({"integrator": "leimkuhler-matthews", "step_size": 2.5}, "leimkuhler-matthews is unstable"),
        ({"step_size": -0.1}, r"step_size must be positive and finite, got -0\.1"),
        ({"integrator": "euler", "step_size": 2.5}, "unstable"),
        ({"step_rule": "published"}, "belongs to the euler integrator"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LangevinConfig(**settings)


def test_a_corrector_takes_away_the_error_of_large_steps():
    """F = -z^2 with a step of .8 leaves the chain's variance off; Metropolis steps bring 1 / (1 + 2) back."""
    settings = {"schedule": DiffusionSchedule.marginal(), "execution": ExecutionConfig(backend="naive")}
    errors = []
    for corrector_steps in (0, 60):
        langevin = LangevinConfig(steps=60, step_size=0.8, corrector_steps=corrector_steps, drift_limit=math.inf)
        prior = DiffusionEBMPrior(
            IdentityBackbone((2,)), energy=[Quadratic(2, 0.0, -1.0)], langevin=langevin, **settings
        )
        u = prior.sample_noise(4000, generator=seed(0))
        errors.append(abs(u.var().item() - 1 / 3))
    assert errors[0] > 0.05
    assert errors[1] < 0.02


def test_a_corrector_at_a_temperature_and_with_held_layers():
    """At temperature T, v = u / T has the target F(T v) N(v; 0, 1): u is N(0, 1 / (1/T^2 + 2))."""
    langevin = LangevinConfig(steps=30, step_size=0.8, corrector_steps=30, drift_limit=math.inf)
    settings = {
        "schedule": DiffusionSchedule.marginal(),
        "execution": ExecutionConfig(backend="naive"),
        "langevin": langevin,
    }
    prior = DiffusionEBMPrior(IdentityBackbone((2,), (1,)), energy=[Quadratic(2, 0.0, -1.0), Quadratic(1)], **settings)
    held = torch.full((1, 1), 0.7)
    u = prior.sample_noise(4000, fixed={1: held}, temperature=0.7, tempering="before", generator=seed(0))
    assert (u[:, 2] == 0.7).all()
    assert u[:, :2].var().item() == pytest.approx(1 / (1 / 0.49 + 2), rel=0.06)
