"""The contents of `config.json`: the class of a saved prior, its settings, its backbone, and how it was trained.

Every class lists which of its settings are saved (`EnergyModel.saved_settings`). A prior is made again from a file only
after the file was checked: names, types and ranges (`typed_json`), the backbone (`fingerprint`), and the size of the
networks, which are laid out without memory until the file of weights agrees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..backbone.transform import BackboneAdapter
from ..chains.execution import ExecutionConfig
from ..chains.schedule import DiffusionSchedule
from ..density.energy_model import EnergyModel
from ..energies.build import make_network
from ..energies.context import ContextEnergy
from ..energies.coupling import Coupling
from ..energies.networks import EnergyConfig, LayerEnergy
from ..energies.published import PublishedEnergy
from .fingerprint import Fingerprint
from .typed_json import InvalidPrior, from_json, read_value, to_json

# Grows when a file of this version means something else to an older one.
SCHEMA = 1
# Residual blocks of all networks together, and features, that a file may ask for.
MOST_BLOCKS = 20_000
LARGEST_WIDTH = 2**16
# Names of categories that people are shown.
SHOWN = 20
# Classes that earlier versions saved and this one has no more.
GONE = ("LayerwisePrior",)


@dataclass(frozen=True)
class TrainingSummary:
    """How a prior was trained.

    Attributes:
        iterations: number of optimiser steps.
        seconds: time they took.
        settings: the `TrainingConfig`, by name.
    """

    iterations: int
    seconds: float
    settings: Mapping[str, int | float | str | tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One figure of quality, as the model card shows it.

    Attributes:
        name: of the metric, such as "FD" or "closure".
        value: the figure.
        features: the features that the metric compares.
        dataset: the images that samples were compared with.
    """

    name: str
    value: float
    features: str = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        # NumPy's numbers and tensors of one too.
        if not isinstance(self.value, str):
            try:
                object.__setattr__(self, "value", float(self.value))
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"metric {self.name!r:.80}: expected a number, got {self.value!r:.80}") from error


@dataclass(frozen=True)
class PriorConfig:
    """The contents of `config.json`.

    Attributes:
        schema: version of this format.
        library: version of the library that wrote it.
        kind: name of the prior's class.
        settings: its arguments, see `EnergyModel.saved_settings`.
        energy: size of the default networks; None where the user's own were saved, which loading is then given.
        coupling: label sets; None for none.
        backbone: its fingerprint.
        family: class of the backbone's adapter, for people.
        training: how it was trained; None where `fit` was not called.
        metrics: figures of quality.
        weights: SHA-256 of the file of the weights that belong to it; empty in folders of before there was one.
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
    metrics: tuple[Metric, ...] = ()
    weights: str = ""


def saved_kinds() -> dict[str, type[EnergyModel]]:
    """The classes of priors that can be saved, by name: those that have `saved_settings` of their own."""
    kinds: dict[str, type[EnergyModel]] = {}
    pending = EnergyModel.__subclasses__()
    while pending:
        kind = pending.pop(0)
        pending += kind.__subclasses__()
        if vars(kind).get("saved_settings") is not None:
            kinds[kind.__name__] = kind
    return kinds


def make_config(
    prior: EnergyModel,
    backbone: Fingerprint,
    library: str,
    training: TrainingSummary | None = None,
    metrics: Sequence[Metric] = (),
) -> PriorConfig:
    """The contents of a prior's `config.json`.

    Args:
        prior: the prior.
        backbone: its backbone's fingerprint.
        library: version of this library.
        training: how it was trained.
        metrics: figures of quality.

    Returns:
        The contents.

    Raises:
        TypeError: a class that cannot be saved, or default networks of several sizes.
    """
    name = type(prior).__name__
    kinds = saved_kinds()
    if kinds.get(name) is not type(prior):
        raise TypeError(
            f"expected one of {', '.join(kinds)}, got {name}; of your own class save prior.state_dict() and its "
            "arguments yourself"
        )
    energies = [
        network.config if isinstance(network, LayerEnergy | ContextEnergy | PublishedEnergy) else None
        for network in prior.energies
    ]
    if any(energy != energies[0] for energy in energies):
        raise TypeError(
            "the energies are default networks of several sizes, or only some of them are; "
            "make all of one EnergyConfig, or all your own"
        )
    return PriorConfig(
        schema=SCHEMA,
        library=library,
        kind=name,
        settings={key: value for key, value in prior.settings().items() if key in (prior.saved_settings or {})},
        energy=energies[0],
        coupling=prior.coupling,
        backbone=backbone,
        family=type(prior.backbone).__name__,
        training=training,
        metrics=tuple(metrics),
    )


def settings_in_words(config: PriorConfig) -> dict[str, str]:
    """The settings of a prior for people to read, by name, and its label sets as "labels NAME"."""
    words = {}
    for name, value in to_json(config.settings).items():
        parts = [f"{key} = {each}" for key, each in value.items()] if isinstance(value, dict) else [str(value)]
        words[name] = ", ".join(parts)
    for name, labels in (config.coupling.sets if config.coupling else {}).items():
        categories = labels.categories
        if isinstance(categories, int):
            words[f"labels {name}"] = f"{categories} categories"
        else:
            more = [f"and {len(categories) - SHOWN} more"] if len(categories) > SHOWN else []
            words[f"labels {name}"] = ", ".join([*categories[:SHOWN], *more])
    return words


def read_config(values: Mapping[str, Any]) -> PriorConfig:
    """Check the contents of a `config.json`.

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
            f"config.json: expected a schema from 1 to {SCHEMA}, got {schema!r:.80}; "
            "it is no saved prior, or one of a newer version"
        )
    config = from_json(PriorConfig, in_present_form(values), "config.json")
    kinds = saved_kinds()
    if config.kind in GONE:
        raise InvalidPrior(
            f"config.json: kind: there is no {config.kind} any more; train a DiffusionEBMPrior, or install the version "
            "of this library that wrote it"
        )
    if config.kind not in kinds:
        raise InvalidPrior(f"config.json: kind: expected one of {', '.join(kinds)}, got {config.kind!r}")
    types = kinds[config.kind].saved_settings or {}
    if unknown := set(config.settings) ^ set(types):
        raise InvalidPrior(
            f"config.json: settings: a {config.kind} has {', '.join(types)}; "
            f"{sorted(unknown)[0]!r:.80} is missing or unknown"
        )
    if config.coupling is not None and not hasattr(kinds[config.kind], "couple"):
        raise InvalidPrior(f"config.json: coupling: a {config.kind} has no labels")
    check_size(config)
    settings = {
        name: read_value(kind, config.settings[name], f"config.json.settings.{name}") for name, kind in types.items()
    }
    return replace(config, settings=settings)


def in_present_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a file, where it is older than energies with context said to be without, and drawn as then."""

    def plain(size: Any) -> Any:
        return {"context": False, **size} if isinstance(size, dict) else size

    read = dict(values)
    if "energy" in read:
        read["energy"] = plain(read["energy"])
    if read.get("kind") == "DiffusionEBMPrior" and isinstance(read.get("settings"), dict):
        read["settings"] = {"drawing": {}, **read["settings"]}
    coupling = read.get("coupling")
    if isinstance(coupling, dict) and "networks" in coupling:
        read["coupling"] = {**coupling, "networks": plain(coupling["networks"])}
    return read


def check_size(config: PriorConfig) -> None:
    """Raise InvalidPrior where a file asks for networks larger than any prior needs."""
    # Sizes of networks, and how many of each there are in a layer.
    networks = [(config.energy or EnergyConfig(), 1)]
    if config.coupling:
        networks.append((config.coupling.networks, len(config.coupling.sets)))
    if any(max(size.width, size.vector_width) > LARGEST_WIDTH for size, _ in networks):
        raise InvalidPrior(f"config.json: expected networks of at most {LARGEST_WIDTH} features")
    layers = len(config.backbone.latent_shapes)
    blocks = layers * sum(size.blocks * count for size, count in networks)
    if blocks > MOST_BLOCKS:
        raise InvalidPrior(
            f"config.json: expected at most {MOST_BLOCKS} residual blocks, got {blocks} in {layers} layers"
        )


def build_prior(
    config: PriorConfig,
    backbone: BackboneAdapter | nn.Module,
    execution: ExecutionConfig,
    energy: Sequence[nn.Module] | None = None,
) -> EnergyModel:
    """Make a prior whose networks take no memory yet: their parameters are on the meta device.

    Args:
        config: its settings.
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
        if energy is None:
            raise TypeError("energy: it was saved with networks of its own: give them as energy=[...]")
        raise TypeError("energy: it was saved with default networks")
    kind = saved_kinds()[config.kind]
    schedule = config.settings.get("schedule", DiffusionSchedule.marginal())
    try:
        shapes = kind.network_shapes(config.backbone.latent_shapes)
        networks = energy or [
            make_network(shape, schedule.steps, config.energy, device="meta")  # type: ignore[arg-type]
            for shape in shapes
        ]
        prior = kind(backbone, energy=list(networks), execution=execution, **config.settings)
        if config.coupling is not None:
            prior.couple(config.coupling)  # type: ignore[operator]  # as `read_config` checked
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidPrior(f"config.json: {error}") from error
    return prior
