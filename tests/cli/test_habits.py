"""What users type, and the bugs in their own files: the command line says what it did, and where an error is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvae_ebm_prior import DiffusionEBMPrior, __version__
from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.cli.options import out_file

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
