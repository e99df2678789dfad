"""The adapters of docs/cookbook.md, on small models with samplers of their own."""

import math
import re
from pathlib import Path

import pytest
import torch
from helpers import seed
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig
from hvae_ebm_prior.backbone.transform import NoiseTransform
from hvae_ebm_prior.evaluation.adapter_check import find_faults

PAGE = (Path(__file__).parent.parent / "docs" / "cookbook.md").read_text()
WIDTH, SHAPE = 6, (1, 4, 4)
# What only a trained model keeps.
UNTRAINED = ("reconstructions are no closer", "likelier, by")


@pytest.fixture(scope="module")
def page():
    names: dict = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)), "cookbook.md", "exec"), names)
    return names


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.prior, self.q = nn.Linear(WIDTH, 2 * size), nn.Linear(2 * WIDTH, 2 * size)
        self.join = nn.Linear(WIDTH + size, WIDTH)

    def posterior(self, h, feature):
        return self.q(torch.cat((h, feature), dim=1))

    def merge(self, h, z):
        return torch.tanh(self.join(torch.cat((h, z), dim=1)))


class Tiny(nn.Module):
    """Layers of 3 and 2 dimensions; `order` is that of its lists, -1 for bottom to top."""

    def __init__(self, channels=1, order=1):
        super().__init__()
        self.order = order
        self.start = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList([Block(3), Block(2)][::order])
        self.encoders = nn.ModuleList([nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)][::order])
        self.head = nn.Linear(WIDTH, channels * 16)

    def encode(self, images):
        return [torch.tanh(encoder(images.flatten(1)[:, :16])) for encoder in self.encoders]

    def to_image(self, h):
        return self.head(h).unflatten(1, (-1, 4, 4))

    def ancestral(self, noise, draw=lambda mean, log_std, u: mean + log_std.exp() * u):
        h, latents = self.start.expand(len(noise[0]), -1), []
        for block, u in zip(list(self.blocks)[:: self.order], noise, strict=True):
            latents.append(draw(*block.prior(h).chunk(2, 1), u))
            h = block.merge(h, latents[-1])
        return latents, h


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.conditional = Block(2), Block(1), nn.Linear(WIDTH + 2, WIDTH)
        self.join = Block(3)

    def merge(self, h, z):
        return self.join.merge(h, z)

    def condition(self, h, first):
        return torch.tanh(self.conditional(torch.cat((h, first), 1)))


class Stages(Tiny):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stage(), Stage()])
        self.encoders = nn.ModuleList([nn.Linear(16, WIDTH) for _ in range(4)])

    def ancestral(self, noise):
        h, latents = self.start.expand(len(noise[0]), -1), []
        for stage, u, v in zip(self.stages, noise[::2], noise[1::2], strict=True):
            mean, log_std = stage.first.prior(h).chunk(2, 1)
            first = mean + log_std.exp() * u
            mean, log_std = stage.second.prior(stage.condition(h, first)).chunk(2, 1)
            second = mean + log_std.exp() * v
            latents += [first, second]
            h = stage.merge(h, torch.cat((first, second), 1))
        return latents, h


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.top = nn.Conv2d(1, 4, 4, 4), nn.Conv2d(4, 4, 1)
        self.q, self.prior = nn.Conv2d(6, 4, 1), nn.Conv2d(2, 4, 1)
        self.up = nn.ConvTranspose2d(4, 1, 4, 4)

    def bottom(self, h, top):
        return self.q(torch.cat((h, top), 1))

    def to_image(self, top, bottom):
        return self.up(torch.cat((top, bottom), 1))


def built(make):
    torch.manual_seed(0)
    return make()


def broken(adapter, shape=SHAPE):
    images = torch.rand(16, *shape, generator=seed(0))
    return [
        fault
        for fault in find_faults(adapter, images, generator=seed(1))
        if not any(part in fault for part in UNTRAINED)
    ]


@pytest.mark.parametrize(
    ("name", "make", "image"),
    [
        ("OneWalk", Tiny, torch.sigmoid),
        ("BottomToTop", lambda: Tiny(order=-1), torch.sigmoid),
        ("TwoLatents", Stages, torch.sigmoid),
        ("SymmetricImages", Tiny, lambda x: (x.tanh() + 1) / 2),
    ],
)
def test_layers_and_images_are_the_models_own(page, name, make, image):
    model = built(make)
    adapter = page[name](model)
    transform = NoiseTransform(adapter)
    u = torch.randn(5, transform.dim, generator=seed(0))
    latents, h = model.ancestral(transform.split(u))
    torch.testing.assert_close(list(transform.to_latents(u)), latents)
    torch.testing.assert_close(transform.decode(u), image(model.to_image(h)))
    assert broken(adapter) == []


def test_one_walk_gives_the_density_of_its_draws(page):
    """The posterior's log-density by PyTorch's own distributions, of draws that follow from the seed; and its mean and
    std.
    """
    model = built(Tiny)
    images = torch.rand(3, *SHAPE, generator=seed(0))
    torch.manual_seed(1)
    drawn = page["OneWalk"](model).infer_with_density(images)
    torch.manual_seed(1)
    given = page["OneWalk"](model).infer_with_posterior(images)
    h = model.start.expand(3, -1)
    for (z, log_density), gaussian, block, feature in zip(
        drawn, given, model.blocks, model.encode(images), strict=True
    ):
        mean, log_std = block.posterior(h, feature).chunk(2, 1)
        torch.testing.assert_close(gaussian, (z, mean, log_std.exp()))
        torch.testing.assert_close(log_density, torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum(1))
        h = block.merge(h, z)
    assert broken(page["OneWalk"](model)) == []


def test_logistic_priors_are_exact(page):
    """Latents have the logistic's quantiles, and T and its inverse undo each other far into the tails."""
    y = torch.linspace(-12, 12, 49)
    x = page["normal_to_logistic"](y)
    torch.testing.assert_close(page["logistic_to_normal"](x), y, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        x[20:29].double(), torch.logit(torch.special.ndtr(y[20:29].double())), atol=1e-5, rtol=1e-5
    )
    model = built(Tiny)
    adapter = page["LogisticPriors"](model)
    transform = NoiseTransform(adapter)
    u = torch.randn(4000, 5, generator=seed(0))
    quantiles = torch.special.ndtr(u.double()).float()
    _, h = model.ancestral(
        quantiles.split([3, 2], dim=1), lambda mean, log_std, q: mean + log_std.exp() * (q / (1 - q)).log()
    )
    torch.testing.assert_close(transform.decode(u), torch.sigmoid(model.to_image(h)), atol=1e-4, rtol=1e-4)
    assert x[y == 0] == 0
    assert page["normal_to_logistic"](u).var() == pytest.approx(math.pi**2 / 3, rel=0.03)
    assert broken(adapter) == []


def test_quantised_posteriors_keep_their_noise(page):
    model = built(Tiny)
    adapter = page["Quantising"](model)
    assert broken(adapter) == []
    images = torch.rand(1, *SHAPE).expand(4000, -1, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(adapter.infer(images)[0].std(0), torch.full((3,), 12**-0.5), atol=0, rtol=0.03)

    def in_eval_mode(images):
        h, drawn = model.start.expand(len(images), -1), []
        for block, feature in zip(model.blocks, model.encode(images), strict=True):
            drawn.append(block.posterior(h, feature).chunk(2, 1)[0].round())
            h = block.merge(h, drawn[-1])
        return drawn

    adapter.infer = in_eval_mode
    (fault,) = broken(adapter)
    assert "two seeds gave equal latents in all layers" in fault


def test_means_of_categorical_and_mixture_pixels(page):
    model = built(lambda: Tiny(channels=256))
    model.to_image = lambda h: model.head(h).unflatten(1, (256, 1, 4, 4))
    adapter, h = page["CategoricalPixels"](model), torch.randn(2, WIDTH, generator=seed(0))
    values = model.to_image(h).softmax(1).mul(torch.arange(256).reshape(-1, 1, 1, 1) / 255).sum(1)
    torch.testing.assert_close(adapter.decode(h), values)
    assert broken(adapter) == []
    mixture = page["MixturePixels"](built(lambda: Tiny(channels=20)))
    assert mixture.decode(h).shape == (2, 3, 4, 4)
    assert broken(mixture, (3, 4, 4)) == []


@pytest.mark.parametrize("size", [8, 12])
def test_a_model_of_any_size_gets_one(page, size):
    adapter = page["AnySize"](built(Convolutional), size, size)
    assert NoiseTransform(adapter).latent_shapes == ((2, size // 4, size // 4),) * 2
    assert broken(adapter, (1, size, size)) == []
    with pytest.raises(ValueError, match=rf"this model takes images \(1, {size}, {size}\), got \(1, 16, 16\)"):
        DiffusionEBMPrior(adapter).encode(torch.rand(2, 1, 16, 16))


def test_tensors_that_are_left_behind_follow_the_weights(page):
    model = built(Tiny)
    model.top_mean, model.top_std = torch.ones(3), torch.full((3,), 2.0)
    model.double()
    adapter = page["FixedTop"](model)
    u = torch.randn(4, 5, generator=seed(0), dtype=torch.float64)
    torch.testing.assert_close(NoiseTransform(adapter).to_latents(u)[0], 1 + 2 * u[:, :3])
    assert broken(adapter) == []


def test_a_prior_learns_over_one_walk(page):
    prior = DiffusionEBMPrior(page["OneWalk"](built(Tiny)))
    images = torch.rand(8, *SHAPE, generator=seed(0))
    training = TrainingConfig(iterations=1, batch_size=4, activity_images=0)
    assert len(prior.fit(images, training=training, generator=seed(1), progress=False)) == 1
    assert prior.sample(2, generator=seed(2)).shape == (2, *SHAPE)
