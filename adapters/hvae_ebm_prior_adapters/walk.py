"""A model's top-down pass, written once for the prior and for the posterior.

A walk is a generator that yields what layer i is conditioned on, is sent its latent z_i, and returns the features below the last one. The prior turns
every state into the layer's Gaussian; the posterior draws the latent from it and from the image's features.
"""

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

State = TypeVar("State")
Walk = Generator[State, Tensor, Any]


def priors(walk: Walk[State], gaussian: Callable[[State], tuple[Tensor, Tensor]]) -> Generator[tuple[Tensor, Tensor], Tensor, Any]:
    """The coroutine of an adapter's `top_down`: `gaussian` gives (mean, std) of every state of `walk`."""
    try:
        state = next(walk)
        while True:
            z = yield gaussian(state)
            state = walk.send(z)
    except StopIteration as stop:
        return stop.value


def posterior_draws(walk: Walk[State], draw: Callable[[int, State], Tensor]) -> list[Tensor]:
    """The latents of an adapter's `infer`, top to bottom: `draw` gives layer i's from its index and state."""
    latents: list[Tensor] = []
    try:
        state = next(walk)
        while True:
            latents.append(draw(len(latents), state))
            state = walk.send(latents[-1])
    except StopIteration:
        return latents


def run(module: Callable[..., Any], *inputs: Any, checkpoint: bool) -> Any:
    """`module(*inputs)`; with `checkpoint`, what it computes on the way is not kept for the backward pass but computed again there."""
    if checkpoint and torch.is_grad_enabled():
        return checkpointed(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    return module(*inputs)


def standard_normal(like: Tensor) -> Tensor:
    """Noise of the shape of `like`, the same for a seed whatever the memory format (that of `randn_like` is not)."""
    return torch.randn(like.shape, device=like.device, dtype=like.dtype)
