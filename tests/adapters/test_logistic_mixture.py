"""Mean and samples of the logistic mixture, against closed forms; tests/adapters/test_official.py compares with NVAE's
and VDVAE's own.
"""

import pytest
import torch
from helpers import seed
from hvae_ebm_prior_adapters.logistic_mixture import image_noise, mixture_mean, mixture_sample


def parameters(logits, means, log_scales, coefficients):
    """(1, 10 M, 1, 1) from per-component logits (M,) and per-colour values (3, M) each."""
    rest = torch.stack((means, log_scales, coefficients), dim=1)
    return torch.cat((logits.flatten(), rest.flatten())).reshape(1, -1, 1, 1)


def one(means, log_scale=-7.0, coefficients=(0.0, 0.0, 0.0)):
    """A single component."""
    return parameters(
        torch.zeros(1),
        torch.tensor(means)[:, None],
        torch.full((3, 1), log_scale),
        torch.tensor(coefficients)[:, None].atanh(),
    )


def test_colours_depend_on_those_before():
    image = mixture_mean(one([0.2, 0.1, -0.3], coefficients=(0.5, -0.25, 0.4)))
    red, green = 0.2, 0.1 + 0.5 * 0.2
    blue = -0.3 - 0.25 * red + 0.4 * green
    torch.testing.assert_close(image.flatten(), (torch.tensor([red, green, blue]) + 1) / 2)


def test_values_are_clipped_before_they_are_used():
    image = mixture_mean(one([3.0, 0.0, 0.0], coefficients=(0.5, 0.0, 0.0)))
    torch.testing.assert_close(image.flatten(), torch.tensor([1.0, 0.75, 0.5]))


def test_mean_weighs_components():
    logits, means = torch.tensor([0.0, 1.0]), torch.tensor([[0.5, -0.5]] * 3)
    image = mixture_mean(parameters(logits, means, torch.zeros(3, 2), torch.zeros(3, 2)))
    weight = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(image.flatten(), (0.5 - weight + 1).expand(3) / 2)


def test_samples_have_the_logistics_moments_and_the_mixtures_frequencies():
    """Std pi s / sqrt 3 for one narrow component; components as often as their softmax says."""
    g = seed(0)
    n, log_scale = 20_000, -3.0
    narrow = mixture_sample(
        one([0.0, 0.0, 0.0], log_scale).expand(n, -1, -1, -1),
        torch.rand(n, 1, 1, 1, generator=g),
        torch.rand(n, 3, 1, 1, generator=g),
    )
    expected = torch.pi * torch.tensor(log_scale).exp() / 3**0.5 / 2
    torch.testing.assert_close(narrow.std((0, 2, 3)), expected.expand(3), rtol=0.03, atol=0)
    torch.testing.assert_close(narrow.mean((0, 2, 3)), torch.full((3,), 0.5), atol=0.003, rtol=0)
    logits, means = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([[-0.5, 0.0, 0.5]] * 3)
    two = parameters(logits, means, torch.full((3, 3), -7.0), torch.zeros(3, 3)).expand(n, -1, -1, -1)
    image = mixture_sample(two, torch.rand(n, 3, 1, 1, generator=g), torch.full((n, 3, 1, 1), 0.5))[:, 0].flatten()
    shares = torch.stack([((image - (mean + 1) / 2).abs() < 0.01).float().mean() for mean in (-0.5, 0.0, 0.5)])
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.015, rtol=0)


def test_noise_is_the_same_at_any_chunking():
    def draw(n, g):
        return image_noise(torch.rand, n, (3, 2, 2), g, torch.zeros(1))

    g = seed(0)
    parts = torch.cat((draw(2, g), draw(3, g)))
    assert torch.equal(parts, draw(5, seed(0)))


def test_number_of_channels_is_checked():
    with pytest.raises(ValueError, match="10 channels per component, got 12"):
        mixture_mean(torch.zeros(1, 12, 2, 2))
