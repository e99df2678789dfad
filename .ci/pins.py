"""constraints.txt: the versions that tests and linters depend on, and a check that they install wherever we say.

    .venv/bin/python .ci/pins.py            # writes it, with the newest versions that all extras agree on
    .venv/bin/python .ci/pins.py --check    # resolves it from the public index alone, for every system and Python

What is not named here follows the ranges of pyproject.toml.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
# Chosen by hand. Triton follows, as the one that this release of PyTorch asks for.
TORCH = "torch==2.13.0"
# Numbers, pictures, pages and complaints come from these.
NUMBERS = {
    "torch",
    "triton",
    "numpy",
    "scipy",
    "scikit-learn",
    "einops",
    "safetensors",
    "huggingface-hub",
    "pillow",
    "matplotlib",
}
TOOLS = {"pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "pydoclint", "sphinx", "furo", "myst-parser"}
# The first patch release of each Python, and every system that PyTorch has files for.
PYTHONS = ("3.11.0", "3.12.0", "3.13.0", "3.14.0")
SYSTEMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")
HEADER = "# Versions that tests and linters depend on, written by .ci/pins.py; always passed with -c.\n"


def resolve(home: str, constraints: Path, *options: str) -> str:
    """What all extras resolve to with the public index alone: no settings, files or caches. ValueError with uv's words
    if they do not.
    """
    command = ["uv", "pip", "compile", "pyproject.toml", "--all-extras", "-c", str(constraints), *options]
    command += ["--no-config", "--system-certs", "--quiet", "--no-annotate", "--no-header"]
    environment = {
        "HOME": home,
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "MACOSX_DEPLOYMENT_TARGET": "14.0",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout


def write(home: str) -> None:
    """Write constraints.txt: one version of each for all systems and Pythons."""
    chosen = Path(home) / "chosen.txt"
    chosen.write_text(TORCH)
    found = resolve(home, chosen, "--universal", "--python-version", PYTHONS[0], "--fork-strategy", "fewest")
    pins = [line for line in found.splitlines() if re.split("[ =;]", line)[0] in NUMBERS | TOOLS]
    FILE.write_text(HEADER + "\n".join(pins) + "\n")


def check(home: str) -> bool:
    """Whether constraints.txt resolves everywhere; prints a line for every system and Python."""

    def outcome(where: tuple[str, str]) -> bool:
        system, python = where
        try:
            resolve(home, FILE, "--python-platform", system, "--python-version", python, "--only-binary", ":all:")
        except ValueError as error:
            print(f"pins: {system}, Python {python}: {error}", flush=True)
            return False
        print(f"pins: {system}, Python {python}: resolved", flush=True)
        return True

    with ThreadPoolExecutor(8) as pool:
        return all(list(pool.map(outcome, itertools.product(SYSTEMS, PYTHONS))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    with tempfile.TemporaryDirectory() as home:
        if not parser.parse_args().check:
            write(home)
        elif not check(home):
            sys.exit(f"{FILE.name} does not install everywhere; write it anew with {sys.executable} .ci/pins.py")


if __name__ == "__main__":
    main()
