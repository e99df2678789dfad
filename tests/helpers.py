"""What many tests use: seeds, states and their comparison, moments, and pictures read back."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hvae_ebm_prior import DiffusionSchedule, EnergyConfig
from hvae_ebm_prior.saving.grid import COLORS

IMAGES = torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
# Networks without context, and with it.
SMALL = EnergyConfig(context=False, width=8, vector_width=8)
TINY = EnergyConfig(width=16, vector_width=16)
COSINE = DiffusionSchedule.cosine(3)


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def state(prior: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the prior has learned."""
    return {name: value.clone() for name, value in prior.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names and, bit for bit, equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def check_moments(draws: Tensor, mean: float, variance: float) -> None:
    """Mean and variance of independent normal draws, within five standard errors."""
    n = draws.numel()
    assert abs(draws.mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert abs(draws.var().item() - variance) < 5 * variance * math.sqrt(2 / n)


def read_strips(path: str | Path) -> list[np.ndarray]:
    """The framed pictures in a PNG file that matplotlib wrote, from top to bottom, without frames: (H, W, 3) in [0, 1].

    A picture begins with a dark line, its frame, and ends above the next white one.
    """
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    found, bottom = [], 0
    for top, row in enumerate(pixels.max(2) < 0.35):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], row, [False]))))
        runs = edges.reshape(-1, 2)
        left, right = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
        if top >= bottom and right - left > 0.3 * len(row):
            white = (pixels[top:, left:right].min(2) > 0.98).all(1)
            bottom = top + (int(white.argmax()) if white.any() else len(white))
            found.append(pixels[top + 1 : bottom - 2, left + 1 : right - 1])
    return found


def check_strip(strip: np.ndarray, images: Tensor) -> None:
    """A picture shows a row of images (N, C, H, W): centres of pixels have their colours, by what the row varies."""
    row = torch.cat(list(images.detach().float().clamp(0, 1)), dim=2).permute(1, 2, 0).numpy()
    height, width = (
        ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(row.shape[:2], strip.shape[:2], strict=True)
    )
    difference, contrast = np.abs(strip[height][:, width] - row).mean(), np.abs(row - row.mean()).mean()
    assert difference < 0.3 * contrast + 1 / 255


def find_color(path: str | Path, color: str, opacity: float = 1.0, tolerance: float = 0.02) -> np.ndarray:
    """Rows and columns, (N, 2), of the pixels in a PNG file that have a colour, drawn on white; "C2" is the third
    of our pictures' curves.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    named = COLORS[int(color[1:])] if color[0] == "C" else color
    drawn = opacity * np.array(to_rgb(named)) + 1 - opacity
    return np.argwhere(np.abs(imread(path)[..., :3] - drawn).max(2) < tolerance)
