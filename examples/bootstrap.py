"""Make the repository's own environment and run a script in it.

It needs Python 3.11 or newer with its venv, and ensurepip or pip.

`run_in_environment(__file__)` at the top of a script runs it again with .venv's Python, after installing what it needs
(an extra of pyproject.toml, in the versions of constraints.txt) where that has not been done yet. Only the standard
library is used here.

PyTorch is, in this order: one that is installed already, in .venv or for the Python at work; its CPU build where there
is no NVIDIA GPU, from PyTorch's own index if that answers; what pip finds. `--cpu` and `--cuda` ask for one of the two.
"""

# Pythons that are too old must be able to parse this file, for check_machine to say so.
from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# What is installed; a file that exists while something is being installed; pip's log.
STAMP = ENVIRONMENT / "installed.json"
BEGUN = ENVIRONMENT / "begun"
LOG = ENVIRONMENT / "pip.log"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Gigabytes on disk: the rest of an extra, and PyTorch.
SIZES = {"examples": 0.4, "dev": 1.5, "cpu": 0.7, "cuda": 4.2}
# These ask for torchvision, which is not needed for what is used of them here, and which would bring another PyTorch.
WITHOUT_DEPENDENCIES = {"examples": [], "dev": ["torch-fidelity>=0.4,<0.5", "azula>=0.11,<0.12"]}
# Version, build and folder of the PyTorch that a Python has; fails if it has none.
FIND_TORCH = """
import importlib.metadata, importlib.util, json, pathlib, runpy
version = importlib.metadata.version("torch")
folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent
about = runpy.run_path(str(folder / "version.py"))
print(json.dumps({"version": version, "build": "cuda" if about["cuda"] else "cpu", "folder": str(folder.parent)}))
"""
NO_CONNECTION = (
    "NewConnectionError|NameResolutionError|ConnectTimeout|Read timed out|Max retries|Network is unreachable"
)
# Advice by a pattern in pip's log; the first that is found is given.
ADVICE = {
    r"No space left on device": "The disk is full, here or where temporary files go (TMPDIR says where).",
    r"ResolutionImpossible": (
        "These versions contradict what your pip is set up with, constraints or an index: see `{pip} config list`."
    ),
    r"ProxyError|Tunnel connection failed": (
        "pip does not get through the proxy: see HTTPS_PROXY, and `{pip} config list`."
    ),
    r"SSLError|CERTIFICATE_VERIFY_FAILED": (
        "A certificate was refused: name your network's own with PIP_CERT=/path/to/ca.pem."
    ),
    NO_CONNECTION: (
        "pip cannot reach its package index. Without a network nothing can be installed; behind a proxy, set "
        "HTTPS_PROXY; with an index of your own, PIP_INDEX_URL. Then run this again."
    ),
    r"(satisfies the requirement|matching distribution found for) torch\b": (
        "PyTorch has no build for this machine and Python: it has for Linux with glibc (x86-64, aarch64), macOS 14 on "
        "Apple silicon, Windows (x86-64), and Python 3.11 to 3.14."
    ),
}


class SetupError(Exception):
    """The environment cannot be made; the message says why, and what to do."""


def run_in_environment(script: str, extra: str = "examples") -> None:
    """Return inside .venv; elsewhere run `script` there with the same arguments, and exit with its exit code.

    Args:
        script: path of the script.
        extra: what it needs: "examples", or "dev", which has all of that as well.
    """
    build = next((argument[2:] for argument in sys.argv if argument in ("--cpu", "--cuda")), None)
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in ("--cpu", "--cuda")]
    if Path(sys.prefix).resolve() == ENVIRONMENT.resolve():
        return
    try:
        check_machine(build)
        stamp = read_stamp()
        unchanged = stamp.get("inputs") == digest_inputs()
        if not (unchanged and extra in stamp["extras"] and build in (None, stamp["build"]) and version_of(PYTHON)):
            if {"-h", "--help"} & set(sys.argv[1:]):
                raise SystemExit(sys.modules["__main__"].__doc__)
            make(extra, build)
        command = [str(PYTHON), script, *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, check=False, env=clean_environment()).returncode)
    except SetupError as error:
        raise SystemExit(f"\n{error}") from None
    except OSError as error:
        raise SystemExit(
            f"\n{error}\nThis needs a folder that can be written to: copy {ROOT} to one of yours, and run it there."
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def check_machine(build: str | None) -> None:
    """Raise SetupError where PyTorch has no builds."""
    system = platform.system()
    machine = platform.machine()
    if sys.version_info < (3, 11):  # noqa: UP036
        newer = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11") if shutil.which(name)]
        advice = f"run this with {newer[0]}" if newer else "get one from python.org or your system's packages"
        raise SetupError(
            f"This needs Python 3.11 or newer, and {sys.executable} is {platform.python_version()}: {advice}."
        )
    if sys.maxsize < 2**32:
        raise SetupError(f"PyTorch needs a Python of 64 bits, and {sys.executable} has 32.")
    if system == "Darwin" and (machine != "arm64" or int(platform.mac_ver()[0].partition(".")[0] or 0) < 14):
        raise SetupError(
            "PyTorch is built for macOS 14 or newer on Apple silicon, and this is macOS "
            f"{platform.mac_ver()[0]} on {machine}."
        )
    if build == "cuda" and system != "Linux":
        raise SetupError(
            "--cuda is for Linux. Elsewhere install PyTorch as pytorch.org says and run this again: it takes the one "
            "it finds."
        )


def make(extra: str, build: str | None) -> None:
    """Make .venv, or add to it.

    Args:
        extra: what to install.
        build: of PyTorch, "cpu" or "cuda"; None for what is there, or suits the machine.

    Raises:
        SetupError: it cannot be done.
    """
    stamp = read_stamp()
    build = build or stamp.get("build")
    keep = version_of(PYTHON) == sys.version and not BEGUN.exists() and stamp.get("build", build) == build
    extra = "dev" if keep and "dev" in stamp.get("extras", ()) else extra
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"(?m)^torch==([^\s;]+)", pins)[1]
    torch = find_torch(PYTHON, build) if keep else None
    if torch and is_own(torch["folder"]) and torch["version"].partition("+")[0] != pinned:
        torch = None  # installed here for another pin, which has moved on
    torch = torch or find_torch(Path(sys.executable), build)
    if torch:
        build = torch["build"]
        choice = f"{torch['version']}, which is installed already."
    else:
        build = build or ("cuda" if platform.system() == "Linux" and has_nvidia_gpu() else "cpu")
        choice = f"its {build.upper()} build (--cpu and --cuda choose)."
    size = SIZES[extra] + (0 if torch else SIZES[build])
    what = "Adding to" if keep else "Making"
    print(f"{what} {ENVIRONMENT}: about {size:.1f} GB on disk, once. PyTorch: {choice}", flush=True)
    pip = make_environment(keep)
    if torch:
        lend(torch["folder"])
        if torch["version"].partition("+")[0] != pinned:  # another one wants another Triton
            pins = re.sub("(?m)^(torch|triton)==.*", "", pins) + f"torch=={torch['version']}\n"
    (ENVIRONMENT / "constraints.txt").write_text(pins, encoding="utf-8")
    install = [*pip, "--disable-pip-version-check", "install"]
    if build == "cpu" and not torch and platform.system() == "Linux":
        install_cpu_torch(install, f"torch=={pinned}")
    run_pip([*install, "-c", str(ENVIRONMENT / "constraints.txt"), "-e", f"{ROOT}[{extra}]"])
    if WITHOUT_DEPENDENCIES[extra]:
        run_pip([*install, "--no-deps", *WITHOUT_DEPENDENCIES[extra]])
    stamp = {"inputs": digest_inputs(), "extras": sorted({"examples", extra}), "build": build}
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")
    BEGUN.unlink()


def make_environment(keep: bool) -> list[str]:
    """Make the environment, unless it is kept.

    Args:
        keep: leave the environment that is there.

    Returns:
        The command of a pip that installs there.

    Raises:
        SetupError: there is no such pip, or the environment cannot be made.
    """
    if ENVIRONMENT.is_symlink() or (ENVIRONMENT.exists() and not ENVIRONMENT.is_dir()):
        raise SetupError(f"{ENVIRONMENT} is not a folder; remove it, and run this again.")
    ENVIRONMENT.mkdir(exist_ok=True)
    if not keep:
        if version_of(PYTHON) and not (STAMP.exists() or BEGUN.exists()):
            raise SetupError(
                f"{ENVIRONMENT} is an environment of another Python ({version_of(PYTHON).split()[0]}; this is "
                f"{platform.python_version()}) that was not made by this command. Remove it, or run the script with "
                f"it: {PYTHON} {sys.argv[0]}"
            )
        # Systems that package ensurepip apart from Python can do without: pip is then the one of the Python at work.
        for options in (["--clear"], ["--clear", "--without-pip"]):
            done = subprocess.run(
                [sys.executable, "-m", "venv", *options, str(ENVIRONMENT)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                break
        else:
            raise SetupError(
                f"{(done.stdout + done.stderr).strip()}\n{sys.executable} could not make an environment. If a part "
                "of Python is missing, install it: on Debian and Ubuntu, sudo apt install python3-venv python3-pip"
            )
    BEGUN.touch()
    for pip in ([str(PYTHON), "-m", "pip"], [sys.executable, "-m", "pip", "--python", str(PYTHON)]):
        done = subprocess.run([*pip, "--version"], capture_output=True, check=False, env=clean_environment())
        if done.returncode == 0:
            return pip
    raise SetupError(
        f"{sys.executable} has neither ensurepip nor a pip of version 22.3 or newer. Install one and run this again: "
        "on Debian and Ubuntu, sudo apt install python3-venv; with conda, conda install pip; elsewhere, "
        f"{sys.executable} -m ensurepip"
    )


def install_cpu_torch(install: list[str], torch: str) -> None:
    """Install PyTorch's CPU build from its own index, if that answers: on Linux the public one has builds for CUDA."""
    command = [*install, "--no-deps", "--retries", "1", "--timeout", "15", "--index-url", CPU_INDEX, torch]
    if subprocess.run(command, check=False, env=clean_environment()).returncode:
        print(
            f"PyTorch's own index ({CPU_INDEX}) does not answer. Taking what pip finds elsewhere, which may be the "
            f"CUDA build: about {SIZES['cuda']:.0f} GB. To have another one, press Ctrl-C, install it for "
            f"{sys.executable}, and run this again.",
            flush=True,
        )


def run_pip(command: list[str]) -> None:
    """Run pip with its output shown; SetupError with a line of advice where it fails."""
    LOG.unlink(missing_ok=True)
    if subprocess.run([*command, "--log", str(LOG)], check=False, env=clean_environment()).returncode:
        log = LOG.read_text(encoding="utf-8", errors="replace") if LOG.exists() else ""
        fitting = (advice for pattern, advice in ADVICE.items() if re.search(pattern, log))
        advice = next(fitting, "What pip says above is the cause.").format(pip=f"{sys.executable} -m pip")
        raise SetupError(f"pip could not install what this needs. {advice}\nAll of its output is in {LOG}")


def find_torch(python: Path, build: str | None) -> dict | None:
    """Version, build and folder of a PyTorch 2.6 or newer that an interpreter has, of the given build if any."""
    command = [str(python), "-c", FIND_TORCH]
    try:
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None
    if tuple(map(int, found["version"].split(".")[:2])) < (2, 6) or build not in (None, found["build"]):
        return None
    return found


def is_own(folder: str) -> bool:
    """Whether a folder of packages is the environment's own, rather than lent to it."""
    return Path(folder).resolve().is_relative_to(ENVIRONMENT.resolve())


def lend(folder: str) -> None:
    """Let the environment see a folder of packages, after its own."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    if own.resolve() != Path(folder).resolve():
        (own / "torch_found_elsewhere.pth").write_text(folder + "\n", encoding="utf-8")


def version_of(python: Path) -> str:
    """An interpreter's `sys.version`; empty if it does not run."""
    command = [str(python), "-c", "import sys; print(sys.version)"]
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def has_nvidia_gpu() -> bool:
    return (
        any(map(os.path.exists, ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")))
        or shutil.which("nvidia-smi") is not None
    )


def read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def digest_inputs() -> str:
    """SHA-256 of what an environment depends on."""
    # Also its folder, as it does not survive a move, and the version, of which the installation keeps a copy.
    inputs = b"".join(
        (ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "hvae_ebm_prior/__init__.py")
    )
    return hashlib.sha256(inputs + f"{ROOT} {sys.version}".encode()).hexdigest()


def clean_environment() -> dict[str, str]:
    """The environment variables, without those that would mix other packages into .venv or install elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")
    }
    return {**kept, "PIP_USER": "0"}
