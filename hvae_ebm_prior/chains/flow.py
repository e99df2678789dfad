"""The probability flow of a diffusion by angles: an ordinary differential equation from noise to data and back.

    u_phi = cos(phi) u + sin(phi) eps,      du/dphi = v(u, phi) = E[cos(phi) eps - sin(phi) u | u_phi]

carries N(0, I) at phi = pi/2 to the density of u at phi = 0 (Song et al. 2021). If data and noise were the same all the
way, a step of d would be the rotation cos(d) u - sin(d) v, with v itself turning to cos(d) v + sin(d) u (DDIM: Song,
Meng & Ermon 2021). What v does beyond that is extrapolated from the step before (two-step Adams-Bashforth, as in
DPM-Solver++ 2M: Lu et al. 2022), which costs no further evaluation. Densities follow by d log p(u_phi) / dphi = -div v.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Where the velocity at pure noise is taken: there, energies are 0 and the tangent that multiplies them is infinite.
LARGEST_ANGLE = math.pi / 2 - 1e-3
# v (N, d) of states u (N, d) at an angle.
Velocity = Callable[[Tensor, float], Tensor]


def follow_flow(velocity: Velocity, u: Tensor, steps: int, stops: Sequence[float] = ()) -> list[Tensor]:
    """Carry pure noise to data, by equal steps of the angle from pi/2 to 0.

    Args:
        velocity: v (N, d) of states and an angle.
        u: pure noise (N, d).
        steps: number of steps, each one evaluation.
        stops: angles in (0, pi/2] at which states are asked for.

    Returns:
        States (N, d) at the angle 0, and at every stop.
    """
    d = math.pi / 2 / steps
    turned: Tensor | None = None
    found = [u] * len(stops)
    for k in range(steps, 0, -1):
        v = velocity(u, k * d)
        beyond = v if turned is None else v + (v - turned) / 2
        for i, stop in enumerate(stops):
            if (k - 1) * d < stop < k * d:
                part = k * d - stop
                found[i] = math.cos(part) * u - math.sin(part) * beyond
        u, turned = math.cos(d) * u - math.sin(d) * beyond, math.cos(d) * v + math.sin(d) * u
        found = [u if math.isclose(stop, (k - 1) * d) else state for stop, state in zip(stops, found, strict=True)]
    return [u, *found]


def flow_density(
    velocity_and_divergence: Callable[[Tensor, float], tuple[Tensor, Tensor]], u: Tensor, start: float, steps: int
) -> Tensor:
    """Log-density of states at an angle, by carrying them to pure noise (Runge-Kutta of fourth order).

    Args:
        velocity_and_divergence: v (N, d) of states and an angle, and its divergence (N,).
        u: states (N, d) at the angle `start`.
        start: their angle.
        steps: number of steps, each four evaluations.

    Returns:
        log p(u) in nats, (N,).
    """
    d = (math.pi / 2 - start) / steps
    gained = torch.zeros_like(u[:, 0])
    for k in range(steps):
        angle = start + k * d
        v1, g1 = velocity_and_divergence(u, angle)
        v2, g2 = velocity_and_divergence(u + d / 2 * v1, angle + d / 2)
        v3, g3 = velocity_and_divergence(u + d / 2 * v2, angle + d / 2)
        v4, g4 = velocity_and_divergence(u + d * v3, angle + d)
        u = u + d / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        gained = gained + d / 6 * (g1 + 2 * g2 + 2 * g3 + g4)
    return gained - (u.square().sum(1) + u.shape[1] * math.log(2 * math.pi)) / 2
