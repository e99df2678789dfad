"""The posterior by Markov chains (Cui & Han, 2024, Sec. 3.1): Langevin steps with a Metropolis test on

    p(u | x) proportional to p(x | T(u)) N(u; 0, I)

from a draw of the encoder, whose own q(z | x) is an approximation of it. Likelihoods of images are sharp, and how sharp
differs from model to model and from image to image, so every chain finds a step size of its own in the first half of
its steps, and keeps it in the second, which leaves p(u | x) as it is.
"""

import torch
from torch import Tensor

from ..backbone.elbo import check_density, density_adapter
from ..backbone.transform import NoiseTransform
from ..chains.autograd import walk_values_and_gradient, with_autograd
from ..chains.langevin import ChainDiverged
from ..chains.metropolis import Proposal, metropolis_step, visit
from ..chains.streams import Streams

# The acceptance at which Langevin steps mix best in many dimensions (Roberts & Rosenthal, 1998), and where a chain
# starts to look for its step, in relaxation times of N(0, I).
ACCEPTANCE = 0.574
FIRST_STEP = 1e-3


@with_autograd
@torch.no_grad()
def refine_posterior(transform: NoiseTransform, u: Tensor, images: Tensor, *, steps: int, streams: Streams) -> Tensor:
    """Langevin steps with a Metropolis test from posterior draws.

    Args:
        transform: the backbone, whose adapter gives densities.
        u: noise (N, D) of posterior draws.
        images: (N, C, H, W) in [0, 1], on the backbone's device.
        steps: number of steps, each a gradient of the backbone.
        streams: the samples' noise.

    Returns:
        Noise (N, D).

    Raises:
        TypeError: the adapter gives no densities.
        ValueError: its densities are not finite or of a wrong shape.
        ChainDiverged: the gradient of log p(x | z) is not finite at the posterior draws.
    """
    adapter = density_adapter(transform.adapter)
    levels = torch.zeros(len(u), dtype=torch.long, device=u.device)

    def log_likelihood(u: Tensor, _: Tensor) -> Tensor:
        value = adapter.log_likelihood(transform.states_and_features(u)[1], images)
        return value.to(u)

    def value_and_gradient(u: Tensor) -> tuple[Tensor, Tensor]:
        return walk_values_and_gradient(log_likelihood, u, levels)

    centre = torch.zeros_like(u)
    log_h = torch.full_like(u[:, 0], FIRST_STEP).log()
    now = visit(value_and_gradient, u, gaussian_step(log_h.exp(), centre))
    check_density("log_likelihood", now.value, len(images))
    if not bool(torch.isfinite(now.drift).all()):
        raise ChainDiverged("the gradient of log p(x | z) is not finite at the encoder's draws")
    for k in range(steps):
        proposal = gaussian_step(log_h.exp(), centre)
        now, log_probability = metropolis_step(value_and_gradient, now, centre, proposal, streams)
        if k < steps // 2:
            log_h = (log_h + (log_probability.exp() - ACCEPTANCE) * (k + 1) ** -0.5).clamp(max=0)
    return now.u


def gaussian_step(h: Tensor, centre: Tensor) -> Proposal:
    """Steps of sizes `h` (N,) towards N(0, I), exact where the likelihood is flat: the exponential integrator, which
    has no defect there.
    """
    a = (-h).exp()
    coefficients = torch.stack((a, torch.zeros_like(h), -torch.expm1(-h), (-torch.expm1(-2 * h)).sqrt()), dim=1)
    return Proposal(coefficients, centre, torch.zeros_like(h), torch.full_like(h, torch.inf))
