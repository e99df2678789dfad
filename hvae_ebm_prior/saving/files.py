"""Files that are written whole or not at all."""

import glob
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# Scratch files older than this, in seconds, are of processes that were killed.
FORGOTTEN = 24 * 3600


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, then move it there, so that the file is never half written.

    Args:
        path: the file to make or replace.
        write: writes to the path that it is given.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    path = Path(path).expanduser()
    with scratch_file(path, write) as scratch:
        os.replace(scratch, path)
    sync(path.parent)


@contextmanager
def scratch_file(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """A file beside `path` that `write` has written, of a name that no other process or thread takes, on the disk; gone
    afterwards, unless it was moved. Those that processes left behind when they were killed are removed.
    """
    own = re.compile(rf"{re.escape(path.stem)}\.\d+-[0-9a-f]+\.part{re.escape(path.suffix)}")
    for old in path.parent.glob(f"{glob.escape(path.stem)}.*.part{path.suffix}"):
        with suppress(OSError):
            if own.fullmatch(old.name) and time.time() - old.stat().st_mtime > FORGOTTEN:
                old.unlink()
    # Some writers look at the suffix.
    scratch = path.with_name(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part{path.suffix}")
    scratch.touch(exist_ok=False)
    # As a new file is made here, whatever the writer makes of it.
    mode = scratch.stat().st_mode
    try:
        try:
            write(scratch)
            scratch.chmod(mode)
            sync(scratch)
        except SafetensorError as error:
            # What a full disk is to it.
            raise OSError(f"{path}: cannot be written ({error})") from error
        except OSError as error:
            if error.filename is None and error.errno is not None:
                raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
            raise
        yield scratch
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
    write_atomically(path, lambda scratch: scratch.write_bytes(json_bytes(values)))


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(values, indent=1) + "\n").encode()
