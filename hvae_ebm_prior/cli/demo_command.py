"""The command `demo`: the page to play with, served on this machine."""

import argparse

from ..saving.extras import install_command, where
from .demo import build_demo
from .loading import Commands, add_loader, load_prior
from .uploads import MAX_FILE


def add_demo(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "demo",
        help="a page in the browser: samples, labels, held layers, chains",
        description="Serve a page to play with a prior; "
        f"needs hvae-ebm-prior[demo]: {install_command('demo')}{where()}.",
    )
    add_loader(command, "your trained DiffusionEBMPrior, or your model with --prior", seed=False, saved=True)
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve it at: as it is, for this machine alone; 0.0.0.0 for whoever reaches this machine "
        "(%(default)s)",
    )
    command.add_argument("--port", type=int, help="where to serve it on this machine (the first free one from 7860 on)")
    command.add_argument("--share", action="store_true", help="ask Gradio for a public address as well")
    command.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    build_demo(load_prior(options)).launch(
        server_name=options.host, server_port=options.port, share=options.share, max_file_size=MAX_FILE
    )
