"""Checkpoints of training: all that a run's next step depends on, so that it goes on as if it had never stopped.

A checkpoint of step n is two files, without pickles:

    step_n.safetensors    weights of trainee and average, the guard's snapshots, Adam's moments, random states, history
    step_n.json           the loop's numbers, the place in the data, settings of the run, digest of the other file

The run goes on bit for bit. Each file is written whole or not at all, and the JSON file last, so that a checkpoint is
there when its JSON file is. The one before is kept: where the newest turns out to be broken, it takes its place.
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

from ..backbone.text import visible
from ..saving.digest import digest_file
from ..saving.files import write_json
from ..saving.fingerprint import Fingerprint, check_backbone, fingerprint
from ..saving.typed_json import LATER_SETTINGS, from_json, to_json, without_former_settings
from ..saving.weights_file import write_weights
from .record import TrainingRecord
from .run import Run

FORMAT = 2
# Names of checkpoints' files, and of those that killed processes were writing: no others are ever removed.
OWN_FILE = re.compile(r"step_(\d{8,})(?:\.\d+(?:-[0-9a-f]+)?\.part)?\.(?:json|safetensors)")
# Settings of training that results do not depend on.
SPEED = ("micro_batch", "workers")
# Differences between two runs that an error names.
SHOWN = 5
ADAM = {"step", "exp_avg", "exp_avg_sq"}
# Numbers of a record in the history; the gap of every level and the gradient norm of every layer follow, and then those
# that older checkpoints have not.
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
LATER_COLUMNS = ("score", "calibration")


class BrokenCheckpoint(ValueError):
    """The files of a checkpoint are missing, damaged, or of another kind."""


def find_checkpoints(folder: Path) -> list[Path]:
    """The JSON files of a folder's checkpoints, newest first."""
    by_step = {
        int(match[1]): path
        for path in folder.glob("step_*.json")
        if (match := re.fullmatch(r"step_(\d{8,})\.json", path.name)) and path.is_file()
    }
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def save_checkpoint(folder: Path, run: Run) -> None:
    """Write a checkpoint into `folder`, then remove all but it and the last one before."""
    tensors, numbers = state_of_run(run)
    step = len(run.history)
    path = folder / f"step_{step:08}.json"
    weights = path.with_suffix(".safetensors")
    write_weights(weights, tensors)
    settings = settings_of_run(run)
    write_json(path, {"format": FORMAT, "sha256": digest_file(weights), "run": settings, "state": numbers})
    kept = {f"step_{each:08}" for each in (step, run.last_checkpoint)}
    run.last_checkpoint = step
    # In this order a JSON file goes before its weights.
    for old in sorted(folder.glob("step_*")):
        if OWN_FILE.fullmatch(old.name) and old.stem not in kept and old.is_file():
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
            tensors, numbers = read_checkpoint(path, run)
        except BrokenCheckpoint as error:
            if path == paths[-1]:
                raise ValueError(
                    f"{error}; {folder} holds no whole checkpoint: begin anew in another checkpoint_dir, or --out"
                ) from error
            warnings.warn(f"{error}; going on from the checkpoint before", RuntimeWarning, stacklevel=4)
        else:
            restore_run(run, tensors, numbers)
            return


def read_checkpoint(path: Path, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state in a checkpoint, checked.

    Args:
        path: the JSON file.
        run: a fresh run that is to go on from there.

    Returns:
        Tensors and numbers, as of `state_of_run`.

    Raises:
        BrokenCheckpoint: a file is missing or damaged.
        ValueError: the checkpoint is of another run.
        OSError: a file cannot be read.
    """
    digest, numbers = read_numbers(path, run)
    weights = path.with_suffix(".safetensors")
    try:
        if digest_file(weights) != digest:
            raise BrokenCheckpoint(f"{weights}: the file is damaged, its digest is not the one in {path.name}")
        # Copies, as safetensors maps the file into memory.
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{weights}: the file is missing") from error
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise BrokenCheckpoint(f"{weights}: this is no safetensors file ({error})") from error
    if damage := find_damage(run, int(path.stem.removeprefix("step_")), tensors, numbers):
        raise BrokenCheckpoint(f"{path}: the checkpoint is damaged: {damage}")
    return tensors, numbers


def read_numbers(path: Path, run: Run) -> tuple[str, dict[str, Any]]:
    """The digest and the numbers in a checkpoint's JSON file; raises as of `read_checkpoint`."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise BrokenCheckpoint(
                f"{path}: expected format {FORMAT}, got {content['format']!r}; read it with the version that wrote it"
            )
        saved, current = content["run"], settings_of_run(run)
        saved_backbone, current_backbone = (
            from_json(Fingerprint, settings.pop("backbone"), "backbone") for settings in (saved, current)
        )
        differences = list_differences(saved, current)
        if not differences and (difference := check_backbone(saved_backbone, current_backbone)):
            differences = [difference]
        digest, numbers = content["sha256"], dict(content["state"])
    except BrokenCheckpoint:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path}: this is no whole checkpoint ({error!r})") from error
    if differences:
        more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        shown = visible("; ".join([*differences[:SHOWN], *more]))
        raise ValueError(
            f"{path}: this checkpoint is of another run: {shown}. Give what it was begun with (the learning rate "
            "depends on iterations at every step), or another checkpoint_dir, or --out"
        )
    return digest, numbers


def settings_of_run(run: Run) -> dict[str, Any]:
    """The settings that a run's results depend on, as JSON values: runs that can go on from each other's checkpoints
    have the same. How fast chains are computed is no part of them.
    """
    prior = run.prior
    about_prior = {
        "class": type(prior).__name__,
        "layers": prior.latent_shapes,
        **{name: value for name, value in prior.settings().items() if name != "execution"},
        "coupling": prior.coupling,
        "weights": {name: f"{value.dtype} {tuple(value.shape)}" for name, value in prior.state_dict().items()},
    }
    return to_json(
        {
            "backbone": fingerprint(prior),
            "prior": about_prior,
            "training": {name: value for name, value in vars(run.config).items() if name not in SPEED},
            "data": run.batches.summary(),
            "random": {name: generator.device.type for name, generator in generators(run).items()},
        }
    )


def list_differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """How the settings of two runs differ, one line for each, by dotted name."""
    if isinstance(saved, dict) and isinstance(current, dict):
        saved = without_former_settings(saved, current)
        names = [each for each in current if each in saved or each not in LATER_SETTINGS]
        names += [each for each in saved if each not in current]
        return [
            line
            for each in names
            for line in list_differences(saved.get(each), current.get(each), f"{name}.{each}".lstrip("."))
        ]
    return [] if saved == current else [f"{name} is {saved} there and {current} here"]


def generators(run: Run) -> dict[str, torch.Generator]:
    """All generators that a step draws from: networks may use torch's global ones even where one is given."""
    named = {"global": torch.default_generator}
    device = run.prior.device
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        named["device"] = module.default_generators[module.current_device() if device.index is None else device.index]
    return named if run.generator is None else {**named, "given": run.generator}


def state_of_run(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that changes in a run from step to step, as named tensors and numbers; `restore_run` is the inverse."""
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
        [
            *(getattr(record, name) for name in COLUMNS),
            *record.gaps,
            *record.gradient_norms,
            *(getattr(record, name) for name in LATER_COLUMNS),
        ]
        for record in run.history
    ]
    tensors["history"] = torch.tensor(rows, device="cpu", dtype=torch.float64)
    numbers = {
        "first": run.warmup_from,
        "lr_scale": run.lr_scale,
        "smoothed": run.guard.smoothed,
        "restarts_left": run.guard.restarts_left,
        **place,
    }
    return tensors, numbers


def restore_run(run: Run, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put a run into a state as of `state_of_run`."""

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

    device = run.prior.device
    # Reading on to the place may draw from the generators, whose states are put back last.
    run.batches.go_to(part("data"), numbers)
    run.prior.load_state_dict(part("prior"))
    run.trainee.load_state_dict(part("trainee"))
    for name, value in part("kept").items():
        setattr(run.trainee, name, value.to(device))
    run.guard.good = {name: value.to(device) for name, value in part("good").items()}
    run.guard.candidate = {name: value.to(device) for name, value in part("candidate").items()}
    run.guard.smoothed = numbers["smoothed"]
    run.guard.restarts_left = numbers["restarts_left"]
    run.warmup_from = numbers["first"]
    run.lr_scale = numbers["lr_scale"]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in part("adam").items():
        i, _, name = key.partition(".")
        moments.setdefault(int(i), {})[name] = value
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": moments})
    levels = run.prior.schedule.steps
    layers = len(run.prior.energies)
    run.history = []
    for step, row in enumerate(tensors["history"].tolist(), 1):
        rest = row[len(COLUMNS) :]
        columns = dict(zip(COLUMNS, row, strict=False)) | dict(
            zip(LATER_COLUMNS, rest[levels + layers :], strict=False)
        )
        gaps, norms = tuple(rest[:levels]), tuple(rest[levels : levels + layers])
        run.history.append(TrainingRecord(iteration=step, gaps=gaps, gradient_norms=norms, **columns))
    run.last_checkpoint = len(run.history)
    for name, generator in generators(run).items():
        generator.set_state(tensors[f"random.{name}"])


def find_damage(run: Run, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> str:
    """What of the state in a checkpoint cannot be that of a run.

    Args:
        run: a fresh run with the same settings.
        step: number of the checkpoint's step.
        tensors: of the checkpoint.
        numbers: of the checkpoint.

    Returns:
        The first thing that is wrong, in words; empty where nothing is.
    """
    own_tensors, own_numbers = state_of_run(run)
    # Type and shape by name of what must be there: as in the fresh run, but for what grows with the steps.
    expected = {
        name: (value.dtype, tuple(value.shape))
        for name, value in own_tensors.items()
        if not name.startswith(("adam.", "kept."))
    }
    columns = len(COLUMNS) + run.prior.schedule.steps + len(run.prior.energies)
    history = tensors.get("history")
    if history is None or tuple(history.shape) != (step, columns):
        columns += len(LATER_COLUMNS)
    expected["history"] = torch.float64, (step, columns)
    parameters = list(run.trainee.parameters())
    for i in {name.split(".")[1] for name in tensors if name.startswith("adam.")}:
        if not i.isdecimal() or int(i) >= len(parameters):
            return f"there is no parameter {i}"
        parameter = parameters[int(i)]
        for name in ADAM:
            size = (torch.float32, ()) if name == "step" else (parameter.dtype, tuple(parameter.shape))
            expected[f"adam.{i}.{name}"] = size
    for name, held in vars(run.trainee).items():
        value = tensors.get(f"kept.{name}")
        if value is not None and (held is None or isinstance(held, Tensor)):
            expected[f"kept.{name}"] = value.dtype, tuple(value.shape)
    for name in sorted(expected.keys() ^ tensors.keys()):
        return f"{name} is {'missing' if name in expected else 'unknown'}"
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            return f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
    for name, own in own_numbers.items():
        number: Any = numbers.get(name)
        if type(number) is not type(own) or math.isnan(number) or (isinstance(own, int) and number < 0):
            wanted = "a number" if isinstance(own, float) else "an integer from 0"
            return f"{name}: expected {wanted}, got {number!r}"
    if not 0 < numbers["lr_scale"] <= 1 or numbers["seed"] >= 2**64:
        return (
            f"expected an lr_scale up to 1 and a seed of 64 bits, got {numbers['lr_scale']!r} and {numbers['seed']!r}"
        )
    states = {f"random.{name}": generator.device for name, generator in generators(run).items()}
    states |= {name: torch.device("cpu") for name in tensors if name.startswith("data.")}
    for name, device in states.items():
        try:
            torch.Generator(device).set_state(tensors[name])
        except RuntimeError as error:
            return f"{name} is no state of a generator ({error})"
    return ""
