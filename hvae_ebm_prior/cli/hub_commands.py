"""The commands `push` and `pull`: saved priors between a folder and the Hub."""

import argparse
import sys
from pathlib import Path

from ..saving.folder import load_config
from ..saving.hub import pull, upload
from .info_command import summary
from .loading import Commands


def add_push(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "push",
        help="upload a saved prior to the Hugging Face Hub",
        description="Upload a saved prior, as it is, to a repository of the Hub, which is made where there is none.",
    )
    command.add_argument("folder", type=Path, help="what save_pretrained, or `hvae-ebm-prior train`, wrote")
    command.add_argument("repository", help="owner/name, or name")
    command.add_argument(
        "--private", action="store_true", default=None, help="make the repository private, if it is made"
    )
    command.add_argument("--message", default="Upload prior", help="the commit's first line (%(default)s)")
    command.add_argument("--pull-request", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--revision", help="branch to commit to")
    add_access(command)
    command.set_defaults(run=run_push)


def add_pull(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "pull", help="download a saved prior", description="Download a saved prior from the Hub into a folder."
    )
    command.add_argument("repository", help="owner/name")
    command.add_argument("folder", type=Path, help="where to put it")
    command.add_argument("--revision", help="branch, tag or commit")
    add_access(command)
    command.set_defaults(run=run_pull)


def add_access(command: argparse.ArgumentParser) -> None:
    """Where in the repository, and as whom."""
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
    folder = pull(
        options.repository,
        options.folder,
        subfolder=options.subfolder,
        revision=options.revision,
        token=options.token,
    )
    print(f"{folder}: {summary(load_config(folder))[0]}", file=sys.stderr)
