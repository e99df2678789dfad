"""Pictures, written as PNG files by matplotlib: the states of chains, their energies and pixels over the steps, scores
of outliers, and the progress of training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..density.energy_model import EnergyModel
from ..saving.grid import draw, pyplot, save_figure, tile
from .transitions import Transitions, pixel_statistics

PIXEL_NAMES = ("mean", "std", "share saturated")


@torch.no_grad()
def save_strips(path: str | Path, prior: EnergyModel, run: Transitions) -> None:
    """One row of decoded states per sample, in time from left to right.

    Args:
        path: the file to write.
        prior: the prior of the run.
        run: the run.
    """
    plt = pyplot()
    states = run.states.flip(0)
    levels, times, samples = states.shape[:3]
    columns = levels * times
    images = torch.stack([prior.decode(u) for u in states.flatten(0, 1)], dim=1)
    height, width = images.shape[-2:]
    figure, axis = plt.subplots(figsize=(0.6 * columns + 0.6, 0.6 * samples * height / width + 0.6))
    draw(axis, tile(images.flatten(0, 1), columns))
    axis.set(
        xticks=[(i + 0.5) * width - 0.5 for i in range(columns)],
        xticklabels=[f"{step}" for step in run.shown.tolist()] * levels,
        yticks=[],
        xlabel="steps taken at level t",
    )
    for i in range(1, levels):
        axis.axvline(i * times * width - 0.5, color="tab:red")
    above = axis.secondary_xaxis("top")
    above.set(
        xticks=[(i + 0.5) * times * width for i in range(levels)],
        xticklabels=[f"t = {t}" for t in reversed(range(levels))],
    )
    save_figure(path, figure)


def save_energies(path: str | Path, run: Transitions) -> None:
    """Every layer's energy over the steps, mean and quartiles over samples, and the acceptance probability below.

    Args:
        path: the file to write.
        run: the run.
    """
    plt = pyplot()
    levels, length, _, layers = run.energies.shape
    figure, axes = plt.subplots(layers + 1, 1, figsize=(9, 1.8 * (layers + 1)), sharex=True)
    for i, axis in enumerate(axes[:-1]):
        for place, t in enumerate(reversed(range(levels))):
            energies = run.energies[t, :, :, i].float().cpu()
            steps = range(place * (length - 1), place * (length - 1) + length)
            low, high = energies.quantile(energies.new_tensor([0.25, 0.75]), dim=1).tolist()
            axis.fill_between(steps, low, high, alpha=0.3, color=f"C{i % 10}", linewidth=0)
            axis.plot(steps, energies.mean(1).tolist(), color=f"C{i % 10}")
        axis.set_ylabel(f"layer {i}, nats")
    axes[0].set_title("layer energies and acceptance", pad=20, fontsize="medium")
    draw_records(axes[-1], run, run.acceptance.mean(2), "C7", "")
    axes[-1].set(ylabel="acceptance", ylim=(0, 1.05))
    finish(figure, axes, path, run)


def save_pixels(path: str | Path, run: Transitions, *, reference: Tensor | None = None) -> None:
    """Mean, std and share of saturated pixels over the steps, and those of reference images as dashed lines.

    Args:
        path: the file to write.
        run: the run.
        reference: images (M, C, H, W) in [0, 1].
    """
    plt = pyplot()
    means = [] if reference is None else pixel_statistics(reference).mean(0).tolist()
    figure, axis = plt.subplots(figsize=(9, 4))
    for i, name in enumerate(PIXEL_NAMES):
        draw_records(axis, run, run.pixels[..., i].mean(2), f"C{i}", name)
        if means:
            axis.axhline(means[i], color=f"C{i}", linestyle="--", linewidth=1)
    axis.set(ylim=(0, 1), ylabel="pixels" + (" (dashed: reference)" if means else ""))
    axis.legend()
    finish(figure, [axis], path, run)


def draw_records(axis: Any, run: Transitions, values: Tensor, color: str, label: str) -> None:
    """Values (T, R) at the recorded steps of each level."""
    length = run.energies.shape[1] - 1
    for place, level in enumerate(values.flip(0).float().cpu()):
        steps = (place * length + run.recorded).tolist()
        # One entry in the legend for all levels.
        axis.plot(steps, level.tolist(), color=color, marker=".", label=label if place == 0 else None)


def finish(figure: Any, axes: Any, path: str | Path, run: Transitions) -> None:
    """Level boundaries and names, and the file."""
    levels = run.energies.shape[0]
    length = run.energies.shape[1] - 1
    for axis in axes:
        for place in range(1, levels):
            axis.axvline(place * length, color="0.6", linewidth=0.8)
    for place, t in enumerate(reversed(range(levels))):
        axes[0].annotate(f"t = {t}", ((place + 0.5) / levels, 1.02), xycoords="axes fraction", ha="center")
    axes[-1].set(xlabel="Langevin steps", xlim=(0, levels * length))
    save_figure(path, figure)


def save_curves(path: str | Path, curves: Mapping[str, Sequence[float]]) -> None:
    """AUROC over the cut k, one curve per scheme.

    Args:
        path: the file to write.
        curves: AUROC of every cut by scheme.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, values in curves.items():
        axis.plot(range(len(values)), values, marker="o", label=name)
    axis.axhline(0.5, color="0.6", linestyle="--", linewidth=1)
    cuts = max(len(values) for values in curves.values())
    axis.set(xlabel="lower layers left out, k", ylabel="AUROC", ylim=(0, 1.02), xticks=range(cuts))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(path, figure)


def save_histograms(
    path: str | Path, scores: Tensor, outliers: Tensor, names: tuple[str, str] = ("data", "outliers")
) -> None:
    """Histograms of scores, one panel per cut k.

    Args:
        path: the file to write.
        scores: of the data (N, L).
        outliers: of outliers (M, L).
        names: what they are.
    """
    plt = pyplot()
    cuts = scores.shape[1]
    figure, axes = plt.subplots(1, cuts, figsize=(3.2 * cuts, 2.8), squeeze=False)
    for k, axis in enumerate(axes[0]):
        for values, name in zip((scores, outliers), names, strict=True):
            axis.hist(values[:, k].float().cpu().numpy(), bins=40, density=True, alpha=0.6, label=name)
        axis.set(title=f"k = {k}", xlabel="score, nats", yticks=[])
    axes[0, 0].legend()
    save_figure(path, figure)


def save_progress(
    path: str | Path,
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    levels: Mapping[str, float],
    ylabel: str,
) -> None:
    """Quality against training time: a line per run, one colour per prior.

    Args:
        path: the file to write.
        curves: (seconds, distance) on the way, one sequence per run, by prior.
        levels: distances to draw as dashed lines, by name.
        ylabel: what the distance is.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for i, (name, runs) in enumerate(curves.items()):
        for j, run in enumerate(runs):
            seconds, distances = zip(*run, strict=True)
            label = name if j == 0 else None
            axis.plot(seconds, distances, color=f"C{i % 10}", marker=".", linewidth=1, label=label)
    for name, value in levels.items():
        axis.axhline(value, color="0.6", linestyle="--", linewidth=1)
        place = {"xy": (1.01, value), "xycoords": ("axes fraction", "data"), "va": "center"}
        axis.annotate(name, **place, fontsize="small", color="0.4")
    axis.set(xlabel="training, seconds", ylabel=ylabel, yscale="log")
    if curves:  # where only what needs no training was compared, there are none
        axis.legend(fontsize="small")
    save_figure(path, figure)
