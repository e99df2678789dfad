"""Checkpoints of training: all that a run's next step depends on, so that it goes on as if it had never stopped, bit
for bit.

A checkpoint of step n is two files, without pickles:

    step_n.safetensors    weights of trainee and average, the guard's snapshots, Adam's moments, random states, the history
    step_n.json           the loop's numbers, the place in the data, what the run is of, and the digest of the other file

Each is written whole or not at all, and the JSON file last, so that a checkpoint is there when its JSON file is. The
one before is kept: where the newest turns out to be broken, it takes its place.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..saving.digest import digest_file
from ..saving.files import write_json
from ..saving.fingerprint import Fingerprint, check_backbone, fingerprint
from ..saving.typed_json import from_json, to_json
from ..saving.weights_file import write_weights
from .record import TrainingRecord
from .run import Run

FORMAT = 2
# Settings of training that results do not depend on.
SPEED = ("micro_batch", "workers")
# Differences between two runs that an error names.
SHOWN = 5
ADAM = {"step", "exp_avg", "exp_avg_sq"}
# Numbers of a record in the history; the gap of every level and the gradient norm of every layer follow.
COLUMNS = (
    "loss",
    "gradient_norm",
    "learning_rate",
    "seconds",
    "cross_entropy",
    "displacement",
    "acceptance",
    "gradients_per_second",
)


class BrokenCheckpoint(ValueError):
    """The files of a checkpoint are missing, damaged, or of another kind."""


def find_checkpoints(folder: Path) -> list[Path]:
    """The JSON files of a folder's checkpoints, newest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("step_*.json")
        if (match := re.fullmatch(r"step_(\d+)\.json", path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def save_checkpoint(folder: Path, run: Run) -> None:
    """Write a checkpoint into `folder`, then remove all but it and the last good one before."""
    tensors, numbers = pack(run)
    path = folder / f"step_{len(run.history):08}.json"
    weights = path.with_suffix(".safetensors")
    write_weights(weights, tensors)
    write_json(path, {"format": FORMAT, "sha256": digest_file(weights), "run": describe(run), "state": numbers})
    kept = {f"step_{step:08}" for step in (len(run.history), run.saved)}
    run.saved = len(run.history)
    # A JSON file goes before its weights.
    for old in sorted(folder.glob("step_*")):
        if old.stem not in kept:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, run: Run) -> None:
    """Put a fresh run where the newest whole checkpoint of `folder` stands.

    Args:
        folder: holds at least one checkpoint.
        run: the same prior, settings and data that the checkpoint was made with; changed only if all is well.

    Raises:
        ValueError: no checkpoint is whole, or it is of another run; the message says what differs.
        OSError: a file cannot be read.
    """
    paths = find_checkpoints(folder)
    for path in paths:
        try:
            tensors, numbers = read(path, run)
        except BrokenCheckpoint as error:
            if path == paths[-1]:
                raise ValueError(
                    f"{error}; {folder} holds no whole checkpoint: begin anew in another checkpoint_dir"
                ) from error
            warnings.warn(f"{error}; going on from the checkpoint before", RuntimeWarning, stacklevel=4)
        else:
            unpack(run, tensors, numbers)
            return


def read(path: Path, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of a checkpoint, as `pack` makes them, which fit `run`."""
    try:
        about = json.loads(path.read_text())
        if about["format"] != FORMAT:
            raise BrokenCheckpoint(
                f"{path}: expected format {FORMAT}, got {about['format']!r}; read it with the version that wrote it"
            )
        there, here = about["run"], describe(run)
        saved, found = (from_json(Fingerprint, each.pop("backbone"), "backbone") for each in (there, here))
        differences = compare(there, here) or [line for line in [check_backbone(saved, found)] if line]
        numbers = dict(about["state"])
        recorded = about["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise (
            error
            if isinstance(error, BrokenCheckpoint)
            else BrokenCheckpoint(f"{path}: this is no whole checkpoint ({error!r})")
        ) from error
    if differences:
        differences[SHOWN:] = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        raise ValueError(
            f"{path}: this checkpoint is of another run: {'; '.join(differences)}. Give what it was begun with (the learning rate depends on "
            "iterations at every step), or another checkpoint_dir"
        )
    weights = path.with_suffix(".safetensors")
    try:
        if digest_file(weights) != recorded:
            raise BrokenCheckpoint(f"{weights}: the file is damaged, its digest is not the one in {path.name}")
        # Copies, as safetensors maps the file into memory.
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{weights}: the file is missing") from error
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise BrokenCheckpoint(f"{weights}: this is no safetensors file ({error})") from error
    wrong = misfit(run, int(path.stem.removeprefix("step_")), tensors, numbers)
    if wrong:
        raise BrokenCheckpoint(f"{path}: the checkpoint is damaged: {wrong}")
    return tensors, numbers


def describe(run: Run) -> dict[str, Any]:
    """What a run is of; two runs that can go on from each other's checkpoints have the same. How fast chains are
    computed is no part of it.
    """
    prior = run.prior
    settings = {name: value for name, value in prior.settings().items() if name != "execution"}
    weights = {name: f"{value.dtype} {tuple(value.shape)}" for name, value in prior.state_dict().items()}
    random = {name: generator.device.type for name, generator in generators(run).items()}
    about = {
        "backbone": fingerprint(prior),
        "prior": {
            "class": type(prior).__name__,
            "layers": prior.latent_shapes,
            **settings,
            "coupling": prior.coupling,
            "weights": weights,
        },
    }
    training = {name: value for name, value in vars(run.config).items() if name not in SPEED}
    return to_json({**about, "training": training, "data": run.batches.describe(), "random": random})


def compare(there: Any, here: Any, name: str = "") -> list[str]:
    """How two descriptions differ, by dotted name."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*here, *(each for each in there if each not in here)]
        return [
            line for each in names for line in compare(there.get(each), here.get(each), f"{name}.{each}".lstrip("."))
        ]
    return [] if there == here else [f"{name} is {there} there and {here} here"]


def generators(run: Run) -> dict[str, torch.Generator]:
    """All generators that a step draws from: networks may use torch's global ones even where one is given."""
    found, device = {"global": torch.default_generator}, run.prior.device
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        found["device"] = module.default_generators[module.current_device() if device.index is None else device.index]
    return found if run.generator is None else {**found, "given": run.generator}


def pack(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A run as named tensors and numbers."""
    states, place = run.batches.place()
    parts: dict[str, Mapping[str, Tensor]] = {
        "prior": run.prior.state_dict(),
        "trainee": run.trainee.state_dict(),
        "good": run.guard.good,
        "candidate": run.guard.candidate,
        # What a prior keeps while it learns, outside its state dict, such as persistent chains.
        "kept": {name: value for name, value in vars(run.trainee).items() if isinstance(value, Tensor)},
        "random": {name: generator.get_state() for name, generator in generators(run).items()},
        "data": states,
    }
    for i, moments in run.optimizer.state_dict()["state"].items():
        parts[f"adam.{i}"] = moments
    tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    rows = [
        [*(getattr(record, name) for name in COLUMNS), *record.gaps, *record.gradient_norms] for record in run.history
    ]
    tensors["history"] = torch.tensor(rows, dtype=torch.float64)
    numbers = {
        "first": run.first,
        "lr_scale": run.lr_scale,
        "smoothed": run.guard.smoothed,
        "restarts_left": run.guard.restarts_left,
    }
    return tensors, {**numbers, **place}


def unpack(run: Run, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put a run where `tensors` and `numbers` of `pack` say."""

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

    # Reading on to the place may draw from the generators, whose states are put back last.
    run.batches.go_to(part("data"), numbers)
    run.prior.load_state_dict(part("prior"))
    run.trainee.load_state_dict(part("trainee"))
    for name, value in part("kept").items():
        setattr(run.trainee, name, value.to(run.prior.device))
    run.guard.good, run.guard.candidate = (
        {key: value.to(run.prior.device) for key, value in part(name).items()} for name in ("good", "candidate")
    )
    run.guard.smoothed, run.guard.restarts_left = numbers["smoothed"], numbers["restarts_left"]
    run.first, run.lr_scale = numbers["first"], numbers["lr_scale"]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in part("adam").items():
        i, _, name = key.partition(".")
        moments.setdefault(int(i), {})[name] = value
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": moments})
    run.history = []
    for step, row in enumerate(tensors["history"].tolist(), 1):
        columns, rest = dict(zip(COLUMNS, row, strict=False)), row[len(COLUMNS) :]
        levels = run.prior.schedule.steps
        run.history.append(
            TrainingRecord(iteration=step, gaps=tuple(rest[:levels]), gradient_norms=tuple(rest[levels:]), **columns)
        )
    run.saved = len(run.history)
    for name, generator in generators(run).items():
        generator.set_state(tensors[f"random.{name}"])


def misfit(run: Run, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> str:
    """What of a checkpoint of `step` does not fit a run, or an empty string."""
    expected, known = pack(run)
    sizes = {
        name: (value.dtype, tuple(value.shape))
        for name, value in expected.items()
        if not name.startswith(("adam.", "kept."))
    }
    sizes["history"] = torch.float64, (step, len(COLUMNS) + run.prior.schedule.steps + len(run.prior.energies))
    parameters = list(run.trainee.parameters())
    for i in {name.split(".")[1] for name in tensors if name.startswith("adam.")}:
        if not i.isdecimal() or int(i) >= len(parameters):
            return f"there is no parameter {i}"
        shape = tuple(parameters[int(i)].shape)
        sizes |= {
            f"adam.{i}.{name}": (torch.float32, ()) if name == "step" else (parameters[int(i)].dtype, shape)
            for name in ADAM
        }
    for name, held in vars(run.trainee).items():
        if (value := tensors.get(f"kept.{name}")) is not None and (held is None or isinstance(held, Tensor)):
            sizes[f"kept.{name}"] = value.dtype, tuple(value.shape)
    for name in sorted(sizes.keys() ^ tensors.keys()):
        return f"{name} is {'missing' if name in sizes else 'unknown'}"
    for name, size in sizes.items():
        if size != (tensors[name].dtype, tuple(tensors[name].shape)):
            return f"{name}: expected {size[0]} {size[1]}, got {tensors[name].dtype} {tuple(tensors[name].shape)}"
    for name, value in known.items():
        got: Any = numbers.get(name)
        if type(got) is not type(value) or math.isnan(got) or (isinstance(value, int) and got < 0):
            return f"{name}: expected {'a number' if isinstance(value, float) else 'an integer from 0'}, got {got!r}"
    try:
        for name, generator in generators(run).items():
            torch.Generator(generator.device).set_state(tensors[f"random.{name}"])
        for name in (name for name in tensors if name.startswith("data.")):
            torch.Generator().set_state(tensors[name])
    except RuntimeError as error:
        return f"{name} is no state of a generator ({error})"
    return ""
