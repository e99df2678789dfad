"""Gradients of walks through the backbone, wherever they are asked for: also under `torch.no_grad()` and
`torch.inference_mode()`, whose tensors cannot take part in autograd, while copies of them can.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def with_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which takes gradients, under `torch.inference_mode()` too: tensors of that mode are copied where
    they are arguments, and none are made inside.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            named = {name: usable(value) for name, value in kwargs.items()}
            return function(*map(usable, args), **named)

    return call


def usable(value: Any) -> Any:
    """A tensor that can take part in autograd; other values as they are."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def walk_gradient(total: Callable[..., Tensor], u: Tensor, *inputs: Tensor) -> Tensor:
    """Gradient in u (N, D) of the scalar `total(u, *inputs)`."""
    with torch.inference_mode(False), torch.enable_grad():
        u = usable(u).detach().requires_grad_()
        return torch.autograd.grad(total(u, *map(usable, inputs)), u)[0]


def walk_values_and_gradient(values: Callable[[Tensor, Tensor], Tensor], u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """`values(u, t)`, (N,) or (N, L), and the gradient of their sum in u (N, D), at levels `t` (N,), by one walk."""
    with torch.inference_mode(False), torch.enable_grad():
        u = usable(u).detach().requires_grad_()
        at_u = values(u, usable(t))
        return at_u.detach(), torch.autograd.grad(at_u.sum(), u)[0]
