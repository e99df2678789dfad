"""The Metropolis test: Langevin steps without their error (MALA: Roberts & Tweedie 1996).

A Langevin chain of finite steps samples a target that is a little off. Every step here is a draw from an affine
Gaussian (see `langevin`),

    q(u' | u) = N(mu + A (u - mu) + C b(u), D^2),     mu = w u_next,     as B = (1 - A) w,

with the drift b = grad F, no longer than `drift_limit` allows. To take it with probability min(1, r) and to stay
otherwise leaves pi(u), proportional to exp F(u) N(u; mu, 1/lambda), exactly invariant at any step size, where with v =
u - mu

    log r = log [pi(u') q(u | u')] / [pi(u) q(u' | u)]
          = F' - F + (lambda - (1 - A^2)/D^2) (|v|^2 - |v'|^2)/2
            + C/D^2 [(v - A v').b' - (v' - A v).b] - C^2/(2 D^2) (|b'|^2 - |b|^2).

The second term is 0 for `exponential` and `strang`, whose steps are reversible where F = 0; for `euler` its factor is s
lambda^2/2. Differences are taken before they are summed, so that nothing large cancels in many dimensions.

The drift limit is a function of the state that a step starts from, so it belongs to b in both directions and the test
stays exact. It keeps chains moving where F is so steep that every step of plain MALA would be refused. Not among the
proposals are `top_steps`, which make a step depend on more than its start, and the doubled noise of
`leimkuhler-matthews`, for which Euler's step stands.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .langevin import BELOW, ChainDiverged, LangevinConfig, gaussian_part, langevin_coefficients
from .schedule import DiffusionSchedule
from .streams import Streams

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Visit:
    """A state, and F and the drift there.

    Attributes:
        u: state (N, D).
        value: F(T(u), t) (N,).
        drift: b(u) (N, D), the gradient no longer than the limit, and 0 where dimensions are held.
    """

    u: Tensor
    value: Tensor
    drift: Tensor


@dataclass(frozen=True)
class Proposal:
    """The affine Gaussian q at given levels.

    Attributes:
        coefficients: A, B, C, D of every sample (N, 4).
        centre: mu = w u_next (N, D).
        defect: lambda - (1 - A^2)/D^2 (N,), 0 where steps without F are reversible.
        longest: largest length of b (N,).
    """

    coefficients: Tensor
    centre: Tensor
    defect: Tensor
    longest: Tensor


def plain_proposal(u_next: Tensor, t: Tensor, *, schedule: DiffusionSchedule, config: LangevinConfig) -> Proposal:
    """The proposal of one plain step of the same integrator and size as a chain's, leimkuhler-matthews's being Euler's.

    Args:
        u_next: states of the noisier level (N, D).
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: integrator, step size and drift limit.

    Returns:
        The proposal.
    """
    if config.integrator == "leimkuhler-matthews":
        config = replace(config, integrator="euler")
    # In double precision, lest the defect of a reversible step be a rounding error times |v|^2; on the CPU, as not all
    # devices have it.
    levels = t.cpu()
    weight, precision = gaussian_part(levels, schedule, config, torch.float64)
    coefficients = langevin_coefficients(levels, schedule, config, torch.float64)
    a, _, c, d = coefficients.unbind(1)
    longest = config.drift_limit * u_next.shape[1] ** 0.25 * d / c
    return Proposal(
        coefficients.to(u_next),
        weight.to(u_next)[:, None] * u_next,
        (precision - (1 - a**2) / d**2).to(u_next),
        longest.to(u_next),
    )


def visit(value_and_gradient: ValueAndGradient, u: Tensor, proposal: Proposal, held: Tensor | None = None) -> Visit:
    """Evaluate F and the drift at a state.

    Args:
        value_and_gradient: F(T(u), t) (N,) and its gradient (N, D) as a function of u (N, D).
        u: state (N, D).
        proposal: the step.
        held: mask (D,) of held dimensions.

    Returns:
        The state, its value and its drift.
    """
    value, gradient = value_and_gradient(u)
    shorter = (proposal.longest / torch.linalg.vector_norm(gradient, dim=1)).clamp(max=1)
    drift = gradient * shorter[:, None].to(gradient)
    return Visit(u, value, drift if held is None else drift.masked_fill(held, 0.0))


def propose(now: Visit, u_next: Tensor, proposal: Proposal, streams: Streams, held: Tensor | None = None) -> Tensor:
    """A draw (N, D) from q(. | u) with the samples' own noise; held dimensions stay.

    Args:
        now: where the step starts.
        u_next: states of the noisier level (N, D).
        proposal: the step.
        streams: the samples' noise.
        held: mask (D,) of held dimensions.

    Returns:
        The proposed states.
    """
    return streams.move(now.u, u_next, now.drift, proposal.coefficients, part=BELOW, previous=False, held=held)


def log_acceptance(now: Visit, proposed: Visit, proposal: Proposal) -> Tensor:
    """Log-probability with which the Metropolis test takes a step.

    Args:
        now: where the step starts.
        proposed: where it leads; both equal in held dimensions.
        proposal: the step.

    Returns:
        log min(1, r) (N,); minus infinity where the value or drift at `proposed` is not finite.
    """
    a, _, c, d = proposal.coefficients.unbind(1)
    v, v_new = now.u - proposal.centre, proposed.u - proposal.centre
    b, b_new = now.drift.to(v), proposed.drift.to(v)
    a_column = a[:, None]
    reversible = proposal.defect / 2 * ((now.u - proposed.u) * (v + v_new)).sum(1)
    linear = c / d**2 * ((v - a_column * v_new) * b_new - (v_new - a_column * v) * b).sum(1)
    square = c**2 / (2 * d**2) * ((b_new - b) * (b_new + b)).sum(1)
    log_ratio = proposed.value - now.value + reversible + linear - square
    finite = torch.isfinite(proposed.value) & torch.isfinite(proposed.drift).all(dim=1) & ~log_ratio.isnan()
    return torch.where(finite, log_ratio.clamp(max=0), -torch.inf)


def metropolis_step(
    value_and_gradient: ValueAndGradient,
    now: Visit,
    u_next: Tensor,
    proposal: Proposal,
    streams: Streams,
    held: Tensor | None = None,
) -> tuple[Visit, Tensor]:
    """One Langevin step, taken or refused.

    Args:
        value_and_gradient: F(T(u), t) (N,) and its gradient (N, D) as a function of u (N, D).
        now: where the step starts.
        u_next: states of the noisier level (N, D).
        proposal: the step.
        streams: the samples' noise, also that of the decisions.
        held: mask (D,) of held dimensions.

    Returns:
        Where it ends, and the log-probability (N,) with which it was taken.
    """
    proposed = visit(value_and_gradient, propose(now, u_next, proposal, streams, held), proposal, held)
    log_probability = log_acceptance(now, proposed, proposal)
    # The logarithm of a uniform number: a standard normal one through its distribution function.
    taken = torch.special.log_ndtr(streams.normal(1)[:, 0]) <= log_probability
    row = taken[:, None]
    end = Visit(
        torch.where(row, proposed.u, now.u),
        torch.where(taken, proposed.value, now.value),
        torch.where(row, proposed.drift, now.drift),
    )
    return end, log_probability


@torch.no_grad()
def metropolis_chain(
    value_and_gradient: ValueAndGradient,
    u: Tensor,
    u_next: Tensor,
    t: Tensor,
    *,
    schedule: DiffusionSchedule,
    config: LangevinConfig,
    steps: int,
    streams: Streams,
    hold: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Langevin steps from `u`, each taken or refused by the Metropolis test; exact for p(u_t | u_{t+1}) at any step
    size.

    Args:
        value_and_gradient: F(T(u), t) (N,) and its gradient (N, D) as a function of u (N, D); evaluated once per step,
            and once before.
        u: where the chain starts (N, D).
        u_next: states of the noisier level (N, D).
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: integrator, step size and drift limit of the proposals; see the module's text.
        steps: number of steps, taken or not.
        streams: the samples' noise, also that of the decisions.
        hold: mask (D,) of dimensions to hold, and the states (N, D) to hold them at.

    Returns:
        States (N, D), finite, and the mean over steps of each sample's acceptance probability (N,).

    Raises:
        ChainDiverged: a start, or F or its gradient there, is not finite.
        ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least one Metropolis step, got {steps}")
    held = None if hold is None else hold[0]
    if hold is not None:
        u = torch.where(hold[0], hold[1], u)
    proposal = plain_proposal(u_next, t, schedule=schedule, config=config)
    now = visit(value_and_gradient, u, proposal, held)
    good = torch.isfinite(now.value) & torch.isfinite(now.u).all(dim=1) & torch.isfinite(now.drift).all(dim=1)
    if not bool(good.all()):
        raise ChainDiverged(
            f"{int((~good).sum())} of {len(u)} Metropolis chains start where the state, the energy or its gradient is "
            f"not finite, at t = {sorted(set(t[~good].tolist()))}; start from a finite chain"
        )
    total = torch.zeros_like(now.value)
    for _ in range(steps):
        now, log_probability = metropolis_step(value_and_gradient, now, u_next, proposal, streams, held)
        total = total + log_probability.exp()
    return now.u, total / steps
