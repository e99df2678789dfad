"""The commands of a trained prior: each draws a picture, and writes its figures beside it as JSON."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..backbone.validation import check_pictures, takes_tensors
from ..control import interpolate, resample
from ..density.sampling import Tempering, supported_options
from ..evaluation.detection import detection
from ..evaluation.outliers import SCHEMES
from ..evaluation.pictures import save_curves, save_energies, save_histograms, save_pixels, save_strips
from ..evaluation.transitions import langevin_transitions, oversaturation, pixel_statistics, relaxation_time
from ..saving.files import write_atomically, write_json
from ..saving.grid import save_grid
from ..training.learned_prior import LearnedPrior
from .loading import Commands, add_loader, load_prior
from .options import add_images, add_json, add_out, out_file, print_json, read_given, say_written

COLUMNS = 16
# What `ood` takes where no scheme is named, besides `typicality` where there are reference images; others need an
# adapter that gives densities.
PRIOR_SCHEMES = ("inference", "diffusion", "density")

# Draws a picture of a prior, with the options' images loaded, and returns its figures.
Draw = Callable[[LearnedPrior, argparse.Namespace, torch.Generator], dict[str, Any]]


def add_sample(commands: Commands) -> None:
    """The command `sample` and its options."""
    command = add_prior_command(commands, "sample", run_sample, "draw images, under labels if asked")
    add_count(command, 64, "samples")
    add_labels(command)
    command.add_argument(
        "--temperature", type=float, default=1.0, help="factor on the std of the model's Gaussians (%(default)s)"
    )
    command.add_argument(
        "--tempering",
        choices=get_args(Tempering),
        default="after",
        help="multiply by it after drawing, as the published code does, or before (%(default)s)",
    )


def add_edit(commands: Commands) -> None:
    """The command `edit` and its options."""
    text = "hold some layers of images, or samples, and draw the others anew, under labels if asked"
    command = add_prior_command(commands, "edit", run_edit, text, "hold some layers, draw the others anew")
    add_images(command, {"images": "real images to edit, in the place of samples"}, required=(), limit=8)
    add_count(command, 8, "samples to edit, where no images are given")
    command.add_argument(
        "--hold", help="layers to hold, as 0,1; without it, one row for each number of layers from the top"
    )
    add_labels(command)


def add_interpolate(commands: Commands) -> None:
    """The command `interpolate` and its options."""
    text = "go from one image, or sample, to another in noise space"
    command = add_prior_command(commands, "interpolate", run_interpolate, text, "from one image, or sample, to another")
    text = "real images in the place of samples; of these the first goes to the second, the third to the fourth"
    add_images(command, {"images": text}, required=(), limit=8)
    add_count(command, 8, "pairs of samples, where no images are given")
    command.add_argument(
        "--frames", type=int, default=10, help="images on the way from one to the other, both included (%(default)s)"
    )


def add_transitions(commands: Commands) -> None:
    """The command `transitions` and its options."""
    text = "watch Langevin chains run: images, energies, acceptance, pixels"
    command = add_prior_command(commands, "transitions", run_transitions, text, "watch Langevin chains run")
    add_images(command, {"images": "real images whose pixels are compared"}, required=(), limit=1000)
    add_count(command, 8, "chains")
    command.add_argument("--steps", type=int, default=10, help="Langevin steps per level (%(default)s)")


def add_ood(commands: Commands) -> None:
    """The command `ood` and its options."""
    text = "score images by how far they are from the data that the prior was trained on"
    command = add_prior_command(commands, "ood", run_ood, text, "score images by how far they are from the data")
    sources = {
        "images": "images like those that the prior was trained on",
        "outliers": "images that are outliers",
        "reference": "other images like those trained on, which the scheme typicality compares with",
    }
    add_images(command, sources, required=("images", "outliers"), limited=sources, limit=1000)
    command.add_argument(
        "--scheme",
        choices=SCHEMES,
        nargs="+",
        action="extend",
        metavar="SCHEME",
        help=f"one or more scores, of {', '.join(SCHEMES)} "
        f"({', '.join(PRIOR_SCHEMES)}; with --reference also typicality)",
    )


def add_prior_command(
    commands: Commands, name: str, draw: Draw, text: str, brief: str | None = None
) -> argparse.ArgumentParser:
    """A command, with the options that all commands of a prior have; its help is `brief`, or its description."""
    description = f"{text[0].upper()}{text[1:]}. Writes a picture, and its figures as JSON."
    command = commands.add_parser(name, help=brief or text, description=description)
    add_loader(command, "your trained DiffusionEBMPrior, or your model with --prior", saved=True)
    add_out(command, f"{name}.png", "the picture", "its figures, as JSON, go")
    add_json(command, "showing them on stderr")
    command.set_defaults(run=partial(run_prior_command, draw))
    return command


def add_count(command: argparse.ArgumentParser, count: int, what: str) -> None:
    """How many samples to draw."""
    command.add_argument("--count", type=int, default=count, help=f"number of {what} (%(default)s)")


def add_labels(command: argparse.ArgumentParser) -> None:
    """Labels and their strength."""
    command.add_argument(
        "--labels",
        nargs="+",
        action="extend",
        default=[],
        metavar="SET=CATEGORY",
        help="one or more, as class=3 or class=sneaker",
    )
    command.add_argument("--guidance", type=float, default=1.0, help="strength of the labels (%(default)s)")


def run_prior_command(draw: Draw, options: argparse.Namespace) -> None:
    """Load the prior and images, draw the picture, write its figures beside it and print them."""
    prior = load_prior(options)
    if not isinstance(prior, LearnedPrior):
        raise TypeError(
            "loader: expected a function that returns a trained DiffusionEBMPrior, "
            f"got {type(prior).__name__}; name a saved prior of it with --prior, or load its weights there"
        )
    if options.command not in ("sample", "ood"):
        check_pictures(prior.backbone, options.command)
    generator = torch.Generator().manual_seed(options.seed)
    for name in ("images", "outliers", "reference"):
        if getattr(options, name, None) is not None:
            setattr(options, name, read_given(options, name, prior))
    options.out = out_file(options.out, f"{options.command}.png")
    options.others = []
    figures = draw(prior, options, generator)
    record = options.out.with_suffix(".json")
    write_json(record, figures)
    if options.json:
        print_json(figures)
    else:
        print(json.dumps(figures, indent=1), file=sys.stderr)
    say_written(options.out, *options.others, record)


def run_sample(prior: LearnedPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """Samples under a row of the Gaussian prior's; of a model of plain tensors an array (N, ...), as OUT.npy."""
    labels = read_labels(options.labels)
    given = supported_options(
        prior,
        labels=labels,
        guidance=options.guidance,
        temperature=options.temperature,
        tempering=options.tempering,
    )
    start = time.monotonic()
    images = prior.sample(options.count, generator=generator, **given)
    seconds = time.monotonic() - start
    figures = {"samples": len(images), "labels": labels, "guidance": options.guidance, "seconds": seconds}
    if takes_tensors(prior.backbone):
        options.out = options.out.with_suffix(".npy")
        write_atomically(options.out, lambda scratch: np.save(scratch, images.float().cpu().numpy()))
        return figures
    names = ["Gaussian prior", ", ".join(f"{name} {value}" for name, value in (labels or {}).items()) or "this prior"]
    save_grid(options.out, [gaussian_row(prior, options), *images.split(COLUMNS)], names)
    return figures | {"pixels": describe_pixels(images)}


@torch.no_grad()
def gaussian_row(prior: LearnedPrior, options: argparse.Namespace) -> Tensor:
    """A row of samples of the model's own Gaussian prior, to compare with."""
    shape = min(options.count, COLUMNS), prior.dim
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return prior.decode(options.temperature * noise.to(prior.device, prior.dtype))


@torch.no_grad()
def run_edit(prior: LearnedPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """Images or samples above, and below them the edits: with `--hold` one row, else one per number of top layers."""
    labels = read_labels(options.labels)
    if options.images is None:
        u = prior.sample_noise(options.count, generator=generator)
        images = prior.decode(u)
    else:
        images = options.images.to(prior.device)
        u = prior.encode(images, generator=generator)
    if options.hold is None:
        holds = [tuple(range(k)) for k in reversed(range(len(prior.latent_shapes) + 1))]
    else:
        holds = [read_layers(options.hold)]
    rows = [images]
    names = ["sample" if options.images is None else "real"]
    figures = []
    for hold in holds:
        edited = prior.decode(resample(prior, u, hold, labels=labels, guidance=options.guidance, generator=generator))
        rows.append(edited)
        names.append(f"layers {', '.join(map(str, hold))} held" if hold else "no layer held")
        figures.append({"held": hold, "mean_squared_change": (edited - images).square().mean().item()})
    save_grid(options.out, rows, names)
    return {"images": len(images), "labels": labels, "guidance": options.guidance, "edits": figures}


@torch.no_grad()
def run_interpolate(prior: LearnedPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """One row per pair: of the given images, first with second and so on, or of samples."""
    if options.images is None:
        u = prior.sample_noise(2 * options.count, generator=generator)
    else:
        u = prior.encode(options.images.to(prior.device), generator=generator)
    if len(u) < 2:
        raise ValueError(f"interpolate: expected at least two images, got {len(u)}")
    start, end = u[: len(u) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    path = interpolate(prior, start, end, options.frames)
    images = torch.stack([prior.decode(step) for step in path], dim=1)
    save_grid(options.out, list(images), columns=["start", *[""] * (options.frames - 2), "end"])
    moved = (images[:, 1:] - images[:, :-1]).square().flatten(2).mean(2)
    return {"pairs": len(images), "frames": options.frames, "mean_squared_change_per_frame": moved.mean(0).tolist()}


def run_transitions(prior: LearnedPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """Image strips; energies and pixels over the steps in pictures beside it."""
    run = langevin_transitions(prior, options.count, steps=options.steps, generator=generator)
    save_strips(options.out, prior, run)
    save_energies(beside(options, "energies"), run)
    save_pixels(beside(options, "pixels"), run, reference=options.images)
    figures = {
        "chains": options.count,
        "steps_per_level": options.steps,
        "acceptance_per_level": run.acceptance.mean((1, 2)).tolist(),
        "energies_at_the_end": run.energies[0, -1].mean(0).tolist(),
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


def run_ood(prior: LearnedPrior, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """AUROC over the cuts, and histograms of every scheme beside it."""
    figures: dict[str, Any] = {"images": len(options.images), "outliers": len(options.outliers)}
    curves = {}
    schemes = options.scheme or [*PRIOR_SCHEMES, *(["typicality"] if options.reference is not None else [])]
    if "typicality" in schemes and options.reference is None:
        raise ValueError(
            "typicality: it compares with images of the data, such as those trained on; give them with --reference"
        )
    for name in schemes:
        reference = {"reference": options.reference} if name == "typicality" else {}
        scores = SCHEMES[name](prior, options.images, generator=generator, **reference)
        outliers = SCHEMES[name](prior, options.outliers, generator=generator, **reference)
        cuts = detection(scores, outliers)
        curves[name] = [cut.auroc for cut in cuts]
        figures[name] = [dataclasses.asdict(cut) for cut in cuts]
        save_histograms(beside(options, name), scores, outliers)
    save_curves(options.out, curves)
    return figures


def beside(options: argparse.Namespace, name: str) -> Path:
    """The path of a second picture, which is said to be written as well."""
    path: Path = options.out.with_name(f"{options.out.stem}_{name}{options.out.suffix}")
    options.others.append(path)
    return path


def describe_pixels(images: Tensor) -> dict[str, float]:
    """Mean, std and share of saturated pixels, means over images."""
    mean, std, saturated = pixel_statistics(images).mean(0).tolist()
    return {"mean": mean, "std": std, "saturated": saturated}


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
