"""One draw from a conditional prior: the Langevin chain over a model's energies and backbone, then Metropolis steps if
asked for.

At a temperature the backbone's stds are multiplied by it; the chain then runs in v = u / temperature, where its
Gaussians are N(0, I) again.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..chains.autograd import walk_values_and_gradient, with_autograd
from ..chains.execution import chain_gradient
from ..chains.langevin import LangevinConfig, langevin_chain
from ..chains.metropolis import metropolis_chain
from ..chains.streams import Streams
from .composition import Condition
from .energy_model import EnergyModel

# Mask (D,) of held dimensions, and the states (N, D) that they are held at.
Held = tuple[Tensor, Tensor]


@with_autograd
def draw_conditional(
    model: EnergyModel,
    u_next: Tensor,
    t: Tensor,
    streams: Streams,
    *,
    langevin: LangevinConfig | None = None,
    temperature: float = 1.0,
    hold: Held | None = None,
    condition: Condition | None = None,
    report: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Draw u_t given u_{t+1}.

    Args:
        model: energies and backbone.
        u_next: states of the noisier level (N, D), divided by the temperature.
        t: levels (N,) long, 0..T-1.
        streams: the samples' noise.
        langevin: settings of the chain; None takes the model's.
        temperature: factor on the std of the backbone's Gaussian layers.
        hold: mask (D,) of dimensions to hold, and the states (N, D) to hold them at.
        condition: what takes the place of F; None for F.
        report: given each sample's mean acceptance probability (N,) of the Metropolis steps, where there are any.

    Returns:
        States (N, D), finite, divided by the temperature.

    Raises:
        ChainDiverged: a chain left the finite numbers.
        ValueError: a graph was asked for, and the noise is that of PyTorch's generators, or there is no CUDA.
    """
    config = langevin or model.langevin
    # Spectrally normalised weights are worked out once, where they are first used.
    with torch.no_grad(), parametrize.cached():
        target = (condition or Condition()).target(model, t)

        def total(u: Tensor, t: Tensor) -> Tensor:
            return target(u, t).sum()

        def total_of_top(u: Tensor, t: Tensor) -> Tensor:
            return target(u, t, 1).sum()

        compiled = model.execution.compile and condition is None
        gradient = chain_gradient(model.compiled_total if compiled else total, temperature, model.execution)
        gradient_of_top = chain_gradient(total_of_top, temperature, model.execution)
        keep = None
        # Label networks and other priors have tensors that are made anew for every chain.
        if model.execution.graph and condition is None and model.coupling is None:
            energies = model.chain_energies(len(t))
            settings = (config, model.langevin, model.schedule, model.execution, temperature)
            keep = partial(model.graphs.run, ("joint", energies, *settings))
        u = langevin_chain(
            gradient,
            u_next,
            t,
            schedule=model.schedule,
            config=config,
            streams=streams,
            hold=hold,
            top=(math.prod(model.latent_shapes[0]), gradient_of_top),
            inputs=(t,),
            keep=keep,
        )
        if not config.corrector_steps:
            return u

        def value_and_gradient(v: Tensor) -> tuple[Tensor, Tensor]:
            # In full precision, as the test compares values of F.
            f, gradient = walk_values_and_gradient(target, temperature * v, t)
            return f, temperature * gradient

        u, acceptance = metropolis_chain(
            value_and_gradient,
            u,
            u_next,
            t,
            schedule=model.schedule,
            config=config,
            steps=config.corrector_steps,
            streams=streams,
            hold=hold,
        )
        if report is not None:
            report(acceptance)
        return u
