"""Rows of images in a PNG file, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import missing


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing("pictures need matplotlib", "pictures") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_grid(
    path: str | Path, rows: Sequence[Tensor], names: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> None:
    """Rows of images.

    Args:
        path: the file to write.
        rows: images (n, C, H, W) in [0, 1] with 1 or 3 channels, one batch per row.
        names: what stands before each row.
        columns: what stands over each column of the first row.
    """
    plt = pyplot()
    height, width = rows[0].shape[-2:]
    length = max(len(row) for row in rows)
    size = 0.75 * length, 0.75 * len(rows) * height / width
    figure, axes = plt.subplots(len(rows), 1, figsize=(size[0], size[1] + 0.3), squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        strip = torch.cat(list(row.detach().float().cpu().clamp(0, 1)), dim=2).permute(1, 2, 0)
        axis.imshow(strip.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], xlim=(-0.5, length * width - 0.5))
    for axis, name in zip(axes[:, 0], names or (), strict=False):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    if columns:
        axes[0, 0].xaxis.tick_top()
        axes[0, 0].set(xticks=[(i + 0.5) * width - 0.5 for i in range(len(columns))], xticklabels=columns)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
