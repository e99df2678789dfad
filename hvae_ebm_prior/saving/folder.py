"""Saved priors: to a folder and back.

A saved prior is three files, and a picture where there is one. Files from elsewhere are data: `config.json` is read
against types and bounds, and the weights against the shapes that follow from it.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter
from ..chains.execution import ExecutionConfig
from ..density.energy_model import EnergyModel
from ..density.gaussian import GaussianPrior
from ..extras import installed
from .card import LIBRARY, Card, write_card
from .config import Measured, PriorConfig, TrainingSummary, build_prior, config_of, read_config
from .files import write_atomically, write_json
from .fingerprint import BackboneMismatch, check_backbone, fingerprint
from .grid import save_grid
from .typed_json import InvalidPrior, read_json_file, to_json
from .weights_file import read_weights, write_weights

CONFIG, WEIGHTS, CARD, SAMPLES = "config.json", "model.safetensors", "README.md", "samples.png"
FILES = (CONFIG, WEIGHTS, CARD, SAMPLES)
P = TypeVar("P", bound=EnergyModel)


def save(
    prior: EnergyModel,
    folder: str | Path,
    *,
    trained: TrainingSummary | None = None,
    metrics: Sequence[Measured] = (),
    card: Card | None = None,
    samples: int = 0,
    seed: int = 0,
    repo_id: str | None = None,
) -> None:
    """Write a prior to a folder; see `LearnedPrior.save_pretrained`. `repo_id` is where the card says that it is loaded
    from.
    """
    folder = Path(folder)
    config = config_of(prior, fingerprint(prior), installed(LIBRARY) or "unknown", trained, metrics)
    folder.mkdir(parents=True, exist_ok=True)
    if samples:
        save_samples(folder / SAMPLES, prior, samples, seed)
    text = write_card(config, card or Card(), repo_id=repo_id or folder.name, samples=SAMPLES if samples else None)
    write_weights(folder / WEIGHTS, prior.state_dict(), {"format": "pt"})
    write_json(folder / CONFIG, to_json(config))
    write_atomically(folder / CARD, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def save_samples(path: Path, prior: EnergyModel, count: int, seed: int, columns: int = 8) -> None:
    """A picture of `count` samples of the backbone's Gaussian prior and as many of `prior`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, prior.dim, generator=generator).to(prior.device, prior.dtype)
    with torch.no_grad():
        gaussian = prior.decode(noise)
    both = {"Gaussian prior": gaussian, "this prior": prior.sample(count, generator=generator)}
    rows = [(name, row) for name, images in both.items() for row in images.split(columns)]
    write_atomically(path, lambda scratch: save_grid(scratch, [row for _, row in rows], [name for name, _ in rows]))


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
    """A prior from a folder, and how it was trained; see `LearnedPrior.from_pretrained`."""
    config = load_config(folder)
    probe = GaussianPrior(backbone)
    try:
        # Before anything is made of what the file says, as the backbone's shapes bound how much that can be.
        if different := check_backbone(config.backbone, fingerprint(probe)):
            if strict:
                raise BackboneMismatch(
                    f"{different}. Load it onto the model that it was learned for, or pass strict=False if you know better"
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
        prior.load_state_dict(read_tensors(folder, prior), assign=True)
    except BaseException:
        prior.release()
        raise
    return prior.to(where, dtype).eval().requires_grad_(True), config.training


def read_tensors(folder: Path, prior: EnergyModel) -> dict[str, Tensor]:
    """The weights of a saved prior, all in one dtype; InvalidPrior where they are not those of `prior`."""
    tensors = read_weights(folder / WEIGHTS, {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()})
    if len(kinds := {tensor.dtype for tensor in tensors.values()}) > 1:
        raise InvalidPrior(f"{WEIGHTS}: expected tensors of one dtype, got {', '.join(sorted(map(str, kinds)))}")
    return tensors


def load_config(folder: Path) -> PriorConfig:
    """What the `config.json` in a folder says; InvalidPrior or OSError where there is none that can be read."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: expected a saved prior, with the files {CONFIG} and {WEIGHTS}; there is no {name}"
            )
    return read_config(read_json_file(folder / CONFIG))
