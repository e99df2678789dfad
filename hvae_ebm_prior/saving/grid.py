"""Batches of images as one picture, and rows of images in a PNG file, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import einops
import torch.nn.functional as F
from torch import Tensor

from .extras import missing


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing("pictures need matplotlib", "pictures") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def tile(images: Tensor, columns: int) -> Tensor:
    """A batch as one picture: images from left to right and from top to bottom, as torchvision's make_grid has them.

    Args:
        images: (N, C, H, W).
        columns: images in a row; fewer if N is less.

    Returns:
        Picture (C, rows H, columns W), with zeros for the images that the last row lacks.
    """
    columns = min(columns, len(images))
    filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns))
    return einops.rearrange(filled, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)


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
        draw(axis, tile(row, len(row)))
        axis.set(xticks=[], yticks=[], xlim=(-0.5, length * width - 0.5))
    for axis, name in zip(axes[:, 0], names or (), strict=False):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    if columns:
        axes[0, 0].xaxis.tick_top()
        axes[0, 0].set(xticks=[(i + 0.5) * width - 0.5 for i in range(len(columns))], xticklabels=columns)
    save_figure(path, figure)


def draw(axis: Any, picture: Tensor) -> None:
    """A picture (C, H, W) in [0, 1], with 1 or 3 channels, drawn on axes."""
    pixels = picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)
    axis.imshow(pixels.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a figure, and close it."""
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot().close(figure)
