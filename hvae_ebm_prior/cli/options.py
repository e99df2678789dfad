"""Options that several commands have: the device, images, the file to write, results as JSON, and what is said on the
model card.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone.validation import takes_tensors
from ..density.latent_prior import LatentPrior
from ..processes import progress_bar
from ..saving.card import Card
from ..training.array_data import load_tensors
from ..training.image_data import IMAGES, DecodedImages, data_shape, image_shape, open_images

# Endings of pictures that can be written.
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


def read_device(name: str) -> str:
    """The device that `--device` names.

    Args:
        name: as PyTorch names devices, or auto for a GPU where PyTorch sees one and the processor elsewhere.

    Returns:
        Its name for PyTorch.

    Raises:
        ArgumentTypeError: there is no such device, here or anywhere.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device, is_here in found.items() if is_here), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:1 or mps, got {name!r}") from None
    count = torch.cuda.device_count()
    if not found.get(device.type, True) or (device.type == "cuda" and (device.index or 0) >= count):
        raise argparse.ArgumentTypeError(f"PyTorch sees no {name} here; auto takes the best that there is")
    return name


def add_json(command: argparse.ArgumentParser, instead: str) -> None:
    """`--json`, for scripts: what the command finds goes to stdout by `print_json`.

    Args:
        command: the command.
        instead: in the place of what.
    """
    command.add_argument("--json", action="store_true", help=f"print the results as JSON, in the place of {instead}")


def print_json(values: Any) -> None:
    """Print values as JSON on stdout; figures that are no finite numbers, which JSON lacks, as null."""
    print(json.dumps(finite(values), indent=1))


def finite(values: Any) -> Any:
    """Values of JSON with None in the place of infinities and NaNs."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {name: finite(value) for name, value in values.items()}
    return [finite(value) for value in values] if isinstance(values, list | tuple) else values


def say_written(*files: str | Path) -> None:
    """The last line of a command that writes files: which ones, on stderr."""
    *others, last = map(str, files)
    print(f"{', '.join(others)}{' and ' if others else ''}{last} written", file=sys.stderr)


def add_images(
    command: argparse.ArgumentParser,
    sources: Mapping[str, str],
    *,
    required: Collection[str] = ("images",),
    limited: Collection[str] = ("images",),
    limit: int | None = None,
) -> "argparse._ArgumentGroup":
    """Options that name images, and those of how they are read, which `open_given` and `read_given` do.

    Args:
        command: the command.
        sources: option, without dashes -> what its images are for, for its help.
        required: the options that must be given.
        limited: the options whose images `--limit` counts.
        limit: how many it leaves by default; None for all.

    Returns:
        The options' group.
    """
    text = f"IMAGES is {IMAGES}; of a model that takes plain tensors, file.npy or file.npz:name of floats (N, ...)."
    group = command.add_argument_group("images", text)
    for name, what in sources.items():
        group.add_argument(f"--{name}", metavar="IMAGES", required=name in required, help=what)
    group.add_argument(
        "--limit",
        type=int,
        default=limit,
        help=f"use so many images from the start of {', '.join(f'--{name}' for name in limited)} "
        f"({'all' if limit is None else '%(default)s'})",
    )
    group.add_argument(
        "--size",
        type=int,
        help="resize pictures of folders and hf:, and crop them about their centre, to squares of this side, which "
        "must be that of the model's (as they are)",
    )
    group.add_argument(
        "--background", default="white", help="color behind transparent pixels, by name or as #rrggbb (%(default)s)"
    )
    group.add_argument(
        "--skip-broken", action="store_true", help="look at all files first, and leave out those that cannot be decoded"
    )
    command.set_defaults(limited=limited)
    return group


def open_given(options: argparse.Namespace, name: str, prior: LatentPrior) -> Tensor | DecodedImages:
    """The images that `--name` names, of the shape that the prior's model draws, see `open_images`; or plain tensors,
    where it takes such.
    """
    source, limit = getattr(options, name), options.limit if name in options.limited else None
    if takes_tensors(getattr(prior, "backbone", None)):
        if options.size is not None:
            raise ValueError("size: this model takes plain tensors, which are taken as they are")
        return load_tensors(source, data_shape(prior), limit=limit)
    return open_images(
        source,
        image_shape(prior),
        size=options.size,
        limit=limit,
        background=options.background,
        skip_broken=options.skip_broken,
    )


def read_given(options: argparse.Namespace, name: str, prior: LatentPrior) -> Tensor:
    """The same, all of them in memory."""
    images = open_given(options, name, prior)
    if isinstance(images, Tensor):
        return images
    pixels = torch.empty(len(images), *images.decoding.shape, dtype=torch.float32, device="cpu")
    with progress_bar(len(images), f"reading {name}") as bar:
        for i in range(len(images)):
            pixels[i] = images[i]
            bar.update()
    return pixels


def add_out(command: argparse.ArgumentParser, file: str, what: str, beside: str = "") -> None:
    """The file that the command writes, which `out_file` finds.

    Args:
        command: the command.
        file: its name by default.
        what: what it is.
        beside: what goes beside it, if anything does.
    """
    more = f"; {beside} beside it" if beside else ""
    command.add_argument(
        "--out", metavar="FILE", default=file, help=f"{what}: a file to write, or a folder for %(default)s{more}"
    )


def out_file(out: str, default: str) -> Path:
    """The file that `--out` means, in a folder that is made if need be.

    Args:
        out: a file, whose ending may be left out, or a folder, which is there or ends with a slash.
        default: the file's name in a folder, with its ending.

    Returns:
        The file.
    """
    path = Path(out).expanduser()
    if path.is_dir() or out.endswith(("/", os.sep)):
        path /= default
    ending = Path(default).suffix
    if path.suffix.lower() not in (PICTURES if ending in PICTURES else (ending,)):
        path = path.with_name(path.name + ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def add_card(command: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """What only its author knows of a prior, for the model card; `read_card` reads it."""
    group = command.add_argument_group("model card")
    group.add_argument("--title", help="its heading (made of the prior's kind and the model's)")
    group.add_argument("--license", metavar="ID", help="identifier of a licence, as on the Hub, such as mit")
    group.add_argument(
        "--dataset",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="what it was trained on, as on the Hub",
    )
    group.add_argument("--base-model", metavar="OWNER/NAME", help="the model on the Hub")
    return group


def read_card(options: argparse.Namespace) -> Card:
    """The card of these options."""
    return Card(title=options.title, base_model=options.base_model, datasets=options.dataset, license=options.license)
