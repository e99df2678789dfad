import importlib.metadata

import pytest
from backbones import IdentityBackbone, RandomBackbone
from stand_ins import VDVAE, AutoEncoder, DeepVAE
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, LadderAdapter, NVAEAdapter, VDVAEAdapter
from hvae_ebm_prior.backbone.registry import GROUP, find_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.mark.parametrize(
    ("make", "adapter"),
    [(AutoEncoder, NVAEAdapter), (VDVAE, VDVAEAdapter), (DeepVAE, LadderAdapter), (HVAE, HVAEAdapter)],
    ids=lambda value: value.__name__,
)
def test_families_are_recognised_by_their_attributes_also_when_wrapped(make, adapter):
    model = make()
    assert type(find_adapter(model)) is adapter
    assert find_adapter(nn.DataParallel(model)).model is model


def test_adapters_are_taken_as_they_are():
    adapter = RandomBackbone([(2,)])
    assert find_adapter(adapter) is adapter


def test_what_was_tried_is_said():
    with pytest.raises(
        TypeError,
        match=r"no adapter fits Linear; tried hvae \(has no start.*nvae \(has no dec_tower.*vdvae.*your_own_vae",
    ):
        DiffusionEBMPrior(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="int is not a backbone adapter"):
        DiffusionEBMPrior(3)


class ThirdParty(nn.Module):
    secret = 1


class ThirdPartyAdapter(IdentityBackbone):
    needs = ("secret",)

    def __init__(self, model):
        super().__init__((2,))
        self.model = model


def test_packages_announce_their_adapters_as_entry_points(monkeypatch):
    installed = importlib.metadata.entry_points(group=GROUP)
    point = importlib.metadata.EntryPoint("third", "test_registry:ThirdPartyAdapter", GROUP)
    monkeypatch.setattr("hvae_ebm_prior.backbone.registry.entry_points", lambda group: [*installed, point])
    monkeypatch.setattr(
        importlib.metadata.EntryPoint,
        "load",
        lambda self, load=importlib.metadata.EntryPoint.load: ThirdPartyAdapter if self == point else load(self),
    )
    model = ThirdParty()
    assert DiffusionEBMPrior(model).backbone.model is model
    monkeypatch.delattr(ThirdPartyAdapter, "needs")
    with pytest.raises(TypeError, match=r"the adapter third .* must have `needs`"):
        find_adapter(nn.Linear(1, 1))
