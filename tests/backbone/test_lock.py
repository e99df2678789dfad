"""Modules are found wherever an adapter keeps them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from backbones import IdentityBackbone
from torch import nn

from hvae_ebm_prior.baselines import GaussianPrior


class Holder(IdentityBackbone):
    def __init__(self, held):
        super().__init__((2,))
        self.held = held


class Slots:
    __slots__ = ("model",)

    def __init__(self, model):
        self.model = model


class Method:
    def __init__(self, model):
        self.model = model

    def run(self):
        return self.model


class Later(IdentityBackbone):
    """Makes a parameter when it is first run."""

    def __init__(self, model):
        super().__init__((2,))
        self.model = model

    def top_down(self, batch_size):
        if not hasattr(self.model, "later"):
            self.model.later = nn.Parameter(torch.zeros(1))
        return super().top_down(batch_size)


def closure(model):
    return lambda x: model(x)


def circle(model):
    first, second = SimpleNamespace(), SimpleNamespace(model=model)
    first.other, second.other = second, first
    return first


class Forgetful(nn.Module):
    """Keeps something that is no part of it, as far as PyTorch knows."""

    def __init__(self, held):
        super().__init__()
        self.held = held


WAYS = {
    "attribute": lambda model: model,
    "list of dicts": lambda model: [{"a": (model,)}],
    "another adapter": Holder,
    "slots": Slots,
    "method": lambda model: Method(model).run,
    "partial": lambda model: partial(print, model),
    "function": closure,
    "circle": circle,
    "list in a module": lambda model: Forgetful([model]),
    "method in a module": lambda model: Forgetful(Method(model).run),
}


@pytest.mark.parametrize("way", WAYS)
def test_modules_are_found_and_put_back(way):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    prior = GaussianPrior(Holder(WAYS[way](model)))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    prior.release()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_that_are_made_later_are_frozen_too():
    model = nn.Linear(2, 2)
    prior = GaussianPrior(Later(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    prior.release()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


OUT_OF_SIGHT = {}


class Hidden(IdentityBackbone):
    """Its model is a variable of this file."""

    def top_down(self, batch_size):
        z = yield torch.zeros(batch_size, 2), torch.ones(batch_size, 2)
        return OUT_OF_SIGHT["model"](z)

    def decode(self, features):
        return features.sigmoid()[:, None, None]


def test_a_model_out_of_sight_is_refused_unless_it_is_frozen():
    """An adapter without any model, of which there are some, is none of these."""
    OUT_OF_SIGHT["model"] = model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with pytest.raises(ValueError, match="not frozen, as they were not found: Sequential, Linear, Dropout; keep the"):
        GaussianPrior(Hidden((2,)))
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="not found: Linear; keep the model as an attribute"):
        GaussianPrior(Hidden((2,)))
    model.requires_grad_(False)
    assert GaussianPrior(Hidden((2,))).sample(1).shape == (1, 1, 1, 2)
