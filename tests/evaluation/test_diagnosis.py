"""The figures of the layer table against closed forms."""

import math

import pytest
import torch
from backbones import IdentityBackbone, images_of
from helpers import seed

from hvae_ebm_prior.evaluation.diagnosis import (
    classifier_accuracy,
    describe_layer,
    describe_layers,
    layer_table,
    posterior_divergence,
)


def draws_of(mean, std, k, g):
    return mean + std * torch.randn(k, *mean.shape, generator=g)


@pytest.mark.parametrize("k", [4, 8])
def test_divergence_is_unbiased_for_gaussian_posteriors(k):
    """Mean over 20,000 images with means of spread 2 and one std per dimension, against KL = E (m^2 + v - 1 - log v) /
    2.
    """
    g, std = seed(0), torch.tensor([0.1, 0.5, 1.0])
    means = torch.tensor([2.0, 0.5, 0.0]) * torch.randn(20_000, 3, generator=g)
    expected = (means.square().mean(0) + std**2 - 1 - 2 * std.log()) / 2
    torch.testing.assert_close(posterior_divergence(draws_of(means, std, k, g)).mean(0), expected, atol=0.02, rtol=0.01)


def test_layer_report_of_known_noise():
    """Ten dimensions: four that the image sets with std .2, so that u is standard normal over images, and six that
    carry nothing.
    """
    g, std = seed(0), torch.tensor([0.2] * 4 + [1.0] * 6)
    means = (1 - std**2).sqrt() * torch.randn(600, 10, generator=g)
    report = describe_layer(draws_of(means, std, 8, g).unflatten(2, (10, 1)), g)
    assert (report.shape, report.dimensions) == ((10, 1), 10)
    assert report.divergence == pytest.approx(-4 * math.log(0.2), rel=0.03)
    assert report.second_moment == pytest.approx(1, abs=0.03)
    assert report.absolute_moment == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    assert report.inactive in (5, 6)
    assert not report.has_hole


@pytest.mark.usefixtures("counters")
def test_holes_of_mean_variance_and_correlation_are_told_apart():
    """By less than the likelihood-ratio test could, and by more than chance."""
    g = seed(0)
    normal = torch.randn(4, 1000, 6, generator=g)
    shifted, narrow = normal + 0.7, 0.5 * normal
    rotated = torch.cat((normal[..., :3], normal[..., :3] + 0.1 * normal[..., 3:]), dim=2)
    best = 0.5 * (1 + math.erf(0.7 * math.sqrt(6) / 2 / math.sqrt(2)))
    assert classifier_accuracy(shifted, seed(1)) == pytest.approx(best, abs=0.05)
    assert classifier_accuracy(narrow, seed(1)) > 0.8
    assert classifier_accuracy(rotated, seed(1)) > 0.6
    assert abs(classifier_accuracy(normal, seed(1)) - 0.5) < 0.05


@pytest.mark.usefixtures("counters")
def test_a_backbone_without_a_hole_and_one_with():
    """Layers of standard normals whose images are their latents: a perfect prior, then one that is off in its second
    layer.
    """
    backbone = IdentityBackbone((3,), (2, 1, 1))
    noise = torch.randn(600, 5, generator=seed(0)).clamp(-9, 9)
    good = describe_layers(backbone, images_of(noise), generator=seed(1))
    assert [report.shape for report in good] == [(3,), (2, 1, 1)]
    assert not any(report.has_hole for report in good)
    noise[:, 3:] = 0.3 * noise[:, 3:] + 1
    bad = describe_layers(backbone, images_of(noise), generator=seed(1))
    assert [report.has_hole for report in bad] == [False, True]
    text = layer_table(bad)
    assert "Prior hole in layer 1." in text
    assert "No prior hole" in layer_table(good)
    assert bad == describe_layers(backbone, images_of(noise), generator=seed(1))


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 8 images and 4 draws, got 3 and 8"):
        describe_layers(IdentityBackbone((2,)), torch.rand(3, 1, 1, 2))


@pytest.mark.usefixtures("counters")
def test_posteriors_without_noise_are_infinitely_far_from_the_prior():
    """Not 13.8 nats for each dimension; where but some dimensions are, those alone count as what they are."""
    noise = torch.randn(8, 40, 3, generator=seed(0))
    still = noise.clone()
    still[..., 1] = still[:1, :, 1]
    divergence = posterior_divergence(still)
    assert bool(torch.isinf(divergence[:, 1]).all())
    assert torch.equal(divergence[:, ::2], posterior_divergence(noise)[:, ::2])
    report = describe_layer(still, seed(1))
    assert report.divergence == math.inf
    assert report.inactive == 2
    assert " inf " in layer_table([report])
