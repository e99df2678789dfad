"""How one gradient of F through the walk is computed, and how a chain's steps are repeated: choices of speed alone.

Always: one backward pass for F (the Gaussian terms are affine and never differentiated), a walk that ends at the last
latent, weights under a parametrisation worked out once per chain. Where it is faster, default energies of equal shape
run as one batched call, with their weights stacked once per chain. On request: half precision, a compiled gradient,
and chains replayed from CUDA graphs (`graphs`).
"""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

from ..backbone.transform import LayerState
from ..energies.context import ContextEnergy
from ..energies.networks import LayerEnergy
from .autograd import walk_gradient
from .kernels import Backend

# On a CPU, networks of equal shape run as one while their inputs have no more numbers than this; beyond, one after the
# other is as fast.
BATCHED_INPUTS = 2**17
# Largest relative difference from the plain gradient at which a compiled one is trusted.
COMPILED_ERROR = 1e-3

# What a network takes: a latent (N, *shape), or with context a layer's state.
Input = Tensor | LayerState
Corrections = Callable[[Sequence[Input], Tensor], Tensor]


@dataclass(frozen=True)
class ExecutionConfig:
    """How chains are computed. Results stay the same to rounding, but for the noise of another backend and for half
    precision.

    Attributes:
        backend: what computes noise and steps, "auto", "torch", "naive" or "triton"; see
            `hvae_ebm_prior.chains.kernels`.
        autocast: run backbone and energies of a chain in "bfloat16" or "float16"; None for their own precision. States
            and steps stay as they are, and so do weights, posterior draws and the optimiser. In training the loss is
            computed so as well, in "bfloat16" alone: gradients of weights may be too small for "float16". For GPUs; a
            CPU may be slower with it.
        compile: compile the gradient with torch.compile. Its first result is compared with the plain one, which is
            used, with a warning, if they differ.
        graph: on CUDA, capture chains, the flow of a layer, and the score loss with its gradient, as graphs that later
            ones of the same shapes replay. For small networks, whose step is many small launches. A graph whose first
            replay gives other numbers is not used, with a warning. Chains take counted noise for it, a backend other
            than "torch"; under labels, other priors and observations they run as without. Of a loss of your own making,
            all images must weigh alike: `prior.loss(x).mean()`.
    """

    backend: Backend = "auto"
    autocast: Literal["bfloat16", "float16"] | None = None
    compile: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {self.backend!r}")
        if self.autocast not in (None, "bfloat16", "float16"):
            raise ValueError(f'autocast: expected None, "bfloat16" or "float16", got {self.autocast!r}')

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """The autocast that was asked for, on `device`."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, getattr(torch, self.autocast))

    def loss_precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """The autocast for the loss, on `device`: bfloat16 where that was asked for."""
        if self.autocast != "bfloat16":
            return nullcontext()
        # Without the cache, in which weights that a chain used without gradients would stay so.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def chain_gradient(
    total: Callable[..., Tensor], temperature: float, execution: ExecutionConfig
) -> Callable[..., Tensor]:
    """Gradient in v of `total(temperature v, *inputs)`, as a function of v (N, D) and of the inputs."""

    def gradient(v: Tensor, *inputs: Tensor) -> Tensor:
        with execution.precision(v.device):
            if temperature == 1:
                return walk_gradient(total, v, *inputs)
            return temperature * walk_gradient(total, temperature * v, *inputs)

    return gradient


def one_by_one(energies: Sequence[Callable[[Any, Tensor], Tensor]], inputs: Sequence[Input], t: Tensor) -> Tensor:
    """f_i, (N, L), of the inputs of all layers or of the first ones."""
    return torch.stack([network(x, t) for network, x in zip(energies, inputs, strict=False)], dim=1)


def group_networks(
    energies: Sequence[nn.Module], shapes: Sequence[Sequence[int]], n: int, device: torch.device
) -> tuple[tuple[int, ...], ...]:
    """Which networks run as one call: default ones of equal shape, and of as many active channels, where that is
    faster.

    Args:
        energies: one network per layer.
        shapes: shapes of the latents.
        n: number of samples N.
        device: where they run.

    Returns:
        Groups of their indices.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (network, shape) in enumerate(zip(energies, shapes, strict=True)):
        small = device.type != "cpu" or n * math.prod(shape) <= BATCHED_INPUTS
        alike = isinstance(network, LayerEnergy | ContextEnergy) and not getattr(network, "inactive", False)
        active = len(network.active) if isinstance(network, ContextEnergy) else 0
        groups[(*shape, active) if small and alike else i].append(i)
    return tuple(map(tuple, groups.values()))


class ChainEnergies:
    """f_i, (N, L), of a chain's energies as one function of the inputs of all layers, or of the first ones, and of the
    levels; its weights ask for no gradients.

    Weights of networks that run alone are the networks' own. Others are copies: stacked ones of a group, and those that
    a parametrisation (spectral normalisation) works out. `refresh` brings them up to date where they are in memory.

    Args:
        energies: one network per layer.
        groups: of `group_networks`.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, energies: Sequence[nn.Module], groups: Sequence[Sequence[int]]) -> None:
        self._energies = energies
        self._where = places(energies)
        self._plain = [plain_copy(network) if is_parametrized(network) else network for network in energies]
        self._single = [frozen(network) for network in self._plain]
        self._alone = [members[0] for members in groups if len(members) == 1]
        self._together = [
            (members, StackedNetworks([self._plain[i] for i in members])) for members in groups if len(members) > 1
        ]

    def is_of(self, energies: Iterable[nn.Module]) -> bool:
        """Whether these are the networks it was made of, with their weights where they were."""
        now = list(energies)
        return (
            len(now) == len(self._energies)
            and all(a is b for a, b in zip(now, self._energies, strict=True))
            and places(now) == self._where
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Take the networks' present weights."""
        for network, plain in zip(self._energies, self._plain, strict=True):
            if plain is not network:
                copy_weights(network, plain)
        for _, networks in self._together:
            networks.refresh()

    def __call__(self, inputs: Sequence[Input], t: Tensor) -> Tensor:
        if len(inputs) < len(self._energies):
            return one_by_one(self._single, inputs, t)
        values: list[Tensor] = [t] * len(inputs)
        for i in self._alone:
            values[i] = self._single[i](inputs[i], t)
        for members, networks in self._together:
            of_members = networks(stack_inputs([inputs[i] for i in members]), t)
            for i, value in zip(members, of_members, strict=True):
                values[i] = value
        return torch.stack(values, dim=1)


def places(energies: Iterable[nn.Module]) -> list[int]:
    """Where the weights and buffers of networks are in memory, and how long they are."""
    tensors = [x for network in energies for x in (*network.parameters(), *network.buffers())]
    return [number for x in tensors for number in (x.data_ptr(), x.numel())]


def stack_inputs(inputs: Sequence[Input]) -> Input:
    """The inputs of G networks alike as one, each part (G, N, *shape)."""
    if isinstance(inputs[0], LayerState):
        return LayerState(*(torch.stack(parts) for parts in zip(*inputs, strict=True)))
    return torch.stack(inputs)  # type: ignore[arg-type]


class StackedNetworks:
    """f_i, (G, N), of G networks alike but for their weights, as one call of inputs (G, N, *shape) and levels (N,).

    Args:
        networks: without parametrisations.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._networks = networks
        self._weightless = copy.deepcopy(networks[0]).to("meta")
        self._weights: dict[str, Tensor] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take the networks' present weights."""
        states = [dict([*network.named_parameters(), *network.named_buffers()]) for network in self._networks]
        for name, first in states[0].items():
            parts = [state[name].detach() for state in states]
            if name not in self._weights:
                self._weights[name] = first.detach().new_empty((len(parts), *first.shape))
            torch.stack(parts, out=self._weights[name])

    def __call__(self, x: Input, t: Tensor) -> Tensor:
        def call(weights: dict[str, Tensor], x: Input, t: Tensor) -> Tensor:
            return functional_call(self._weightless, weights, (x, t))

        return vmap(call, in_dims=(0, 0, None))(self._weights, x, t)


def frozen(network: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    """`network` with weights that ask for no gradients, so that a backward pass keeps and computes nothing for them."""
    weights = {name: value.detach() for name, value in network.named_parameters()}
    return lambda z, t: functional_call(network, weights, (z, t))


def is_parametrized(network: nn.Module) -> bool:
    """Whether any weight of `network` is under a parametrisation."""
    return any(parametrize.is_parametrized(module) for module in network.modules())


def plain_copy(network: nn.Module) -> nn.Module:
    """A copy whose parametrised weights (spectral normalisation) are plain parameters of their present values."""
    new = copy.deepcopy(network)
    with torch.no_grad():
        for module, source in list(zip(new.modules(), network.modules(), strict=True)):
            if parametrize.is_parametrized(source):
                replace_parametrizations(module, {name: getattr(source, name) for name in source.parametrizations})  # type: ignore[union-attr]
    return new


def copy_weights(source: nn.Module, plain: nn.Module) -> None:
    """Copy the present weights of `source` into its `plain_copy`, in place."""
    copies = dict([*plain.named_parameters(), *plain.named_buffers()])
    present = [getattr(source.get_submodule(path), name) for path, _, name in (x.rpartition(".") for x in copies)]
    torch._foreach_copy_(list(copies.values()), present)


def replace_parametrizations(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Give a copied module plain parameters of these values, instead of parametrised ones."""
    plain = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    # `remove_parametrizations` would change the class, which the copy shares with the original.
    module.__class__ = plain
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value.detach().clone()))


class CompiledTotal:
    """A compiled scalar function of (u, t) whose gradient is checked against the plain one at its first call.

    On a CPU, torch 2.13's inductor was observed to return a gradient that is wrong by some per cent, for convolutions
    around an upsampling.

    Args:
        total: the plain function.
        device: where it runs.
    """

    def __init__(self, total: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self.plain = total
        # The optimisation that went wrong.
        options: Any = {"layout_optimization": False} if device.type == "cpu" else None
        self.compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(total, options=options)
        self.trusted: bool | None = None

    def __call__(self, u: Tensor, t: Tensor) -> Tensor:
        if self.trusted is None:
            self.trusted = self._check(u, t)
        return self.compiled(u, t) if self.trusted else self.plain(u, t)

    def _check(self, u: Tensor, t: Tensor) -> bool:
        expected = walk_gradient(self.plain, u, t)
        try:
            actual = walk_gradient(self.compiled, u, t)
        except Exception as error:  # a compiler fails in many ways
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {str(error)[:200]}); the plain gradient is used",
                stacklevel=2,
            )
            return False
        difference = ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        if not difference <= COMPILED_ERROR:
            warnings.warn(
                f"torch.compile's gradient differs from the plain one by {difference:.1%}; the plain one is used",
                stacklevel=2,
            )
        return difference <= COMPILED_ERROR
