"""The density of a prior with context: layer by layer, by the probability flow.

    log p(u) = sum_i log p(u_i | z_<i),      log p(u_i | z_<i) = log N(u_i(pi/2); 0, I) + int div v dphi

along the flow that carries u_i, given the latents above it, from the noise of level 0 to pure noise. It is normalised
whatever the energies are, and that of the flow's samples. The divergence is exact for layers of few active dimensions,
and for others Hutchinson's estimate with random signs that a seed fixes, unbiased in the logarithm.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backbone.transform import LayerState
from ..chains.execution import frozen
from ..chains.flow import LARGEST_ANGLE, flow_density
from ..energies.context import SMALLEST_ANGLE
from .energy_model import EnergyModel

# Most active dimensions of a layer whose divergence is exact, each by one backward pass.
EXACT = 64


def log_prob_by_layer(model: EnergyModel, u: Tensor, steps: int = 20, probes: int = 1, seed: int = 0) -> Tensor:
    """log p(u_i | z_<i) of every layer.

    Args:
        model: energies with context, and the backbone.
        u: noise (N, D).
        steps: Runge-Kutta steps of a layer's flow, each four velocities and divergences.
        probes: random signs per sample in Hutchinson's estimate.
        seed: of the signs.

    Returns:
        Nats (N, L).

    Raises:
        TypeError: energies without context.
    """
    if not model.has_context:
        raise TypeError(
            "log_prob: energies without context have no normalised density by layer; make the prior with "
            "EnergyConfig(context=True), or see log_likelihood_bound"
        )
    start = max(model.schedule.angle[0].item(), SMALLEST_ANGLE)
    with torch.no_grad():
        states = [state.to(model.dtype) for state in model.transform.states(u)]
    # Inference tensors cannot take part in autograd; copies can.
    with torch.inference_mode(False):
        states = [LayerState(*(part.clone() for part in state)) for state in states]
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for network, state in zip(model.energies, states, strict=True):
        active = active_dimensions(network, state)
        directions = None
        if len(active) > EXACT:
            signs = torch.randint(2, (probes, state.u[0].numel()), generator=generator, device="cpu") * 2 - 1
            directions = signs.to(state.u)
        layers.append(layer_log_prob(frozen(network), state, start, steps, active, directions))
    return torch.stack(layers, dim=1)


def active_dimensions(network: torch.nn.Module, state: LayerState) -> Tensor:
    """Indices of the dimensions of a layer, flattened, that its energy depends on."""
    activity = getattr(network, "activity", torch.ones_like(state.u[0]))
    return activity.flatten().nonzero()[:, 0]


def layer_log_prob(
    energy: Callable[[LayerState, Tensor], Tensor],
    state: LayerState,
    start: float,
    steps: int,
    active: Tensor,
    directions: Tensor | None,
) -> Tensor:
    """log p(u_i | z_<i) (N,) of one layer.

    Args:
        energy: f_i of a state and angles.
        state: of the layer.
        start: angle of the noise that u_i is taken to have.
        steps: Runge-Kutta steps.
        active: indices of the dimensions that the energy depends on.
        directions: random signs (P, d), whose products with the Jacobian estimate the divergence; None for it exactly.

    Returns:
        Nats (N,).
    """
    shape = state.u.shape

    def velocity_and_divergence(u: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        angle = min(angle, LARGEST_ANGLE)
        angles = torch.tensor([angle, 0.0], device=u.device, dtype=torch.promote_types(u.dtype, torch.float32))
        angles = angles.expand(len(u), 2)
        with torch.inference_mode(False), torch.enable_grad():
            u = u.detach().clone().requires_grad_()
            part = u.reshape(shape)
            f = energy(LayerState(part, state.mean + state.std * part, state.mean, state.std), angles)
            v = -math.tan(angle) * torch.autograd.grad(f.sum(), u, create_graph=True)[0]
            if not v.requires_grad:  # f is linear in u
                return v.detach(), torch.zeros_like(u[:, 0])
            divergence = torch.zeros_like(u[:, 0])
            if directions is None:
                for k in active.tolist():
                    divergence = divergence + torch.autograd.grad(v[:, k].sum(), u, retain_graph=True)[0][:, k]
            else:
                for signs in directions:
                    product = torch.autograd.grad((v * signs).sum(), u, retain_graph=True)[0]
                    divergence = divergence + (product * signs).sum(1) / len(directions)
            return v.detach(), divergence.detach()

    return flow_density(velocity_and_divergence, state.u.flatten(1), start, steps)
