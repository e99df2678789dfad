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
from hvae_ebm_prior.chains.langevin import ChainDiverged
from hvae_ebm_prior.control import edit

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
    given = {"labels": torch.arange(6) % 3, "generator": seed(2), "progress": False}
    assert len(made.fit(images, iterations=two, training=training, **given)) == 2
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


class Decoding(RandomBackbone):
    """Decodes to what it is given a function for."""

    def __init__(self, change):
        super().__init__([(2,), (3,)])
        self.change = change

    def decode(self, features):
        return self.change(super().decode(features))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: (255 * x).byte(), TypeError, "got torch.uint8"),
        (lambda x: x.numpy(), TypeError, "got ndarray"),
        (lambda x: x[:, 0], ValueError, r"2 images \(2, C, H, W\), got shape \(2, 2, 2\)"),
        (lambda x: x[:1], ValueError, r"got shape \(1, 1, 2, 2\)"),
        (lambda x: 2 * x - 1.5, ValueError, r"images in \[0, 1\], got -.* rescale them in its decode"),
        (lambda x: x * torch.nan, ChainDiverged, "not finite"),
        (lambda x: x / 0, ChainDiverged, "not finite"),
    ],
)
@pytest.mark.parametrize("use", ["sample", "edit", "decode"])
def test_only_images_leave_the_library(use, change, error, message):
    prior = DiffusionEBMPrior(Decoding(change), energy=TINY, langevin=LangevinConfig(steps=1))
    calls = {
        "sample": lambda: prior.sample(2, generator=seed(0)),
        "edit": lambda: edit(prior, torch.rand(2, 1, 2, 2), (0,), generator=seed(0)),
        "decode": lambda: prior.decode(torch.zeros(2, prior.dim)),
    }
    with torch.no_grad(), pytest.raises(error, match=message):
        calls[use]()


def test_rounding_is_no_other_range():
    prior = DiffusionEBMPrior(Decoding(lambda x: x.round() + 1e-6), energy=TINY)
    assert prior.sample(2, generator=seed(0)).max() <= 1 + 2e-6
