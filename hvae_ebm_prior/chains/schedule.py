"""Noise schedules of the diffusion in u-space.

A schedule with T steps has T + 1 noise levels t = 0..T, each fixed by its signal-to-noise ratio, which falls from data
to noise:

    u_t = alpha_bar_t u_data + sigma_bar_t eps,   alpha_bar_t^2 = snr_t / (1 + snr_t),   sigma_bar_t^2 = 1 / (1 + snr_t)
    u_t = alpha_t u_{t-1} + sigma_t eps,          alpha_t = alpha_bar_t/alpha_bar_{t-1}, sigma_t^2 = 1 - alpha_t^2

with u_{-1} the data itself (Eq. 5-7 of Cui & Han, 2024). There is one conditional energy-based prior p(u_t | u_{t+1})
for each t = 0..T-1.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.validation import as_integer

# The reverse pass starts from N(0, I), so the last level may keep no more than this signal-to-noise ratio.
LARGEST_LAST_SNR = 0.01


class Levels(NamedTuple):
    """The tensors of a schedule, each (T + 1,); see `DiffusionSchedule` for what they are."""

    alpha: Tensor
    sigma: Tensor
    alpha_bar: Tensor
    sigma_bar: Tensor
    angle: Tensor


@dataclass(frozen=True)
class DiffusionSchedule:
    """Noise levels of the diffusion, from data (t = 0) to noise (t = T).

    Attributes:
        snr: signal-to-noise ratios alpha_bar^2 / sigma_bar^2 of the T + 1 levels, strictly decreasing; the first may be
            infinite (a noise-free level), the last is at most 0.01, usually 0.
    """

    snr: tuple[float, ...]

    def __post_init__(self) -> None:
        snr = tuple(float(value) for value in self.snr)
        object.__setattr__(self, "snr", snr)
        if len(snr) < 2:
            raise ValueError(f"a schedule needs at least 2 signal-to-noise ratios (T = 1), got {len(snr)}")
        if any(math.isnan(value) or value < 0 for value in snr) or any(a <= b for a, b in pairwise(snr)):
            raise ValueError(f"signal-to-noise ratios must be non-negative and strictly decreasing, got {snr}")
        if snr[-1] > LARGEST_LAST_SNR:
            raise ValueError(
                "sampling starts from pure noise, so the last signal-to-noise ratio must be at most "
                f"{LARGEST_LAST_SNR}, got {snr[-1]}; append 0"
            )

    @property
    def steps(self) -> int:
        """Number of steps T, which is also the number of conditional priors."""
        return len(self.snr) - 1

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        snr = torch.tensor(self.snr, device="cpu", dtype=torch.float64)
        alpha_bar = (1 / (1 + 1 / snr)).sqrt()
        sigma_bar = (1 / (1 + snr)).sqrt()
        alpha = torch.cat((alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]))
        # 1 - alpha^2 without its cancellation between two nearly noise-free levels.
        sigma = torch.cat((sigma_bar[:1], ((1 - snr[1:] / snr[:-1]) / (1 + snr[1:])).sqrt()))
        return alpha.float(), sigma.float(), alpha_bar.float(), sigma_bar.float()

    @property
    def alpha(self) -> Tensor:
        """Signal kept by the step into level t, alpha_t, shape (T + 1,)."""
        return self._levels[0]

    @property
    def sigma(self) -> Tensor:
        """Std of the noise added by the step into level t, sigma_t, shape (T + 1,)."""
        return self._levels[1]

    @property
    def alpha_bar(self) -> Tensor:
        """Signal left at level t, shape (T + 1,)."""
        return self._levels[2]

    @property
    def sigma_bar(self) -> Tensor:
        """Std of the noise at level t, shape (T + 1,)."""
        return self._levels[3]

    @property
    def angle(self) -> Tensor:
        """Noise as an angle, from 0 for none to pi/2 for pure noise, u_t = cos(angle_t) u_data + sin(angle_t) eps,
        shape (T + 1,).
        """
        return torch.atan2(self.sigma_bar, self.alpha_bar)

    def on(self, device: torch.device, dtype: torch.dtype) -> Levels:
        """All levels on a device, where they stay: no step of a chain copies them there."""
        place = (device, dtype)
        if place not in self._placed:
            levels = (self.alpha, self.sigma, self.alpha_bar, self.sigma_bar, self.angle)
            with torch.inference_mode(False):
                self._placed[place] = Levels(*(level.to(device, dtype) for level in levels))
        return self._placed[place]

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], Levels]:
        return {}

    @classmethod
    def from_snr(cls, snr: list[float] | tuple[float, ...]) -> "DiffusionSchedule":
        """Schedule with the given signal-to-noise ratios.

        Args:
            snr: T + 1 strictly decreasing values, see `DiffusionSchedule.snr`.

        Returns:
            The schedule.

        Raises:
            ValueError: the list is too short, not decreasing, negative, or does not end near 0.
        """
        return cls(tuple(snr))

    @classmethod
    def cosine(cls, steps: int) -> "DiffusionSchedule":
        """alpha_bar_t = cos(pi t / 2T): level 0 is noise-free and level T pure noise, both exactly.

        Args:
            steps: number of steps T >= 1.

        Returns:
            The schedule.

        Raises:
            ValueError: `steps` is below 1.
        """
        steps = check_steps(steps)
        inner = (math.tan(math.pi * t / (2 * steps)) ** -2 for t in range(1, steps))
        return cls((math.inf, *inner, 0.0))

    @classmethod
    def ddpm(cls, steps: int) -> "DiffusionSchedule":
        """The published code's levels, picked from DDPM's 1000 betas between 1e-4 and 0.02.

        Level 0 carries a little noise (sigma_bar = 0.01). T = 1, where the published code divides by zero, has levels 0
        and 999.

        Args:
            steps: number of steps T, 1 to 500.

        Returns:
            The schedule.

        Raises:
            ValueError: `steps` is below 1 or above 500.
        """
        steps = check_steps(steps)
        if steps > 500:
            raise ValueError(f"the ddpm schedule has room for 500 steps, got {steps}; use cosine")
        stride = 1000 // (2 * (steps - 1)) if steps > 1 else 0
        indices = [*(t * stride for t in range(steps)), 999]
        betas = torch.linspace(1e-4, 0.02, 1000, device="cpu", dtype=torch.float64)
        alpha_bar_squared = torch.cumprod(1 - betas, dim=0)[indices]
        return cls(tuple((alpha_bar_squared / (1 - alpha_bar_squared)).tolist()))

    @classmethod
    def marginal(cls) -> "DiffusionSchedule":
        """One step from data straight to noise: a single marginal prior exp(F(T(u))) p0(u) (Eq. 8).

        Returns:
            The schedule, T = 1 with alpha_1 = 0.
        """
        return cls((math.inf, 0.0))


def check_steps(steps: int) -> int:
    """A number of steps as Python's integer; ValueError unless it is one of at least 1."""
    number = as_integer(steps)
    if number is None or number < 1:
        raise ValueError(f"a schedule needs an integer number of steps of at least 1, got {steps!r}")
    return number
