import pytest
import torch
from backbones import ExactGaussian, IdentityBackbone, images_of
from helpers import seed
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, EnergyConfig, TrainingConfig
from hvae_ebm_prior.callbacks import EarlyStopping
from hvae_ebm_prior.evaluation.early_stopping import held_out_accuracy

SCHEDULE = DiffusionSchedule.from_snr([2000, 15, 3, 0])


def noise(n: int) -> torch.Tensor:
    return 0.8 + 0.5 * torch.randn(n, 3, generator=seed(0))


def test_accuracy_is_chance_for_the_density_of_the_data_alone():
    images = images_of(noise(2000))
    exact, wrong = (
        DiffusionEBMPrior(IdentityBackbone((3,)), schedule=SCHEDULE, energy=[ExactGaussian(0.0, 0.8, std)])
        for std in (0.5, 1.0)
    )
    assert held_out_accuracy(exact, images) == pytest.approx(0.5, abs=0.03)
    assert held_out_accuracy(wrong, images) > 0.6


def test_training_ends_when_it_no_longer_helps_and_the_best_state_is_kept():
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(IdentityBackbone((3,)), schedule=SCHEDULE, energy=EnergyConfig(vector_width=16))
    stop = EarlyStopping(images_of(noise(400)), every=5, patience=2)
    kept = {}

    def spoil(prior, record):
        """After 20 steps every test is worse."""
        if stop.best is not None and stop.best[0] == record.iteration:
            kept.update({name: value.clone() for name, value in prior.state_dict().items()})
        if record.iteration >= 20:
            for parameter in prior.parameters():
                nn.init.normal_(parameter, std=0.5)

    training = TrainingConfig(iterations=200, batch_size=64, learning_rate=1e-2, warmup=2, ema_decay=0.5)
    history = prior.fit(images_of(noise(800)), training=training, callback=[stop, spoil], generator=seed(0))
    assert len(history) < 200
    assert stop.best[0] <= 20
    assert stop.best[1] == min(accuracy for _, accuracy in stop.history)
    assert all(torch.equal(value, kept[name]) for name, value in prior.state_dict().items())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="every"):
        EarlyStopping(torch.rand(4, 1, 2, 2), every=0)
    prior = DiffusionEBMPrior(IdentityBackbone((3,)), schedule=SCHEDULE, energy=EnergyConfig(vector_width=16))
    with pytest.raises(ValueError, match="images: expected a non-empty batch"):
        prior.fit(images_of(noise(8)), iterations=1, callback=EarlyStopping(torch.rand(4, 2)))
