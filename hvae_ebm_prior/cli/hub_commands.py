"""The commands `push`, `pull` and `info`: saved priors between a folder and the Hub, and what one says of itself."""

import argparse
import math
import sys
from pathlib import Path

from ..saving.config import PriorConfig, settings_in_words
from ..saving.folder import WEIGHTS, load_config
from ..saving.hub import fetch, upload


def add_hub_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Options of `push` and `pull`."""
    push = commands.add_parser(
        "push",
        help="upload a saved prior to the Hugging Face Hub",
        description="Upload a saved prior, as it is, to a repository of the Hub, which is made where there is none.",
    )
    push.add_argument("folder", type=Path, help="what save_pretrained, or `hvae-ebm-prior train`, wrote")
    push.add_argument("repository", help="owner/name, or name")
    push.add_argument("--private", action="store_true", default=None, help="make the repository private, if it is made")
    push.add_argument("--message", default="Upload prior", help="the commit's first line (%(default)s)")
    push.add_argument("--pull-request", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--revision", help="branch to commit to")
    pull = commands.add_parser(
        "pull", help="download a saved prior", description="Download a saved prior from the Hub into a folder."
    )
    pull.add_argument("repository", help="owner/name")
    pull.add_argument("folder", type=Path, help="where to put it")
    pull.add_argument("--revision", help="branch, tag or commit")
    for command in (push, pull):
        command.add_argument("--subfolder", default="", help="folder within the repository")
        command.add_argument("--token", help="your token; without it, the one that `hf auth login` kept, or HF_TOKEN")


def run_push(options: argparse.Namespace) -> None:
    """Upload a folder; prints the commit's address."""
    address = upload(
        options.folder,
        options.repository,
        private=options.private,
        commit_message=options.message,
        token=options.token,
        create_pr=options.pull_request,
        revision=options.revision,
        subfolder=options.subfolder,
    )
    print(address)


def run_pull(options: argparse.Namespace) -> None:
    """Download into a folder; says on stderr what came."""
    folder = fetch(
        options.repository,
        subfolder=options.subfolder,
        local_dir=options.folder,
        revision=options.revision,
        token=options.token,
    )
    print(f"{folder}: {summary(load_config(folder))[0]}", file=sys.stderr)


def describe_saved(repo_or_dir: str) -> str:
    """What a saved prior in a folder or repository says of itself, in lines."""
    folder = fetch(repo_or_dir)
    size = (folder / WEIGHTS).stat().st_size / 1e6
    return "\n".join([*summary(load_config(folder)), f"{'weights':14}{size:.1f} MB"])


def summary(config: PriorConfig) -> list[str]:
    """The contents of a `config.json` for people."""
    shapes = config.backbone.latent_shapes
    lines = [f"{config.kind} for {config.family}, written by hvae-ebm-prior {config.library}"]
    lines.append(f"{'latents':14}{len(shapes)} layers, {sum(math.prod(shape) for shape in shapes)} dimensions")
    lines += [f"{name:14}{words}" for name, words in settings_in_words(config).items()]
    if config.training:
        lines.append(f"{'training':14}{config.training.iterations} iterations in {config.training.seconds:.0f} s")
    return lines + [f"{each.name:14}{each.value:.4g}  {each.features}  {each.dataset}" for each in config.metrics]
