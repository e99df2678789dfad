"""Pictures, written as PNG files by matplotlib: the states of chains, their energies and pixels over the steps, scores
of outliers, and the progress of training.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..density.energy_model import EnergyModel
from ..saving.grid import COLORS, GREY, color, draw, drawing, line_style, tile
from .transitions import Transitions, pixel_statistics

PIXEL_NAMES = ("mean", "std", "share saturated")


# Bars of a histogram, at the least and at the most.
BARS = 6, 30
# Share of the height that the names of two lines need between them.
SPACING = 0.055


@torch.no_grad()
def save_strips(path: str | Path, prior: EnergyModel, run: Transitions) -> None:
    """One row of decoded states per sample, in time from left to right.

    Args:
        path: the file to write.
        prior: the prior of the run.
        run: the run.
    """
    states = run.states.flip(0)
    levels, times, samples = states.shape[:3]
    columns = levels * times
    images = torch.stack([prior.decode(u) for u in states.flatten(0, 1)], dim=1)
    height, width = images.shape[-2:]
    with drawing(path, size=(0.6 * columns + 0.6, 0.6 * samples * height / width + 0.6)) as (_, axes):
        axis = axes[0, 0]
        draw(axis, tile(images.flatten(0, 1), columns))
        axis.set(
            xticks=[(i + 0.5) * width - 0.5 for i in range(columns)],
            xticklabels=[f"{step}" for step in run.shown.tolist()] * levels,
            yticks=[],
            xlabel="Langevin steps taken at each level of noise",
        )
        for i in range(1, levels):
            axis.axvline(i * times * width - 0.5, color=COLORS[1], linewidth=2)
        above = axis.secondary_xaxis("top")
        above.set(
            xticks=[(i + 0.5) * times * width for i in range(levels)],
            xticklabels=[level_name(t, levels) for t in reversed(range(levels))],
        )


def level_name(t: int, levels: int) -> str:
    """A noise level for the eye."""
    ends = {levels - 1: ", from pure noise", 0: ", to the samples"}
    return f"level t = {t}{ends.get(t, '')}"


def save_energies(path: str | Path, run: Transitions) -> None:
    """Every layer's energy over the steps, mean and quartiles over samples, and the acceptance probability below.

    Args:
        path: the file to write.
        run: the run.
    """
    levels, length, _, layers = run.energies.shape
    with drawing(path, layers + 1, size=(9, 1.8 * (layers + 1)), sharex=True) as (_, axes):
        for i, axis in enumerate(axes[:-1, 0]):
            for place, t in enumerate(reversed(range(levels))):
                energies = run.energies[t, :, :, i].float().cpu()
                steps = range(place * (length - 1), place * (length - 1) + length)
                low, high = energies.quantile(energies.new_tensor([0.25, 0.75]), dim=1).tolist()
                axis.fill_between(steps, low, high, alpha=0.3, color=color(i), linewidth=0)
                axis.plot(steps, energies.mean(1).tolist(), color=color(i))
            axis.set_ylabel(f"layer {i}, nats")
        axes[0, 0].set_title("Energies of the layers, and acceptance", pad=24)
        draw_records(axes[-1, 0], run, run.acceptance.mean(2), GREY, "")
        axes[-1, 0].set(ylabel="acceptance", ylim=(0, 1.05))
        finish(axes[:, 0], run)


def save_pixels(path: str | Path, run: Transitions, *, reference: Tensor | None = None) -> None:
    """Mean, std and share of saturated pixels over the steps, and those of reference images as dashed lines.

    Args:
        path: the file to write.
        run: the run.
        reference: images (M, C, H, W) in [0, 1].
    """
    means = [] if reference is None else pixel_statistics(reference).mean(0).tolist()
    with drawing(path, size=(9, 4)) as (_, axes):
        axis = axes[0, 0]
        for i, name in enumerate(PIXEL_NAMES):
            draw_records(axis, run, run.pixels[..., i].mean(2), color(i), name)
            if means:
                axis.axhline(means[i], color=color(i), linestyle="--", linewidth=1)
        axis.set(ylim=(0, 1), ylabel="pixels" + (" (dashed: real images)" if means else ""))
        axis.legend()
        finish([axis], run)


def draw_records(axis: Any, run: Transitions, values: Tensor, shade: str, label: str) -> None:
    """Values (T, R) at the recorded steps of each level."""
    length = run.energies.shape[1] - 1
    for place, level in enumerate(values.flip(0).float().cpu()):
        steps = (place * length + run.recorded).tolist()
        # One entry in the legend for all levels.
        axis.plot(steps, level.tolist(), color=shade, marker=".", label=label if place == 0 else None)


def finish(axes: Sequence[Any], run: Transitions) -> None:
    """Level boundaries and names."""
    levels = run.energies.shape[0]
    length = run.energies.shape[1] - 1
    for axis in axes:
        for place in range(1, levels):
            axis.axvline(place * length, color="0.6", linewidth=0.8)
    for place, t in enumerate(reversed(range(levels))):
        axes[0].annotate(f"t = {t}", ((place + 0.5) / levels, 1.02), xycoords="axes fraction", ha="center")
    axes[-1].set(xlabel="Langevin steps", xlim=(0, levels * length))


def save_curves(path: str | Path, curves: Mapping[str, Sequence[float]]) -> None:
    """AUROC over the cut k, one curve per scheme.

    Args:
        path: the file to write.
        curves: AUROC of every cut by scheme.
    """
    with drawing(path, size=(6, 4)) as (_, axes):
        axis = axes[0, 0]
        for i, (name, values) in enumerate(curves.items()):
            axis.plot(range(len(values)), values, marker="o", label=name, **line_style(i))
        axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axis.annotate("chance", (0.01, 0.5), xycoords=("axes fraction", "data"), va="bottom", color=GREY)
        cuts = max(len(values) for values in curves.values())
        axis.set(xlabel="lower layers left out, k", ylabel="AUROC", ylim=(0, 1.02), xticks=range(cuts))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def save_histograms(
    path: str | Path, scores: Tensor, outliers: Tensor, names: tuple[str, str] = ("data", "outliers")
) -> None:
    """Histograms of scores, one panel per cut k, of as many bars as the number of scores can fill.

    Args:
        path: the file to write.
        scores: of the data (N, L).
        outliers: of outliers (M, L).
        names: what they are.
    """
    cuts = scores.shape[1]
    # Rice's rule. Both sets are counted by the same bars; single scores far out are counted in the last ones.
    bars = round(2 * min(len(scores), len(outliers)) ** (1 / 3))
    bars = max(BARS[0], min(BARS[1], bars))
    both = torch.cat((scores, outliers)).float().cpu()
    ends = both.quantile(both.new_tensor([0.01, 0.99]), dim=0)
    with drawing(path, 1, cuts, size=(3.6 * cuts, 3)) as (figure, axes):
        for k, axis in enumerate(axes[0]):
            low, high = ends[:, k].tolist()
            step = (high - low or 1) / bars
            edges = [low + step * bar for bar in range(bars + 1)]
            for i, (values, name) in enumerate(zip((scores, outliers), names, strict=True)):
                within = values[:, k].float().cpu().clamp(edges[0], edges[-1]).numpy()
                axis.hist(within, bins=edges, density=True, alpha=0.6, color=color(i), label=name)
                axis.hist(within, bins=edges, density=True, histtype="step", color=color(i))
            top = cuts - 1 - k
            layers = "all layers" if k == 0 else f"layers 0 to {top}" if top else "the top layer"
            axis.set(title=f"{layers} (k = {k})", xlabel="score, nats", yticks=[])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def save_progress(
    path: str | Path,
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    levels: Mapping[str, float],
    ylabel: str,
) -> None:
    """Quality against training time: a line per run, one colour and kind of line per prior.

    Args:
        path: the file to write.
        curves: (seconds, distance) on the way, one sequence per run, by prior.
        levels: distances to draw as dashed lines, by name.
        ylabel: what the distance is.
    """
    with drawing(path, size=(8, 5)) as (_, axes):
        from matplotlib.ticker import LogLocator

        axis = axes[0, 0]
        for i, (name, runs) in enumerate(curves.items()):
            for j, run in enumerate(runs):
                seconds, distances = zip(*run, strict=True)
                label = name if j == 0 else None
                axis.plot(seconds, distances, marker=".", label=label, **line_style(i))
        for value in levels.values():
            axis.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axis.set(xlabel="training, seconds", ylabel=ylabel, yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.get_ylim()  # which scales the axis to what is drawn
        heights = axis.transAxes.inverted().transform(axis.transData.transform([(1, y) for y in levels.values()]))[:, 1]
        for name, height, place in zip(levels, heights, spread(heights.tolist(), SPACING), strict=True):
            axis.annotate(
                name,
                (1, height),
                (1.04, place),
                xycoords="axes fraction",
                textcoords="axes fraction",
                va="center",
                color=GREY,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
            )
        if curves:  # where only what needs no training was compared, there are none
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)


def spread(heights: Sequence[float], spacing: float) -> list[float]:
    """Heights for names, in their order, moved up as far as it takes for `spacing` between them."""
    found = list(heights)
    last = -math.inf
    for i in sorted(range(len(found)), key=found.__getitem__):
        last = found[i] = max(found[i], last + spacing)
    return found
