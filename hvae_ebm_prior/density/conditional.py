"""One draw from a conditional prior: the Langevin chain over a model's energies and backbone, and the Metropolis steps
after it if asked for.

At a temperature the backbone's stds are multiplied by it; the chain then runs in v = u / temperature, where its
Gaussians are N(0, I) again.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..chains.execution import chain_gradient, repeat, walk_values_and_gradient
from ..chains.langevin import LangevinConfig, langevin_chain
from ..chains.metropolis import metropolis_chain
from ..chains.streams import SampleStreams, Streams
from .composition import Condition
from .energy_model import EnergyModel

# Mask (D,) of held dimensions, and the states (N, D) that they are held at.
Held = tuple[Tensor, Tensor]


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
    if model.execution.graph and isinstance(streams, SampleStreams):
        raise ValueError(
            'graph: a captured step needs counted noise; set ExecutionConfig(backend="triton") or "naive", or graph=False'
        )
    config = langevin or model.langevin
    # Spectrally normalised weights are worked out once, where they are first used.
    with torch.no_grad(), parametrize.cached():
        terms = model.terms_at(t)

        def plain(u: Tensor, t: Tensor, layers: int | None = None) -> Tensor:
            return terms(model.transform.to_latents(u, layers), t)[0]

        target = plain if condition is None else condition.target(model, t)
        total = (
            model.compiled_total if model.execution.compile and condition is None else lambda u, t: target(u, t).sum()
        )
        whole, own = (
            chain_gradient(part, t, temperature, model.execution)
            for part in (total, lambda u, t: target(u, t, 1).sum())
        )
        chain = partial(langevin_chain, schedule=model.schedule, config=config, streams=streams, hold=hold)
        top = math.prod(model.latent_shapes[0]), own
        u = chain(whole, u_next, t, top=top, repeat=repeat if model.execution.graph else None)
        if not config.corrector_steps:
            return u

        def valued(v: Tensor) -> tuple[Tensor, Tensor]:
            # In full precision, as the test compares values of F.
            f, gradient = walk_values_and_gradient(target, temperature * v, t)
            return f, temperature * gradient

        corrector = partial(metropolis_chain, schedule=model.schedule, config=config, streams=streams, hold=hold)
        u, acceptance = corrector(valued, u, u_next, t, steps=config.corrector_steps)
        if report is not None:
            report(acceptance)
        return u
