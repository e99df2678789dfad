"""A loss and its gradient as one graph, where a loss is many small launches and a GPU waits for each.

Forward and backward pass are captured together: inputs are copied to places of their own, the weights are read where
they are, and what comes back is the loss and its gradient in the weights (`chains.graphs`).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..chains.execution import places
from ..density.energy_model import EnergyModel


def captured_loss(
    prior: EnergyModel, name: Sequence[Hashable], loss: Callable[..., Sequence[Tensor]], *inputs: Tensor
) -> list[Tensor]:
    """A loss from a graph, which is captured at its first call.

    Args:
        prior: the prior to learn, whose weights move in place.
        name: names everything that the loss depends on beside inputs and weights.
        loss: of the inputs, first what is minimised (N,), then its parts; not differentiable in the inputs.
        inputs: its arguments.

    Returns:
        What `loss` returns. The first has its gradient in the prior's parameters, for a minimum in which all samples
        weigh alike; the parts have none.

    Raises:
        ValueError: the prior is on a device without graphs.
    """
    parameters = [each for each in prior.parameters() if each.requires_grad]

    def loss_and_gradient(*inputs: Tensor) -> list[Tensor]:
        total, *parts = loss(*inputs)
        gradients = torch.autograd.grad(total.sum(), parameters, allow_unused=True)
        # No numbers stand for no gradient.
        return [
            *(part.detach() for part in (total, *parts)),
            *(
                x.new_empty(0) if gradient is None else gradient
                for x, gradient in zip(parameters, gradients, strict=True)
            ),
        ]

    where = places([*prior.energies, *prior.heads.values()])
    results = prior.graphs.run((*name, *where), loss_and_gradient, inputs)
    losses, gradients = results[: -len(parameters)], results[-len(parameters) :]
    total: Tensor = KnownGradient.apply(losses[0], gradients, *parameters)  # type: ignore[no-untyped-call]
    return [total, *losses[1:]]


class KnownGradient(torch.autograd.Function):
    """Losses (N,) whose sum has a gradient that is known."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        known = [gradient for gradient in ctx.gradients if gradient.numel()]
        weighed = iter(torch._foreach_mul(known, weights[0]))
        return (None, None, *(next(weighed) if gradient.numel() else None for gradient in ctx.gradients))
