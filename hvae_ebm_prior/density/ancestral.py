"""Ancestral drawing: layer by layer in one walk through the backbone, each layer from its own density given those
above.

    p(u) = prod_i p(u_i | z_<i),      p_phi(u_i | z_<i) proportional to exp f_i(u_i, phi; c_i) N(u_i; 0, I)

for energies with context. A layer starts from pure noise and follows the probability flow, or Langevin chains from
level to level; Metropolis steps on its density without noise may end either. No gradient of the backbone is needed.

With labels or other priors, the density that a layer is drawn from is that of all layers so far, those above held: what
the expression makes of F summed over them. At a temperature the layer's u / temperature is drawn, in which the Gaussian
is N(0, I) again.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.transform import LayerState, drive
from ..backbone.validation import set_integers
from ..chains.autograd import walk_gradient, walk_values_and_gradient, with_autograd
from ..chains.execution import frozen, places
from ..chains.flow import LARGEST_ANGLE, follow_flow
from ..chains.graphs import Keep
from ..chains.langevin import ChainDiverged, langevin_chain
from ..chains.metropolis import metropolis_chain
from ..chains.schedule import DiffusionSchedule
from ..chains.streams import Streams
from ..energies.coupling import evidence
from .composition import Condition
from .energy_model import EnergyModel, Terms
from .sampling import SamplingRequest

# log w (N,) of a layer's noise (N, d) at angles (N,), and of what was drawn above it.
LogWeight = Callable[..., Tensor]


@dataclass(frozen=True)
class DrawingConfig:
    """How samples are drawn.

    Attributes:
        ancestral: layer by layer, each given those above; or all layers together, by Langevin chains through the
            backbone (Alg. 2). Energies without context have joint densities alone. None for ancestral where the
            energies have context.
        flow_steps: steps of the probability flow in ancestral drawing, each a gradient of one layer's network; 0 for
            Langevin chains over the schedule's levels instead.
    """

    ancestral: bool | None = None
    flow_steps: int = 12

    def __post_init__(self) -> None:
        set_integers(self, {"flow_steps": 0})


class Above(NamedTuple):
    """What a prior says of the layers drawn so far: sums of f_i (N,), and of logits (N, K) by label set."""

    f: Tensor
    logits: Mapping[str, Tensor]


class LayerTerms:
    """F and log p(y | u) of a prior over the layers so far, as functions of the layer that is being drawn.

    Args:
        model: the prior.
        n: number of samples.
    """

    def __init__(self, model: EnergyModel, n: int) -> None:
        self.dtype = model.dtype
        self.energies = [frozen(network) for network in model.energies]
        self.heads = {name: {int(i): frozen(each) for i, each in heads.items()} for name, heads in model.heads.items()}  # type: ignore[operator]
        zeros = torch.zeros(n, device=model.device, dtype=model.dtype)
        sets = {} if model.coupling is None else model.coupling.sets
        self.above = Above(zeros, {name: zeros[:, None].expand(-1, labels.size) for name, labels in sets.items()})

    def sums(self, i: int, state: LayerState, angles: Tensor, above: Above | None = None) -> Above:
        """The sums with layer `i` at a state and angles (N, 2), and those `above` it, or else the present ones."""
        state = state.to(self.dtype)
        above = above or self.above
        logits = dict(above.logits)
        for name, heads in self.heads.items():
            if i in heads:
                logits[name] = logits[name] + heads[i](state, angles)
        return Above(above.f + self.energies[i](state, angles), logits)

    def terms(self, i: int, state: LayerState, angles: Tensor, above: Above | None = None) -> Terms:
        """F (N,) and log p(y | u) by label set; arguments as of `sums`."""
        f, logits = self.sums(i, state, angles, above)
        for values in logits.values():
            f = f + evidence(values)
        return f, {name: values.log_softmax(1) for name, values in logits.items()}


@with_autograd
@torch.no_grad()
def draw_layers(
    model: EnergyModel,
    streams: Streams,
    drawing: DrawingConfig,
    request: SamplingRequest,
) -> list[Tensor]:
    """Draw noise layer by layer.

    Args:
        model: energies with context, and the backbone.
        streams: the samples' noise.
        drawing: how.
        request: what to sample; its held layers are the first ones.

    Returns:
        u_0..u_T, each (N, D) and finite, with the states of every layer at the schedule's levels on its way, the first
        one drawn; held layers are alike in all.

    Raises:
        ChainDiverged: a layer left the finite numbers.
    """
    condition, temperature = request.condition or Condition(), request.temperature
    n = len(streams)
    terms = {each: LayerTerms(each, n) for each in (model, *condition.experts)}
    own = terms[model]
    name: tuple[Hashable, ...] | None = None
    if model.execution.graph and request.condition is None:
        settings = (drawing, model.langevin, model.schedule, model.execution, temperature)
        name = ("layer", *settings, *places([model.energies, model.heads]))
    # A layer that is drawn counts at the level with the least noise, as energies of no noise at all may be infinite.
    first_level = torch.tensor([model.schedule.angle[0].item(), 0.0], device=model.device, dtype=model.angle_dtype)
    first_level = first_level.expand(n, 2)
    layers: list[list[Tensor]] = []

    def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
        # Inference tensors cannot take part in autograd; copies can.
        with torch.inference_mode(False):
            mean, std = mean.clone(), std.clone()

        def state_of(u: Tensor, mean: Tensor, std: Tensor) -> LayerState:
            u = u.reshape(mean.shape).to(mean.dtype)
            return LayerState(u, mean + std * u, mean, std)

        def log_weight(v: Tensor, angle: Tensor, mean: Tensor, std: Tensor, f: Tensor, *logits: Tensor) -> Tensor:
            state = state_of(temperature * v, mean, std)
            angles = torch.stack((angle, torch.zeros_like(angle)), dim=1)
            above = Above(f, dict(zip(own.above.logits, logits, strict=True)))
            return condition.log_weight(
                model, lambda each: terms[each].terms(i, state, angles, above if each is model else None)
            )

        if i in request.fixed:
            states = [request.fixed[i].to(model.dtype).expand(mean.shape)] * (model.schedule.steps + 1)
        else:
            noise = streams.normal(mean[0].numel())
            inputs = (mean, std, own.above.f, *own.above.logits.values())
            keep = None if name is None else partial(model.graphs.run, (*name, i))
            drawn = draw_layer(model, log_weight, inputs, noise, streams, drawing, keep)
            states = [(temperature * v).reshape(mean.shape) for v in drawn]
        layers.append(states)
        state = state_of(states[0], mean, std)
        for each in terms.values():
            each.above = each.sums(i, state, first_level)
        return state.z

    drive(model.backbone, n, draw, stop_after=len(model.latent_shapes))
    return [model.join(parts) for parts in zip(*layers, strict=True)]


def draw_layer(
    model: EnergyModel,
    log_weight: LogWeight,
    inputs: Sequence[Tensor],
    noise: Tensor,
    streams: Streams,
    drawing: DrawingConfig,
    keep: Keep | None = None,
) -> list[Tensor]:
    """One layer's noise, from the density exp `log_weight` N(0, I) of every level.

    Args:
        model: its schedule, chain settings and precision matter.
        log_weight: log w (N,) of states (N, d) at angles (N,), and of `inputs`.
        inputs: what was drawn above.
        noise: pure noise (N, d).
        streams: the samples' noise.
        drawing: how.
        keep: runs the flow or the chains from a graph; None runs them as they are.

    Returns:
        States (N, d) at the levels 0..T, finite.
    """

    def gradient(u: Tensor, angle: Tensor, *inputs: Tensor) -> Tensor:
        with model.execution.precision(u.device):
            return walk_gradient(lambda *state: log_weight(*state).sum(), u, angle, *inputs)

    def flow(noise: Tensor, *inputs: Tensor) -> list[Tensor]:
        def velocity(u: Tensor, angle: float) -> Tensor:
            angle = min(angle, LARGEST_ANGLE)
            angles = torch.full((len(u),), angle, device=u.device, dtype=model.angle_dtype)
            return -math.tan(angle) * gradient(u, angles, *inputs)

        return follow_flow(velocity, noise, drawing.flow_steps, model.schedule.angle[1:].tolist())

    if drawing.flow_steps:
        states = flow(noise, *inputs) if keep is None else keep(flow, (noise, *inputs))
    else:
        states = [noise]
        for level in reversed(range(model.schedule.steps)):
            states.insert(0, chain_of_layer(model, gradient, inputs, states[0], level, streams, keep))
    if model.langevin.corrector_steps:
        states[0] = correct(model, lambda u, angle: log_weight(u, angle, *inputs), states[0], streams)
    if not bool(torch.isfinite(states[0]).all()):
        raise ChainDiverged("a layer's states are not finite; train with a lower learning rate")
    return states


def chain_of_layer(
    model: EnergyModel,
    gradient: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    u_next: Tensor,
    level: int,
    streams: Streams,
    keep: Keep | None,
) -> Tensor:
    """One layer's states (N, d) of a level given those of the level above, by a Langevin chain; arguments as of
    `draw_layer`.
    """
    t = torch.full((len(u_next),), level, dtype=torch.long, device=u_next.device)
    angle = model.schedule.on(u_next.device, model.angle_dtype).angle[t]
    config = replace(model.langevin, steps=model.langevin.sampling_steps or model.langevin.steps, top_steps=1)
    return langevin_chain(
        gradient,
        u_next,
        t,
        schedule=model.schedule,
        config=config,
        streams=streams,
        inputs=(angle, *inputs),
        keep=keep,
    )


def correct(model: EnergyModel, log_weight: LogWeight, u: Tensor, streams: Streams) -> Tensor:
    """Metropolis steps on a layer's density at the first level, from states `u` (N, d)."""
    angle = model.schedule.on(u.device, model.angle_dtype).angle[:1].expand(len(u))

    def value_and_gradient(u: Tensor) -> tuple[Tensor, Tensor]:
        return walk_values_and_gradient(lambda u, _: log_weight(u, angle), u, t)

    t = torch.zeros(len(u), dtype=torch.long, device=u.device)
    return metropolis_chain(
        value_and_gradient,
        u,
        torch.zeros_like(u),
        t,
        schedule=DiffusionSchedule.marginal(),
        config=model.langevin,
        steps=model.langevin.corrector_steps,
        streams=streams,
    )[0]
