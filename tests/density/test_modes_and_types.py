"""Other people's habits: sampling and training under inference_mode and no_grad, and models of other types."""

import pytest
import torch
from backbones import RandomBackbone
from helpers import SMALL, TINY, same, seed

from hvae_ebm_prior import DiffusionEBMPrior, LangevinConfig, TrainingConfig
from hvae_ebm_prior.control import edit
from hvae_ebm_prior.testing import check_adapter

# Two latents share a shape, so that their networks run as one.
SHAPES = [(4,), (4,), (1, 4, 4)]
TRAINING = TrainingConfig(iterations=3, batch_size=4, activity_images=0, recovery_share=0.4)
IMAGES = torch.rand(8, 1, 2, 2, generator=seed(0))
ENERGIES = pytest.mark.parametrize("energy", [TINY, SMALL], ids=["context", "plain"])


def make(energy, backbone=None):
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(backbone or RandomBackbone(SHAPES), energy=energy, langevin=LangevinConfig(steps=2))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return prior


@ENERGIES
def test_samples_under_inference_mode_are_the_same(energy):
    prior = make(energy)
    uses = {
        "sample": lambda: prior.sample(3, generator=seed(1)),
        "held": lambda: prior.sample(3, fixed={2: torch.ones(1, 1, 4, 4)}, generator=seed(1)),
        "observed": lambda: prior.posterior_sample(lambda x: -x.flatten(1).sum(1), 2, generator=seed(1)),
        "edit": lambda: edit(prior, IMAGES[:2], (0,), generator=seed(1)),
        "score": lambda: prior.score(torch.ones(2, prior.dim), 1),
    }
    for name, use in uses.items():
        plain = use()
        with torch.inference_mode():
            assert torch.equal(use(), plain), name


@ENERGIES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_under_a_mode_without_gradients_is_the_same(mode, energy):
    """Also of a prior that is made there, over a model that was not."""
    plain = make(energy)
    plain.fit(IMAGES, training=TRAINING, generator=seed(2), progress=False)
    backbone = RandomBackbone(SHAPES)
    with mode():
        prior = make(energy, backbone)
        prior.fit(IMAGES, training=TRAINING, generator=seed(2), progress=False)
    assert same(prior.state_dict(), plain.state_dict())


def test_a_model_made_under_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"weight was made under torch.inference_mode\(\)"):
        DiffusionEBMPrior(RandomBackbone(SHAPES))


class Encoding(RandomBackbone):
    """Posteriors through a layer of the model's type, which takes images of no other."""

    def __init__(self, dtype):
        super().__init__(SHAPES, dtype=dtype)
        self.encoder = torch.nn.Linear(4, 24).to(dtype)

    def infer(self, images):
        h = self.encoder(images.flatten(1))
        h = h + torch.randn_like(h)
        return [part.unflatten(1, shape) for part, shape in zip(h.split([4, 4, 16], dim=1), SHAPES, strict=True)]


@ENERGIES
@pytest.mark.parametrize("images", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_take_the_models_type(dtype, images, energy):
    prior = make(energy, Encoding(dtype))
    data = IMAGES.to(images)
    assert prior.encode(data, generator=seed(0)).dtype == prior.dtype
    assert len(prior.fit(data, training=TRAINING, generator=seed(0), progress=False)) == 3
    assert torch.isfinite(prior.sample(3, generator=seed(0))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_check_knows_how_a_type_rounds(dtype):
    """What is left is true of it: images come back no better than samples, as nothing of this model was learned."""
    with pytest.raises(ValueError, match=r"breaks 1 promise:\n- infer and decode: reconstructions are no closer"):
        check_adapter(Encoding(dtype), IMAGES, generator=seed(0))
