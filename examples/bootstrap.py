"""Make the repository's own environment and run a script in it; needs only Python 3.11 and pip.

`run_in_environment(__file__)` at the top of a script re-executes it with .venv's Python, after installing the package with its pinned development
dependencies (constraints.txt) where that has not been done yet. Only the standard library is used here.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "installed"


def run_in_environment(script: str) -> None:
    """Return inside .venv; elsewhere, make .venv and replace this process by `script` running there, with the same arguments."""
    if Path(sys.prefix).resolve() == ENVIRONMENT.resolve():
        return
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inputs = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    # The folder and the interpreter are part of the stamp: an environment does not survive a move.
    wanted = hashlib.sha256(inputs + str(ROOT).encode() + sys.version.encode()).hexdigest()
    if not STAMP.exists() or STAMP.read_text() != wanted:
        print(f"Making {ENVIRONMENT} (about a minute, 1 GB) ...", flush=True)
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]"], check=True, cwd=ROOT)
        STAMP.write_text(wanted)
    raise SystemExit(subprocess.run([str(python), script, *sys.argv[1:]], check=False).returncode)
