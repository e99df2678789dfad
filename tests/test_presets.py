import pytest
import torch
from backbones import RandomBackbone
from helpers import seed

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.presets import PRESETS


def test_published_settings():
    cifar, celeba = PRESETS["paper-cifar10"], PRESETS["paper-celebahq256"]
    assert cifar.schedule.steps == celeba.schedule.steps == 3
    assert (cifar.langevin.steps, celeba.langevin.steps) == (50, 30)
    assert (cifar.langevin.step_size, celeba.langevin.step_size) == (3e-5, 2e-5)
    assert (cifar.training.batch_size, celeba.training.batch_size) == (50, 4)
    assert (cifar.training.epoch_decay, celeba.training.epoch_decay) == (0.9, 0.98)


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
