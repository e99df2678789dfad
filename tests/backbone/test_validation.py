"""Whole numbers come in many kinds: Python's, NumPy's, tensors' without dimensions."""

import numpy as np
import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY, seed

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    DiffusionSchedule,
    DrawingConfig,
    EnergyConfig,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.backbone.validation import check_count

KINDS = [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)]


@pytest.mark.parametrize("two", KINDS, ids=lambda kind: type(kind).__name__)
def test_every_kind_of_whole_number_counts(two, tmp_path):
    made = DiffusionEBMPrior(
        RandomBackbone([(2,), (3,)]),
        energy=TINY,
        schedule=DiffusionSchedule.ddpm(two),
        langevin=LangevinConfig(steps=two),
        drawing=DrawingConfig(flow_steps=two),
        coupling=Coupling({"kind": LabelSet(3)}, networks=TINY),
    )
    assert torch.equal(made.sample_noise(two, generator=seed(0)), made.sample_noise(2, generator=seed(0)))
    assert torch.equal(
        made.sample(two, labels={"kind": two}, chunk_size=two, generator=seed(0)),
        made.sample(2, labels={"kind": 2}, generator=seed(0)),
    )
    images = torch.rand(6, 1, 2, 2, generator=seed(1))
    training = TrainingConfig(batch_size=two, activity_images=0)
    assert len(made.fit(images, iterations=two, training=training, generator=seed(2), progress=False)) == 2
    made.save_pretrained(tmp_path / "prior")
    again = DiffusionEBMPrior.from_pretrained(tmp_path / "prior", backbone=RandomBackbone([(2,), (3,)]))
    assert again.langevin == LangevinConfig(steps=2)
    assert type(EnergyConfig(width=two).width) is int


@pytest.mark.parametrize("wrong", [True, np.bool_(True), torch.tensor(True), 2.0, np.float64(2), "2", None, [2]])
def test_what_is_no_whole_number_is_refused(wrong):
    with pytest.raises(TypeError, match="n: expected a positive integer"):
        check_count(wrong)
    with pytest.raises(ValueError, match="width must be a positive integer"):
        EnergyConfig(width=wrong) if wrong is not None else EnergyConfig(width=0)
