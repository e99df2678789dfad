"""The picture of docs/concepts.md, computed: python docs/make_pictures.py (it takes matplotlib, and some seconds).

The noise that an encoder gives is here a mixture of three Gaussians in two dimensions. Diffused to any level it is such
a mixture again, q_t(u), so the best energies are known, F(u, t) = log q_t(u) - log N(u; 0, I). The library's own chains
follow their gradient.
"""

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from hvae_ebm_prior import DiffusionSchedule, LangevinConfig
from hvae_ebm_prior.chains.langevin import langevin_chain
from hvae_ebm_prior.chains.streams import open_streams

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MEANS = torch.tensor([[1.25, 0.55], [-1.1, 0.8], [-0.1, -1.25]])
STDS = torch.tensor([0.28, 0.33, 0.25])
SCHEDULE = DiffusionSchedule.from_snr([math.inf, 5, 1, 0])
LANGEVIN = LangevinConfig(steps=100, step_size=0.03, start="next")
SIDE, WATCHED = 2.6, 244
GAUSSIAN, OURS = "#5c677d", "#c1121f"


def log_gaussian(u: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """log N(u; mean, std^2 I) in two dimensions."""
    return -((u - mean) ** 2).sum(-1) / (2 * std**2) - torch.as_tensor(2 * math.pi * std**2).log()


def log_data(u: Tensor, t: int) -> Tensor:
    """log q_t(u), of the data's noise diffused to level t."""
    alpha_bar, sigma_bar = SCHEDULE.alpha_bar[t], SCHEDULE.sigma_bar[t]
    std = (alpha_bar**2 * STDS**2 + sigma_bar**2).sqrt()
    return log_gaussian(u[..., None, :], alpha_bar * MEANS, std).logsumexp(-1) - math.log(len(MEANS))


def log_prior(u: Tensor) -> Tensor:
    """log N(u; 0, I)."""
    return log_gaussian(u, 0.0, 1.0)


def gradient_of_correction(u: Tensor, t: int) -> Tensor:
    """grad F(u, t)."""
    u = u.clone().requires_grad_()
    return torch.autograd.grad((log_data(u, t) - log_prior(u)).sum(), u)[0]


def sample(n: int, watched: int) -> tuple[list[Tensor], list[Tensor]]:
    """States u_0..u_T of the conditional priors' chains, each (n, 2), and the way (steps, 2) of one chain through
    levels 0..T-1.
    """
    streams = open_streams(0, range(n), torch.device("cpu"), torch.float32)
    states, ways = [streams.normal(2)], []
    for t in reversed(range(SCHEDULE.steps)):
        way: list[Tensor] = []

        def gradient(u: Tensor, t: int = t, way: list[Tensor] = way) -> Tensor:
            way.append(u[watched])
            return gradient_of_correction(u, t)

        states.insert(
            0,
            langevin_chain(
                gradient, states[0], torch.full((n,), t), schedule=SCHEDULE, config=LANGEVIN, streams=streams
            ),
        )
        ways.insert(0, torch.stack((*way, states[0][watched])))
    return states, ways


def density_of_conditional(u: Tensor, t: int, u_next: Tensor) -> Tensor:
    """p(u_t | u_{t+1}) up to a constant, proportional to exp(F) N(u_t; 0, I) N(u_{t+1}; alpha u_t, sigma^2)."""
    log_density = log_data(u, t) + log_gaussian(u_next - SCHEDULE.alpha[t + 1] * u, 0.0, SCHEDULE.sigma[t + 1])
    return (log_density - log_density.max()).exp()


def main() -> None:
    """Write docs/images/concept.png."""
    line = torch.linspace(-SIDE, SIDE, 241)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    states, ways = sample(300, WATCHED)
    figure, axes = plt.subplots(2, 4, figsize=(11, 6.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for axis in axes.flat:
        axis.set(xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), aspect="equal", xticks=[], yticks=[])

    def shade(axis: Axes, density: Tensor, colours: str) -> None:
        axis.contourf(line, line, density / density.max(), levels=torch.linspace(0.04, 1, 9), cmap=colours)

    shade(axes[0, 0], log_data(grid, 0).exp(), "Blues")
    axes[0, 0].scatter(*states[-1].T, s=6, color=GAUSSIAN, linewidths=0)
    axes[0, 0].set_title("The hole: N(0, I), dots, is not\nwhere the data are, blue", fontsize=10)
    for axis, t in zip(axes[0, 1:], reversed(range(SCHEDULE.steps)), strict=True):
        shade(axis, density_of_conditional(grid, t, states[t + 1][WATCHED]), "Oranges")
        axis.plot(*ways[t].T, color="black", linewidth=0.4, alpha=0.7)
        axis.plot(*states[t + 1][WATCHED], "x", color="black", markersize=8, markeredgewidth=2)
        axis.plot(*states[t][WATCHED], "o", color="black", markersize=6)
        axis.set_title(
            f"$p(u_{t}\\,|\\,u_{t + 1})$ of one sample:\nfrom $u_{t + 1}$, cross, to $u_{t}$, dot", fontsize=10
        )
    for axis, t in zip(axes[1], reversed(range(SCHEDULE.steps + 1)), strict=True):
        shade(axis, log_data(grid, t).exp(), "Blues")
        axis.scatter(*states[t].T, s=6, color=OURS if t < SCHEDULE.steps else GAUSSIAN, linewidths=0)
        axis.set_title(f"$u_{t}$ of all samples" if t < SCHEDULE.steps else "Start: $u_3$ from N(0, I)", fontsize=10)
    figure.savefig(Path(__file__).parent / "images" / "concept.png", dpi=100)


if __name__ == "__main__":
    main()
