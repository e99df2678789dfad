"""Optional packages: what to install for them, said the same way everywhere."""

# Until the first release the package is in no index: it is installed from a clone. A release makes this "hvae-ebm-prior" (docs/releasing.md).
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
