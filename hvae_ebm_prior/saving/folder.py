"""Saved priors: to a folder and back.

A saved prior is three files, and a picture where there is one. Files from elsewhere are data: `config.json` is read
against types and bounds, and the weights against the shapes that follow from it.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import takes_tensors
from ..chains.execution import ExecutionConfig
from ..density.energy_model import EnergyModel
from ..density.gaussian import GaussianPrior
from .card import LIBRARY, Card, write_card
from .config import Metric, PriorConfig, TrainingSummary, build_prior, make_config, read_config
from .digest import digest_file
from .extras import installed
from .files import json_bytes, scratch_file, write_atomically, write_json
from .fingerprint import BackboneMismatch, check_backbone, fingerprint
from .grid import save_grid
from .typed_json import InvalidPrior, parse_json, read_json_file, to_json
from .weights_file import read_weights, save_weights

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# The weights before, while others are being saved.
PREVIOUS = ".model.previous.safetensors"
CARD = "README.md"
SAMPLES = "samples.png"
FILES = (CONFIG, WEIGHTS, CARD, SAMPLES)
P = TypeVar("P", bound=EnergyModel)


def save(
    prior: EnergyModel,
    folder: str | Path,
    *,
    trained: TrainingSummary | None = None,
    metrics: Sequence[Metric] = (),
    card: Card | None = None,
    samples: int = 0,
    seed: int = 0,
    repo_id: str | None = None,
) -> None:
    """Write a prior to a folder; see `LearnedPrior.save_pretrained`.

    Args:
        prior: the prior.
        folder: where to write.
        trained: how it was trained.
        metrics: figures of quality, for the card.
        card: what its author adds to the card.
        samples: how many samples the card shows; 0 for none.
        seed: of the samples.
        repo_id: where the card says that the prior is loaded from; None for the folder's name.

    Raises:
        TypeError: a class, or networks, that cannot be described in `config.json`.
        InvalidPrior: settings, figures or weights that could not be loaded again, such as numbers that are not finite.
        ValueError: a card that could not be read again.
        FileExistsError: files of these names are there that are none of a prior's.
        OSError: the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    check_free(folder)
    config = make_config(prior, fingerprint(prior), installed(LIBRARY) or "unknown", trained, metrics)
    # Whoever loads it must be able to read what is written, with a digest of the weights in it.
    read_config(parse_json(json_bytes(to_json(replace(config, weights=64 * "0"))), CONFIG))
    tensors = takes_tensors(prior.backbone)
    text = write_card(
        config,
        card or Card(),
        repo_id=repo_id or folder.name,
        samples=SAMPLES if samples and not tensors else None,
        tensors=tensors,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as scratch:
        write = partial(save_weights, prior.state_dict(), {"format": "pt"})
        weights = scratch.enter_context(scratch_file(folder / WEIGHTS, write))
        read_tensors(weights, prior)
        if samples:
            write = partial(save_samples, prior=prior, count=samples, seed=seed)
            picture = scratch.enter_context(scratch_file(folder / SAMPLES, write))
        settings = to_json(replace(config, weights=digest_file(weights)))
        keep_previous(folder)
        for name in in_order(folder):
            if name == WEIGHTS:
                os.replace(weights, folder / WEIGHTS)
            else:
                write_json(folder / CONFIG, settings)
        if samples:
            os.replace(picture, folder / SAMPLES)
    (folder / PREVIOUS).unlink(missing_ok=True)
    write_atomically(folder / CARD, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def in_order(folder: Path) -> tuple[str, str]:
    """Settings and weights in the order in which they are written.

    Over a prior settings come last: they name the weights that they go with, of which the former stay till then. Where
    there is none they come first: by them `check_free` knows the folder as a prior's, should saving end in between.
    """
    return (WEIGHTS, CONFIG) if (folder / CONFIG).exists() else (CONFIG, WEIGHTS)


def check_free(folder: Path) -> None:
    """Raise FileExistsError where a folder is a file, or holds files of a prior's names that are none of a prior's."""
    if folder.is_file():
        raise FileExistsError(f"{folder}: expected a folder to write to, got a file")
    there = [name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()]
    try:
        if there:
            read_settings(folder)
    except (InvalidPrior, OSError) as error:
        raise FileExistsError(
            f"{folder} holds {', '.join(there)}, which would be overwritten, and no saved prior ({error}); nothing is "
            "overwritten: choose another folder"
        ) from error


def keep_previous(folder: Path) -> None:
    """Give the weights in a folder a second name, by which `load` finds them if saving ends before it is done. Where it
    ended so before, those that the settings go with have that name already, and keep it.
    """
    try:
        digest = load_config(folder).weights
    except (InvalidPrior, OSError):  # no prior that could be lost
        digest = ""
    if digest and (folder / PREVIOUS).is_file() and digest_file(folder / WEIGHTS) != digest:
        return
    (folder / PREVIOUS).unlink(missing_ok=True)
    if (folder / WEIGHTS).exists():
        try:
            os.link(folder / WEIGHTS, folder / PREVIOUS)
        except OSError:  # file systems without links
            shutil.copyfile(folder / WEIGHTS, folder / PREVIOUS)


def read_own_weights(folder: Path, prior: EnergyModel, digest: str) -> dict[str, Tensor]:
    """The weights in a folder that its settings were written with; InvalidPrior where they are others, or not those of
    `prior`.
    """
    if digest and digest_file(folder / WEIGHTS) != digest:
        previous = folder / PREVIOUS
        if previous.is_file() and digest_file(previous) == digest:
            return read_tensors(previous, prior)
        read_tensors(folder / WEIGHTS, prior)  # which says more, if that is where the fault is
        raise InvalidPrior(
            f"{WEIGHTS}: not the weights that {CONFIG} was written with: one of the files is damaged, or of another "
            "prior; save the prior again"
        )
    return read_tensors(folder / WEIGHTS, prior)


def save_samples(path: Path, prior: EnergyModel, count: int, seed: int, columns: int = 8) -> None:
    """A picture of `count` samples of the backbone's Gaussian prior and as many of `prior`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, prior.dim, generator=generator, device="cpu", dtype=torch.float32)
    noise = noise.to(prior.device, prior.dtype)
    with torch.no_grad():
        gaussian = prior.decode(noise)
    above, below = gaussian.split(columns), prior.sample(count, generator=generator).split(columns)
    names = ["Gaussian prior"] * len(above) + ["this prior"] * len(below)
    save_grid(path, [*above, *below], names)


def load(
    kind: type[P],
    folder: Path,
    backbone: BackboneAdapter | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    energy: Sequence[nn.Module] | None = None,
    execution: ExecutionConfig | None = None,
) -> tuple[P, TrainingSummary | None]:
    """Load a prior from a folder; see `LearnedPrior.from_pretrained`.

    Args:
        kind: the class that it must be of.
        folder: where it lies.
        backbone: the model, or its adapter.
        device: where to put the prior; None for the backbone's device.
        dtype: of its networks; None for that of the file.
        strict: raise, and not only warn, where the backbone is another one of the same shapes.
        energy: the user's own networks, where the prior was saved with such.
        execution: how chains are computed; None for the defaults.

    Returns:
        The prior, in eval mode, and how it was trained.

    Raises:
        InvalidPrior: the files are damaged, or hold no prior of this class.
        BackboneMismatch: the backbone is another one.
        TypeError: `backbone` or `energy` does not fit.
        OSError: a file cannot be read.
    """
    config = load_config(folder)
    probe = GaussianPrior(backbone)
    try:
        # Before anything is made of what the file says, as the backbone's shapes bound how much memory that can take.
        if different := check_backbone(config.backbone, fingerprint(probe)):
            if strict:
                raise BackboneMismatch(
                    f"{different}. Load it onto the model that it was learned for, or pass strict=False if you know "
                    "better"
                )
            warnings.warn(different, UserWarning, stacklevel=3)
        where = probe.device if device is None else torch.device(device)
        prior = build_prior(config, backbone, execution or ExecutionConfig(), energy)
    finally:
        probe.release()
    if not isinstance(prior, kind):
        prior.release()
        raise InvalidPrior(
            f"expected a {kind.__name__}, got a {config.kind}; load it with {config.kind}.from_pretrained"
        )
    try:
        prior.load_state_dict(read_own_weights(folder, prior, config.weights), assign=True)
    except BaseException:
        prior.release()
        raise
    return prior.to(where, dtype).eval().requires_grad_(True), config.training


def read_tensors(path: Path, prior: EnergyModel) -> dict[str, Tensor]:
    """The weights in a file, all in one dtype; InvalidPrior where they are not those of `prior`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()}
    tensors = read_weights(path, shapes, WEIGHTS)
    if len(dtypes := {tensor.dtype for tensor in tensors.values()}) > 1:
        raise InvalidPrior(f"{WEIGHTS}: expected tensors of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    return tensors


def load_config(folder: Path) -> PriorConfig:
    """The `config.json` in a folder with weights; InvalidPrior or OSError where there is none that can be read."""
    for name in (CONFIG, WEIGHTS):
        check_there(folder, name)
    return read_settings(folder)


def read_settings(folder: Path) -> PriorConfig:
    """The same, whether weights are there or not."""
    check_there(folder, CONFIG)
    return read_config(read_json_file(folder / CONFIG))


def check_there(folder: Path, name: str) -> None:
    """Raise FileNotFoundError where a folder has no such file of a saved prior."""
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder}: expected a saved prior, with the files {CONFIG} and {WEIGHTS}; there is no {name}"
        )
