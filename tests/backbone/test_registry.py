import importlib.metadata
import re
from types import SimpleNamespace

import pytest
from backbones import IdentityBackbone, RandomBackbone
from stand_ins import VDVAE, AutoEncoder, DeepVAE
from torch import nn
from torch.optim.swa_utils import AveragedModel

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


class AdapterModule(nn.Module, RandomBackbone):
    """An adapter that is a module."""

    def __init__(self):
        nn.Module.__init__(self)
        held = RandomBackbone([(2,)])
        self.model, self.start, self.shapes, self.tail_ran = held.model, held.start, held.shapes, 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda model: nn.DataParallel(AveragedModel(model))])
def test_wrapped_adapters_are_unwrapped(wrap):
    wrapped = wrap(AdapterModule())
    assert type(find_adapter(wrapped)) is AdapterModule
    assert DiffusionEBMPrior(wrapped).sample(1).shape == (1, 1, 2, 2)
    assert type(find_adapter(wrap(VDVAE()))) is VDVAEAdapter


class Trainer(nn.Module):
    """Holds models, none of which is itself."""

    def __init__(self, **held):
        super().__init__()
        self.top_down, self.infer, self.decode = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
        for name, value in held.items():
            setattr(self, name, value)


def test_parts_of_the_names_of_methods_make_no_adapter():
    with pytest.raises(TypeError, match="no adapter fits Trainer; tried"):
        find_adapter(Trainer())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Trainer(net=nn.Linear(1, 1), ema_model=VDVAE()),
            "no adapter fits Trainer; its attribute ema_model is a VDVAE: pass model.ema_model; tried",
        ),
        (lambda: Trainer(parts=nn.ModuleList([nn.Linear(1, 1), HVAE()])), "a HVAE: pass model.parts[1];"),
        (lambda: Trainer(adapter=RandomBackbone([(2,)])), "is a RandomBackbone: pass model.adapter;"),
        (lambda: nn.DataParallel(Trainer(vae=VDVAE())), "attribute module.vae is a VDVAE: pass model.module.vae;"),
        (lambda: {"step": 3, "ema": VDVAE()}, "its entry ['ema'] is a VDVAE: pass model['ema']"),
        (lambda: VDVAE, "expected a model or an adapter, got the class VDVAE: pass an object of it"),
        (lambda: HVAEAdapter, "got the class HVAEAdapter: pass an object of it"),
        (
            lambda: SimpleNamespace(model=VDVAE()),
            "SimpleNamespace is not a backbone adapter: it has no method top_down, infer, decode; .* is a VDVAE: pass "
            "model.model",
        ),
    ],
)
def test_a_refusal_says_what_would_fit(model, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(TypeError, match=pattern):
        find_adapter(model())
