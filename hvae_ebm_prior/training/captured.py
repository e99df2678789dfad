"""A loss and its gradient as one graph, where a loss is many small launches and a GPU waits for each.

Forward and backward pass are captured together: inputs are copied to places of their own, the weights are read where
they are, and what comes back is the loss and its gradient in the weights (`chains.graphs`).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ..chains.execution import places
from ..density.energy_model import EnergyModel

# Of tensors: first what is minimised (N,), then its parts.
Loss = Callable[..., Sequence[Tensor]]


def captured_loss(prior: EnergyModel, name: Sequence[Hashable], loss: Loss, *inputs: Tensor) -> list[Tensor]:
    """A loss from a graph, which is captured at its first call.

    Args:
        prior: the prior to learn, whose weights move in place.
        name: names everything that the loss depends on beside inputs and weights.
        loss: of the inputs, in which no gradient is asked for.
        *inputs: its arguments.

    Returns:
        What `loss` returns. The first has its gradient in the prior's parameters, for a minimum in which all samples
        weigh alike, and NaN for another; the parts have none.

    Raises:
        ValueError: the prior is on a device without graphs.
    """
    learned = {key: value for key, value in prior.named_parameters() if value.requires_grad}
    if not learned:
        return list(loss(*inputs))
    module = LossModule(prior, loss)

    def loss_and_gradient(*inputs: Tensor) -> list[Tensor]:
        # Leaves of its own: those of an earlier loss that is still alive belong to another stream, and so do their
        # casts under autocast.
        leaves = {f"prior.{key}": value.detach().requires_grad_() for key, value in learned.items()}
        total, *parts = functional_call(module, leaves, inputs)
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            gradients = torch.autograd.grad(total.sum(), list(leaves.values()), allow_unused=True)
        # No numbers stand for no gradient.
        of_weights = [total.new_empty(0) if gradient is None else gradient for gradient in gradients]
        return [*of_weights, *(part.detach() for part in (total, *parts))]

    kind = prior.device.type
    mode = (prior.training, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), *learned)
    where = places([*prior.energies, *prior.heads.values()])
    results = prior.graphs.run((*name, mode, *where), loss_and_gradient, inputs)
    gradients, (total, *parts) = results[: len(learned)], results[len(learned) :]
    total = KnownGradient.apply(total, gradients, *learned.values())  # type: ignore[no-untyped-call]
    return [total, *parts]


class LossModule(nn.Module):
    """A loss as a module of its prior, so that it can be called with other weights."""

    def __init__(self, prior: EnergyModel, loss: Loss) -> None:
        super().__init__()
        self.prior, self.loss = prior, loss

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.loss(*inputs)


class KnownGradient(torch.autograd.Function):
    """Losses (N,) whose sum has a gradient that is known; where they do not weigh alike it is NaN."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return losses.clone()  # what is returned as it came would be no function of the parameters

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        weight = torch.where((weights == weights[0]).all(), weights[0], math.nan)
        known = [gradient for gradient in ctx.gradients if gradient.numel()]
        weighed = iter(torch._foreach_mul(known, weight) if known else ())
        return (None, None, *(next(weighed) if gradient.numel() else None for gradient in ctx.gradients))
