"""The command `hvae-ebm-prior`. Each command adds its options, and the function that runs it with them."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from ..chains.langevin import ChainDiverged
from ..training.guard import TrainingDiverged
from .demo_command import add_demo
from .diagnose_command import add_diagnose
from .evaluate_command import add_evaluate
from .hub_commands import add_pull, add_push
from .info_command import add_info
from .loading import importable
from .prior_commands import add_edit, add_interpolate, add_ood, add_sample, add_transitions
from .train_command import add_train
from .trial_commands import add_trials

# What the user can mend, and so a message is enough.
MISTAKES = (ValueError, TypeError, ImportError, OSError, AttributeError, ChainDiverged, TrainingDiverged)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 2 with a message on stderr for what the user can mend."""
    options = make_parser().parse_args(arguments)
    try:
        # What the loader returns may import modules beside its file at any time.
        with importable(options.loader) if "loader" in options else nullcontext():
            options.run(options)
    except MISTAKES as error:
        print(f"hvae-ebm-prior: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hvae-ebm-prior", description="Better samples from a trained hierarchical VAE."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    add_diagnose(commands)
    add_train(commands)
    add_sample(commands)
    add_edit(commands)
    add_interpolate(commands)
    add_transitions(commands)
    add_ood(commands)
    add_evaluate(commands)
    add_trials(commands)
    add_demo(commands)
    add_push(commands)
    add_pull(commands)
    add_info(commands)
    return parser
