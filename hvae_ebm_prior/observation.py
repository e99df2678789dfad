"""What of a training step is shown to the callbacks, beside what the step needs itself."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .prior import DiffusionEBMPrior


def list_callbacks(callback: Any) -> list[Callable[..., object]]:
    """The callbacks of a run, of one, a sequence of them, or None; raise TypeError for what cannot be called."""
    callbacks = list(callback) if isinstance(callback, Sequence) else [] if callback is None else [callback]
    for each in callbacks:
        if not callable(each):
            raise TypeError(f"callback: expected a function of (prior, record), or a sequence of such, got {type(each).__name__}")
    return callbacks


def parameters_by_layer(prior: "DiffusionEBMPrior") -> list[list[nn.Parameter]]:
    """Parameters of every layer's energy and label networks, top to bottom."""
    heads = [networks for networks in prior.heads.values() if isinstance(networks, nn.ModuleDict)]
    return [
        [*energy.parameters(), *(each for networks in heads if str(i) in networks for each in networks[str(i)].parameters())]
        for i, energy in enumerate(prior.energies)
    ]


def gradient_norms(layers: Sequence[Sequence[nn.Parameter]]) -> tuple[float, ...]:
    """Norm of the gradient of every layer's parameters."""
    norms = [nn.utils.get_total_norm([each.grad for each in layer if each.grad is not None]) for layer in layers]
    device = next(each.device for layer in layers for each in layer)  # that of a layer without parameters is the CPU
    return tuple(torch.stack([norm.to(device) for norm in norms]).tolist())


def mean(values: Tensor | None) -> float:
    """The mean of what was measured, NaN for nothing."""
    return math.nan if values is None else values.mean().item()
