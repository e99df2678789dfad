"""What the command line names: functions of modules or files, and the models and priors that they return."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from torch import nn

from ..saving.hub import NOT_FOUND
from ..training.learned_prior import LearnedPrior
from .options import read_device

# Where a command is added, with its options and the function that runs it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
# The form of a function's name, for help and errors.
FORM = "package.module:function or path/to/file.py:function"


def add_loader(
    command: argparse.ArgumentParser, what: str, *, seed: bool = True, saved: bool = False, otherwise: str = ""
) -> None:
    """Where the model comes from, and options of most commands.

    Args:
        command: the command.
        what: what the loader returns, for its help.
        seed: whether the command draws random numbers under `--seed`.
        saved: whether it takes a saved prior as `--prior`.
        otherwise: what the command takes where no loader is named; empty where one must be.
    """
    command.add_argument(
        "loader",
        metavar="LOADER",
        nargs="?" if otherwise else None,
        help=f"function that returns {what}, as {FORM}{f' ({otherwise})' if otherwise else ''}",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="handed to the function, if given")
    command.add_argument(
        "--device",
        type=read_device,
        default="cpu",
        help="where to put it, if it is a module: cpu, cuda, cuda:1, mps, or auto for a GPU where there is one "
        "(%(default)s)",
    )
    if seed:
        command.add_argument("--seed", type=int, default=0, help="seed of all randomness (%(default)s)")
    if saved:
        command.add_argument(
            "--prior",
            help="a saved prior, a folder or owner/name on the Hub, to be loaded onto the model that the function "
            "returns",
        )


def load_model(options: argparse.Namespace) -> Any:
    """What the loader returns for the checkpoint, on the device if it is a module."""
    load = load_function(options.loader)
    given = [options.checkpoint] if options.checkpoint else []
    with suppress(ValueError):  # functions whose signature is not known
        try:
            inspect.signature(load).bind(*given)
        except TypeError as error:
            what = f"with {options.checkpoint}" if given else "without a CHECKPOINT, which goes after it"
            raise TypeError(f"loader: {options.loader} cannot be called {what}: {error}") from None
    model = load(*given)
    return model.to(options.device) if isinstance(model, nn.Module) else model


def load_prior(options: argparse.Namespace) -> Any:
    """What the loader returns, or the saved prior that `--prior` names, of whichever class, on it."""
    model = load_model(options)
    if not options.prior:
        return model
    with folder_or_repository(options.prior):
        return LearnedPrior.from_pretrained(options.prior, backbone=model)


@contextmanager
def folder_or_repository(name: str) -> Iterator[None]:
    """Where the Hub has no repository of this name, or cannot be asked, say that there is no folder of it either."""
    try:
        yield
    except NOT_FOUND as error:
        raise FileNotFoundError(f"there is no folder {name}; as a repository of the Hub: {error}") from error


def load_function(name: str, what: str = "loader") -> Callable[..., Any]:
    """The function that a name refers to; modules beside its file can be imported while it runs.

    Args:
        name: `package.module:function` or `path/to/file.py:function`.
        what: what it is for; errors begin with this word.

    Returns:
        The function.

    Raises:
        ValueError: the name has another form, or there is no such function.
        ImportError, OSError: the module or file cannot be read.
    """
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise ValueError(f"{what}: expected {FORM}, got {name!r}")
    if where.endswith(".py") and not Path(where).exists():
        raise FileNotFoundError(f"{what}: there is no file {where}")
    with importable(name):
        module = load_file(Path(where).resolve()) if where.endswith(".py") else importlib.import_module(where)
    try:
        found = attrgetter(function)(module)
    except AttributeError:
        found = None
    if not callable(found):
        raise ValueError(f"{what}: {where} has no function {function}")
    return importable(name)(found)


@contextmanager
def importable(name: str) -> Iterator[None]:
    """Inside, or inside a function that it decorates, modules beside the file that `name` is of can be imported, as in
    `python file.py`; where it is of a module, those in the working folder, as in `python -m module`.
    """
    where = name.rpartition(":")[0]
    folder = str(Path(where).resolve().parent) if where.endswith(".py") else ""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # Not all of the path is put back: the user's code may have added clones of its own, to stay.
        with suppress(ValueError):
            sys.path.remove(folder)


def load_file(path: Path) -> ModuleType:
    """The module of a Python file."""
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = module_from_spec(spec)
    # Dataclasses look their module up by name. A name that is taken, as by torch for a torch.py, stays what it is.
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module
