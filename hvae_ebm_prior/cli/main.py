"""The command `hvae-ebm-prior`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..backbone.registry import find_adapter
from ..chains.kernels import VARIABLE, choose_backend
from ..chains.langevin import ChainDiverged
from ..evaluation.diagnosis import describe_layers, table
from ..evaluation.outliers import SCHEMES
from ..extras import install_command, installed, where
from ..prior import DiffusionEBMPrior
from ..saving.files import write_json
from ..training.guard import TrainingDiverged
from ..training.image_data import IMAGES, load_images
from .commands import run_edit, run_interpolate, run_ood, run_sample, run_transitions
from .demo import run_demo
from .hub_commands import add_hub_commands, describe_saved, run_pull, run_push
from .loading import load_function
from .report import add_evaluation, run_evaluate
from .train_command import add_train, run_train
from .trials import TRIALS, add_trials, run_trials

# What each command of a trained prior does, and its own options.
PRIOR_COMMANDS = {
    "sample": (run_sample, "draw images, under labels if asked", ("count", "labels", "temperature")),
    "edit": (
        run_edit,
        "hold some layers of images, or samples, and draw the others anew, under labels if asked",
        ("optional images", "count", "hold", "labels"),
    ),
    "interpolate": (
        run_interpolate,
        "go from one image, or sample, to another in noise space",
        ("optional images", "count", "steps"),
    ),
    "transitions": (
        run_transitions,
        "watch Langevin chains run: images, energies, acceptance, pixels",
        ("optional images", "count", "steps"),
    ),
    "ood": (run_ood, "score images by how far they are from what the prior learned", ("images", "outliers", "scheme")),
}

SAVED = "a saved prior, a folder or owner/name on the Hub, to be loaded onto the model that the function returns"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 2 with a message on stderr for what the user can mend."""
    options = make_parser().parse_args(arguments)
    try:
        if options.command in WITHOUT_MODEL:
            WITHOUT_MODEL[options.command](options)
            return 0
        made = load_function(options.loader)(*([options.checkpoint] if options.checkpoint else []))
        if isinstance(made, torch.nn.Module):
            made = made.to(options.device)
        if getattr(options, "prior", None):
            made = DiffusionEBMPrior.from_pretrained(options.prior, backbone=made)
        generator = torch.Generator().manual_seed(getattr(options, "seed", 0))
        if options.command == "diagnose":
            images = load_images(options.images)[: options.limit]
            print(table(describe_layers(find_adapter(made), images, draws=options.draws, generator=generator)))
        elif options.command == "train":
            run_train(options, made, generator)
        elif options.command == "evaluate":
            run_evaluate(options, made, generator)
        elif options.command == "demo":
            run_demo(made, port=options.port, share=options.share)
        elif options.command in TRIALS:
            run_trials(options, made)
        else:
            run_prior_command(options, made, generator)
    except (ValueError, TypeError, ImportError, OSError, AttributeError, ChainDiverged, TrainingDiverged) as error:
        print(f"hvae-ebm-prior: {error}", file=sys.stderr)
        return 2
    return 0


def run_prior_command(options: argparse.Namespace, prior: object, generator: torch.Generator) -> None:
    """One of `PRIOR_COMMANDS`: draws its picture, writes its figures beside it and prints them."""
    if not isinstance(prior, DiffusionEBMPrior):
        raise TypeError(
            f"loader: expected a function that returns a trained DiffusionEBMPrior, got {type(prior).__name__}; load its weights there"
        )
    for name in ("images", "outliers", "reference"):
        if getattr(options, name, None) is not None:
            setattr(options, name, load_images(getattr(options, name))[: options.limit])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = PRIOR_COMMANDS[options.command][0](prior, options, generator)
    write_json(options.out.with_suffix(".json"), figures)
    print(
        f"{json.dumps(figures, indent=1)}\n{options.out} and {options.out.with_suffix('.json')} written",
        file=sys.stderr,
    )


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hvae-ebm-prior", description="Better samples from a trained hierarchical VAE."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    diagnose = commands.add_parser(
        "diagnose",
        help="is there a prior hole, and in which layers?",
        description="Encode images with your model and print, layer by layer, whether its prior matches where they come to lie.",
    )
    add_loader(diagnose, "your model or an adapter of it")
    diagnose.add_argument("--images", required=True, help=f"{IMAGES}, held out")
    diagnose.add_argument(
        "--limit", type=int, default=500, help="use so many images from the start of the file (%(default)s)"
    )
    diagnose.add_argument("--draws", type=int, default=8, help="posterior draws per image (%(default)s)")
    train = commands.add_parser(
        "train",
        help="train a prior for your model on images; goes on where it was interrupted",
        description="Train a prior for your model on images, with checkpoints. The same command, run again, goes on from the last one.",
    )
    add_train(train)
    for name, (_, text, own) in PRIOR_COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. Writes a picture, and its figures as JSON."
        )
        add_loader(command, "your trained DiffusionEBMPrior, or your model with --prior")
        command.add_argument("--prior", help=SAVED)
        command.add_argument(
            "--out", type=Path, default=Path(f"{name}.png"), help="the picture; figures go beside it (%(default)s)"
        )
        add_options(command, own)
    evaluate = commands.add_parser(
        "evaluate",
        help="how good are the samples? FID, KID, precision, recall, closure of the prior hole",
        description="Compare samples with real images, beside reconstructions and the Gaussian prior under the same protocol. Prints a table and "
        "writes a record as JSON.",
    )
    add_loader(evaluate, "your trained DiffusionEBMPrior, or another prior with sample, encode and decode")
    evaluate.add_argument("--prior", help=SAVED)
    add_evaluation(evaluate)
    for name, text in {
        "compare": "train our prior and baselines on your model, for an equal time and equal gradients, and see which is best",
        "ablate": "train our prior with one thing changed at a time: K, T, integrator, space, schedule, batch, moving average",
    }.items():
        trial = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. Goes on where it was interrupted."
        )
        add_loader(trial, "your trained model or an adapter of it", seed=False)
        add_trials(trial, name)
    demo = commands.add_parser(
        "demo",
        help="a page in the browser: samples, labels, held layers, chains",
        description=f"Serve a page to play with a prior; needs hvae-ebm-prior[demo]: {install_command('demo')}{where()}.",
    )
    add_loader(demo, "your trained DiffusionEBMPrior, or your model with --prior", seed=False)
    demo.add_argument("--prior", help=SAVED)
    demo.add_argument("--port", type=int, help="where to serve it on this machine (the first free one from 7860 on)")
    demo.add_argument("--share", action="store_true", help="ask Gradio for a public address as well")
    add_hub_commands(commands)
    info = commands.add_parser(
        "info",
        help="what a saved prior says of itself; without one, versions, devices, and the code that computes Langevin steps on each",
        description="Describe a saved prior, or this installation.",
    )
    info.add_argument(
        "saved", nargs="?", help="a folder that save_pretrained wrote, or a repository of the Hub, as owner/name"
    )
    return parser


def add_loader(command: argparse.ArgumentParser, what: str, *, seed: bool = True) -> None:
    """Where the model comes from, and options of all commands."""
    command.add_argument(
        "loader", help=f"function that returns {what}, as package.module:function or path/to/file.py:function"
    )
    command.add_argument("checkpoint", nargs="?", help="handed to the function, if given")
    command.add_argument("--device", default="cpu", help="where to put it, if it is a module (%(default)s)")
    if seed:
        command.add_argument("--seed", type=int, default=0, help="seed of all randomness (%(default)s)")


def add_options(command: argparse.ArgumentParser, own: Sequence[str]) -> None:
    """A command's own options."""
    if "images" in own or "optional images" in own:
        command.add_argument("--images", required="images" in own, help=IMAGES)
        command.add_argument(
            "--limit",
            type=int,
            default=1000 if "outliers" in own else 8,
            help="use so many from the start of a file (%(default)s)",
        )
    if "outliers" in own:
        command.add_argument("--outliers", required=True, help="the same, of images that are to be told apart")
        command.add_argument(
            "--reference", help="the same, of images of the data to compare with, for the scheme typicality"
        )
    if "scheme" in own:
        command.add_argument(
            "--scheme", choices=SCHEMES, action="append", help="a score; may be given again (all of the prior's own)"
        )
    if "count" in own:
        command.add_argument(
            "--count", type=int, default=64 if "temperature" in own else 8, help="number of samples (%(default)s)"
        )
    if "steps" in own:
        command.add_argument(
            "--steps", type=int, default=10, help="images per row, or Langevin steps per level (%(default)s)"
        )
    if "hold" in own:
        command.add_argument(
            "--hold", help="layers to hold, as 0,1; without it, one row for each number of layers from the top"
        )
    if "labels" in own:
        command.add_argument(
            "--labels", nargs="+", default=[], metavar="SET=CATEGORY", help="as class=3 or class=sneaker"
        )
        command.add_argument("--guidance", type=float, default=1.0, help="strength of the labels (%(default)s)")
    if "temperature" in own:
        command.add_argument(
            "--temperature", type=float, default=1.0, help="factor on the std of the model's Gaussians (%(default)s)"
        )


def run_info(options: argparse.Namespace) -> None:
    """Print what there is to know of a saved prior, or of this installation."""
    print(describe_saved(options.saved) if options.saved else describe_installation())


def describe_installation() -> str:
    """Versions, and the backend of every device, one per line."""
    packages = ("hvae-ebm-prior", "torch", "numpy", "triton", "torch-fidelity")
    lines = [f"{name:16}{installed(name) or 'not installed'}" for name in packages]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    devices += [torch.device("mps")] if torch.backends.mps.is_available() else []
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        lines.append(f"{name:16}Langevin steps by {choose_backend('auto', device)}")
    if os.environ.get(VARIABLE):
        lines.append(f"{VARIABLE} is set to {os.environ[VARIABLE]}")
    return "\n".join(lines)


# Commands that need nobody's model.
WITHOUT_MODEL = {"push": run_push, "pull": run_pull, "info": run_info}
