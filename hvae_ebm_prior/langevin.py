"""Langevin dynamics on the conditional priors.

The target p(u | u_next), proportional to exp(F(T(u), t)) N(u; 0, I) N(u_next; alpha u, sigma^2), is a correction exp F times a Gaussian of
precision lambda = 1 + alpha^2/sigma^2 and mean mu = alpha u_next/(sigma^2 lambda). Our convention is that of Eq. 3: a step s moves u by
s grad log p and adds noise of variance 2s. Every integrator here is one affine map with four coefficients per sample,

    u <- A u + B u_next + C grad F + D xi,     xi ~ N(0, I),

    exponential   A = e^-h       B = (1 - A) alpha/(sigma^2 lambda)   C = (1 - A)/lambda   D = sqrt((1 - A^2)/lambda)     exact where F = 0
    euler         A = 1 - s lambda   B = s alpha/sigma^2              C = s                D = sqrt(2s)

with h the dimensionless step size and s = h/lambda. The published code takes s = s_t/2 with s_t = b^2 (sigma_bar_t/sigma_bar_0) sigma_{t+1}^2,
lets its network f stand for F = f/s_t and drops the kernel at t = T-1: the `published` step rule.

The top layer's energy is the most curved one, as the top holds most of the prior hole, and the only one whose gradient needs no walk through the
backbone. `top_steps` > 1 therefore moves the top layer by that many shorter steps within each step, and renews there only the gradient of its own
energy: multiple time stepping (r-RESPA, Tuckerman et al. 1992).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .schedule import DiffusionSchedule
from .streams import SampleStreams

Integrator = Literal["exponential", "euler"]
Start = Literal["next", "gaussian"]
StepRule = Literal["relative", "published"]
Gradient = Callable[[Tensor], Tensor]


class ChainDiverged(FloatingPointError):
    """A Langevin chain left the finite numbers."""


@dataclass(frozen=True)
class LangevinConfig:
    """How a conditional prior is sampled.

    Attributes:
        steps: Langevin steps K per noise level.
        step_size: h, in relaxation times of the Gaussian part (`relative`), or b^2 (`published`).
        integrator: "exponential", or "euler" as in Eq. 3.
        start: where the chain starts: "next" at u_{t+1}, "gaussian" at an exact draw of the Gaussian part.
        step_rule: "relative" (s = h/lambda), or "published", for euler only: the published code's step with its scaling F = f/s_t.
        drift_limit: largest length of the drift C grad F, in units of D^(1/4) standard deviations of the step's noise. Where F is too curved for
            the step size, a chain overshoots further at every step; this bounds it and is idle otherwise.
        top_steps: shorter steps of the top layer within each step; 1 for none.
        sampling_steps: steps per noise level in sampling; None takes `steps`.
        kernel_at_top: keep the term N(u_T; alpha u_{T-1}, sigma^2) at t = T-1; the published code drops it.
    """

    steps: int = 15
    step_size: float = 0.15
    integrator: Integrator = "exponential"
    start: Start = "next"
    step_rule: StepRule = "relative"
    drift_limit: float = 1.0
    top_steps: int = 1
    sampling_steps: int | None = None
    kernel_at_top: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("integrator", Integrator), ("start", Start), ("step_rule", StepRule)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        counts = {"steps": self.steps, "top_steps": self.top_steps, "sampling_steps": 1 if self.sampling_steps is None else self.sampling_steps}
        for name, steps in counts.items():
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"{name} must be a positive integer, got {steps!r}")
        if not self.drift_limit > 0:
            raise ValueError(f"drift_limit must be positive, got {self.drift_limit!r}")
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, got {self.step_size!r}")
        if self.integrator == "euler" and self.step_rule == "relative" and self.step_size >= 2:
            raise ValueError(f"euler is unstable at a relative step_size of 2 and above, got {self.step_size}; use exponential or a smaller step")
        if self.step_rule == "published" and self.top_steps > 1:
            raise ValueError("the published step rule has no top_steps; leave it at 1")
        if self.step_rule == "published" and self.integrator != "euler":
            raise ValueError(f"the published step rule belongs to the euler integrator, got {self.integrator}")


def gaussian_part(t: Tensor, schedule: DiffusionSchedule, config: LangevinConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gaussian factor N(u; w u_next, 1/lambda) of the conditional priors at levels `t`.

    Args:
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: the settings; only `kernel_at_top` matters.
        dtype: dtype of the result.

    Returns:
        Weight w = alpha/(sigma^2 lambda) and precision lambda = 1 + alpha^2/sigma^2, each (N,).
    """
    alpha, sigma = (level.to(t.device, dtype)[t + 1] for level in (schedule.alpha, schedule.sigma))
    if not config.kernel_at_top:
        alpha = torch.where(t == schedule.steps - 1, 0.0, alpha)
    precision = 1 + (alpha / sigma) ** 2
    return alpha / (sigma**2 * precision), precision


def published_step(t: Tensor, schedule: DiffusionSchedule, config: LangevinConfig, dtype: torch.dtype) -> Tensor:
    """The published code's step s_t = b^2 (sigma_bar_t/sigma_bar_0) sigma_{t+1}^2, (N,), at levels `t` (N,)."""
    sigma, sigma_bar = schedule.sigma.to(t.device, dtype), schedule.sigma_bar.to(t.device, dtype)
    return config.step_size * (sigma_bar[t] / sigma_bar[0]) * sigma[t + 1] ** 2


def langevin_coefficients(t: Tensor, schedule: DiffusionSchedule, config: LangevinConfig, dtype: torch.dtype) -> Tensor:
    """Coefficients A, B, C, D of the update at levels `t`; see the module's text.

    Args:
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: integrator and step size.
        dtype: dtype of the coefficients.

    Returns:
        Coefficients (N, 4).
    """
    weight, precision = gaussian_part(t, schedule, config, dtype)
    if config.integrator == "euler":
        s = published_step(t, schedule, config, dtype) / 2 if config.step_rule == "published" else config.step_size / precision
        return torch.stack((1 - s * precision, s * weight * precision, s, (2 * s).sqrt()), dim=1)
    h = torch.full_like(precision, config.step_size)
    moved = -torch.expm1(-h)
    return torch.stack((1 - moved, moved * weight, moved / precision, (-torch.expm1(-2 * h) / precision).sqrt()), dim=1)


def langevin_update(u: Tensor, u_next: Tensor, gradient: Tensor, coefficients: Tensor, noise: Tensor) -> Tensor:
    """One Langevin step, A u + B u_next + C gradient + D noise.

    Args:
        u: states (N, D).
        u_next: states of the noisier level (N, D).
        gradient: grad_u F at `u` (N, D).
        coefficients: A, B, C, D of every sample (N, 4).
        noise: standard normal (N, D).

    Returns:
        The new states (N, D).
    """
    a, b, c, d = coefficients.unsqueeze(2).unbind(1)
    return (a * u).addcmul_(b, u_next).addcmul_(c, gradient).addcmul_(d, noise)


def limited_update(u: Tensor, u_next: Tensor, gradient: Tensor, coefficients: Tensor, drift_limit: float, streams: SampleStreams) -> Tensor:
    """`langevin_update` with a drift no longer than `drift_limit`, and noise from `streams`."""
    dim = u.shape[1]
    longest = drift_limit * dim**0.25 * coefficients[:, 3:4] / coefficients[:, 2:3]
    gradient = gradient * (longest / gradient.norm(dim=1, keepdim=True)).clamp(max=1)
    return langevin_update(u, u_next, gradient, coefficients, streams.normal(dim))


def top_update(
    own_gradient: Gradient, u: Tensor, u_next: Tensor, gradient: Tensor, coefficients: Tensor, config: LangevinConfig, streams: SampleStreams
) -> Tensor:
    """`top_steps` steps of the top layer: of its gradient `gradient` at the first one, the part `own_gradient` is renewed at every later one."""
    at_start = own_gradient(u)
    for step in range(config.top_steps):
        now = gradient if step == 0 else gradient + (own_gradient(u) - at_start)
        u = limited_update(u, u_next, now, coefficients, config.drift_limit, streams)
    return u


def langevin_chain(
    gradient: Gradient,
    u_next: Tensor,
    t: Tensor,
    *,
    schedule: DiffusionSchedule,
    config: LangevinConfig,
    streams: SampleStreams,
    hold: tuple[Tensor, Tensor] | None = None,
    top: tuple[int, Gradient] | None = None,
) -> Tensor:
    """Draw u_t given u_{t+1} by K Langevin steps.

    Args:
        gradient: grad_u F(T(u), t) as a function of u (N, D).
        u_next: states of the noisier level (N, D).
        t: levels (N,) long, 0..T-1.
        schedule: the noise levels.
        config: steps, integrator and start.
        streams: the samples' noise.
        hold: mask (D,) of dimensions to hold, and the states (N, D) to hold them at.
        top: number of dimensions of the top layer, the first of D, and the gradient of its own energy as a function of them; for `top_steps`.

    Returns:
        States (N, D), finite.

    Raises:
        ChainDiverged: a state is not finite at the end of the chain.
    """

    def held(u: Tensor) -> Tensor:
        return u if hold is None else torch.where(hold[0], hold[1], u)

    dim = u_next.shape[1]
    coefficients = langevin_coefficients(t, schedule, config, u_next.dtype)
    u = u_next
    if config.start == "gaussian":
        weight, precision = gaussian_part(t, schedule, config, u_next.dtype)
        u = weight[:, None] * u_next + streams.normal(dim) / precision.sqrt()[:, None]
    u = held(u)
    limit, split = config.drift_limit, (top[0] if top is not None and config.top_steps > 1 else 0)
    fine = langevin_coefficients(t, schedule, replace(config, step_size=config.step_size / config.top_steps), u_next.dtype)
    for _ in range(config.steps):
        g = gradient(u)
        moved = [limited_update(u[:, split:], u_next[:, split:], g[:, split:], coefficients, limit, streams)]
        if top is not None and split:
            moved.insert(0, top_update(top[1], u[:, :split], u_next[:, :split], g[:, :split], fine, config, streams))
        u = held(torch.cat(moved, dim=1))
    finite = torch.isfinite(u).all(dim=1)
    if not bool(finite.all()):
        raise ChainDiverged(
            f"{int((~finite).sum())} of {len(u)} Langevin chains are not finite after {config.steps} steps at t = "
            f"{sorted(set(t[~finite].tolist()))}; lower LangevinConfig.step_size, or train with a lower learning rate"
        )
    return u
