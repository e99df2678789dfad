"""What `config.json` of a saved prior says: which prior it is, its settings, the backbone it belongs to, and how it was
trained.

Every class says itself which of its settings are saved (`EnergyModel.saved_settings`). A prior is made again from what
a file says after that was checked: names, types and ranges (`typed_json`), the backbone (`fingerprint`), and the size
of the networks, which are laid out without memory until the weights' file agrees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..backbone.transform import BackboneAdapter
from ..chains.execution import ExecutionConfig
from ..chains.schedule import DiffusionSchedule
from ..density.energy_model import EnergyModel
from ..energies.coupling import Coupling
from ..energies.networks import EnergyConfig, LayerEnergy
from .fingerprint import Fingerprint
from .typed_json import InvalidPrior, from_json, read, to_json

# Grows when a file of this version means something else to an older one.
SCHEMA = 1
# Residual blocks of all networks together, and features, that a file may ask for.
MOST_BLOCKS, LARGEST_WIDTH = 20_000, 2**16


@dataclass(frozen=True)
class TrainingSummary:
    """How a prior was trained, for the record.

    Attributes:
        iterations: optimiser steps taken.
        seconds: time they took.
        settings: the `TrainingConfig`, by name.
    """

    iterations: int
    seconds: float
    settings: Mapping[str, int | float | str | tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One figure of quality, as the model card shows it.

    Attributes:
        name: what was measured, "FD" or "closure" say.
        value: the figure.
        features: the features it was measured with.
        dataset: the images it was measured on.
    """

    name: str
    value: float
    features: str = ""
    dataset: str = ""


@dataclass(frozen=True)
class PriorConfig:
    """The contents of `config.json`.

    Attributes:
        schema: version of this format.
        library: version of the library that wrote it.
        kind: name of the prior's class.
        settings: its arguments, see `EnergyModel.saved_settings`.
        energy: size of the default networks; None where the user's own were saved, which have to be handed over to load
            them.
        coupling: label sets; None for none.
        backbone: the fingerprint.
        family: class of the backbone's adapter, for people.
        training: how it was trained; None where that is not known.
        metrics: figures of quality.
    """

    schema: int
    library: str
    kind: str
    settings: Mapping[str, Any]
    energy: EnergyConfig | None
    coupling: Coupling | None
    backbone: Fingerprint
    family: str = ""
    training: TrainingSummary | None = None
    metrics: tuple[Measured, ...] = ()


def saved_kinds() -> dict[str, type[EnergyModel]]:
    """The classes of priors that can be saved, by name: those that have `saved_settings` of their own."""
    found: dict[str, type[EnergyModel]] = {}
    pending = EnergyModel.__subclasses__()
    while pending:
        kind = pending.pop(0)
        pending += kind.__subclasses__()
        if vars(kind).get("saved_settings") is not None:
            found[kind.__name__] = kind
    return found


def settings_of(kind: type[EnergyModel]) -> Mapping[str, Any]:
    """Type by name of what is saved of a class of priors."""
    return kind.saved_settings or {}


def config_of(
    prior: EnergyModel,
    backbone: Fingerprint,
    library: str,
    training: TrainingSummary | None = None,
    metrics: Sequence[Measured] = (),
) -> PriorConfig:
    """What there is to say of a prior.

    Args:
        prior: the prior.
        backbone: its backbone's fingerprint.
        library: this library's version.
        training: how it was trained.
        metrics: figures of quality.

    Returns:
        The contents of its `config.json`.

    Raises:
        TypeError: a class that cannot be saved, or default networks of several sizes.
    """
    name, kinds = type(prior).__name__, saved_kinds()
    if kinds.get(name) is not type(prior):
        raise TypeError(
            f"expected one of {', '.join(kinds)}, got {name}; of your own class save prior.state_dict() and its arguments yourself"
        )
    settings = {key: value for key, value in prior.settings().items() if key in settings_of(type(prior))}
    configs = [network.config if isinstance(network, LayerEnergy) else None for network in prior.energies]
    if any(config != configs[0] for config in configs):
        raise TypeError(
            "the energies are default networks of several sizes, or only some of them are; make all of one EnergyConfig, or all your own"
        )
    family = type(prior.backbone).__name__
    return PriorConfig(
        SCHEMA, library, name, settings, configs[0], prior.coupling, backbone, family, training, tuple(metrics)
    )


def settings_in_words(config: PriorConfig) -> dict[str, str]:
    """What a prior was made with, for people: its settings by name, and its label sets as "labels NAME"."""
    found = {}
    for name, value in to_json(config.settings).items():
        found[name] = (
            ", ".join(f"{key} = {each}" for key, each in value.items()) if isinstance(value, dict) else str(value)
        )
    for name, labels in (config.coupling.sets if config.coupling else {}).items():
        found[f"labels {name}"] = (
            f"{labels.size} categories" if isinstance(labels.categories, int) else ", ".join(labels.categories)
        )
    return found


def read_config(values: Mapping[str, Any]) -> PriorConfig:
    """The contents of a `config.json`, checked.

    Args:
        values: as read from the file.

    Returns:
        The configuration.

    Raises:
        InvalidPrior: something is unknown, missing, of a wrong type, or out of range.
    """
    schema = values.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise InvalidPrior(
            f"config.json: expected a schema from 1 to {SCHEMA}, got {schema!r:.80}; it is no saved prior, or one of a newer version"
        )
    config = from_json(PriorConfig, dict(values), "config.json")
    kinds = saved_kinds()
    if config.kind not in kinds:
        raise InvalidPrior(f"config.json: kind: expected one of {', '.join(kinds)}, got {config.kind!r}")
    settings = settings_of(kinds[config.kind])
    if unknown := set(config.settings) ^ set(settings):
        raise InvalidPrior(
            f"config.json: settings: a {config.kind} has {', '.join(settings)}; {sorted(unknown)[0]!r:.80} is missing or unknown"
        )
    sizes = [config.energy or EnergyConfig(), *([config.coupling.networks] if config.coupling else [])]
    if any(max(size.width, size.vector_width) > LARGEST_WIDTH for size in sizes):
        raise InvalidPrior(f"config.json: expected networks of at most {LARGEST_WIDTH} features")
    layers = len(config.backbone.latent_shapes)
    blocks = [
        size.blocks * layers * count
        for size, count in zip(sizes, (1, len(config.coupling.sets) if config.coupling else 0), strict=False)
    ]
    if sum(blocks) > MOST_BLOCKS:
        raise InvalidPrior(
            f"config.json: expected at most {MOST_BLOCKS} residual blocks, got {sum(blocks)} in {layers} layers"
        )
    read_settings = {
        name: read(kind, config.settings[name], f"config.json.settings.{name}") for name, kind in settings.items()
    }
    return replace(config, settings=read_settings)


def build_prior(
    config: PriorConfig,
    backbone: BackboneAdapter | nn.Module,
    execution: ExecutionConfig,
    energy: Sequence[nn.Module] | None = None,
) -> EnergyModel:
    """A prior of these settings whose own networks take no memory yet: their parameters are on the meta device.

    Args:
        config: the settings.
        backbone: the model or its adapter, whose latents have the shapes of `config.backbone`.
        execution: how chains are computed.
        energy: the user's own networks, where `config.energy` is None.

    Returns:
        The prior.

    Raises:
        InvalidPrior: settings that do not go together.
        TypeError: networks are missing, or were given although default ones are saved.
    """
    if (config.energy is None) != (energy is not None):
        wanted = (
            "it was saved with networks of its own: give them as energy=[...]"
            if energy is None
            else "it was saved with default networks"
        )
        raise TypeError(f"energy: {wanted}")
    kind = saved_kinds()[config.kind]
    schedule = config.settings.get("schedule", DiffusionSchedule.marginal())
    try:
        with torch.device("meta"):
            shapes = kind.network_shapes(config.backbone.latent_shapes)
            networks = energy or [LayerEnergy(shape, schedule.steps, config.energy) for shape in shapes]  # type: ignore[arg-type]
        prior = kind(backbone, energy=list(networks), execution=execution, **config.settings)
        if config.coupling is not None:
            with torch.device("meta"):
                prior.couple(config.coupling)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidPrior(f"config.json: {error}") from error
    return prior
