"""Pictures as PNG files, by matplotlib, all in one look: figures to draw on, and rows of images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import einops
import torch.nn.functional as F
from torch import Tensor

from .extras import missing

# Colours that the colour-blind can tell apart (Okabe & Ito, 2008), the palest last.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
GREY = "#6b7280"
# Type that can be read where a page shows the picture at two thirds of its size.
LOOK: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "figure.titlesize": 15,
    "image.interpolation": "nearest",
}
DPI = 130


def check_matplotlib() -> None:
    """Raise ImportError, with the extra to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing("pictures need matplotlib", "pictures") from error


@contextmanager
def drawing(
    path: str | Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **settings: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure to draw on, which is written at the end. Neither backend nor settings of the user's matplotlib change.

    Args:
        path: the file to write.
        rows: rows of axes.
        columns: columns of axes.
        size: width and height of the figure in inches.
        **settings: more for `Figure.subplots`, as `sharex`.

    Yields:
        The figure, and its axes as an array (rows, columns).

    Raises:
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=size)
        yield figure, figure.subplots(rows, columns, squeeze=False, **settings)
        figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")


def color(i: int) -> str:
    """The colour of the curve number `i`; after the last one they begin anew."""
    return COLORS[i % len(COLORS)]


def line_style(i: int) -> dict[str, Any]:
    """What tells the curve number `i` from others: its colour, and where colours begin anew, dots for a line."""
    return {"color": color(i), "linestyle": "-:"[i // len(COLORS) % 2]}


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
    path: str | Path,
    rows: Sequence[Tensor],
    names: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    title: str = "",
) -> None:
    """Rows of images.

    Args:
        path: the file to write.
        rows: images (n, C, H, W) in [0, 1] with 1 or 3 channels, one batch per row.
        names: what stands before each row.
        columns: what stands over each column of the first row.
        title: what stands above all.
    """
    height, width = rows[0].shape[-2:]
    length = max(len(row) for row in rows)
    size = 0.75 * length, 0.75 * len(rows) * height / width + 0.3
    with drawing(path, len(rows), size=size, gridspec_kw={"hspace": 0.06}) as (_, axes):
        for axis, row in zip(axes[:, 0], rows, strict=True):
            draw(axis, tile(row, len(row)))
            axis.set(xticks=[], yticks=[], xlim=(-0.5, length * width - 0.5))
        for axis, name in zip(axes[:, 0], names or (), strict=False):
            axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        if columns:
            axes[0, 0].xaxis.tick_top()
            axes[0, 0].set(xticks=[(i + 0.5) * width - 0.5 for i in range(len(columns))], xticklabels=columns)
            axes[0, 0].tick_params(length=0)
        if title:
            axes[0, 0].set_title(title, pad=10)


def draw(axis: Any, picture: Tensor) -> None:
    """A picture (C, H, W) in [0, 1], with 1 or 3 channels, drawn on axes."""
    pixels = picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)
    axis.imshow(pixels.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
