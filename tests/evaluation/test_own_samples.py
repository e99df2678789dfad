"""Samples of the layers against the model's own: a wrong std is found, and nothing else is."""

import pytest
import torch
from helpers import seed
from torch import nn

from hvae_ebm_prior.backbone.transform import NoiseTransform
from hvae_ebm_prior.evaluation.adapter_check import check_adapter, find_faults
from hvae_ebm_prior.evaluation.own_samples import compare_samples


class Blobs:
    """Broad waves from above and grain from below, std .5 each; `std` says what the adapter makes of that."""

    def __init__(self, *std):
        self.std = std or (lambda s: s, lambda s: s)
        self.model = nn.Linear(4, 64, bias=False)
        with torch.no_grad():
            grid = torch.linspace(0, 3, 8)
            waves = torch.stack((torch.ones(8), grid.cos()))
            self.model.weight.copy_(torch.einsum("ia,jb->abij", waves, waves).reshape(64, 4))

    def top_down(self, batch_size):
        zeros = self.model.weight.new_zeros(batch_size, 4)
        top = yield zeros, self.std[0](torch.full_like(zeros, 0.5))
        waves = self.model(top).unflatten(1, (1, 8, 8))
        grain = yield 0.1 * waves, self.std[1](torch.full_like(waves, 0.5))
        return waves + grain / 4

    def infer(self, images):
        waves = torch.logit(images, eps=1e-6)
        top = torch.linalg.lstsq(self.model.weight, waves.flatten(1).T).solution.T + 0.05 * torch.randn(len(images), 4)
        return [top, 4 * (waves - self.model(top).unflatten(1, (1, 8, 8)))]

    def decode(self, features):
        return torch.sigmoid(features)


def samples_of(adapter, n, value):
    """As the model's own code would draw them."""
    g = seed(value)
    waves = adapter.model(0.5 * torch.randn(n, 4, generator=g)).unflatten(1, (1, 8, 8)).detach()
    return torch.sigmoid(waves + (0.1 * waves + 0.5 * torch.randn(waves.shape, generator=g)) / 4)


def same(std):
    return std


@pytest.mark.parametrize(
    "std", [(torch.square, same), (same, torch.square), (same, lambda s: s.log().abs()), (same, lambda s: 1.2 * s)]
)
def test_a_wrong_std_in_one_layer_is_found(std):
    adapter = Blobs(*std)
    (fault,) = compare_samples(NoiseTransform(adapter), samples_of(adapter, 200, 0), 0)
    assert "images of the layers differ from the model's own" in fault
    assert "a variance or a log-std" in fault


@pytest.mark.parametrize("value", range(5))
def test_right_ones_pass_also_as_bytes(value):
    """Rounded down, as .byte() does, or to the nearest; a thousandth of right adapters is called wrong."""
    adapter = Blobs()
    samples = samples_of(adapter, 200, value)
    for images in (samples, (255 * samples).byte().float() / 255, (255 * samples).round() / 255):
        assert list(compare_samples(NoiseTransform(adapter), images, value)) == []


def test_the_check_takes_samples(capsys):
    right, wrong = Blobs(), Blobs(same, torch.square)
    images = samples_of(right, 40, 1)
    check_adapter(right, images, samples=samples_of(right, 200, 2), generator=seed(0))
    # What it cannot see without, as T and its inverse still undo each other.
    assert list(find_faults(wrong, images, generator=seed(0))) == []
    with pytest.raises(ValueError, match=r"breaks 1 promise:\n- samples: 200 images of the layers differ"):
        check_adapter(wrong, images, samples=samples_of(right, 200, 2), generator=seed(0))
    with pytest.raises(ValueError, match=r"samples: the adapter decodes to images \(1, 8, 8\), got \(1, 4, 4\)"):
        check_adapter(right, images, samples=torch.rand(64, 1, 4, 4), generator=seed(0))
    with pytest.raises(ValueError, match="samples: expected at least 64 of the model's own, got 40"):
        check_adapter(right, images, samples=images)
    with pytest.raises(TypeError, match="samples, as images: expected floating-point values"):
        check_adapter(right, images, samples=(255 * images).byte())
    capsys.readouterr()
