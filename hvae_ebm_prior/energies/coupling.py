"""Symbol vectors: a prior over latents and labels y together (Eq. 14, 18-21).

Every label set s is bound to some layers. Networks over their latents give logits l_s(z, t), one per category, which
take part in F:

    F_y(z, t) = F(z, t) + sum_s (l_s,y(z, t) - log K_s)
    F^(z, t) = F(z, t) + sum_s (log sum_y exp l_s,y(z, t) - log K_s)

so p(y_s | u_t) = softmax(l_s), and F^ + log p(y | u_t) = F_y: the drift under a label is that of F_y. F^ is learned by
recovery likelihood and p(y | u_t) by cross-entropy, together. The networks' last layers start at zero, where F^ = F: a
trained prior can be coupled afterwards and begins where it was.

The paper couples at t = 0 alone. Given u_t, a label does not depend on u_{t+1}, so the same holds at every t, and
coupling every level draws from p(u_0 | y) all the way: where the last step of a schedule is small, u_1 has settled the
label already. `levels=(0,)` is the paper's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.text import LONGEST_TEXT, hidden_characters
from ..backbone.transform import LayerState
from ..backbone.validation import as_integer
from .build import make_network
from .context import ContextEnergy, takes_context
from .networks import EnergyConfig, LayerEnergy

# Labels of one call: a tensor (N,) per set, with -1 where unknown.
Labels = Mapping[str, Tensor]
# What to do about a prior that knows no labels.
COUPLE = "see DiffusionEBMPrior.couple, or `hvae-ebm-prior train --labels`"
# Networks by set and by layer.
Heads = Mapping[str, Mapping[str, Callable[[Any, Tensor], Tensor]]]


@dataclass(frozen=True)
class LabelSet:
    """One set of exclusive labels.

    Attributes:
        categories: their number (2 for a binary attribute), or their names.
        layers: indices of the latent layers that they are bound to, 0 the top; None for all.
    """

    categories: int | Sequence[str]
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.categories, str) or not isinstance(self.categories, int | Sequence):
            raise TypeError(f"categories: expected their number or their names, got {self.categories!r}")
        if isinstance(self.categories, bool) or self.size < 2:
            raise ValueError(f"categories: expected at least two, got {self.categories!r}")
        if not isinstance(self.categories, int):
            check_names(self.categories)
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(
                f"layers: expected one or several distinct layer indices, or None for all, got {self.layers!r}"
            )

    @property
    def size(self) -> int:
        """The number of categories K."""
        return self.categories if isinstance(self.categories, int) else len(self.categories)

    def index(self, name: str, value: int | str) -> int:
        """The index of a category given by index or name; ValueError or TypeError, naming the set `name`, if there is
        none.
        """
        if isinstance(value, str):
            if isinstance(self.categories, int):
                raise ValueError(f"label {name!r}: expected an index 0..{self.size - 1}, got {value!r}")
            if value not in self.categories:
                raise ValueError(f"label {name!r}: expected one of {', '.join(self.categories)}, got {value!r}")
            return list(self.categories).index(value)
        if isinstance(value, bool) and self.size > 2:
            raise TypeError(f"label {name!r}: expected an index 0..{self.size - 1}, got {value!r}")
        number = int(value) if isinstance(value, bool) else as_integer(value)
        if number is None:
            kind = type(value).__name__
            raise TypeError(f"label {name!r}: expected a category's index or name, or a tensor of indices, got {kind}")
        if not 0 <= number < self.size:
            raise ValueError(f"label {name!r}: expected an index 0..{self.size - 1}, got {number}")
        return number


def check_names(categories: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless names of categories are distinct texts that a saved prior may hold."""
    for name in categories:
        if not isinstance(name, str):
            raise TypeError(f"categories: expected names, or their number, got {name!r}")
        if hidden_characters(name) or len(name) > LONGEST_TEXT:
            raise ValueError(
                f"categories: expected names of at most {LONGEST_TEXT} characters, without control characters, "
                f"got {name[:80]!r}"
            )
    if len(set(categories)) < len(categories):
        raise ValueError(f"categories: expected distinct names, got {categories!r:.300}")


@dataclass(frozen=True)
class Coupling:
    """The label sets of a prior, and how they are learned.

    Attributes:
        sets: label sets by name.
        levels: levels t at which labels take part; None for all, (0,) as in the paper.
        weight: weight of the cross-entropy beside the recovery loss.
        networks: size of the networks that give logits; they see what the prior's energies see, so `context` does not
            matter.
    """

    sets: Mapping[str, LabelSet]
    levels: Sequence[int] | None = None
    weight: float = 1.0
    networks: EnergyConfig = field(default_factory=EnergyConfig)

    def __post_init__(self) -> None:
        named = isinstance(self.sets, Mapping) and all(isinstance(labels, LabelSet) for labels in self.sets.values())
        if not named or not self.sets:
            raise TypeError(f"sets: expected a LabelSet by name, such as {{'class': LabelSet(10)}}, got {self.sets!r}")
        for name in self.sets:
            if not isinstance(name, str) or not name.isidentifier() or len(name) > LONGEST_TEXT:
                raise ValueError(
                    f"sets: expected names of at most {LONGEST_TEXT} letters, digits and underscores, got {name!r:.80}"
                )
        if not self.weight > 0:
            raise ValueError(f"weight: expected a positive number, got {self.weight!r}")

    def coupled(self, t: Tensor) -> Tensor:
        """Whether labels take part at levels `t` (N,): (N,) bool."""
        if self.levels is None:
            return torch.ones_like(t, dtype=torch.bool)
        return torch.isin(t, torch.tensor(list(self.levels), device=t.device, dtype=t.dtype))

    def layers(self, name: str, count: int) -> tuple[int, ...]:
        """Indices of the layers that a set is bound to, out of `count`, top to bottom."""
        layers = self.sets[name].layers
        return tuple(range(count)) if layers is None else tuple(sorted(layers))


class HeadDict(nn.ModuleDict):
    """Networks by label set, of any name: a plain ModuleDict takes no "type", "items" or "training", as it has
    attributes of these names. Entries are no attributes here.
    """

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def build_heads(
    coupling: Coupling, shapes: Sequence[Sequence[int]], energies: Sequence[nn.Module], steps: int, device: torch.device
) -> nn.ModuleDict:
    """The networks that give logits.

    Args:
        coupling: the label sets.
        shapes: shapes of the latents without batch, top to bottom.
        energies: the prior's energies; default ones hand on their inputs' activity.
        steps: number of conditional priors T.
        device: where to make them.

    Returns:
        By set and by layer, network(z_i, t) -> (N, K); with context where the energies have it, see `ContextEnergy`.

    Raises:
        ValueError: a set is bound to a layer that does not exist, or a level does not exist.
    """
    for level in coupling.levels or ():
        if level not in range(steps):
            raise ValueError(f"levels: expected levels 0..{steps - 1}, got {level!r}")
    config = replace(coupling.networks, context=all(takes_context(energy) for energy in energies))
    heads = HeadDict()
    for name, labels in coupling.sets.items():
        for i in labels.layers or ():
            if i not in range(len(shapes)):
                raise ValueError(
                    f"label set {name!r}: expected layer indices 0 (top) to {len(shapes) - 1} (bottom), got {i!r}"
                )
        networks = nn.ModuleDict()
        for i in coupling.layers(name, len(shapes)):
            networks[str(i)] = network = make_network(shapes[i], steps, config, labels.size, device)
            take_statistics(network, energies[i])
        heads[name] = networks
    return heads


def take_statistics(network: nn.Module, energy: nn.Module) -> None:
    """Give a new label network what the data told the energy of its layer: the activity, and the context's moments."""
    if not isinstance(energy, LayerEnergy | ContextEnergy) or energy.activity.is_meta:
        return
    if isinstance(network, LayerEnergy) and bool((energy.activity != 1).any()):
        network.set_activity(energy.activity)
    if isinstance(network, ContextEnergy) and isinstance(energy, ContextEnergy):
        network.load_statistics(energy)


def label_logits(
    heads: Heads, coupling: Coupling, inputs: Sequence[Tensor | LayerState], levels: Tensor, t: Tensor
) -> dict[str, Tensor]:
    """l_s of every set, (N, K): the sum over the layers that are given, zero at levels that are not coupled.

    Args:
        heads: networks by set and layer.
        coupling: the label sets.
        inputs: of the networks of all layers, or of the first ones: latents, or with context states.
        levels: of the networks: (N,) long, or with context angles (N, 2).
        t: levels (N,) long, at which labels take part or not.

    Returns:
        Logits by set.
    """
    by_set = {}
    coupled = coupling.coupled(t)[:, None]
    for name, networks in heads.items():
        parts = [network(inputs[int(i)], levels) for i, network in networks.items() if int(i) < len(inputs)]
        first = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0].u
        logits = torch.stack(parts).sum(0) if parts else first.new_zeros(len(t), coupling.sets[name].size)
        by_set[name] = logits * coupled
    return by_set


def evidence(logits: Tensor) -> Tensor:
    """A set's part of F^, log sum_y exp l_y - log K in nats, (N,), from logits (N, K)."""
    return logits.logsumexp(1) - math.log(logits.shape[1])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(y | u_t) in nats, (N,), from logits (N, K) and labels (N,); 0 where a label is unknown, -1."""
    return nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")


def check_labels(labels: Tensor | Labels, coupling: Coupling | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """Labels of images for training.

    Args:
        labels: by set, or of the only set: (n,) integers or floats; -1 or NaN where unknown.
        coupling: the label sets; None for a prior that is not coupled.
        n: number of images.
        device: where the labels go.

    Returns:
        Long tensors (n,) by set; sets that were not given are unknown.

    Raises:
        TypeError, ValueError: no coupling, an unknown set, a wrong length, or an index out of range.
    """
    if coupling is None:
        raise ValueError(f"labels: this prior is not coupled to labels; {COUPLE}")
    if isinstance(labels, Tensor):
        if len(coupling.sets) > 1:
            raise TypeError(
                f"labels: expected a tensor for each of {', '.join(coupling.sets)}, as {{name: tensor}}, got one tensor"
            )
        labels = {next(iter(coupling.sets)): labels}
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels: expected a tensor (N,), or one by name of its set, got {type(labels).__name__}")
    checked = {name: torch.full((n,), -1, dtype=torch.long, device=device) for name in coupling.sets}
    for name, values in labels.items():
        find_set(name, coupling)
        checked[name] = check_values(name, values, coupling.sets[name], n, device)
    return checked


def find_set(name: str, coupling: Coupling | None) -> LabelSet:
    """The label set of this name; ValueError where there is none."""
    if coupling is None:
        raise ValueError(f"label {name!r}: this prior is not coupled to labels; {COUPLE}")
    if name not in coupling.sets:
        raise ValueError(f"label {name!r}: expected one of the label sets {', '.join(coupling.sets)}")
    return coupling.sets[name]


def check_values(name: str, values: Tensor, labels: LabelSet, n: int, device: torch.device) -> Tensor:
    """Categories (n,) as a long tensor, -1 where `values` are -1 or NaN; TypeError or ValueError for all but indices of
    `labels`.
    """
    if not isinstance(values, Tensor) or values.is_complex():
        raise TypeError(
            f"label {name!r}: expected a tensor of indices, got {type(values).__name__}; convert them with "
            "torch.as_tensor(labels)"
        )
    if tuple(values.shape) != (n,):
        raise ValueError(
            f"label {name!r}: expected one label for each of {n} images, shape ({n},), got {tuple(values.shape)}"
        )
    indices = values.double().nan_to_num(-1.0)
    wrong = indices[(indices != indices.round()) | (indices < -1) | (indices >= labels.size)]
    if len(wrong):
        raise ValueError(
            f"label {name!r}: expected indices 0..{labels.size - 1}, or -1 where unknown, got {wrong[0].item():g}"
        )
    return indices.long().to(device)
