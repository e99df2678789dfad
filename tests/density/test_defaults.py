"""PyTorch's default device and type are the user's own affair: results are the same under all of them."""

import pytest
import torch
from helpers import TINY, seed
from torch.utils.data import TensorDataset

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, LabelSet, TrainingConfig
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, HVAEConfig
from hvae_ebm_prior.baselines import GaussianPrior
from hvae_ebm_prior.control import edit
from hvae_ebm_prior.evaluation import describe_layers
from hvae_ebm_prior.evaluation.adapter_check import find_faults
from hvae_ebm_prior.posterior_cache import PosteriorCache

TRAINING = TrainingConfig(iterations=1, batch_size=4, activity_images=4)
IMAGES = torch.rand(8, 1, 4, 4, generator=seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HVAE(HVAEConfig(image_size=4, latent_channels=(2, 1), widths=(4, 4)))


def a_day(model, folder):
    """What a user does with a prior, and what comes out of it: tensors and numbers, by name."""
    torch.manual_seed(1)
    prior = DiffusionEBMPrior(model, energy=TINY, coupling=Coupling({"kind": LabelSet(2)}, networks=TINY))
    labels = (IMAGES[:, 0, 0, 0] > 0.5).long()
    prior.fit(TensorDataset(IMAGES, labels), training=TRAINING, generator=seed(2), progress=False)
    yield "fit", torch.cat([parameter.detach().flatten() for parameter in prior.parameters()])
    u = prior.encode(IMAGES, generator=seed(3))
    yield "encode", u
    yield "sample", prior.sample(2, labels={"kind": 1}, generator=seed(4))
    torch.manual_seed(5)
    yield "sample by the global generator", prior.sample(2)
    yield "edit", edit(prior, IMAGES[:1], (0,), generator=seed(6))
    prior.save_pretrained(folder / "prior")
    again = DiffusionEBMPrior.from_pretrained(folder / "prior", backbone=model)
    yield "loaded", again.energy(u, 0)
    cache = PosteriorCache.build(prior, TensorDataset(IMAGES), folder / "cache", draws=2, generator=seed(8))
    yield "cache", cache.noise(labels, 1)
    yield "layers", [vars(report) for report in describe_layers(HVAEAdapter(model), IMAGES, generator=seed(9))]
    own = GaussianPrior(model).sample(64, generator=seed(10))
    yield "check", list(find_faults(HVAEAdapter(model), IMAGES, samples=own, generator=seed(11)))


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    return dict(a_day(model, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("default", ["meta", torch.float64])
def test_results_do_not_depend_on_defaults(model, expected, default, tmp_path):
    """On "meta" there are no numbers at all: whatever is made there, or drawn there by a CPU generator, fails."""
    try:
        torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        found = dict(a_day(model, tmp_path))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (found[name].dtype, found[name].device) == (value.dtype, value.device), name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
