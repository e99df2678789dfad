import numpy as np
import pytest
import torch
from backbones import RandomBackbone
from helpers import seed

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.chains.langevin import langevin_coefficients
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.training.optimizer import learning_rate

PAPER = {"paper-cifar10": (3e-5, 0.9), "paper-celebahq256": (2e-5, 0.98)}


@pytest.mark.parametrize("name", PAPER)
def test_published_presets_take_the_published_steps(name):
    """Steps of s_t = b^2 (sigma_bar_t / sigma_bar_0) sigma_{t+1}^2 along the Gaussian part, without its kernel at the
    top; the levels are numbers 0, 250, 500 and 999 of DDPM's.
    """
    (b2, _), preset = PAPER[name], PRESETS[name]
    variances = 1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[0, 250, 500, 999]]  # sigma_bar^2
    alpha2 = (1 - variances[1:]) / (1 - variances[:-1])
    sigma2 = 1 - alpha2
    s = b2 * np.sqrt(variances[:-1] / variances[0]) * sigma2
    kernel = np.array([1, 1, 0])
    a, b, _, d = langevin_coefficients(torch.arange(3), preset.schedule, preset.langevin, torch.float64).numpy().T
    np.testing.assert_allclose(d**2, s, rtol=1e-5)
    np.testing.assert_allclose(1 - a, s / 2 * (1 + kernel * alpha2 / sigma2), rtol=1e-5)
    np.testing.assert_allclose(b, s / 2 * kernel * np.sqrt(alpha2) / sigma2, rtol=1e-5)


def test_published_chains_hardly_move():
    """A chain of the CIFAR-10 settings relaxes .07, 5 and 7 % of a displacement at t = 0, 1 and 2."""
    preset = PRESETS["paper-cifar10"]
    a = langevin_coefficients(torch.arange(3), preset.schedule, preset.langevin, torch.float64)[:, 0]
    relaxed = 1 - a**preset.langevin.steps
    assert [round(float(part), digits) for part, digits in zip(relaxed, (4, 2, 2), strict=True)] == [0.0007, 0.05, 0.07]


def test_published_steps_of_joint_ebm():
    """u moves by 1/2 1e-5 of the gradient and by noise of variance 1e-5, of N(0, I) too."""
    preset = PRESETS["joint-ebm-published"]
    found = langevin_coefficients(torch.zeros(1).long(), preset.schedule, preset.langevin, torch.float64)[0]
    np.testing.assert_allclose(found, [1 - 0.5e-5, 0, 0.5e-5, 1e-5**0.5], rtol=1e-6)


@pytest.mark.parametrize("name", PAPER)
def test_published_learning_rates_decay_by_epoch_alone(name):
    _, decay = PAPER[name]
    for step, epoch in ((0, 0), (9000, 0), (123, 7)):
        assert learning_rate(PRESETS[name].training, step, epoch) == pytest.approx(4e-5 * decay**epoch)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_samples(name):
    preset = PRESETS[name]
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (1, 4, 4)]), schedule=preset.schedule, langevin=preset.langevin, energy=preset.energy
    )
    g = seed(0)
    images = torch.rand(8, 1, 2, 2, generator=g)
    history = prior.fit(images, training=preset.training, iterations=2, batch_size=4, generator=g, progress=False)
    assert len(history) == 2
    assert torch.isfinite(prior.sample(2, generator=g)).all()


def test_default_preset_is_the_default():
    preset, prior = PRESETS["default"], DiffusionEBMPrior(RandomBackbone([(2,)]))
    assert (prior.schedule, prior.langevin) == (preset.schedule, preset.langevin)
