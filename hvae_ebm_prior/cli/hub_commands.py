"""The commands `push` and `pull`: saved priors between a folder and the Hub."""

import argparse
import sys
from pathlib import Path

from ..saving.card import amend_card, write_card
from ..saving.files import write_atomically
from ..saving.folder import CARD, load_config
from ..saving.hub import pull, upload
from .info_command import summary
from .loading import Commands
from .options import add_card, read_card


def add_push(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "push",
        help="upload a saved prior to the Hugging Face Hub",
        description="Upload a saved prior to a repository of the Hub, which is made where there is none. What is given "
        "for the model card is written into the folder's README.md first.",
    )
    command.add_argument(
        "folder", metavar="FOLDER", type=Path, help="what save_pretrained, or `hvae-ebm-prior train`, wrote"
    )
    command.add_argument("repository", metavar="REPOSITORY", help="owner/name, or name")
    command.add_argument(
        "--private", action="store_true", default=None, help="make the repository private, if it is made"
    )
    command.add_argument("--message", default="Upload prior", help="the commit's first line (%(default)s)")
    command.add_argument("--pull-request", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--revision", help="branch to commit to")
    add_access(command)
    add_card(command)
    command.set_defaults(run=run_push)


def add_pull(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "pull", help="download a saved prior", description="Download a saved prior from the Hub into a folder."
    )
    command.add_argument("repository", metavar="REPOSITORY", help="owner/name")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="where to put it")
    command.add_argument("--revision", help="branch, tag or commit")
    add_access(command)
    command.set_defaults(run=run_pull)


def add_access(command: argparse.ArgumentParser) -> None:
    """Where in the repository, and as whom."""
    command.add_argument("--subfolder", default="", help="folder within the repository")
    command.add_argument("--token", help="your token; without it, the one that `hf auth login` kept, or HF_TOKEN")


def run_push(options: argparse.Namespace) -> None:
    """Upload a folder; prints the commit's address."""
    complete_card(options.folder.expanduser(), options)
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


def complete_card(folder: Path, options: argparse.Namespace) -> None:
    """Write what was given for the model card, and the repository's name, into a folder's README.md."""
    config, path = load_config(folder), folder / CARD
    if path.is_symlink():  # which is not uploaded, nor what it leads to
        return
    if path.is_file():
        before = path.read_text(encoding="utf-8")
        text = amend_card(before, read_card(options), written_for=folder.name, repo_id=options.repository)
    else:
        before, text = "", write_card(config, read_card(options), repo_id=options.repository)
    if text != before:
        write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


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
