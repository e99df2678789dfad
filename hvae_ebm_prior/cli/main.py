"""The command `hvae-ebm-prior`. Each command adds its options, and the function that runs it with them."""

import argparse
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ..backbone.text import visible
from ..chains.langevin import ChainDiverged
from ..saving.extras import installed
from ..training.guard import TrainingDiverged
from .demo_command import add_demo
from .diagnose_command import add_diagnose
from .evaluate_command import add_evaluate
from .hub_commands import add_pull, add_push
from .info_command import add_info
from .loading import importable
from .prior_commands import add_edit, add_interpolate, add_ood, add_sample, add_transitions
from .threads import leave_busy_cores
from .train_command import add_train
from .trial_commands import add_trials

# Code that is none of the user's: this library, Python's own, and what is installed.
OTHERS_CODE = [
    Path(__file__).parent.parent,
    Path(__file__).parents[2] / "adapters",
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")),
]
# What one types first, and what scripts look at.
EXAMPLES = """examples, where the function load of mine.py returns your model:
  hvae-ebm-prior demo                      (the shipped prior, in a clone)
  hvae-ebm-prior diagnose mine.py:load --images photos/
  hvae-ebm-prior train mine.py:load --images photos/ --out my-prior
  hvae-ebm-prior sample mine.py:load --prior my-prior --count 64 --seed 0
  hvae-ebm-prior info my-prior --json

hvae-ebm-prior COMMAND --help says what a command takes. Exit status: 0 done,
2 for what you can mend, 130 after Ctrl-C, 1 for an error nobody foresaw."""
# What the user can mend, and so a message is enough.
MISTAKES = (ValueError, TypeError, ImportError, OSError, AttributeError, ChainDiverged, TrainingDiverged)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words of the command line; None for the process's own.

    Returns:
        Its exit status: 0, or 2 with a message on stderr for what the user can mend, or 130 after Ctrl-C.

    Raises:
        SystemExit: of status 2, a command line that cannot be understood; of 0, after --help and --version.
        Exception: an error that nobody foresaw, after which Python prints a traceback and the status is 1; with
            --debug, any error.
    """
    options, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if "loader" in options:
        leave_busy_cores()
    try:
        # What the loader returns may import modules beside its file at any time.
        with importable(options.loader) if getattr(options, "loader", None) else nullcontext():
            options.run(options)
    except MISTAKES as error:
        if options.debug:
            raise
        # Names of files and texts from elsewhere may hold what a terminal obeys.
        message = "\n".join(map(visible, str(error).splitlines()))
        print(f"hvae-ebm-prior: {message}{users_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if options.debug:
            raise
        print(f"hvae-ebm-prior: interrupted{f'; {error}' if error.args else ''}", file=sys.stderr)
        return 130
    return 0


def users_line(error: BaseException) -> str:
    """Where in the user's own code an error arose, as a line of its own; empty where it did not."""
    # Code that is made while running, as of dataclasses, is in no file.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    own = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(place) for place in OTHERS_CODE)]
    if not own:
        return ""
    frame = own[-1]
    return f"\n  in {frame.filename}, line {frame.lineno}, in {frame.name}: {frame.line}\n  (--debug shows all of it)"


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hvae-ebm-prior",
        description="Better samples from a trained hierarchical VAE.",
        epilog=EXAMPLES,
        formatter_class=OneScreen,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed('hvae-ebm-prior') or 'unknown'}")
    parser.add_argument("--debug", action="store_true", help="show where errors arise, as Python does")
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
    for command in commands.choices.values():
        command.usage = usage(command)
        command.allow_abbrev = False  # --data would be taken for --dataset
        command.set_defaults(parser=command)
    return parser


class OneScreen(argparse.RawDescriptionHelpFormatter):
    """A line for every command, its name beside what it does, and examples as they stand."""

    def add_argument(self, action: argparse.Action) -> None:
        """Leave room for the names of commands, which stand further right than those of options."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            longest = max(len(name) for name in action.choices)
            self._action_max_length = max(self._action_max_length, longest + 2 * self._indent_increment)


def usage(command: argparse.ArgumentParser) -> str:
    """What a command must be given, in the order in which it is best given: an option that takes several values would
    take the loader's name, too, where that comes last.
    """
    words = [command.prog]
    for action in sorted(command._actions, key=lambda action: bool(action.option_strings)):
        name = " ".join([*action.option_strings, str(action.metavar)])
        words += [f"[{name}]"] if action.nargs == "?" else []
        words += [name] if action.required and action.nargs != "?" else []
    for group in command._mutually_exclusive_groups:
        either = (f"{action.option_strings[0]} {action.metavar}" for action in group._group_actions)
        words += [f"({' | '.join(either)})"] if group.required else []
    return " ".join([*words, "[OPTIONS]"])
