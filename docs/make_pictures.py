"""The pictures of README.md, docs/gallery.md and docs/concepts.md: python docs/make_pictures.py [NAME ...]

writes them to docs/images (--out), all or those named, with matplotlib, in some minutes of one core. They are of the
prior that comes with the repository (--prior), some by the functions that draw examples/conditional.py's own pictures;
`concept` is of no model:

The noise that an encoder gives is there a mixture of three Gaussians in two dimensions. Diffused to any level it is
such a mixture again, q_t(u), so the best energies are known, F(u, t) = log q_t(u) - log N(u; 0, I). The library's own
chains follow their gradient.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, LangevinConfig
from hvae_ebm_prior.chains.langevin import langevin_chain
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.control import interpolate
from hvae_ebm_prior.evaluation.pictures import save_histograms, save_strips
from hvae_ebm_prior.ood import density_scores, detection
from hvae_ebm_prior.saving.grid import COLORS, GREY, draw, drawing, save_grid, tile
from hvae_ebm_prior.transitions import langevin_transitions

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import conditional
from fashion_mnist import load_subset
from quickstart import SHIPPED, load_prior

ROOT = Path(__file__).parent.parent

MEANS = torch.tensor([[1.25, 0.55], [-1.1, 0.8], [-0.1, -1.25]])
STDS = torch.tensor([0.28, 0.33, 0.25])
SCHEDULE = DiffusionSchedule.from_snr([math.inf, 5, 1, 0])
LANGEVIN = LangevinConfig(steps=100, step_size=0.03, start="next")
SIDE, WATCHED = 2.6, 244
OURS = COLORS[3]


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


def shade(axis: Any, line: Tensor, density: Tensor, colours: str) -> None:
    """A density on a square grid of `line` by `line`."""
    axis.contourf(line, line, density / density.max(), levels=torch.linspace(0.04, 1, 9), cmap=colours)


def draw_concept(path: Path) -> None:
    """The prior hole in two dimensions, one sample's chains, and all samples level by level."""
    line = torch.linspace(-SIDE, SIDE, 241)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    states, ways = sample(300, WATCHED)
    with drawing(path, 2, 4, size=(12.5, 7)) as (figure, axes):
        figure.subplots_adjust(wspace=0.06, hspace=0.28)
        for axis in axes.flat:
            axis.set(xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), aspect="equal", xticks=[], yticks=[])
        shade(axes[0, 0], line, log_data(grid, 0).exp(), "Blues")
        axes[0, 0].scatter(*states[-1].T, s=9, color=GREY, linewidths=0)
        axes[0, 0].set_title("The hole: N(0, I), dots,\nis not where data are, blue")
        for axis, t in zip(axes[0, 1:], reversed(range(SCHEDULE.steps)), strict=True):
            shade(axis, line, density_of_conditional(grid, t, states[t + 1][WATCHED]), "Oranges")
            axis.plot(*ways[t].T, color="black", linewidth=0.4, alpha=0.7)
            axis.plot(*states[t + 1][WATCHED], "x", color="black", markersize=8, markeredgewidth=2)
            axis.plot(*states[t][WATCHED], "o", color="black", markersize=6)
            axis.set_title(f"$p(u_{t}\\,|\\,u_{t + 1})$ of one sample:\n$u_{t + 1}$, cross, to $u_{t}$, dot")
        for axis, t in zip(axes[1], reversed(range(SCHEDULE.steps + 1)), strict=True):
            shade(axis, line, log_data(grid, t).exp(), "Blues")
            axis.scatter(*states[t].T, s=9, color=OURS if t < SCHEDULE.steps else GREY, linewidths=0)
            axis.set_title(f"$u_{t}$ of all samples" if t < SCHEDULE.steps else "Start: $u_3$ from N(0, I)")


def draw_before_and_after(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Real images, samples of the Gaussian prior, and of ours, n rows each."""
    count = n * (n - 2)
    with torch.no_grad():
        gaussian = prior.decode(torch.randn(count, prior.dim, generator=g))
    panels = {
        "Real images": (load_subset("test")[0][:count], "black"),
        "Samples of a VAE": (gaussian, GREY),
        "The same VAE, our prior": (prior.sample(count, generator=g), OURS),
    }
    with drawing(path, 1, 3, size=(13.5, 6.4)) as (figure, axes):
        figure.subplots_adjust(wspace=0.04)
        for axis, (title, (images, colour)) in zip(axes[0], panels.items(), strict=True):
            draw(axis, tile(images, n - 2))
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, color=colour, fontsize=15, pad=8)


def draw_hole(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Noise of the encoder, of the Gaussian prior and of ours in two dimensions of the top layer: the two in which the
    encoder's noise is furthest from Gaussian.
    """
    size = math.prod(prior.latent_shapes[0])
    images, held_out = (load_subset(split)[0][: 4 * n] for split in ("train", "test"))
    train, again, test = (prior.encode(each, generator=g)[:, :size] for each in (images, images, held_out))
    gaussian = torch.randn(len(train), size, generator=g)
    # The most active dimensions: those in which images decide most of the variance, which two draws then share.
    active = ((train * again).mean(0) - train.mean(0) * again.mean(0)).topk(6).indices.tolist()
    pair = max(itertools.combinations(active, 2), key=lambda pair: apart(train[:, pair], gaussian[:, pair]))
    ours = prior.sample_noise(n, generator=g)[:, :size]
    panels = (
        ("Before: samples of the Gaussian prior,\nnoise that images have in blue", gaussian[:n], GREY),
        ("After: samples of the learned prior", ours, OURS),
    )
    line = torch.linspace(-3.3, 3.3, 111)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    # A kernel estimate of the encoder's noise, whose kernels are narrow beside the gaps.
    density = log_gaussian(grid[..., None, :], test[:, pair], 0.2).exp().mean(-1)
    with drawing(path, 1, 2, size=(10.5, 5.4)) as (figure, axes):
        figure.subplots_adjust(wspace=0.05)
        for axis, (title, drawn, colour) in zip(axes[0], panels, strict=True):
            shade(axis, line, density, "Blues")
            axis.scatter(*drawn[:, pair].T, s=11, color=colour, linewidths=0)
            axis.set(title=title, xticks=[], yticks=[], xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), aspect="equal")
            axis.set_xlabel(f"dimension {pair[0]} of the top layer")
        axes[0, 0].set_ylabel(f"dimension {pair[1]}")
    for name, drawn in (("Gaussian", torch.randn(len(ours), size, generator=g)), ("ours", ours)):
        print(f"{name}: {apart(test[:, pair], drawn[:, pair]):.2f} apart from the noise of test images")
    print(f"the noise of as many training images: {apart(test[:, pair], train[:n, pair]):.2f}")


def apart(first: Tensor, second: Tensor, bins: int = 8) -> float:
    """Share of two sets of points (N, 2) and (M, 2) by which their histograms differ: 0 for none, 1 for all."""
    ranges = [-3.0, 3.0, -3.0, 3.0]
    counts = (torch.histogramdd(each.contiguous(), bins=[bins, bins], range=ranges).hist for each in (first, second))
    one, other = (count / count.sum() for count in counts)
    return ((one - other).abs().sum() / 2).item()


def draw_hundred(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Samples in the order of the seed, n rows of n."""
    with drawing(path, size=(7.5, 7.5)) as (_, axes):
        draw(axes[0, 0], tile(prior.sample(n * n, generator=g), n))
        axes[0, 0].set(xticks=[], yticks=[])


def draw_nearest(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Samples above the training images nearest to them in squared error."""
    samples, train = prior.sample(2 * n, generator=g), load_subset("train")[0]
    nearest = train[torch.cdist(samples.flatten(1), train.flatten(1)).argmin(1)]
    rows = [row for pair in zip(samples.split(n), nearest.split(n), strict=True) for row in pair]
    save_grid(path, rows, ["samples", "nearest"] * 2)


def draw_interpolated(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Real images at both ends of four rows, and between them the way from one to the other in noise space."""
    real = load_subset("test")[0][:8]
    u = prior.encode(real, generator=g)
    with torch.no_grad():
        frames = torch.stack([prior.decode(step) for step in interpolate(prior, u[::2], u[1::2], n - 2)], dim=1)
    rows = [torch.cat((real[2 * i, None], row, real[2 * i + 1, None])) for i, row in enumerate(frames)]
    save_grid(path, rows, columns=["real", *[""] * (n - 2), "real"])


def draw_chains(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Langevin chains of all layers together."""
    save_strips(path, prior, langevin_transitions(prior, 6, steps=5 * n, generator=g))


def draw_outliers(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Scores of test images, and of others turned upside down."""
    images = load_subset("test")[0]
    data, outliers = images[:n], images[n : 2 * n].flip(2)
    scores, theirs = (density_scores(prior, each, generator=g) for each in (data, outliers))
    save_histograms(path, scores, theirs, ("test images", "upside down"))
    print("AUROC", ", ".join(f"k = {k}: {cut.auroc:.2f}" for k, cut in enumerate(detection(scores, theirs))))


# What is drawn, and how many images, or points, of each kind.
Draw = Callable[[Path, DiffusionEBMPrior, int, torch.Generator], None]
PICTURES: dict[str, tuple[Draw, int]] = {
    "before_and_after": (draw_before_and_after, 8),
    **{name: (draw, 10) for name, draw in conditional.PICTURES.items()},
    "hole": (draw_hole, 600),
    "hundred": (draw_hundred, 10),
    "nearest": (draw_nearest, 10),
    "interpolated": (draw_interpolated, 11),
    "chains": (draw_chains, 20),
    "outliers": (draw_outliers, 300),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("concept", *PICTURES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)} (all)")
    parser.add_argument("--prior", type=Path, default=SHIPPED, help="the folder of a trained prior (%(default)s)")
    parser.add_argument("--count", type=int, help="images, or points, of each kind (as many as the docs show)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True, exist_ok=True)
    prior = None
    for name in args.names or names:
        path = args.out / f"{name}.png"
        if name == "concept":
            draw_concept(path)
        else:
            prior = prior or load_prior(args.prior)
            draw, count = PICTURES[name]
            draw(path, prior, args.count or count, torch.Generator().manual_seed(0))
        print(f"{path} written", flush=True)


if __name__ == "__main__":
    main()
