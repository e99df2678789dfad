"""The command `info`: what a saved prior, or this installation, says of itself."""

import argparse
import math
import os
from pathlib import Path

import torch

from ..chains.kernels import VARIABLE, choose_backend
from ..saving.config import PriorConfig, settings_in_words
from ..saving.extras import installed
from ..saving.folder import CONFIG, WEIGHTS, load_config, read_settings
from ..saving.hub import fetch, file_sizes
from .loading import Commands, folder_or_repository


def add_info(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "info",
        help="what a saved prior says of itself; without one, versions, devices, and the code that computes Langevin "
        "steps on each",
        description="Describe a saved prior, or this installation.",
    )
    command.add_argument(
        "saved",
        metavar="SAVED",
        nargs="?",
        help="a folder that save_pretrained or train wrote, or a repository of the Hub, as owner/name",
    )
    command.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> None:
    """Print what there is to know of a saved prior, or of this installation."""
    print(describe_saved(options.saved) if options.saved else describe_installation())


def describe_saved(repo_or_dir: str) -> str:
    """What a saved prior in a folder or repository says of itself, in lines; of a repository, without its weights."""
    with folder_or_repository(repo_or_dir):
        folder = fetch(repo_or_dir, files=[CONFIG])
    weights = folder / WEIGHTS
    size: int | None
    if Path(repo_or_dir).expanduser().is_dir() or weights.is_file():
        config, size = load_config(folder), weights.stat().st_size
    else:
        config, size = read_settings(folder), file_sizes(repo_or_dir, [WEIGHTS]).get(WEIGHTS)
    return "\n".join([*summary(config), f"{'weights':14}{'not there' if size is None else f'{size / 1e6:.1f} MB'}"])


def summary(config: PriorConfig) -> list[str]:
    """The contents of a `config.json` for people."""
    shapes = config.backbone.latent_shapes
    lines = [f"{config.kind} for {config.family}, written by hvae-ebm-prior {config.library}"]
    lines.append(f"{'latents':14}{len(shapes)} layers, {sum(math.prod(shape) for shape in shapes)} dimensions")
    lines += [f"{name:14}{words}" for name, words in settings_in_words(config).items()]
    if config.training:
        lines.append(f"{'training':14}{config.training.iterations} iterations in {config.training.seconds:.0f} s")
    return lines + [f"{each.name:14}{each.value:.4g}  {each.features}  {each.dataset}" for each in config.metrics]


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
