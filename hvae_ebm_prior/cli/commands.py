"""What the commands of a trained prior do: each draws a picture and returns its figures."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..control import interpolate, resample
from ..evaluation.outliers import SCHEMES, detection
from ..evaluation.pictures import save_curves, save_energies, save_histograms, save_pixels, save_strips
from ..evaluation.transitions import langevin_transitions, oversaturation, pixel_statistics, relaxation_time
from ..prior import DiffusionEBMPrior
from ..saving.grid import save_grid

COLUMNS = 16
# What `ood` takes where no scheme is named, besides `typicality` where there are reference images; others need an
# adapter that knows densities.
PRIOR_SCHEMES = ("inference", "diffusion", "density")


def run_sample(prior: DiffusionEBMPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """A grid of samples."""
    labels, start = read_labels(options.labels), time.monotonic()
    images = prior.sample(
        options.count, labels=labels, guidance=options.guidance, temperature=options.temperature, generator=generator
    )
    seconds = time.monotonic() - start
    save_grid(options.out, images.split(COLUMNS))
    return {
        "samples": len(images),
        "labels": labels,
        "guidance": options.guidance,
        "seconds": seconds,
        "pixels": describe_pixels(images),
    }


@torch.no_grad()
def run_edit(prior: DiffusionEBMPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """Images or samples above, and below them the edits: of the layers to hold, or one row for every number of layers
    from the top.
    """
    labels, layers = read_labels(options.labels), len(prior.latent_shapes)
    if options.images is None:
        u = prior.sample_noise(options.count, generator=generator)
        images = prior.decode(u)
    else:
        images = options.images.to(prior.device)
        u = prior.encode(images, generator=generator)
    holds = (
        [tuple(range(k)) for k in reversed(range(layers + 1))] if options.hold is None else [read_layers(options.hold)]
    )
    rows, figures = [images], []
    for hold in holds:
        rows.append(
            prior.decode(resample(prior, u, hold, labels=labels, guidance=options.guidance, generator=generator))
        )
        figures.append({"held": hold, "mean_squared_change": (rows[-1] - images).square().mean().item()})
    names = ["image", *(f"holds {', '.join(map(str, hold)) or 'none'}" for hold in holds)]
    save_grid(options.out, rows, names)
    return {"images": len(images), "labels": labels, "guidance": options.guidance, "edits": figures}


@torch.no_grad()
def run_interpolate(
    prior: DiffusionEBMPrior, options: argparse.Namespace, generator: torch.Generator
) -> dict[str, Any]:
    """One row per pair: of the given images, first with second and so on, or of samples."""
    if options.images is None:
        u = prior.sample_noise(2 * options.count, generator=generator)
    else:
        u = prior.encode(options.images.to(prior.device), generator=generator)
    if len(u) < 2:
        raise ValueError(f"interpolate: expected at least two images, got {len(u)}")
    start, end = u[: len(u) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    path = interpolate(prior, start, end, options.steps)
    images = torch.stack([prior.decode(step) for step in path], dim=1)
    save_grid(options.out, list(images))
    moved = (images[:, 1:] - images[:, :-1]).square().flatten(2).mean(2)
    return {"pairs": len(images), "steps": options.steps, "mean_squared_change_per_step": moved.mean(0).tolist()}


def run_transitions(
    prior: DiffusionEBMPrior, options: argparse.Namespace, generator: torch.Generator
) -> dict[str, Any]:
    """Image strips; energies and pixels over the steps in pictures beside it."""
    run = langevin_transitions(prior, options.count, steps=options.steps, generator=generator)
    save_strips(options.out, prior, run)
    save_energies(beside(options.out, "energies"), run)
    save_pixels(beside(options.out, "pixels"), run, reference=options.images)
    figures = {
        "chains": options.count,
        "steps_per_level": options.steps,
        "acceptance_per_level": run.acceptance.mean((1, 2)).tolist(),
        "energies_at_the_end": (run.energies[0, -1].mean(0)).tolist(),
    }
    if options.steps >= 8:
        # The first half is on its way to the stationary state.
        figures["relaxation_time_per_level_and_layer"] = [
            relaxation_time(level[options.steps // 2 :]).tolist() for level in run.energies
        ]
    if options.count > 1:
        found = oversaturation(run, options.images)
        figures |= {
            "pixels": found.run[0, -1].tolist(),
            "reference_pixels": found.reference.tolist(),
            "oversaturated": found.oversaturated,
        }
    return figures


def run_ood(prior: DiffusionEBMPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """AUROC over the cuts, and histograms of every scheme beside it."""
    figures: dict[str, Any] = {"images": len(options.images), "outliers": len(options.outliers)}
    curves = {}
    schemes = options.scheme or [*PRIOR_SCHEMES, *(["typicality"] if options.reference is not None else [])]
    if "typicality" in schemes and options.reference is None:
        raise ValueError(
            "typicality: it compares with images of the data, such as those trained on; give them with --reference"
        )
    for name in schemes:
        given = {"reference": options.reference} if name == "typicality" else {}
        scores, outliers = (
            SCHEMES[name](prior, images, generator=generator, **given) for images in (options.images, options.outliers)
        )
        found = detection(scores, outliers)
        curves[name], figures[name] = [cut.auroc for cut in found], [dataclasses.asdict(cut) for cut in found]
        save_histograms(beside(options.out, name), scores, outliers)
    save_curves(options.out, curves)
    return figures


def beside(path: Path, name: str) -> Path:
    """The path of a second picture."""
    return path.with_name(f"{path.stem}_{name}{path.suffix}")


def describe_pixels(images: Tensor) -> dict[str, float]:
    """Mean, std and share of saturated pixels, means over images."""
    return dict(zip(("mean", "std", "saturated"), pixel_statistics(images).mean(0).tolist(), strict=True))


def read_labels(given: list[str]) -> dict[str, int | str] | None:
    """Labels of `set=category` pairs."""
    labels: dict[str, int | str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"labels: expected set=category, such as class=3, got {pair!r}")
        labels[name] = int(value) if value.isdecimal() else value
    return labels or None


def read_layers(given: str) -> tuple[int, ...]:
    """Layer indices of `0,1`."""
    try:
        return tuple(int(part) for part in given.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"hold: expected layer indices such as 0,1, got {given!r}") from None
