"""What users type, and the bugs in their own files: the command line says what it did, and where an error is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hvae_ebm_prior import DiffusionEBMPrior, __version__
from hvae_ebm_prior.cli import demo_command
from hvae_ebm_prior.cli.main import main, make_parser
from hvae_ebm_prior.cli.options import out_file
from hvae_ebm_prior.training.learned_prior import LearnedPrior

ROOT = Path(__file__).parents[2]

LOADER = """
from __future__ import annotations
from dataclasses import dataclass

import torch
from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig
from hvae_ebm_prior.adapters import HVAE, HVAEConfig

@dataclass
class Settings:
    size: int = 8

def load(path: str | None = None):
    torch.manual_seed(0)
    model = HVAE(HVAEConfig(image_size=Settings().size, widths=(8, 8), latent_channels=(2, 1)))
    return DiffusionEBMPrior(model, energy=EnergyConfig(width=8, vector_width=8))

def broken(path=None):
    return load().missing

def raising(path=None):
    return torch.load("nowhere.pt")
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "written"),
    [
        *(("sam", "sam/sample.png"), ("sam/", "sam/sample.png"), ("made/", "made/sample.png")),
        *(("new", "new.png"), ("v1.5", "v1.5.png"), ("a/b.png", "a/b.png"), ("c.pdf", "c.pdf")),
    ],
)
def test_what_was_written_is_said(out, written, files, capsys):
    (files / "sam").mkdir()
    assert main(["sample", "mine.py:load", "--count", "2", "--out", out]) == 0
    record = f"{written.rsplit('.', 1)[0]}.json"
    assert f"{written} and {record} written" in capsys.readouterr().err
    assert (files / written).is_file()
    assert (files / record).is_file()


def test_other_commands_write_where_they_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert out_file("~/runs/", "compare.json") == tmp_path / "runs" / "compare.json"
    for out, file in (
        ("new", "new.json"),
        ("made/", "made/compare.json"),
        ("a.png", "a.png.json"),
        ("b.json", "b.json"),
    ):
        assert out_file(out, "compare.json") == Path(file)
        assert Path(file).parent.is_dir()


@pytest.mark.parametrize("options", [["--data", "x"], ["--backbone", "y"], ["second.pt"]])
def test_what_a_command_does_not_know_is_refused_with_its_usage(options, capsys):
    """Also the beginning of an option's name, as --data is of --dataset."""
    with pytest.raises(SystemExit, match="2"):
        main(["train", "mine.py:load", "first.pt", "--images", "x", "--out", "y", *options])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: hvae-ebm-prior train LOADER [CHECKPOINT] --images IMAGES --out FOLDER [OPTIONS]"
    assert error == f"hvae-ebm-prior train: error: unrecognized arguments: {' '.join(options)}"


def test_ctrl_c_is_one_line(files, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionEBMPrior, "sample", interrupted)
    assert main(["sample", "mine.py:load"]) == 130
    assert capsys.readouterr().err == "hvae-ebm-prior: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        main(["--debug", "sample", "mine.py:load"])


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("broken", "return load().missing"),
        ("raising", 'return torch.load("nowhere.pt")'),
    ],
)
def test_an_error_in_the_users_file_has_its_line(function, line, files, capsys):
    assert main(["sample", f"mine.py:{function}"]) == 2
    number = 1 + LOADER.splitlines().index(f"    {line}")
    assert f"in {files / 'mine.py'}, line {number}, in {function}: {line}" in capsys.readouterr().err
    with pytest.raises((AttributeError, OSError)):
        main(["--debug", "sample", f"mine.py:{function}"])


def test_an_error_of_ours_is_one_line(files, capsys):
    assert main(["sample", "mine.py:nothing"]) == 2
    assert capsys.readouterr().err == "hvae-ebm-prior: loader: mine.py has no function nothing\n"


@pytest.mark.parametrize("name", ["./nothere", "runs/a/nothere"])
def test_a_folder_that_is_not_there_is_said_to_be_none(name, files, capsys):
    assert main(["info", name]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_version_and_module():
    for command in (["-m", "hvae_ebm_prior", "--version"], ["-m", "hvae_ebm_prior", "info"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        assert __version__ in done.stdout
    assert torch.__version__ in done.stdout


def test_the_help_is_one_screen_with_examples(monkeypatch):
    """A line for every command, and nothing that a terminal of 80 columns would break; examples can be parsed."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = make_parser().format_help().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    (actions,) = [action for action in make_parser()._actions if action.dest == "command"]
    assert [line.split()[0] for line in lines if line.startswith("    ") and line[4] != " "] == list(actions.choices)
    examples = [line.partition("(")[0].split() for line in lines if line.startswith("  hvae-ebm-prior ")]
    assert len(examples) == 5
    for words in examples:
        make_parser().parse_args(words[1:])


def test_exit_statuses(files, monkeypatch, capsys):
    """0, 2 for what can be mended, 130 after Ctrl-C (above), and 1, Python's own, with a traceback for the rest."""
    assert main(["info"]) == 0
    assert main(["info", "./nothere"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-command"])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])

    def fails(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(DiffusionEBMPrior, "sample", fails)
    with pytest.raises(ZeroDivisionError):
        main(["sample", "mine.py:load"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("command", "files_written"),
    [
        (["sample", "--count", "2"], "sample.png and sample.json"),
        (
            ["transitions", "--count", "2", "--steps", "2"],
            "transitions.png, transitions_energies.png, transitions_pixels.png and transitions.json",
        ),
    ],
)
def test_results_as_json_and_a_last_line_with_all_files(command, files_written, files, capsys):
    assert main([command[0], "mine.py:load", *command[1:], "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads(Path(f"{command[0]}.json").read_text())
    assert shown.err == f"{files_written} written\n"
    assert sorted(path.name for path in files.glob(f"{command[0]}*")) == sorted(
        files_written.replace(" and ", ", ").split(", ")
    )


def test_diagnosis_and_info_as_json(files, capsys):
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    (files / "model.py").write_text(LOADER.replace("return DiffusionEBMPrior(model,", "return model; dict("))
    assert main(["diagnose", "model.py:load", "--images", "images.npy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["shape"] for layer in found["layers"]] == [[2, 2, 2], [1, 4, 4]]
    assert {"divergence", "accuracy", "error", "has_hole"} <= set(found["layers"][0])
    assert ["is the model trained" in fault for fault in found["faults"]] == [True]
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert "cpu" in found["langevin_steps"]
    assert main(["info", str(ROOT / "examples" / "data" / "prior"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "DiffusionEBMPrior"
    assert found["bytes"] == (ROOT / "examples" / "data" / "prior" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("has_gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_best_device(has_gpu, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert make_parser().parse_args(["sample", "mine.py:load", "--device", "auto"]).device == device


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "expected auto, cpu, cuda, cuda:1 or mps, got 'gpu'"), ("cuda", "PyTorch sees no cuda here; auto takes")],
)
def test_devices_that_are_not_there(device, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "mine.py:load", "--device", device])
    assert message in capsys.readouterr().err


def test_demo_without_a_loader_shows_the_shipped_prior(tmp_path, monkeypatch, capsys):
    """In a clone or beside one; elsewhere it says what to do."""
    shown = []

    class Page:
        def launch(self, **_):
            pass

    monkeypatch.setattr(demo_command, "build_demo", lambda prior: shown.append(prior) or Page())
    monkeypatch.chdir(ROOT)
    assert main(["demo"]) == 0
    assert isinstance(shown[0], LearnedPrior)
    assert "examples/data/prior" in capsys.readouterr().err.replace("\\", "/")
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    assert len(shown) == 2
    capsys.readouterr()
    monkeypatch.setattr(demo_command, "CLONES", (Path(),))
    assert main(["demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no examples/data/hvae.safetensors here" in line
    assert "hvae-ebm-prior demo mine.py:load_prior" in line
