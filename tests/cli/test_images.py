"""Every command takes images of every kind, read alike: arrays, folders of files, and data sets of the Hub."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from hvae_ebm_prior.cli.main import main, make_parser

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
LOADER = """
import torch
from backbones import Seeing
from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig, LangevinConfig

def load():
    torch.manual_seed(0)
    return Seeing([(2,), (3,)])

def load_prior():
    energy = EnergyConfig(context=False, width=8, vector_width=8)
    return DiffusionEBMPrior(load(), langevin=LangevinConfig(steps=2), energy=energy)

def pixels():
    return lambda images: images.flatten(1)
"""
FEATURES = ["--features", "mine.py:pixels"]
# Commands, in which A and B stand for images.
COMMANDS = {
    "diagnose": ["diagnose", "mine.py:load", "--images", "A", "--draws", "4"],
    "train": ["train", "mine.py:load", "--images", "A", "--out", "run", "--iterations", "1", "--batch-size", "4"],
    "edit": ["edit", "mine.py:load_prior", "--images", "A"],
    "interpolate": ["interpolate", "mine.py:load_prior", "--images", "A"],
    "transitions": ["transitions", "mine.py:load_prior", "--images", "A", "--count", "2", "--steps", "2"],
    "ood": [
        *("ood", "mine.py:load_prior", "--images", "A", "--outliers", "B", "--reference", "A"),
        *("--scheme", "inference", "typicality"),
    ],
    "evaluate": [
        *("evaluate", "mine.py:load_prior", "--images", "A", "--reference", "B", "--metrics", "--temperatures"),
        *FEATURES,
    ],
    "compare": [
        *("compare", "mine.py:load", "--images", "A", "--train", "B", "--iterations", "1", "--seeds", "0"),
        *("--only", "gaussian-0.9", *FEATURES),
    ],
}
# What takes time, and the names of the images.
VARIES = ("seconds", "sampling_seconds", "curve", "file")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two sets of images as arrays, as files, and on the Hub."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER)
    hub = {}
    for name, seed in (("A", 0), ("B", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 2, 2), dtype=np.uint8)
        np.save(f"{name}.npy", pixels)
        pictures = [pillow.fromarray(each) for each in pixels]
        for i, picture in enumerate(pictures):
            path = tmp_path / name / ("first" if i < 9 else "second") / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        rows = type("Rows", (list,), {"features": {"image": type("Image", (), {})()}})
        hub[name] = rows({"image": picture} for picture in pictures)
    stand_in = types.SimpleNamespace(load_dataset=lambda name, split: hub[name])
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return tmp_path


def lasting(figures):
    """Figures without what varies from call to call."""
    if isinstance(figures, dict):
        return {name: lasting(value) for name, value in figures.items() if name not in VARIES}
    return [lasting(each) for each in figures] if isinstance(figures, list) else figures


def outcome(command, kind, capsys):
    """What a command finds of one kind of images."""
    sources = {name: kind.format(name) for name in "AB"}
    assert main([sources.get(word, word) for word in command]) == 0, capsys.readouterr().err
    if command[0] == "diagnose":
        return capsys.readouterr().out
    if command[0] == "train":
        return json.loads(Path("run/checkpoints/step_00000001.json").read_text())["run"]["data"]["digest_of_images"]
    record = json.loads(Path(f"{command[0]}.json").read_text())
    if command[0] == "compare":
        del record["sha256"]  # of seconds among others
    return lasting(record)


@pytest.mark.parametrize("name", COMMANDS)
def test_images_of_every_kind_are_taken_alike(name, files, capsys):
    command = COMMANDS[name]
    expected = outcome(command, "{}.npy", capsys)
    for kind in ("{}", "hf:{}") if name == "edit" else ("{}",):
        for path in files.glob(f"{name}*.*"):
            path.unlink()
        shutil.rmtree("run", ignore_errors=True)
        assert outcome(command, kind, capsys) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_images_are_made_to_fit_the_model(name, files, capsys):
    """Those of another size are refused with what mends it; one that is broken is named, or left out."""
    command = ["A" if word == "B" else word for word in COMMANDS[name]]
    for path in files.glob("A/*/*.png"):
        pillow.open(path).resize((6, 4), pillow.Resampling.NEAREST).save(path)
    assert main(command) == 2
    assert "00.png: expected 2x2 pixels, as the backbone draws, got 6x4; --size 2 resizes" in capsys.readouterr().err
    (files / "A" / "first" / "03.png").write_bytes(b"no image")
    assert main([*command, "--size", "2"]) == 2
    assert "03.png: cannot be read as an image" in capsys.readouterr().err


def test_what_is_wrong_with_images_is_said_in_one_line(files, capsys):
    np.save("wide.npy", np.zeros((20, 2, 3), np.uint8))
    for source, message in (
        ("wide.npy", "wide.npy: expected images (1, 2, 2) (channels, height, width), as the backbone draws, got (1, 2"),
        ("nowhere", "images: there is no folder nowhere; expected a folder of PNG, JPEG or WebP files, hf:NAME"),
    ):
        for name in ("diagnose", "edit", "ood", "evaluate", "compare"):
            assert main([source if word == "A" else word for word in COMMANDS[name]]) == 2
            printed = capsys.readouterr().err.strip().splitlines()
            assert len(printed) == 1
            assert printed[0].startswith(f"hvae-ebm-prior: {message}")


def test_the_options_of_images_are_the_same_everywhere():
    (commands,) = [action for action in make_parser()._actions if action.dest == "command"]
    for name, command in commands.choices.items():
        options = command._option_string_actions
        expected = (
            {"--images", "--limit", "--size", "--background", "--skip-broken"} if "--images" in options else set()
        )
        assert expected <= options.keys(), name
        assert not {"--data", "--backbone", "--checkpoint"} & options.keys(), name
        positions = [action.dest for action in command._actions if not action.option_strings]
        if "--device" in options:
            assert positions == ["loader", "checkpoint"]
