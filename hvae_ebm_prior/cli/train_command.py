"""The command `train`: a prior for a backbone. The same command, run again, goes on from the last checkpoint."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..backbone.validation import check_count
from ..chains.streams import seeded
from ..energies.coupling import Coupling, LabelSet
from ..evaluation.candidates import build
from ..presets import PRESETS
from ..prior import DiffusionEBMPrior
from ..processes import rank
from ..saving.files import write_json
from ..saving.folder import check_free
from ..saving.grid import check_matplotlib
from ..training.array_data import split_array
from ..training.callbacks import LOGS, open_log
from ..training.checkpoint import find_checkpoints
from ..training.config import ObjectiveName, TrainingConfig
from ..training.image_data import DecodedImages
from ..training.label_data import LABELS, LabelledImages, open_labels
from ..training.learned_prior import LearnedPrior
from .loading import Commands, add_loader, load_model
from .options import add_card, add_images, open_given, read_card

# Presets that `train` takes; the others are for baselines.
SUITED = [name for name in PRESETS if name not in ("joint-ebm", "joint-ebm-published", "ncp", "nce-stages")]
# What a run that is gone on with must have been begun with, and what it is where it is not given, besides the settings,
# which its checkpoints know.
GIVEN: dict[str, Any] = {
    "loader": None,
    "checkpoint": None,
    "images": None,
    "size": None,
    "limit": None,
    "preset": "default",
    "seed": 0,
    "labels": [],
    "label_layers": [],
    "background": "white",
    "skip_broken": False,
}


def add_train(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "train",
        help="train a prior; goes on where it was interrupted",
        description="Train a prior for your model on images, with checkpoints. The same command, run again, goes on "
        "from the last one.",
    )
    add_loader(command, "your model or an adapter of it")
    add_images(command, {"images": "what to train on"})
    command.add_argument(
        "--labels",
        nargs="+",
        action="extend",
        default=[],
        metavar="SET=SOURCE",
        help=f"one or more label sets to couple the prior to; a source is {LABELS}",
    )
    command.add_argument(
        "--label-layers",
        nargs="+",
        action="extend",
        default=[],
        metavar="SET=LAYERS",
        help="latent layers that labels are bound to, as class=0 for the top or class=0,1 (all)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        required=True,
        help="a folder to write: the trained prior, and checkpoints on the way to it",
    )
    command.add_argument(
        "--preset",
        choices=SUITED,
        default="default",
        help="settings of the prior and its training (%(default)s)",
    )
    command.add_argument(
        "--iterations", type=int, help="optimiser steps (the preset's; of default by the number of images)"
    )
    command.add_argument("--objective", choices=get_args(ObjectiveName), help="what is minimised (the preset's)")
    command.add_argument("--batch-size", type=int, help="images per iteration (the preset's)")
    command.add_argument("--learning-rate", type=float, help="largest learning rate (the preset's)")
    command.add_argument(
        "--checkpoint-every", type=int, default=100, help="iterations between checkpoints (%(default)s)"
    )
    command.add_argument(
        "--log",
        nargs="+",
        action="extend",
        default=[],
        metavar="PLACE",
        help=f"write numbers and samples to one or more of {LOGS}",
    )
    command.add_argument(
        "--samples-every",
        type=int,
        default=500,
        help="iterations between samples in the logs, 0 for none (%(default)s)",
    )
    card = add_card(command)
    card.add_argument(
        "--card-samples",
        type=int,
        default=0,
        metavar="N",
        help="show so many samples of the prior, and of the model's Gaussian one (%(default)s); needs matplotlib",
    )
    command.set_defaults(run=run_train)


def run_train(options: argparse.Namespace) -> None:
    """Train a prior, or go on with its training, and write it."""
    if options.card_samples:
        check_count(options.card_samples, "card-samples")
        check_matplotlib()  # which may not be there, and that should be known before training
    out = options.out.expanduser()
    check_free(out)
    backbone = load_model(options)
    preset = PRESETS[options.preset]
    # The first weights follow from the seed as well.
    with seeded(options.seed, torch.device("cpu")):
        prior = build(preset, backbone)
    data: Any = open_given(options, "images", prior)
    labels = couple_to_labels(prior, options, data)
    if labels and not isinstance(data, Tensor):
        data = LabelledImages(data, labels)
    logs = [open_log(place, options.samples_every, out.name) for place in options.log]
    folder = out / "checkpoints"
    about = out / "train.json"
    command = {name: in_full(name, getattr(options, name)) for name in GIVEN}
    if begun := find_checkpoints(folder):
        check_command(about, command)
        print(f"going on from {begun[0]}", file=sys.stderr)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(about, command)
    try:
        history = prior.fit(
            data,
            labels=labels if labels and isinstance(data, Tensor) else None,
            # Without settings `fit` takes the defaults, with as many steps as the images bear.
            training=None if preset.training == TrainingConfig() else preset.training,
            objective=options.objective,
            iterations=options.iterations,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            callback=logs,
            checkpoint_dir=folder,
            checkpoint_every=options.checkpoint_every,
            resume=True,
            progress=True,
            generator=torch.Generator().manual_seed(options.seed),
        )
    except KeyboardInterrupt:
        last = find_checkpoints(folder)
        where = f"goes on from {last[0]}" if last else "begins anew, as there is no checkpoint yet"
        raise KeyboardInterrupt(f"the same command {where}") from None
    if rank() > 0:
        return
    prior.save_pretrained(out, card=read_card(options), samples=options.card_samples, seed=options.seed)
    print(
        f"{len(history)} iterations in {history[-1].seconds:.0f} s; {out} written, see hvae-ebm-prior info {out}",
        file=sys.stderr,
    )


def couple_to_labels(
    prior: LearnedPrior, options: argparse.Namespace, data: Tensor | DecodedImages
) -> dict[str, Tensor]:
    """Couple a prior to the labels that were asked for; those of the images (N,) by name."""
    given = {
        key: [option.partition("=")[::2] for option in getattr(options, key)] for key in ("labels", "label_layers")
    }
    try:
        layers = {name: [int(part) for part in value.split(",")] for name, value in given["label_layers"]}
    except ValueError:
        raise ValueError(
            f"label-layers: expected SET=LAYERS, such as class=0,1, got {', '.join(options.label_layers)}"
        ) from None
    sources = dict(given["labels"])
    if "" in (*sources, *sources.values()) or len(sources) < len(options.labels):
        raise ValueError(f"labels: expected SET=SOURCE with different sets, got {', '.join(options.labels)}")
    if unknown := layers.keys() - sources.keys():
        raise ValueError(f"label-layers: expected labels out of {', '.join(sources) or 'none'}, got {min(unknown)}")
    indices = data.indices if isinstance(data, DecodedImages) else list(range(len(data)))
    count = len(data.names) if isinstance(data, DecodedImages) else len(data)
    rows = getattr(data, "rows", None)
    found = {name: open_labels(source, options.images, count, rows) for name, source in sources.items()}
    if not found:
        return {}
    if not isinstance(prior, DiffusionEBMPrior):
        raise TypeError(f"labels: a {type(prior).__name__} has none")
    prior.couple(Coupling({name: LabelSet(kinds, layers.get(name)) for name, (kinds, _) in found.items()}))
    return {name: values[indices] for name, (_, values) in found.items()}


def in_full(name: str, value: Any) -> Any:
    """The value of an option, with paths in full, so that photos, photos/ and ./photos are one."""
    if isinstance(value, list):
        return [f"{key}={in_full(name, source)}" for key, _, source in (each.partition("=") for each in value)]
    if not isinstance(value, str) or name not in ("loader", "checkpoint", "images", "labels"):
        return value
    if name == "loader":
        file, _, function = value.rpartition(":")
        return f"{Path(file).resolve()}:{function}" if file.endswith(".py") else value
    file, array = split_array(value)
    path = Path(file).expanduser()
    return (f"{path.resolve()}:{array}" if array else str(path.resolve())) if path.exists() else value


def check_command(path: Path, command: Mapping[str, Any]) -> None:
    """Raise ValueError unless the run whose options stand in `path` was begun with those of `command`."""
    try:
        # Runs that were begun before there were such options had none.
        before = {name: in_full(name, value) for name, value in {**GIVEN, **json.loads(path.read_text())}.items()}
        changed = [name for name, value in command.items() if before[name] != value]
        differences = [f"{name} was {before[name]} and is {command[name]}" for name in changed]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{path}: expected the options that this run was begun with, got none ({error!r}); give another --out"
        ) from error
    if differences:
        raise ValueError(
            f"{path.parent} holds another run: {', '.join(differences)}; "
            "give the same options to go on with it, or another --out"
        )
