"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, then move it there, so that the file is never half written.

    Args:
        path: the file to make or replace.
        write: writes to the path that it is given.
    """
    path = Path(path).expanduser()
    scratch = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")  # some writers look at the suffix
    try:
        write(scratch)
        sync(scratch)
        os.replace(scratch, path)
        sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON."""
    write_atomically(path, lambda scratch: scratch.write_text(json.dumps(values, indent=1) + "\n"))
