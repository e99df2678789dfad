"""The command `info`: what a saved prior, or this installation, says of itself."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from ..chains.kernels import VARIABLE, choose_backend
from ..saving.config import PriorConfig, settings_in_words
from ..saving.extras import installed
from ..saving.folder import CONFIG, WEIGHTS, load_config, read_settings
from ..saving.hub import fetch, file_sizes
from ..saving.typed_json import to_json
from .loading import Commands, folder_or_repository
from .options import add_json, print_json


def add_info(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "info",
        help="describe a saved prior, or this installation",
        description="What a saved prior says of itself; without one, versions, devices, and the code that computes "
        "Langevin steps on each.",
    )
    command.add_argument(
        "saved",
        metavar="SAVED",
        nargs="?",
        help="a folder that save_pretrained or train wrote, or a repository of the Hub, as owner/name",
    )
    add_json(command, "lines")
    command.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> None:
    """Print what there is to know of a saved prior, or of this installation."""
    if options.saved:
        config, size = find_saved(options.saved)
        if options.json:
            print_json({**to_json(config), "bytes": size})
        else:
            weights = "not there" if size is None else f"{size / 1e6:.1f} MB"
            print(*summary(config), f"{'weights':14}{weights}", sep="\n")
        return
    versions, backends = find_installation()
    chosen = os.environ.get(VARIABLE)
    if options.json:
        print_json({"versions": versions, "langevin_steps": backends, VARIABLE: chosen or None})
        return
    for name, version in versions.items():
        print(f"{name:16}{version or 'not installed'}")
    for name, backend in backends.items():
        print(f"{name:16}Langevin steps by {backend}")
    if chosen:
        print(f"{VARIABLE} is set to {chosen}")


def find_saved(repo_or_dir: str) -> tuple[PriorConfig, int | None]:
    """What a saved prior in a folder or repository says of itself, of a repository without its weights; and their size
    in bytes, None where there are none.
    """
    with folder_or_repository(repo_or_dir):
        folder = fetch(repo_or_dir, files=[CONFIG])
    weights = folder / WEIGHTS
    if Path(repo_or_dir).expanduser().is_dir() or weights.is_file():
        return load_config(folder), weights.stat().st_size
    return read_settings(folder), file_sizes(repo_or_dir, [WEIGHTS]).get(WEIGHTS)


def summary(config: PriorConfig) -> list[str]:
    """The contents of a `config.json` for people."""
    shapes = config.backbone.latent_shapes
    lines = [f"{config.kind} for {config.family}, written by hvae-ebm-prior {config.library}"]
    lines.append(f"{'latents':14}{len(shapes)} layers, {sum(math.prod(shape) for shape in shapes)} dimensions")
    lines += [f"{name:14}{words}" for name, words in settings_in_words(config).items()]
    if config.training:
        lines.append(f"{'training':14}{config.training.iterations} iterations in {config.training.seconds:.0f} s")
    return lines + [f"{each.name:14}{each.value:.4g}  {each.features}  {each.dataset}" for each in config.metrics]


def find_installation() -> tuple[dict[str, str | None], dict[str, Any]]:
    """Versions of packages, None for what is not installed; and the backend of every device, by its name."""
    packages = ("hvae-ebm-prior", "torch", "numpy", "triton", "torch-fidelity")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    devices += [torch.device("mps")] if torch.backends.mps.is_available() else []
    backends = {}
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        # GPUs of one kind have one name.
        backends[f"{name} ({device})" if name in backends else name] = choose_backend("auto", device)
    return {name: installed(name) for name in packages}, backends
