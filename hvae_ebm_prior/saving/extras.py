"""Optional packages: which are installed, and the errors that name what to install."""

from importlib.metadata import PackageNotFoundError, version

import torch

# Until the first release the package is in no index: it is installed from a clone. A release makes this
# "hvae-ebm-prior" (docs/releasing.md).
SOURCE = "."


def install_command(extra: str | None = None) -> str:
    """The command that installs this package, with an extra or without."""
    return f"pip install {SOURCE}" if extra is None else f'pip install "{SOURCE}[{extra}]"'


def where() -> str:
    """Where that command works; empty if anywhere."""
    return ", in a clone of the library's repository" if SOURCE == "." else ""


def missing(what: str, extra: str) -> ImportError:
    """The error of a feature whose optional package is not there.

    Args:
        what: what needs which package, as "pictures need matplotlib".
        extra: the extra of this package that brings it.

    Returns:
        The error, to be raised.
    """
    return ImportError(f"{what}; install hvae-ebm-prior[{extra}]: {install_command(extra)}{where()}")


def installed(package: str) -> str | None:
    """The version of an installed distribution, None if there is none of this name."""
    # Its own version names the build, +cpu or +cu124, which the metadata of some releases leave out.
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None
