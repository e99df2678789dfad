"""A model's top-down pass, written once for the prior and for the posterior.

A walk is a generator that yields what layer i is conditioned on, is sent its latent z_i, and returns the features below
the last one. The prior turns every state into the layer's Gaussian; the posterior draws the latent from it and from the
image's features.
"""

import math
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

State = TypeVar("State")
Drawn = TypeVar("Drawn", bound=tuple[Tensor, ...])
Walk = Generator[State, Tensor, Any]


def priors(
    walk: Walk[State], gaussian: Callable[[State], tuple[Tensor, Tensor]]
) -> Generator[tuple[Tensor, Tensor], Tensor, Any]:
    """The coroutine of an adapter's `top_down`, which yields the mean and std of every layer, of a model's own walk.

    Args:
        walk: the model's top-down pass, as a generator: it yields what a layer is conditioned on, whatever that is, is
            sent the layer's latent, and returns the features for `decode`.
        gaussian: mean and std of the layer's prior, each (N, *shape), from what the walk yields.

    Returns:
        What the walk returns.
    """
    try:
        state = next(walk)
        while True:
            z = yield gaussian(state)
            state = walk.send(z)
    except StopIteration as stop:
        return stop.value


def posterior_draws(
    walk: Walk[State], gaussian: Callable[[int, State], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """The result of an adapter's `infer_with_density`, of a model's own walk; its latents alone are that of `infer`.

    Args:
        walk: the model's top-down pass, as of `priors`.
        gaussian: mean and std of layer i's posterior, each (N, *shape), from i, 0 for the top, and what the walk
            yields; features of the image come from the scope that the function is defined in.

    Returns:
        Draws z_i ~ q(z_i | z_<i, x), (N, *shape), with their log-densities in nats, (N,), top to bottom.
    """
    return drawn_by(walk, lambda i, state: normal_draw(*gaussian(i, state)))


def posteriors(
    walk: Walk[State], gaussian: Callable[[int, State], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The result of an adapter's `infer_with_posterior`; arguments as of `posterior_draws`, whose draws it has."""

    def draw(i: int, state: State) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = gaussian(i, state)
        return normal_draw(mean, std)[0], mean, std

    return drawn_by(walk, draw)


def drawn_by(walk: Walk[State], draw: Callable[[int, State], Drawn]) -> list[Drawn]:
    """`posterior_draws` of posteriors that are no Gaussians.

    Args:
        walk: the top-down pass.
        draw: layer i's latent and what comes with it, as its log-density (N,), from i and the walk's state.

    Returns:
        What was drawn, top to bottom.
    """
    drawn: list[Drawn] = []
    try:
        state = next(walk)
        while True:
            drawn.append(draw(len(drawn), state))
            state = walk.send(drawn[-1][0])
    except StopIteration:
        return drawn


def run(module: Callable[..., Any], *inputs: Any, checkpoint: bool) -> Any:
    """`module(*inputs)`; with `checkpoint`, the backward pass computes activations again instead of keeping them."""
    if checkpoint and torch.is_grad_enabled():
        return checkpointed(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    return module(*inputs)


def single(x: Tensor) -> Tensor:
    """`x` in float32 where it is in half precision: means, stds and images need the digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def standard_normal(like: Tensor) -> Tensor:
    """Noise of the shape of `like`, the same for a seed whatever the memory format (that of `randn_like` is not)."""
    return torch.randn(like.shape, device=like.device, dtype=like.dtype)


def normal_draw(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """A draw of N(mean, std^2), and its log-density in nats, (N,)."""
    noise = standard_normal(mean)
    log_density = -(0.5 * noise**2 + std.log() + 0.5 * math.log(2 * math.pi))
    return mean + std * noise, log_density.flatten(1).sum(1)
