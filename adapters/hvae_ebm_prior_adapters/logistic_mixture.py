"""Mixture of discretised logistics over RGB pixels (PixelCNN++, Salimans et al. 2017), as NVAE and VDVAE end in: mean,
samples, likelihood.

Of the 10 M channels of its parameters, M are the mixture's logits; for each of the three colours M means, M log-scales
and M coefficients follow. Green depends on red, and blue on both, by the coefficients' tanh. Values live in [-1, 1];
images here are in [0, 1].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Uniform noise stays this far from 0 and 1, as in the published samplers.
MARGIN = 1e-5


def mixture_mean(parameters: Tensor) -> Tensor:
    """Image of the mixture's mean means and coefficients, differentiable, as of NVAE's `DiscMixLogistic.mean`.

    Args:
        parameters: (N, 10 M, H, W).

    Returns:
        Images (N, 3, H, W) in [0, 1].

    Raises:
        ValueError: the number of channels is no multiple of 10.
    """
    logits, means, _, coefficients = unpack(parameters)
    weights = logits.softmax(1).unsqueeze(1)
    return assemble((means * weights).sum(2), (coefficients * weights).sum(2))


def mixture_sample(parameters: Tensor, choice: Tensor, noise: Tensor) -> Tensor:
    """Image drawn from the mixture, not rounded to 8 bits.

    Args:
        parameters: (N, 10 M, H, W).
        choice: uniform numbers (N, M, H, W) that choose each pixel's component.
        noise: uniform numbers (N, 3, H, W) for its values.

    Returns:
        Images (N, 3, H, W) in [0, 1].

    Raises:
        ValueError: the number of channels is no multiple of 10.
    """
    logits, means, log_scales, coefficients = unpack(parameters)
    gumbel = -torch.log(-torch.log(choice.clamp(MARGIN, 1 - MARGIN)))
    component = (logits + gumbel).argmax(1, keepdim=True).unsqueeze(1).expand(-1, 3, -1, -1, -1)
    mean, log_scale, coefficient = (part.gather(2, component).squeeze(2) for part in (means, log_scales, coefficients))
    return assemble(mean + log_scale.exp() * torch.logit(noise, eps=MARGIN), coefficient)


def mixture_log_likelihood(parameters: Tensor, images: Tensor, levels: int = 256) -> Tensor:
    """Log-probability of images of whole levels: the mixture's mass within half a level, at the ends all beyond.

    With a and b the ends of a level in units of the scale, log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log
    sigmoid(-b) + log(1 - exp(b - a)).

    Args:
        parameters: (N, 10 M, H, W).
        images: (N, 3, H, W), multiples of 1 / (levels - 1) in [0, 1].
        levels: number of levels of a colour.

    Returns:
        Nats (N,).

    Raises:
        ValueError: the number of channels is no multiple of 10.
    """
    logits, means, log_scales, coefficients = unpack(parameters)
    values = (2 * images - 1).unsqueeze(2)
    half = 1 / (levels - 1)
    scales = log_scales.exp()
    red, green = values[:, 0], values[:, 1]
    shifts = (
        torch.zeros_like(coefficients[:, 0]),
        coefficients[:, 0] * red,
        coefficients[:, 1] * red + coefficients[:, 2] * green,
    )
    residuals = values - means - torch.stack(shifts, dim=1)
    below = F.logsigmoid((residuals + half) / scales)
    above = F.logsigmoid((half - residuals) / scales)
    within = below + above + torch.log(-torch.expm1(-2 * half / scales))
    log_masses = torch.where(values <= half - 1, below, torch.where(values >= 1 - half, above, within))
    return torch.logsumexp(logits.log_softmax(1) + log_masses.sum(1), dim=1).flatten(1).sum(1)


def unpack(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (N, M, H, W), and means, log-scales and coefficients (N, 3, M, H, W) each."""
    n, channels, height, width = parameters.shape
    if channels % 10:
        raise ValueError(f"logistic mixture: expected 10 channels per component, got {channels} channels")
    mixtures = channels // 10
    logits = parameters[:, :mixtures]
    rest = parameters[:, mixtures:].reshape(n, 3, 3 * mixtures, height, width)
    means, log_scales, coefficients = rest.chunk(3, dim=2)
    return logits, means, log_scales.clamp(min=-7), torch.tanh(coefficients)


def assemble(values: Tensor, coefficients: Tensor) -> Tensor:
    """Images in [0, 1] from independent values (N, 3, H, W) and the colours' coefficients (green on red, blue on red,
    blue on green).
    """
    red = values[:, 0].clamp(-1, 1)
    green = (values[:, 1] + coefficients[:, 0] * red).clamp(-1, 1)
    blue = (values[:, 2] + coefficients[:, 1] * red + coefficients[:, 2] * green).clamp(-1, 1)
    return (torch.stack((red, green, blue), dim=1) + 1) / 2


def image_noise(
    draw: Callable[..., Tensor], n: int, shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """Noise (n, *shape) by `draw` (torch.rand or torch.randn), image by image, so that batches make no difference."""
    device = like.device if generator is None else generator.device
    return torch.stack([draw(shape, generator=generator, device=device) for _ in range(n)]).to(like)


def draw_mixture(parameters: Tensor, generator: torch.Generator | None) -> Tensor:
    """`mixture_sample` with noise from `generator`."""
    mixtures = parameters.shape[1] // 10
    shape = (mixtures + 3, *parameters.shape[2:])
    choice, noise = image_noise(torch.rand, len(parameters), shape, generator, parameters).split([mixtures, 3], dim=1)
    return mixture_sample(parameters, choice, noise)
