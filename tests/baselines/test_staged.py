"""Stages of density-ratio estimation, where every ratio is known."""

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone, images_of
from helpers import SMALL, same, seed

from hvae_ebm_prior import EnergyConfig, LangevinConfig, TrainingConfig
from hvae_ebm_prior.baselines import MultiStagePrior
from hvae_ebm_prior.baselines.staged import Stage, StagedEnergy

# Data N(.5, .8^2) are the Gaussian prior times exp(w z + v z^2), up to a constant.
MEAN, STD = 0.5, 0.8
W, V = MEAN / STD**2, 0.5 - 0.5 / STD**2
CHAINS = LangevinConfig(steps=30, step_size=0.2, start="next")


class Logit(Quadratic):
    """With a constant, which a classifier needs."""

    def __init__(self, w=0.0, v=0.0, c=0.0):
        super().__init__(1, w, v)
        self.c = torch.nn.Parameter(torch.tensor(c))

    def forward(self, z, t):
        return super().forward(z, t) + self.c


def make_prior(*stages):
    return MultiStagePrior(
        IdentityBackbone((1,)), stages=len(stages), langevin=CHAINS, energy=[StagedEnergy(stages)], pool=3000
    )


def test_stages_add_up_to_the_ratio_of_densities():
    """The first finds half of it, as it is stopped early; the second what is left, from the samples of the first."""
    data = images_of(MEAN + STD * torch.randn(6000, 1, generator=seed(0)))
    prior = make_prior(Logit(), Logit())
    training = TrainingConfig(
        iterations=300, batch_size=512, learning_rate=0.02, ema_decay=0.9, activity_images=0, warmup=0
    )
    prior.fit(data, training=training, generator=seed(1), progress=False)
    first, second = prior.energies[0].stages
    assert first.w.item() + second.w.item() == pytest.approx(W, abs=0.12)
    assert first.v.item() + second.v.item() == pytest.approx(V, abs=0.12)
    u = prior.sample_noise(4000, generator=seed(2))
    assert u.mean().item() == pytest.approx(MEAN, abs=0.08)
    assert u.std().item() == pytest.approx(STD, abs=0.08)


def test_a_stage_learns_from_samples_of_the_one_before():
    prior = make_prior(Logit(W, V), Logit(0.0, 0.0))
    gaussian, samples = (prior.negatives(3000, stage, seed(0)) for stage in (0, 1))
    assert gaussian.mean().item() == pytest.approx(0, abs=0.06)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.06)
    assert samples.std().item() == pytest.approx(STD, abs=0.05)
    # These are told from the data by nothing: the loss of a stage that says nothing is that of chance.
    u = MEAN + STD * torch.randn(100, 1, generator=seed(1))
    assert prior.batch_loss(u, None, seed(2), objective=Stage(number=1)).total.abs().max() < 1e-6


def test_stages_share_the_steps_and_a_run_goes_on(tmp_path):
    def make():
        torch.manual_seed(0)
        return MultiStagePrior(RandomBackbone([(2,), (1, 4, 4)]), stages=3, langevin=CHAINS, energy=SMALL, pool=12)

    training = TrainingConfig(iterations=6, batch_size=4, activity_images=0)
    prior = make()
    assert [prior.objective(training, step).number for step in range(6)] == [0, 0, 1, 1, 2, 2]
    images = torch.rand(12, 1, 2, 2, generator=seed(0))
    prior.fit(images, training=training, generator=seed(1), progress=False)

    def stop(_, record):
        if record.iteration == 4:
            raise KeyboardInterrupt

    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "resume": True, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        make().fit(images, training=training, generator=seed(1), callback=stop, **options)
    again = make()
    again.fit(images, training=training, generator=seed(1), **options)
    assert same(again.state_dict(), prior.state_dict())


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: MultiStagePrior(IdentityBackbone((1,)), energy=EnergyConfig()), "context=False"),
        (lambda: MultiStagePrior(IdentityBackbone((1,)), stages=0), "stages"),
        (lambda: make_prior(Logit()).loss(images_of(torch.ones(2, 1)), labels={"a": torch.zeros(2)}), "learns none"),
        (lambda: make_prior(Logit()).batch_loss(torch.ones(2, 1), None, None, rows=range(2)), "without micro_batch"),
    ],
)
def test_what_it_cannot_do_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()
