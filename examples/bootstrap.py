"""Make the repository's own environment and run a script in it; needs only Python 3.11 and pip.

`run_in_environment(__file__)` at the top of a script re-executes it with .venv's Python, after installing the package with its pinned development
dependencies (constraints.txt) where that has not been done yet. Only the standard library is used here.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "installed"


def run_in_environment(script: str) -> None:
    """Return inside .venv; elsewhere, make .venv, run `script` there with the same arguments, and exit with its exit code."""
    if Path(sys.prefix).resolve() == ENVIRONMENT.resolve():
        return
    python = str(ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    inputs = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "hvae_ebm_prior/__init__.py"))
    # An environment does not survive a move, so folder and interpreter are part of the stamp; the version is, as the installation keeps a copy.
    wanted = hashlib.sha256(inputs + str(ROOT).encode() + sys.version.encode()).hexdigest()
    if not STAMP.exists() or STAMP.read_text() != wanted:
        print(f"Making {ENVIRONMENT} (about a minute, 1 GB) ...", flush=True)
        STAMP.unlink(missing_ok=True)
        # Without its own pip the environment needs no ensurepip, which some systems package apart from Python.
        clear = [] if runs_this_python(python) else ["--clear"]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", *clear, str(ENVIRONMENT)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]"], check=True, cwd=ROOT)
        # Without its dependencies: those it needs here are there already, and torchvision, which it imports but does not use for what we ask of it,
        # has no build on PyPI that goes with the CPU build of PyTorch. Tests stand in for it.
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "--no-deps", "torch-fidelity"], check=True, cwd=ROOT)
        STAMP.write_text(wanted)
    raise SystemExit(subprocess.run([python, script, *sys.argv[1:]], check=False).returncode)


def runs_this_python(python: str) -> bool:
    """Whether an environment's interpreter exists, runs and is of this version."""
    try:
        told = subprocess.run([python, "-c", "import sys; print(sys.version)"], check=False, capture_output=True, text=True)
    except OSError:
        return False
    return told.stdout.strip() == sys.version.strip()
