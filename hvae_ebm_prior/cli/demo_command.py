"""The command `demo`: the page to play with, served on this machine."""

import argparse
import sys
from pathlib import Path

from ..saving.extras import install_command, where
from .demo import build_demo
from .loading import Commands, add_loader, load_prior
from .uploads import MAX_FILE

# The example's model, and the prior that is shipped with it, in a clone: the working folder, or where this file lies.
CLONES = (Path(), Path(__file__).resolve().parents[2])
SHIPPED = Path("examples", "data")
MODEL, PRIOR = "hvae.safetensors", "prior"


def add_demo(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "demo",
        help="a page in the browser: samples, labels, held layers, chains",
        description="Serve a page to play with a prior; "
        f"needs hvae-ebm-prior[demo]: {install_command('demo')}{where()}.",
    )
    what = "your trained DiffusionEBMPrior, or your model with --prior"
    add_loader(command, what, seed=False, saved=True, otherwise="in a clone, the example's model and its shipped prior")
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
    if options.loader is None:
        take_shipped(options)
    build_demo(load_prior(options)).launch(
        server_name=options.host, server_port=options.port, share=options.share, max_file_size=MAX_FILE
    )


def take_shipped(options: argparse.Namespace) -> None:
    """Name the example's model, and its shipped prior or that of `--prior`, in the options; FileNotFoundError where
    this is no clone.
    """
    found = next((clone / SHIPPED for clone in CLONES if (clone / SHIPPED / MODEL).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"demo: there is no {SHIPPED.as_posix()}/{MODEL} here, which it shows where no LOADER is named; run it "
            "in a clone of the library's repository, or name a function that returns your trained prior: "
            "hvae-ebm-prior demo mine.py:load_prior"
        )
    options.loader, options.checkpoint = "hvae_ebm_prior.adapters:HVAE.load", str(found / MODEL)
    options.prior = options.prior or str(found / PRIOR)
    print(f"the example's model, {options.checkpoint}, with the prior {options.prior}", file=sys.stderr)
