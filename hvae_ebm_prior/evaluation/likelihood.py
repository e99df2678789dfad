"""Likelihood: bounds on log p(x) under the prior, with its normalisers by annealed importance sampling.

As alpha^2 + sigma^2 = 1, p0(u_t) N(u_{t+1}; alpha u_t, sigma^2) = N(u_{t+1}; 0, I) N(u_t; alpha u_{t+1}, sigma^2). So

    p(u_t | u_{t+1}) = exp(F(T(u_t), t)) N(u_t; alpha u_{t+1}, sigma^2) / Z_t(u_{t+1})
    Z_t(u_{t+1}) = E_N exp F(T(u), t)

and with the forward diffusion as posterior of u_1..u_T every Gaussian of the bound on log p(u_0) cancels, draw by draw:

    log p(x) >= E_q [ELBO + sum_t F(T(u_t), t) - log Z_t(u_{t+1})]
    ELBO = log p(x|z) + log p(z) - log q(z|x) of the backbone, z = T(u_0)

log Z: draws of N are carried through exp(beta F) N, beta = 0..1, by Langevin steps with a Metropolis test, and collect
weights w = exp(sum_k (beta_k - beta_{k-1}) F) (Neal 2001). E w = Z, so the log of their mean is in expectation *below*
log Z (`forward`). A path taken back from u_t collects a weight as well, and the log of the mean over it and the others
(`reverse`) is in expectation

- *above* log Z if u_t is an exact draw of p(. | u_{t+1}): bidirectional Monte Carlo (Grosse et al. 2015);
- for any u_t, such that F + log N - `reverse` is *below* the log-density of a sampler that can be run: anneal P + 1
  particles, keep one by its weight. That is the bound of importance weighting (Domke & Sheldon 2018). The sampler tends
  to p as temperatures or particles grow.

Posterior draws are no draws of p, so on images the second point holds: with `reverse` the bound is one on log p(x) of
the annealed sampler, however few the temperatures. With `forward` it lies above what exact normalisers would give. That
both agree is evidence, but no proof, that the bound is also that of the exact p. Neither bounds the density of what the
short chains of `prior.sample` draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..backbone.elbo import backbone_bound, density_adapter
from ..backbone.validation import check_count, check_images, check_levels, check_noise
from ..chains.autograd import walk_values_and_gradient
from ..chains.langevin import ChainDiverged, LangevinConfig, chain_start
from ..chains.metropolis import Proposal, ValueAndGradient, Visit, metropolis_step, plain_proposal
from ..chains.streams import Streams, draw_key, draw_seeds, open_streams, seeded
from ..density.energy_model import EnergyModel, TermsAt
from ..processes import progress_bar


@dataclass(frozen=True)
class AnnealingConfig:
    """How log Z is estimated.

    Attributes:
        steps: temperatures K, each at the cost of one gradient; 1 is plain importance sampling from the Gaussian part.
        particles: forward paths P of every state.
        step_size: h of the Langevin transitions, in relaxation times of the Gaussian part; any is right, an acceptance
            of 0.6 to 0.9 is efficient.
    """

    steps: int = 50
    particles: int = 4
    step_size: float = 0.6

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_count(self.particles, "particles")
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, got {self.step_size!r}")


@dataclass(frozen=True)
class LogNormalizer:
    """Estimates of log Z_t(u_{t+1}) in nats; the module's text says what bounds what.

    Attributes:
        forward: from P forward paths (N,): in expectation below log Z.
        reverse: from these and one path backwards from u_t (N,); NaN where no u_t was given.
        effective_sample_size: of the forward weights (N,), from 1 to P.
        acceptance: mean acceptance probability of the forward paths (N,); NaN with one temperature, which has none.
    """

    forward: Tensor
    reverse: Tensor
    effective_sample_size: Tensor
    acceptance: Tensor


@dataclass(frozen=True)
class LikelihoodBound:
    """Bounds on log p(x) in nats, from one posterior draw of every image.

    Attributes:
        elbo: the backbone's own bound (N,), under its Gaussian prior.
        corrections: F(T(u_t), t) of every level (N, T).
        normalizers: log Z_t(u_{t+1}) of every level, its tensors (N, T).
    """

    elbo: Tensor
    corrections: Tensor
    normalizers: LogNormalizer

    @property
    def gains(self) -> Tensor:
        """What every level adds to the backbone's bound, F - `reverse` (N, T)."""
        return self.corrections - self.normalizers.reverse

    @property
    def lower(self) -> Tensor:
        """Bound (N,) under the prior, in expectation below log p(x) of the annealed sampler."""
        return self.elbo + self.gains.sum(1)

    @property
    def optimistic(self) -> Tensor:
        """Estimate (N,) with `forward` instead, in expectation above the bound with exact normalisers: itself none."""
        return self.elbo + (self.corrections - self.normalizers.forward).sum(1)


def bits_per_dimension(log_likelihood: Tensor, images: Tensor) -> Tensor:
    """-log p(x) / (CHW log 2), (N,), of nats (N,) and their images (N, C, H, W).

    A continuous likelihood is a density over [0, 1]; add 8 to compare it with probabilities of 8-bit pixels.
    """
    return -log_likelihood / (images[0].numel() * math.log(2))


def values_and_gradient(prior: EnergyModel, terms: TermsAt, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """F(T(u), t) (N,) at states `u` (N, D) and levels `t` (N,), and its gradient in u (N, D)."""

    def layer_values(u: Tensor, t: Tensor) -> Tensor:
        return terms(prior.transform.states(u), t)[0]

    return walk_values_and_gradient(layer_values, u, t)


def anneal(
    value_and_gradient: ValueAndGradient,
    u: Tensor,
    u_next: Tensor,
    proposal: Proposal,
    ladder: Sequence[float],
    streams: Streams,
) -> tuple[Tensor, Tensor]:
    """One path of annealed importance sampling per sample.

    Args:
        value_and_gradient: F and grad F as a function of u.
        u: draws (N, D) of the target at the first temperature.
        u_next: states of the noisier level (N, D).
        proposal: the Langevin steps.
        ladder: K + 1 inverse temperatures, from 0 to 1 (forward) or from 1 to 0 (reverse).
        streams: the samples' noise.

    Returns:
        Log-weights sum_k |beta_k - beta_{k-1}| F in nats (N,), and the mean acceptance probability (N,).
    """
    value, gradient = value_and_gradient(u)
    log_weights = abs(ladder[1] - ladder[0]) * value
    accepted = torch.zeros_like(value)
    for beta, following in pairwise(ladder[1:]):

        def tempered(u: Tensor, beta: float = beta) -> tuple[Tensor, Tensor]:
            value, gradient = value_and_gradient(u)
            return beta * value, beta * gradient

        begin = Visit(u, beta * value, beta * gradient)
        end, log_probability = metropolis_step(tempered, begin, u_next, proposal, streams)
        # The test's value and drift are those of beta F; the next temperature takes F.
        u, value, gradient = end.u, end.value / beta, end.drift / beta
        log_weights = log_weights + abs(following - beta) * value
        accepted = accepted + log_probability.exp()
    return log_weights, accepted / (len(ladder) - 2) if len(ladder) > 2 else torch.full_like(accepted, torch.nan)


@torch.no_grad()
def annealed_weights(
    prior: EnergyModel,
    u_next: Tensor,
    t: Tensor,
    key: int,
    annealing: AnnealingConfig,
    chunk_size: int,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-weights and acceptance of P forward paths of every state, (N, P), or of a reverse path from `u`, (N, 1)."""
    # Without a drift limit, as a drift that was cut short could not be scaled to the next temperature.
    config = LangevinConfig(step_size=annealing.step_size, drift_limit=math.inf, start="gaussian")
    ladder = torch.linspace(0, 1, annealing.steps + 1, device="cpu", dtype=torch.float64).tolist()
    if u is not None:
        ladder.reverse()
    paths = annealing.particles if u is None else 1
    total = len(u_next) * paths
    results = []
    with progress_bar(total, "annealed paths") as bar:
        for first in range(0, total, chunk_size):
            samples = range(first, min(first + chunk_size, total))
            streams = open_streams(key, samples, u_next.device, u_next.dtype, prior.execution.backend)
            rows = torch.arange(samples.start, samples.stop, device=u_next.device) // paths
            states, levels = u_next[rows], t[rows]
            start = chain_start(states, levels, prior.schedule, config, streams) if u is None else u[rows]
            proposal = plain_proposal(states, levels, schedule=prior.schedule, config=config)
            with parametrize.cached():
                function = partial(values_and_gradient, prior, prior.terms_at(levels), levels)
                results.append(anneal(function, start, states, proposal, ladder, streams))
            bar.update(len(samples))
    log_weights, acceptance = (
        torch.cat(parts).unflatten(0, (len(u_next), paths)) for parts in zip(*results, strict=True)
    )
    if not bool(torch.isfinite(log_weights).all()):
        raise ChainDiverged(
            "annealed weights are not finite: the energies are not, somewhere; "
            "train them again with a lower learning rate"
        )
    return log_weights, acceptance


def log_normalizer(
    prior: EnergyModel,
    u_next: Tensor,
    t: int | Tensor,
    *,
    u: Tensor | None = None,
    annealing: AnnealingConfig = AnnealingConfig(),
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> LogNormalizer:
    """Annealed importance sampling of log Z_t(u_{t+1}), the normaliser of p(u_t | u_{t+1}); see the module's text.

    Of `prior.execution` only the backend matters: half precision is too coarse for the test's differences of F.

    Args:
        prior: the prior.
        u_next: states u_{t+1} (N, D).
        t: levels, an int or (N,) long in 0..T-1.
        u: states u_t (N, D) for the reverse paths. With exact draws of p(u_t | u_{t+1}), as of simulated data,
            `reverse` is in expectation above log Z; with others, like posterior draws, it is only an estimate of log Z,
            yet still bounds likelihoods.
        annealing: temperatures, particles and step size.
        chunk_size: paths computed at a time; results do not depend on it but for rounding. None bounds the memory by
            the latents' size.
        generator: source of all noise; None takes torch's default generator.

    Returns:
        The estimates.

    Raises:
        TypeError, ValueError: arguments of a wrong type or shape, or a prior with the published step rule or without
            the kernel at the top.
        ChainDiverged: the energies are not finite.
    """
    check_normalised(prior)
    check_noise(u_next, prior.dim, prior.device)
    levels = check_levels(t, len(u_next), prior.schedule.steps, u_next.device)
    chunk_size = prior.samples_per_chunk if chunk_size is None else chunk_size
    chunk_size = check_count(chunk_size, "chunk_size")
    forward_key, reverse_key = draw_key(generator), draw_key(generator)
    forward, acceptance = annealed_weights(prior, u_next, levels, forward_key, annealing, chunk_size)
    reverse = torch.full_like(levels, torch.nan, dtype=forward.dtype)
    if u is not None:
        check_noise(u, prior.dim, prior.device)
        if len(u) != len(u_next):
            raise ValueError(f"u: expected one state per u_next, {len(u_next)}, got {len(u)}")
        backwards, _ = annealed_weights(prior, u_next, levels, reverse_key, annealing, chunk_size, u)
        reverse = log_mean(torch.cat((forward, backwards), dim=1))
    effective = torch.exp(2 * forward.logsumexp(1) - (2 * forward).logsumexp(1))
    return LogNormalizer(log_mean(forward), reverse, effective, acceptance.mean(1))


@torch.no_grad()
def log_likelihood_bound(
    prior: EnergyModel,
    images: Tensor,
    *,
    last_step: bool = False,
    annealing: AnnealingConfig = AnnealingConfig(),
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> LikelihoodBound:
    """Bounds on log p(x), and the backbone's own from the same posterior draws.

    Where the schedule leaves noise at level 0, `prior.sample` still decodes u_0, so the bound takes posterior noise u
    as u_0: valid, but the energy meets states with less noise than it was trained on. With `last_step` the bound is
    that of another model, which draws noise-free u ~ N(alpha_bar_0 u_0, sigma_bar_0^2) after u_0 and decodes that: one
    more level, with F = 0 and u_0 the diffused posterior noise.

    Args:
        prior: the prior; its backbone's adapter must be a `DensityAdapter`.
        images: (N, C, H, W) in [0, 1]; the posterior takes them one by one, so that an image's result does not depend
            on the others.
        last_step: bound the model with a last Gaussian step; no difference where level 0 is noise-free.
        annealing: temperatures, particles and step size.
        chunk_size: as in `log_normalizer`.
        generator: source of all noise; None takes torch's default generator.

    Returns:
        The bounds.

    Raises:
        TypeError: images of a wrong type, or the adapter gives no densities.
        ValueError: images of a wrong shape or range, or as in `log_normalizer`.
        ChainDiverged: the energies are not finite.
    """
    check_normalised(prior)
    check_images(images, prior.backbone)
    density_adapter(prior.backbone)
    schedule = prior.schedule
    images = prior.transform.take(images)
    draws = []
    for image, seed in zip(images.split(1), draw_seeds(len(images), generator), strict=True):
        with seeded(seed, images.device):
            draws.append(backbone_bound(prior.transform, image))
    u, elbo = (torch.cat(parts) for parts in zip(*draws, strict=True))
    u_t = u.to(prior.dtype)
    streams = open_streams(draw_key(generator), range(len(images)), u_t.device, u_t.dtype, prior.execution.backend)
    if last_step:
        u_t = schedule.alpha_bar[0].item() * u_t + schedule.sigma_bar[0].item() * streams.normal(prior.dim)
    corrections = []
    normalizers = []
    for t in range(schedule.steps):
        alpha, sigma = schedule.alpha[t + 1].item(), schedule.sigma[t + 1].item()
        u_next = alpha * u_t + sigma * streams.normal(prior.dim)
        normalizers.append(
            log_normalizer(prior, u_next, t, u=u_t, annealing=annealing, chunk_size=chunk_size, generator=generator)
        )
        corrections.append(-torch.cat([prior.energy(part, t) for part in u_t.split(prior.samples_per_chunk)]))
        u_t = u_next
    names = [field.name for field in fields(LogNormalizer)]
    stacked = LogNormalizer(*(torch.stack([getattr(level, name) for level in normalizers], dim=1) for name in names))
    return LikelihoodBound(elbo, torch.stack(corrections, dim=1), stacked)


def check_normalised(prior: EnergyModel) -> None:
    """Raise ValueError unless the prior's levels are conditionals of one joint density."""
    if prior.langevin.step_rule != "relative" or not prior.langevin.kernel_at_top:
        raise ValueError(
            "a likelihood needs energies that are log-densities, at every level with its kernel: "
            "expected step_rule='relative' and kernel_at_top=True, "
            f"got {prior.langevin.step_rule!r} and {prior.langevin.kernel_at_top}"
        )


def log_mean(log_weights: Tensor) -> Tensor:
    """Log of the mean over particles, (N,), of weights exp `log_weights` (N, P)."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])
