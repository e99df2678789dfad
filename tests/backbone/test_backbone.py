import gc
import re

import pytest
import torch
import torch.nn.functional as F
from backbones import IdentityBackbone, RandomBackbone, Seeing
from helpers import TINY, seed
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, HVAEConfig
from hvae_ebm_prior.backbone.transform import NoiseTransform
from hvae_ebm_prior.control import edit
from hvae_ebm_prior.evaluation import describe_layers
from hvae_ebm_prior.evaluation.adapter_check import check_adapter, find_faults
from hvae_ebm_prior.ood import bound_scores, diffusion_scores

SHAPES = st.one_of(
    st.tuples(st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
)


@given(st.lists(SHAPES, min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_noise_and_latents_are_inverse(shapes, n, value):
    transform = NoiseTransform(RandomBackbone(shapes, value))
    assert transform.latent_shapes == tuple(shapes)
    u = torch.randn(n, transform.dim, generator=seed(value))
    with torch.no_grad():
        z = transform.to_latents(u)
        assert [tuple(z_i.shape) for z_i in z] == [(n, *shape) for shape in shapes]
        torch.testing.assert_close(transform.to_noise(z), u, atol=1e-5, rtol=0)
        for z_i, again in zip(z, transform.to_latents(transform.to_noise(z)), strict=True):
            torch.testing.assert_close(again, z_i, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shapes", [[(3,)], [(2,), (2, 2, 2)], [(2, 1, 1), (3,), (1, 2, 3), (2,)]])
def test_log_det_is_that_of_autograds_jacobian(shapes):
    transform = NoiseTransform(RandomBackbone(shapes, seed=3, dtype=torch.float64))
    u = torch.randn(2, transform.dim, dtype=torch.float64, generator=seed(1))
    for row, log_det in zip(u, transform.log_abs_det(u), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: transform.join(transform.to_latents(x[None]))[0], row)
        torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-12, rtol=1e-10)


def test_eighty_layers():
    transform = NoiseTransform(RandomBackbone([(2,)] * 80))
    u = torch.randn(3, transform.dim, generator=seed(0))
    torch.testing.assert_close(transform.to_noise(transform.to_latents(u)), u, atol=1e-4, rtol=0)


def test_split_and_join_pack_top_to_bottom():
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (1, 2, 2)]))
    u = torch.arange(12.0).reshape(2, 6)
    top, bottom = prior.split(u)
    assert top.tolist() == [[0, 1], [6, 7]]
    assert bottom[1].tolist() == [[[8, 9], [10, 11]]]
    assert torch.equal(prior.join((top, bottom)), u)


def test_energy_walk_stops_after_the_last_latent():
    adapter = RandomBackbone([(2,), (3,)])
    prior = DiffusionEBMPrior(adapter)
    before, u = adapter.tail_ran, torch.zeros(2, 5)
    prior.energy(u, 0), prior.score(u, 0), prior.to_noise(prior.to_latents(u)), prior.log_abs_det(u)
    assert adapter.tail_ran == before
    prior.decode(u)
    assert adapter.tail_ran == before + 1


def test_gradient_reaches_noise_but_no_backbone_parameter():
    adapter = RandomBackbone([(2,), (3,)])
    prior = DiffusionEBMPrior(adapter)
    u = torch.zeros(2, 5, requires_grad=True)
    prior.decode(u).sum().backward()
    assert (u.grad != 0).all()
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_backbone_is_frozen_and_given_back():
    adapter = RandomBackbone([(2,)])
    adapter.model["tail"].eval()
    adapter.model["heads"].requires_grad_(False)
    flags = [m.training for m in adapter.model.modules()], [p.requires_grad for p in adapter.model.parameters()]
    assert len(set(flags[0])) == len(set(flags[1])) == 2

    def now():
        return [m.training for m in adapter.model.modules()], [p.requires_grad for p in adapter.model.parameters()]

    first, second = DiffusionEBMPrior(adapter), DiffusionEBMPrior(adapter)
    assert not any(now()[0] + now()[1])
    first.release()
    assert not any(now()[0] + now()[1])
    with pytest.raises(RuntimeError, match="released its backbone"):
        first.sample(1)
    del second
    gc.collect()
    assert now() == flags


def test_a_module_reachable_twice_is_given_back():
    adapter = RandomBackbone([(2,)])
    adapter.again = [adapter.model["heads"]]
    prior = DiffusionEBMPrior(adapter)
    assert not any(m.training for m in adapter.model.modules())
    prior.release()
    assert all(m.training for m in adapter.model.modules())
    assert all(p.requires_grad for p in adapter.model.parameters())


def test_an_adapter_without_attributes_of_its_own_works():
    inner = IdentityBackbone((2,))

    class Slotted:
        __slots__ = ()
        top_down, infer, decode = map(staticmethod, (inner.top_down, inner.infer, inner.decode))

    assert DiffusionEBMPrior(Slotted()).sample(2, generator=seed(0)).shape == (2, 1, 1, 2)


def test_a_refused_backbone_is_left_as_it_was():
    class Negative(RandomBackbone):
        def top_down(self, batch_size):
            yield torch.zeros(batch_size, 2), torch.full((batch_size, 2), -1.0)

    adapter = Negative([(2,)])
    with pytest.raises(ValueError, match="std must be positive"):
        DiffusionEBMPrior(adapter)
    assert all(m.training for m in adapter.model.modules())
    assert all(p.requires_grad for p in adapter.model.parameters())


def test_prior_owns_the_energies_alone():
    adapter = RandomBackbone([(2,), (1, 2, 2)])
    prior = DiffusionEBMPrior(adapter)
    assert all(name.startswith("energies.") for name in prior.state_dict())
    backbone = {id(p) for p in adapter.model.parameters()}
    assert not backbone & {id(p) for p in prior.parameters()}
    prior.train()
    assert not any(m.training for m in adapter.model.modules())


def test_global_generator_is_not_touched():
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (1, 2, 2)]))
    g = seed(0)
    before = torch.get_rng_state()
    u = prior.encode(torch.zeros(3, 1, 2, 2), generator=g)
    prior.decode(u), prior.energy(u, 0), prior.score(u, 0), prior.to_latents(u), prior.log_abs_det(u)
    prior.sample(2, generator=g)
    prior.loss(torch.zeros(3, 1, 2, 2), generator=g)
    assert torch.equal(torch.get_rng_state(), before)


def test_encode_follows_its_generator():
    prior = DiffusionEBMPrior(RandomBackbone([(2,)]))
    images = torch.zeros(3, 1, 2, 2)
    draws = [prior.encode(images, generator=seed(value)) for value in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


class Broken(IdentityBackbone):
    """Yields what it is told."""

    def __init__(self, *layers, second=None):
        super().__init__((2,))
        self.layers, self.second, self.calls = layers, second, 0

    def top_down(self, batch_size):
        self.calls += 1
        layers = self.second if self.second is not None and self.calls > 1 else self.layers
        for layer in layers:
            yield layer(batch_size)
        return torch.zeros(batch_size, 2)


def normal(*shape):
    return lambda n: (torch.zeros(n, *shape), torch.ones(n, *shape))


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (object(), TypeError, "no method top_down, infer, decode; wrap the model"),
        (Broken(), ValueError, "without yielding a layer"),
        (Broken(lambda n: torch.zeros(n, 2)), TypeError, r"tuple \(mean, std\) .* got one tensor of torch.float32"),
        (
            Broken(lambda n: (torch.zeros(n, 2).long(), torch.ones(n, 2))),
            TypeError,
            "got tuple of .one tensor of torch.int64",
        ),
        (Broken(lambda n: (torch.zeros(n, 2), torch.ones(n, 1))), ValueError, r"one shape, got \(2, 2\) and \(2, 1\)"),
        (
            Broken(lambda n: (torch.zeros(n, 2), -torch.ones(n, 2))),
            ValueError,
            "positive and finite, got values from -1 to -1; yield the standard dev",
        ),
        (
            Broken(lambda n: (torch.full((n, 2), torch.nan), torch.ones(n, 2))),
            ValueError,
            "layer 0: the backbone's mean is not finite",
        ),
        (
            Broken(lambda n: (torch.zeros(1, 2), torch.ones(1, 2))),
            ValueError,
            r"batch of 2, expected mean of shape \(2, ...\), got \(1, 2\)",
        ),
    ],
)
def test_broken_adapters_are_refused(adapter, error, message):
    with pytest.raises(error, match=message):
        DiffusionEBMPrior(adapter)


def test_top_down_without_yield_is_refused():
    adapter = IdentityBackbone((2,))
    adapter.top_down = lambda batch_size: [torch.zeros(batch_size, 2)]
    with pytest.raises(TypeError, match="must be a generator function .* returns list"):
        DiffusionEBMPrior(adapter)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([normal(3)], r"expected the shapes \[\('N', 2\), \('N', 2\)\] of its first call, got \(3, 3\) as layer 0"),
        ([normal(2)], "expected 2 layers as at its first call, got 1"),
    ],
)
def test_shapes_that_change_between_calls_are_refused(second, message):
    prior = DiffusionEBMPrior(Broken(normal(2), normal(2), second=second))
    with pytest.raises(ValueError, match=message):
        prior.to_latents(torch.zeros(3, 4))


def test_posterior_of_wrong_shape_is_refused():
    adapter = IdentityBackbone((2,), (3,))
    prior = DiffusionEBMPrior(adapter)
    adapter.infer = lambda images: [torch.zeros(len(images), 3), torch.zeros(len(images), 2)]
    with pytest.raises(
        ValueError, match=r"latents: expected .*'N', 2.*'N', 3.* from top to bottom, got \[\(4, 3\), \(4, 2\)\]"
    ):
        prior.encode(torch.zeros(4, 1, 1, 5))
    adapter.infer = lambda images: [torch.full((len(images), 2), torch.nan), torch.zeros(len(images), 3)]
    with pytest.raises(ValueError, match="posterior draws are not finite"):
        prior.encode(torch.zeros(4, 1, 1, 5))


def test_a_prior_may_be_collected_inside_a_functorch_transform():
    backbone = RandomBackbone([(2,)])
    prior = DiffusionEBMPrior(backbone)

    def release(x):
        prior.release()
        return x.sum()

    torch.func.grad(release)(torch.ones(2))
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize("kind", [tuple, iter, lambda drawn: (z for z in drawn)])
def test_posterior_draws_may_come_in_any_form(kind):
    """Of `infer` and of `infer_with_density`: the same noise, losses and bounds as of a list."""

    class Ours(HVAEAdapter):
        def infer(self, images):
            return kind(super().infer(images))

        def infer_with_density(self, images):
            return kind(super().infer_with_density(images))

        def infer_with_posterior(self, images):
            return kind(super().infer_with_posterior(images))

    torch.manual_seed(0)
    model = HVAE(HVAEConfig(image_size=4, latent_channels=(2, 1), widths=(4, 4)))
    images = torch.rand(8, 1, 4, 4, generator=seed(0))
    training = TrainingConfig(iterations=1, batch_size=4, activity_images=0)
    results = []
    for adapter in (HVAEAdapter(model), Ours(model)):
        torch.manual_seed(1)
        prior = DiffusionEBMPrior(adapter, energy=TINY)
        records = prior.fit(images, training=training, generator=seed(2), progress=False)
        scores = bound_scores(prior, images[:2], generator=seed(3))
        faults = list(find_faults(adapter, images, generator=seed(4)))
        results.append((prior.encode(images, generator=seed(5)), records[0].loss, scores, faults))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][3] == results[1][3]


def test_gaussians_that_draws_are_not_from_are_refused():
    images = torch.rand(4, 1, 2, 2, generator=seed(0))

    class Wrong(Seeing):
        scale, part = 2.0, slice(None)

        def infer_with_posterior(self, images):
            return [(z, mean, self.scale * std)[self.part] for z, mean, std in super().infer_with_posterior(images)]

    prior = DiffusionEBMPrior(Wrong([(3, 8, 8), (2, 8, 8)]), energy=TINY)
    for scale in (2.0, 0.5, -1.0, 0.0):
        Wrong.scale = scale
        with pytest.raises(ValueError, match="Wrong.infer_with_posterior: expected every z as drawn from its mean and"):
            prior.encode_with_posterior(images)
    Wrong.part = slice(2)
    with pytest.raises(TypeError, match=r"Wrong.infer_with_posterior: expected \(z, mean, std\) of every layer"):
        prior.encode_with_posterior(images)


def test_a_subclass_with_other_draws_inherits_no_gaussians():
    class Other(Seeing):
        def infer(self, images):
            return [z + 1 for z in super().infer(images)]

    images = torch.rand(4, 1, 2, 2, generator=seed(0))
    for kind, known in ((Seeing, True), (Other, False)):
        prior = DiffusionEBMPrior(kind([(3,)]), energy=TINY)
        u, posterior = prior.encode_with_posterior(images, generator=seed(1))
        assert (posterior is not None) == known
        assert torch.equal(u, prior.encode(images, generator=seed(1)))
    patched = Seeing([(3,)])
    patched.infer = Other([(3,)]).infer
    assert DiffusionEBMPrior(patched, energy=TINY).encode_with_posterior(images)[1] is None


@pytest.mark.parametrize("drawn", [None, torch.zeros(2, 2), {"z": torch.zeros(2, 2)}])
def test_other_forms_are_refused(drawn):
    adapter = IdentityBackbone((2,))
    adapter.infer = lambda images: drawn
    with pytest.raises(TypeError, match="latents: expected a list or tuple of one tensor per layer, got"):
        DiffusionEBMPrior(adapter).encode(torch.rand(2, 1, 1, 2))


# Of a model that takes (1, 4, 4).
WRONG_SIZES = [(3, 4, 4), (1, 8, 8), (1, 4, 2), (4, 4, 1)]


@pytest.mark.parametrize("shape", WRONG_SIZES)
def test_images_of_another_size_are_refused_wherever_they_enter(shape):
    """Also where the model would take them: this one has an encoder for any size and number of channels."""

    class AnyImages(HVAEAdapter):
        def infer(self, images):
            return super().infer(F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 4))

    torch.manual_seed(0)
    prior = DiffusionEBMPrior(AnyImages(HVAE(HVAEConfig(image_size=4, latent_channels=(2, 1), widths=(4, 4)))))
    images = torch.rand(8, *shape, generator=seed(0))
    training = TrainingConfig(iterations=1, batch_size=4, activity_images=0)
    uses = [
        lambda: prior.encode(images),
        lambda: prior.loss(images),
        lambda: prior.fit(images, training=training, progress=False),
        lambda: prior.fit(TensorDataset(images), training=training, progress=False),
        lambda: prior.log_likelihood(images),
        lambda: edit(prior, images, (0,)),
        lambda: bound_scores(prior, images),
        lambda: diffusion_scores(prior, images),
        lambda: describe_layers(prior.backbone, images),
        lambda: check_adapter(prior.backbone, images),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=re.escape(f"this model takes images (1, 4, 4), got {shape}")):
            use()


def test_the_image_size_is_found_without_random_numbers():
    """Of a backbone that draws its images, from the global generator."""

    class Noisy(IdentityBackbone):
        def decode(self, features):
            return super().decode(features + torch.randn_like(features))

    transform = NoiseTransform(Noisy((2,)))
    state = torch.get_rng_state()
    assert transform.image_shape == (1, 1, 2)
    assert torch.equal(torch.get_rng_state(), state)
