"""The conformance kit: a good adapter passes, and each broken promise is named."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seed
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.evaluation.adapter_check import check_adapter, find_faults


class Good:
    """Two layers of one shape: images are z_0 + z_1 / 10, squeezed into [0, 1], and the posterior knows z exactly."""

    def __init__(self):
        self.model = nn.ModuleDict({"head": nn.Conv2d(1, 1, 1), "norm": nn.BatchNorm2d(1)})
        nn.init.constant_(self.model["head"].weight, 0.1)
        nn.init.zeros_(self.model["head"].bias)

    def top_down(self, batch_size):
        zeros = torch.zeros(batch_size, 1, 4, 4)
        first = yield zeros, torch.ones_like(zeros)
        second = yield self.model["head"](first), 0.5 * torch.ones_like(zeros)
        return self.model["norm"](first + second / 10)

    def infer(self, images):
        total = 8 * images.clamp(0.05, 0.95) - 4
        second = 0.05 * torch.randn_like(total)
        return [total - second / 10, second]

    def decode(self, features):
        return ((features + 4) / 8).clamp(0, 1)


class Reversed(Good):
    def infer(self, images):
        return super().infer(images)[::-1]


class Trains(Good):
    def infer(self, images):
        self.model.train()
        return super().infer(images)


class WrongShape(Good):
    def infer(self, images):
        return [z.flatten(1) for z in super().infer(images)]


class LogStd(Good):
    def top_down(self, batch_size):
        zeros = torch.zeros(batch_size, 1, 4, 4)
        yield zeros, zeros - 1
        return zeros


class Stochastic(Good):
    def decode(self, features):
        return super().decode(features + torch.randn_like(features))


class StochasticMean(Good):
    def top_down(self, batch_size):
        walk = super().top_down(batch_size)
        mean, std = next(walk)
        z = yield mean + torch.randn_like(mean), std
        z = yield walk.send(z)
        try:
            walk.send(z)
        except StopIteration as stop:
            return stop.value


class Batched(Good):
    """Its normalisation is by the batch."""

    def decode(self, features):
        return super().decode(features - features.mean(0))


class Hidden(Good):
    """Its model is no attribute."""

    def __init__(self):
        super().__init__()
        # In no object that it holds, but among the variables of this file.
        globals()["out_of_sight"] = self.__dict__.pop("model")

    def __getattr__(self, name):
        return globals()["out_of_sight"]


class Detached(Good):
    def decode(self, features):
        return super().decode(features.detach())


class Unused(Good):
    def top_down(self, batch_size):
        walk = super().top_down(batch_size)
        gaussian = next(walk)
        z = yield gaussian
        gaussian = walk.send(z)
        yield gaussian
        return z


class HiddenParameter(Good):
    """It has a parameter that is part of no module."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def decode(self, features):
        return super().decode(self.scale * features)


class Means(Good):
    def infer(self, images):
        total = 8 * images - 4
        return [total, 0 * total]


class Rounded(Good):
    """Quantises its lower layer, as compressing models do in eval mode."""

    def infer(self, images):
        first, second = super().infer(images)
        return [first, second.round()]


class HalfMeans(Good):
    def infer(self, images):
        first, second = super().infer(images)
        return [torch.cat((first[..., :3], (8 * images - 4)[..., 3:]), dim=3), second]


class Unseeded(Good):
    def infer(self, images):
        rng = np.random.default_rng()
        return [z + 0.1 * torch.from_numpy(rng.normal(size=z.shape)).float() for z in super().infer(images)]


class NotFinite(Good):
    def infer(self, images):
        return [z / 0 for z in super().infer(images)]


class InPlace(Good):
    def top_down(self, batch_size):
        zeros = torch.zeros(batch_size, 1, 4, 4)
        first = yield zeros, torch.ones_like(zeros)
        second = yield self.model["head"](first.mul_(2)), 0.5 * torch.ones_like(zeros)
        return self.model["norm"](first + second / 10)


class InPlaceStd(Good):
    def top_down(self, batch_size):
        zeros = torch.zeros(batch_size, 1, 4, 4)
        first = yield zeros, torch.ones_like(zeros)
        std = 0.5 * torch.ones_like(zeros)
        second = yield self.model["head"](first), std
        std *= 2
        return self.model["norm"](first + second / 10)


class InPlaceData(Good):
    """In a way that PyTorch does not count."""

    def top_down(self, batch_size):
        zeros = torch.zeros(batch_size, 1, 4, 4)
        first = yield zeros, torch.ones_like(zeros)
        first.data.mul_(2)
        second = yield self.model["head"](first), 0.5 * torch.ones_like(zeros)
        return self.model["norm"](first + second / 10)


class OwnSeed(Good):
    def infer(self, images):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return super().infer(images)


class SometimesNaN(Good):
    def decode(self, features):
        return super().decode(features) / (features.abs() < 2)


class Dropout(Good):
    def top_down(self, batch_size):
        features = yield from super().top_down(batch_size)
        return F.dropout(features)


class DropoutInEncoder(Good):
    def infer(self, images):
        return super().infer(F.dropout2d(images, 0.1))


class Numpy(Good):
    def decode(self, features):
        return super().decode(features + float(np.random.default_rng().normal()))


class OtherSize(Good):
    def decode(self, features):
        return super().decode(features).reshape(-1, 1, 2, 8)


class Keyed(Good):
    def infer(self, images):
        return {}["nothing"]


class WrongRange(Good):
    def decode(self, features):
        return features + 0.5


class WrongSize(Good):
    def decode(self, features):
        return super().decode(features)[..., :3]


class Untrained(Good):
    def infer(self, images):
        return [torch.randn_like(z) for z in super().infer(images)]


@pytest.fixture(scope="module")
def images():
    return ((torch.randn(300, 1, 4, 4, generator=seed(0)) + 4) / 8).clamp(0, 1)


def test_a_good_adapter_passes_and_is_described(images, capsys):
    adapter = Good()
    adapter.model.train()
    reports = check_adapter(adapter, images, generator=seed(1))
    assert [report.dimensions for report in reports] == [16, 16]
    assert reports[0].inactive == 0
    printed = capsys.readouterr().out
    assert "classifier accuracy" in printed
    assert len(printed.splitlines()) == 4
    assert adapter.model.training
    assert adapter.model["head"].weight.requires_grad


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Reversed, "reverse the list"),
        (WrongShape, "infer with a batch of 1"),
        (Stochastic, "draws from the global generator"),
        (StochasticMean, "draws from the global generator .* by torch.randn_like"),
        (Batched, "depends on the others in its batch"),
        (Hidden, "modules that are not frozen, as they were not found: Conv2d, BatchNorm2d; keep the model"),
        (Trains, r"that were frozen before: .* does the adapter call train\(\)"),
        (HiddenParameter, r"autograd also reaches other tensors, 1 of them"),
        (Detached, "autograd does not reach u"),
        (Unused, "layer 1: the image does not depend on its noise"),
        (WrongRange, r"must return images in \[0, 1\], got .*rescale them in its decode"),
        (WrongSize, r"this model takes images \(1, 4, 3\), got \(1, 4, 4\)"),
        (Means, "two seeds gave equal latents in all layers: .* does it return means, or quantise in eval mode"),
        (Rounded, "two seeds gave equal latents in layer 1: "),
        (HalfMeans, "two seeds gave equal latents in 4 of 16 dimensions of layer 0: "),
        (Unseeded, "the same seed gave two draws"),
        (NotFinite, "infer: its latents are not finite"),
        (InPlaceData, "the inverse of T is off by .* changed in place, by .data or NumPy"),
        (OwnSeed, "two seeds gave equal latents in all layers.* or of a seed of its own"),
        (SometimesNaN, "decode: the images are not finite"),
        (Dropout, "dropout is on: torch.nn.functional.dropout drops also in eval mode"),
        (DropoutInEncoder, "dropout is on: torch.nn.functional.dropout2d"),
        (Numpy, "the same noise gave two different images"),
        (OtherSize, r"this model takes images \(1, 2, 8\), got \(1, 4, 4\)"),
        (Keyed, "KeyError: 'nothing'"),
        (Untrained, "reconstructions are no closer"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_broken_promises_are_named(adapter, message, images):
    with pytest.raises(ValueError, match=r"breaks 1 promise:\n- .*" + message):
        check_adapter(adapter(), images, generator=seed(1))


def test_what_is_too_wrong_to_go_on_raises(images):
    with pytest.raises(ValueError, match="yield the standard deviation, not its logarithm"):
        check_adapter(LogStd(), images)
    for adapter, what in ((InPlace(), "layer 0: it changes the latent that it was"), (InPlaceStd(), "layer 1: .* std")):
        for use in (lambda adapter=adapter: check_adapter(adapter, images), lambda a=adapter: DiffusionEBMPrior(a)):
            with pytest.raises(ValueError, match=f"top_down, {what} .*in place; write z = z"):
                use()
    with pytest.raises(TypeError, match="has no method top_down"):
        check_adapter(object(), images)
    with pytest.raises(ValueError, match="at least 8, got 2"):
        check_adapter(Good(), images[:2])


def test_a_good_adapter_has_no_faults(images):
    assert list(find_faults(Good(), images, generator=seed(2))) == []
