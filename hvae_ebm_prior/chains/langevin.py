"""Langevin dynamics on the conditional priors.

The target p(u | u_next), proportional to exp(F(T(u), t)) N(u; 0, I) N(u_next; alpha u, sigma^2), is a correction exp F
times a Gaussian of precision lambda = 1 + alpha^2/sigma^2 and mean w u_next, with w = alpha/(sigma^2 lambda). As in Eq.
3, a step s moves u by s grad log p and adds noise of variance 2s. With h the dimensionless step size and s = h/lambda,
every integrator is one affine map with four coefficients per sample, u <- A u + B u_next + C grad F + D xi:

                          A               B            C                D
    exponential           e^-h            (1 - A) w    (1 - A)/lambda   sqrt((1 - A^2)/lambda)
    strang                e^-h            (1 - A) w    A h/lambda       sqrt((1 - A^2)/lambda)
    euler                 1 - s lambda    s lambda w   s                sqrt(2 s)
    leimkuhler-matthews   1 - s lambda    s lambda w   s                sqrt(s/2), with xi + xi of the last step

The first two are exact where F = 0. Strang's steps kick by F and then let the Gaussian part act; the last one of a
chain lets it act for h/2, which makes the whole symmetric. On a quadratic F the stationary variance has an error of
order h, smaller with strang, and none with leimkuhler-matthews (Leimkuhler & Matthews 2013), whose weak order is 2. The
published code takes s = s_t/2 with s_t = b^2 (sigma_bar_t/sigma_bar_0) sigma_{t+1}^2, lets its network f stand for F =
f/s_t and drops the kernel at t = T-1: the `published` step rule.

The top layer's energy is the most curved one, as the top holds most of the prior hole, and the only one whose gradient
needs no walk through the backbone. `top_steps` > 1 therefore moves the top layer by that many shorter steps within each
step, and renews there only the gradient of its own energy: multiple time stepping (r-RESPA, Tuckerman et al. 1992).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..backbone.validation import set_integers
from .graphs import Keep
from .schedule import DiffusionSchedule
from .streams import CounterStreams, Streams

Integrator = Literal["exponential", "strang", "euler", "leimkuhler-matthews"]
Start = Literal["next", "gaussian"]
StepRule = Literal["relative", "published"]
# Of a state, and of whatever else differs between chains alike.
Gradient = Callable[..., Tensor]
# Parts of the dimensions that move with noise of their own: all of them, or those below the top layer, and the top
# layer's shorter steps.
BELOW, TOP = 0, 1


class ChainDiverged(FloatingPointError):
    """A Langevin chain left the finite numbers."""


@dataclass(frozen=True)
class LangevinConfig:
    """How a conditional prior is sampled.

    Attributes:
        steps: Langevin steps K per noise level.
        step_size: h, in relaxation times of the Gaussian part (`relative`), or b^2 (`published`).
        integrator: "exponential", "strang", "leimkuhler-matthews", or "euler" as in Eq. 3.
        start: where the chain starts: "next" at u_{t+1}, "gaussian" at an exact draw of the Gaussian part.
        step_rule: "relative" (s = h/lambda), or "published", for euler only: the published code's step with its scaling
            F = f/s_t.
        drift_limit: largest length of the drift C grad F, in units of D^(1/4) standard deviations of the step's noise.
            Where F is too curved for the step size, a chain overshoots further at every step; this bounds it and is
            idle otherwise.
        top_steps: shorter steps of the top layer within each step; 1 for none.
        sampling_steps: steps per noise level in sampling; None takes `steps`.
        corrector_steps: steps with a Metropolis test after each chain, which take away the error of the others; see
            `metropolis`. 0 for none.
        kernel_at_top: keep the term N(u_T; alpha u_{T-1}, sigma^2) at t = T-1; the published code drops it.
    """

    steps: int = 5
    step_size: float = 0.3
    integrator: Integrator = "exponential"
    start: Start = "gaussian"
    step_rule: StepRule = "relative"
    drift_limit: float = 1.0
    top_steps: int = 1
    sampling_steps: int | None = None
    corrector_steps: int = 0
    kernel_at_top: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("integrator", Integrator), ("start", Start), ("step_rule", StepRule)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        set_integers(self, {"steps": 1, "top_steps": 1, "sampling_steps": 1, "corrector_steps": 0})
        if not self.drift_limit > 0:
            raise ValueError(f"drift_limit must be positive, got {self.drift_limit!r}")
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, got {self.step_size!r}")
        if self.integrator in ("euler", "leimkuhler-matthews") and self.step_rule == "relative" and self.step_size >= 2:
            raise ValueError(
                f"{self.integrator} is unstable at a relative step_size of 2 and above, got {self.step_size}; "
                "use exponential or a smaller step"
            )
        if self.step_rule == "published" and (self.top_steps > 1 or self.corrector_steps):
            raise ValueError("the published step rule has no top_steps and corrector_steps; leave them at 1 and 0")
        if self.step_rule == "published" and self.integrator != "euler":
            raise ValueError(f"the published step rule belongs to the euler integrator, got {self.integrator}")

    @property
    def adds_last_noise(self) -> bool:
        """Whether a step adds the noise of the step before to its own."""
        return self.integrator == "leimkuhler-matthews"


def gaussian_part(
    t: Tensor, schedule: DiffusionSchedule, config: LangevinConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gaussian factor N(u; w u_next, 1/lambda) of the conditional priors at levels `t`.

    Args:
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: the settings; only `kernel_at_top` matters.
        dtype: dtype of the result.

    Returns:
        Weight w = alpha/(sigma^2 lambda) and precision lambda = 1 + alpha^2/sigma^2, each (N,).
    """
    levels = schedule.on(t.device, dtype)
    alpha, sigma = levels.alpha[t + 1], levels.sigma[t + 1]
    if not config.kernel_at_top:
        alpha = torch.where(t == schedule.steps - 1, 0.0, alpha)
    precision = 1 + (alpha / sigma) ** 2
    return alpha / (sigma**2 * precision), precision


def published_step(t: Tensor, schedule: DiffusionSchedule, config: LangevinConfig, dtype: torch.dtype) -> Tensor:
    """The published code's step s_t = b^2 (sigma_bar_t/sigma_bar_0) sigma_{t+1}^2, (N,), at levels `t` (N,)."""
    levels = schedule.on(t.device, dtype)
    return config.step_size * (levels.sigma_bar[t] / levels.sigma_bar[0]) * levels.sigma[t + 1] ** 2


def langevin_coefficients(
    t: Tensor,
    schedule: DiffusionSchedule,
    config: LangevinConfig,
    dtype: torch.dtype,
    *,
    share: int = 1,
    last: bool = False,
) -> Tensor:
    """Coefficients A, B, C, D of the update at levels `t`; see the module's text.

    Args:
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: integrator and step size.
        dtype: dtype of the coefficients.
        share: number of shorter steps that the relative step size h is divided into.
        last: whether these are the coefficients of a chain's last step.

    Returns:
        Coefficients (N, 4).
    """
    weight, precision = gaussian_part(t, schedule, config, dtype)
    h = config.step_size / share * torch.ones_like(precision)
    if config.integrator in ("euler", "leimkuhler-matthews"):
        s = published_step(t, schedule, config, dtype) / 2 if config.step_rule == "published" else h / precision
        noise = (2 * s).sqrt() if config.integrator == "euler" else (s / 2).sqrt()
        return torch.stack((1 - s * precision, s * weight * precision, s, noise), dim=1)
    time = h / 2 if config.integrator == "strang" and last else h
    left, moved = torch.exp(-time), -torch.expm1(-time)
    drift = left * h if config.integrator == "strang" else moved
    return torch.stack((left, moved * weight, drift / precision, (-torch.expm1(-2 * time) / precision).sqrt()), dim=1)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def coefficient_table(
    schedule: DiffusionSchedule,
    config: LangevinConfig,
    share: int,
    last: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Coefficients (T, 4) of all levels, kept on the device; arguments as of `langevin_coefficients`."""
    levels = torch.arange(schedule.steps, device="cpu")
    return langevin_coefficients(levels, schedule, config, dtype, share=share, last=last).to(device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def gaussian_table(
    schedule: DiffusionSchedule, config: LangevinConfig, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Weight and precision (T, 2) of all levels, kept on the device; see `gaussian_part`."""
    levels = torch.arange(schedule.steps, device="cpu")
    return torch.stack(gaussian_part(levels, schedule, config, dtype), dim=1).to(device)


def chain_start(
    u_next: Tensor, t: Tensor, schedule: DiffusionSchedule, config: LangevinConfig, streams: Streams
) -> Tensor:
    """Where a chain starts: at `u_next` (N, D), or at an exact draw of the Gaussian part."""
    if config.start == "next":
        return u_next
    weight, precision = gaussian_table(schedule, config, u_next.device, u_next.dtype)[t].split(1, dim=1)
    return weight * u_next + streams.normal(u_next.shape[1]) / precision.sqrt()


class Moves(NamedTuple):
    """The affine maps of a chain's steps.

    Attributes:
        usual: coefficients A, B, C, D (N, 4) of a step.
        last: of the last step.
        short: of a shorter step of the top layer.
        last_short: of the last one of all.
    """

    usual: Tensor
    last: Tensor
    short: Tensor
    last_short: Tensor


def chain_moves(
    t: Tensor, schedule: DiffusionSchedule, config: LangevinConfig, dtype: torch.dtype, top_steps: int
) -> Moves:
    """The moves of a chain at levels `t` (N,), whose top layer takes so many shorter steps within a step."""

    def coefficients(share: int, last: bool) -> Tensor:
        return coefficient_table(schedule, config, share, last, t.device, dtype)[t]

    usual = coefficients(1, False)
    short = usual if top_steps == 1 else coefficients(top_steps, False)
    if config.integrator != "strang":
        return Moves(usual, usual, short, short)
    return Moves(usual, coefficients(1, True), short, coefficients(top_steps, True))


def langevin_steps(
    gradient: Gradient,
    u: Tensor,
    u_next: Tensor,
    moves: Moves,
    config: LangevinConfig,
    streams: Streams,
    held: Tensor | None,
    top: tuple[int, Gradient] | None,
    inputs: Sequence[Tensor] = (),
) -> Tensor:
    """The steps of a chain, each a gradient and one call of the update, and more gradients and calls for `top_steps`.

    Args:
        gradient: grad_u F(T(u), t) as a function of u (N, D) and of `inputs`.
        u: states (N, D); left as they are.
        u_next: states of the noisier level (N, D).
        moves: the steps' coefficients.
        config: the settings.
        streams: the samples' noise.
        held: mask (D,) of dimensions to leave as they are.
        top: number of dimensions of the top layer, and the gradient of its own energy as a function of them and of
            `inputs`; None for steps of all dimensions together.
        inputs: of the gradients, beside the state.

    Returns:
        The new states (N, D).
    """

    def move(place: slice, state: Tensor, g: Tensor, *rest: Tensor, coefficients: Tensor, part: int = BELOW) -> Tensor:
        """One update of some of the dimensions; `rest` is where it goes and what is renewed."""
        return streams.move(
            state,
            u_next[:, place],
            g,
            coefficients,
            part=part,
            previous=config.adds_last_noise,
            held=None if held is None else held[place],
            drift_limit=config.drift_limit,
            out=rest[0] if rest else None,
            renewed=(rest[1], rest[2]) if len(rest) > 1 else None,
        )

    if top is None:
        for step in range(1, config.steps + 1):
            now = moves.last if step == config.steps else moves.usual
            u = move(slice(None), u, gradient(u, *inputs), coefficients=now)
        return u
    split, own_gradient = top
    above, below = slice(split), slice(split, None)
    for step in range(1, config.steps + 1):
        g, new = gradient(u, *inputs), torch.empty_like(u)
        if split < u.shape[1]:
            now = moves.last if step == config.steps else moves.usual
            move(below, u[:, below], g[:, below], new[:, below], coefficients=now)
        # The first of the shorter steps has the whole gradient; of later ones only the top layer's own part is new.
        at_start = own_gradient(u[:, above], *inputs)
        move(above, u[:, above], g[:, above], new[:, above], coefficients=moves.short, part=TOP)
        place = new[:, above]
        for shorter in range(2, config.top_steps + 1):
            own = own_gradient(place, *inputs)
            ends = step == config.steps and shorter == config.top_steps
            now = moves.last_short if ends else moves.short
            move(above, place, g[:, above], place, own, at_start, coefficients=now, part=TOP)
        u = new
    return u


def langevin_chain(
    gradient: Gradient,
    u_next: Tensor,
    t: Tensor,
    *,
    schedule: DiffusionSchedule,
    config: LangevinConfig,
    streams: Streams,
    hold: tuple[Tensor, Tensor] | None = None,
    top: tuple[int, Gradient] | None = None,
    inputs: Sequence[Tensor] = (),
    keep: Keep | None = None,
) -> Tensor:
    """Draw u_t given u_{t+1} by K Langevin steps.

    Args:
        gradient: grad_u F(T(u), t) as a function of u (N, D) and of `inputs`.
        u_next: states of the noisier level (N, D).
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: steps, integrator and start.
        streams: the samples' noise.
        hold: mask (D,) of dimensions to hold, and the states (N, D) to hold them at.
        top: number of dimensions of the top layer, the first of D, and the gradient of its own energy as a function of
            them and of `inputs`; for `top_steps`.
        inputs: tensors that the gradients take beside the state.
        keep: runs the steps from a graph, of which the gradients' `inputs` must then be all that differs between
            chains; see `graphs`. It takes counted noise. None runs them as they are.

    Returns:
        States (N, D), finite.

    Raises:
        ChainDiverged: a state is not finite at the end of the chain.
        ValueError: `keep` with noise of PyTorch's generators.
    """
    streams.begin()
    u = chain_start(u_next, t, schedule, config, streams)
    held = None if hold is None else hold[0]
    if hold is not None:
        u = torch.where(hold[0], hold[1], u)
    if config.top_steps == 1:
        top = None
    moves = chain_moves(t, schedule, config, u.dtype, config.top_steps if top else 1)
    if keep is None:
        u = langevin_steps(gradient, u, u_next, moves, config, streams, held, top, inputs)
    elif isinstance(streams, CounterStreams):

        def steps(u: Tensor, u_next: Tensor, held: Tensor | None, position: Tensor, *rest: Tensor) -> list[Tensor]:
            now, inputs = Moves(*rest[:4]), rest[4:]
            return [langevin_steps(gradient, u, u_next, now, config, streams.at(position), held, top, inputs)]

        (u,) = keep(steps, (u, u_next, held, streams.position(), *moves, *inputs))
        streams.skip(BELOW, config.steps if top is None or top[0] < u.shape[1] else 0)
        streams.skip(TOP, config.steps * config.top_steps if top else 0)
    else:
        raise ValueError(
            'graph: a captured chain needs counted noise; set ExecutionConfig(backend="triton") or "naive", or '
            "graph=False"
        )
    finite = torch.isfinite(u).all(dim=1)
    if not bool(finite.all()):
        raise ChainDiverged(
            f"{int((~finite).sum())} of {len(u)} Langevin chains are not finite after {config.steps} steps at t = "
            f"{sorted(set(t[~finite].tolist()))}; lower LangevinConfig.step_size, or train with a lower learning rate"
        )
    return u
