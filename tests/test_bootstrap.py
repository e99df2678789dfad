"""The environment that the two commands make: what they take, what they say where it cannot be had, and that a broken
one is made anew.
"""

import ast
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import bootstrap
import pytest
import torch


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """What the environment depends on, in a folder whose name has a space and umlauts; pip's installations are recorded
    instead of run, and the Python at work has a pip, but no ensurepip.
    """
    root = tmp_path / "Bücher und mehr"
    for name in ("pyproject.toml", "constraints.txt", "hvae_ebm_prior/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bootstrap.ROOT / name, root / name)
    moved = {
        name: root / getattr(bootstrap, name).relative_to(bootstrap.ROOT)
        for name in ("ENVIRONMENT", "PYTHON", "STAMP", "BEGUN", "LOG")
    }
    for name, path in {"ROOT": root, **moved}.items():
        monkeypatch.setattr(bootstrap, name, path)
    commands = []
    monkeypatch.setattr(bootstrap, "run_pip", commands.append)
    plain = subprocess.run

    def without_ensurepip(command, **options):
        if "venv" in command and "--without-pip" not in command:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr="ensurepip is not available")
        if command[1:3] == ["-m", "pip"]:
            return subprocess.CompletedProcess(command, int(command[0] != sys.executable))
        return plain(command, **options)

    monkeypatch.setattr(subprocess, "run", without_ensurepip)
    return commands


def run(*arguments, extra="examples"):
    """The command with these arguments on a script that prints what it is run with; its exit code."""
    script = bootstrap.ROOT / "script.py"
    script.write_text(
        "import importlib.util, sys\n"
        "torch = importlib.util.find_spec('torch').origin\n"
        "print(sys.prefix, torch, *sys.argv[1:], file=open('ran', 'w'))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.chdir(bootstrap.ROOT)
        with pytest.raises(SystemExit) as caught:
            bootstrap.run_in_environment(str(script), extra)
    return caught.value.code


def test_an_environment_takes_the_torch_that_is_there_and_is_repaired(checkout, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    monkeypatch.setenv("PIP_TARGET", "/somewhere/else")
    assert run("--cuda" if torch.version.cuda else "--cpu", "7") == 0
    prefix, found, argument = (bootstrap.ROOT / "ran").read_text().rsplit(" ", 2)
    assert (Path(prefix), Path(found), argument.strip()) == (bootstrap.ENVIRONMENT, Path(torch.__file__), "7")
    assert f"{importlib.metadata.version('torch')}, which is installed already" in capsys.readouterr().out
    (installed,) = checkout
    assert installed[:5] == [sys.executable, "-m", "pip", "--python", str(bootstrap.PYTHON)]
    assert installed[-1] == f"{bootstrap.ROOT}[examples]"
    # Once only; then what is missing, keeping what is there.
    assert run() == 0
    assert len(checkout) == 1
    (bootstrap.ENVIRONMENT / "mine").touch()
    assert run(extra="dev") == 0
    everything, without_dependencies = checkout[1:]
    assert everything[-1] == f"{bootstrap.ROOT}[dev]"
    alone = bootstrap.WITHOUT_DEPENDENCIES["dev"]
    assert without_dependencies[-len(alone) - 1 :] == ["--no-deps", *alone]
    assert run() == 0
    assert len(checkout) == 3
    assert (bootstrap.ENVIRONMENT / "mine").exists()
    # Half made: an interpreter that is gone, and one that was being filled.
    bootstrap.PYTHON.unlink()
    assert run() == 0
    assert not (bootstrap.ENVIRONMENT / "mine").exists()
    (bootstrap.ENVIRONMENT / "mine").touch()
    bootstrap.STAMP.unlink()
    bootstrap.BEGUN.touch()
    assert run() == 0
    assert not (bootstrap.ENVIRONMENT / "mine").exists()


def test_without_a_torch_the_cpu_build_of_the_pins_comes_first(checkout, monkeypatch):
    monkeypatch.setattr(bootstrap, "find_torch", lambda python, build: None)
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    asked = []
    monkeypatch.setattr(bootstrap, "install_cpu_torch", lambda install, requirement: asked.append(requirement))
    bootstrap.make("examples", None)
    bootstrap.make("examples", "cuda")  # another build: the environment is made anew
    (pinned,) = [
        line for line in (bootstrap.ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    assert asked == [pinned]
    assert [bootstrap.read_stamp()["build"], len(checkout)] == ["cuda", 2]


def test_an_environment_of_somebody_else_is_left_alone(checkout, monkeypatch):
    bootstrap.PYTHON.parent.mkdir(parents=True)
    bootstrap.PYTHON.touch()
    monkeypatch.setattr(bootstrap, "version_of", lambda python: "3.99.0 (main)")
    assert "environment of another Python (3.99.0" in run()
    assert not checkout


def test_help_needs_no_environment(checkout, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "what it does")
    assert run("--help") == "what it does"
    assert not bootstrap.ENVIRONMENT.exists()


SAID = {
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device": "The disk is full",
    "ERROR: ResolutionImpossible: for help visit ...": "contradict what your pip is set up with",
    "WARNING: Retrying ... NewConnectionError('...: Failed to establish a new ...')": "cannot reach its package index",
    "ProxyError('Cannot connect to proxy.')": "does not get through the proxy",
    "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))": "PIP_CERT",
    "ERROR: Could not find a version that satisfies the requirement torch>=2.6 (from ...)": "no build for this machine",
    "something new": "What pip says above is the cause",
}


@pytest.mark.parametrize("said", SAID)
def test_what_pip_fails_with_becomes_advice(said, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "pip.log")
    with pytest.raises(bootstrap.SetupError, match=SAID[said]):
        bootstrap.run_pip([sys.executable, "-c", f"import sys; open(sys.argv[-1], 'w').write({said!r}); sys.exit(1)"])


def test_machines_without_a_pytorch_are_told_so(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 2))
        with pytest.raises(bootstrap.SetupError, match="needs Python 3.11 or newer"):
            bootstrap.check_machine(None)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    for machine, version, good in (("x86_64", "15.1", False), ("arm64", "13.6", False), ("arm64", "14.0", True)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(platform, "mac_ver", lambda version=version: (version, ("", "", ""), ""))
        if good:
            bootstrap.check_machine(None)
        else:
            with pytest.raises(bootstrap.SetupError, match=f"and this is macOS {version} on {machine}"):
                bootstrap.check_machine(None)
    with pytest.raises(bootstrap.SetupError, match="--cuda is for Linux"):
        bootstrap.check_machine("cuda")


def test_old_pythons_can_read_what_tells_them_so():
    for script in ("examples/bootstrap.py", "examples/quickstart.py", "examples/conditional.py", "tests/run.py"):
        ast.parse((bootstrap.ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 7))


def test_only_a_torch_that_fits_is_taken():
    build = "cuda" if torch.version.cuda else "cpu"
    python = Path(sys.executable)
    assert bootstrap.find_torch(python, build) == bootstrap.find_torch(python, None)
    assert bootstrap.find_torch(python, None)["version"] == importlib.metadata.version("torch")
    assert bootstrap.find_torch(python, "cpu" if build == "cuda" else "cuda") is None
    assert bootstrap.find_torch(Path("no/python"), None) is None


def test_a_torch_that_was_installed_here_follows_its_pin(checkout, monkeypatch, capsys):
    """The environment's own PyTorch is no longer what there is when the pin moves on; one that is lent to it is."""
    assert run() == 0
    found = {"version": "2.6.0", "build": "cpu", "folder": str(bootstrap.ENVIRONMENT / "lib")}
    monkeypatch.setattr(bootstrap, "find_torch", lambda python, build: found if python == bootstrap.PYTHON else None)
    asked = []
    monkeypatch.setattr(bootstrap, "install_cpu_torch", lambda install, torch: asked.append(torch))
    pin = bootstrap.ROOT / "constraints.txt"
    pin.write_text(pin.read_text().replace("torch==", "torch==9.") + "\n")
    capsys.readouterr()
    bootstrap.make("examples", None)
    assert "installed already" not in capsys.readouterr().out
    assert "torch==9." in (bootstrap.ENVIRONMENT / "constraints.txt").read_text()
    assert platform.system() != "Linux" or asked[0].startswith("torch==9.")
    found["folder"] = "/elsewhere"
    monkeypatch.setattr(bootstrap, "lend", lambda folder: None)
    bootstrap.make("examples", None)
    assert "2.6.0, which is installed already" in capsys.readouterr().out
    assert "torch==2.6.0" in (bootstrap.ENVIRONMENT / "constraints.txt").read_text()
