"""The networks of a prior: default ones by their settings, or the user's own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..backbone.transform import LayerState
from .context import ContextEnergy, takes_context
from .networks import EnergyConfig, LayerEnergy
from .published import PublishedEnergy


def make_network(
    shape: Sequence[int],
    steps: int,
    config: EnergyConfig,
    categories: int | None = None,
    device: torch.device | str = "cpu",
) -> LayerEnergy | ContextEnergy | PublishedEnergy:
    """A default or published network for latents of this shape.

    Args:
        shape: shape of the latent without batch.
        steps: number of conditional priors T; of no matter with context, where levels are continuous.
        config: its size.
        categories: numbers per sample, for logits of labels; None for an energy.
        device: where it goes.

    Returns:
        The network, in float32. Its first values are those of a CPU in float32, whatever PyTorch's defaults are.
    """
    device = torch.device(device)
    with usual_defaults(device):
        if config.context:
            return ContextEnergy(shape, config, categories).to(device)
        if config.architecture != "default":
            return PublishedEnergy(shape, config, categories).to(device)
        return LayerEnergy(shape, steps, config, categories).to(device)


@contextmanager
def usual_defaults(device: torch.device) -> Iterator[None]:
    """Inside, new tensors are of float32 and on the CPU, or without values for the device "meta", whatever PyTorch's
    defaults are.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with device if device.type == "meta" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def without_context(energy: EnergyConfig | Sequence[nn.Module], kind: str) -> EnergyConfig | Sequence[nn.Module]:
    """The networks of a class that takes none with context; ValueError, naming the class, where they have it."""
    if energy.context if isinstance(energy, EnergyConfig) else any(takes_context(network) for network in energy):
        raise ValueError(f"energy: the networks of a {kind} see no context; set EnergyConfig(context=False)")
    return energy


def build_energies(
    energy: EnergyConfig | Sequence[nn.Module], shapes: Sequence[Sequence[int]], steps: int, device: torch.device
) -> nn.ModuleList:
    """One energy network per latent layer.

    Args:
        energy: settings of the default network, or the user's own networks, one per layer: network(z, t) returns f of
            shape (N,) for latents z (N, *shape) and levels t (N,) long; or, where the network has an attribute
            `context` that is True, network(state, angles) as `ContextEnergy.forward`.
        shapes: shapes of the latents without batch, top to bottom.
        steps: number of conditional priors T.
        device: where default networks are made.

    Returns:
        The networks, top to bottom.

    Raises:
        TypeError: `energy` is neither.
        ValueError: there is not one network per layer, or one returns another shape than (N,).
    """
    if isinstance(energy, EnergyConfig):
        return nn.ModuleList(make_network(shape, steps, energy, device=device) for shape in shapes)
    if not isinstance(energy, list | tuple | nn.ModuleList) or not all(
        isinstance(network, nn.Module) for network in energy
    ):
        raise TypeError(
            f"energy: expected an EnergyConfig or a list of one nn.Module per layer, got {type(energy).__name__}"
        )
    if len({takes_context(network) for network in energy}) > 1:
        raise ValueError("energy: expected all networks with context (attribute `context`), or none")
    if len(energy) != len(shapes):
        raise ValueError(f"energy: expected one network per layer, {len(shapes)} in all, got {len(energy)}")
    for i, (network, shape) in enumerate(zip(energy, shapes, strict=True)):
        parameter = next(network.parameters(), torch.empty((), device=device, dtype=torch.float32))
        z = parameter.new_zeros(2, *shape)
        t = torch.zeros(2, dtype=torch.long, device=parameter.device)
        training = network.training
        with torch.no_grad():
            if takes_context(network):
                out = network.eval()(LayerState(z, z, z, z + 1), z.new_zeros(2, 2))
            else:
                out = network.eval()(z, t)
        network.train(training)
        if tuple(out.shape) != (2,):
            raise ValueError(
                f"energy network {i}: for 2 latents of shape {tuple(shape)} expected an output of shape (2,), "
                f"got {tuple(out.shape)}"
            )
    return nn.ModuleList(energy)
