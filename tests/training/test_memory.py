"""Parts of a batch, memory that runs out, what training is estimated to take, half precision, and reading ahead."""

import math
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import Seeing
from helpers import IMAGES, SMALL, TINY, same, seed, state
from test_processes import CASES, LABELS, SETTINGS, alike, close, diffusion, first_gradient, moved, of_case, train
from torch.utils.data import Dataset

from hvae_ebm_prior import (
    DiffusionEBMPrior,
    ExecutionConfig,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.baselines import JointEBMPrior, NCPPrior
from hvae_ebm_prior.training.batches import Batches
from hvae_ebm_prior.training.memory import MemoryEstimate
from hvae_ebm_prior.training.step import out_of_memory


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 4])
def test_parts_have_the_gradient_of_the_whole(name, size):
    """Nine images in parts of four are 4, 4 and 1; the same gradient, weights and figures but for rounding."""
    (make, in_parts), (_, at_once) = of_case(name, replace(SETTINGS, micro_batch=size)), of_case(name)
    for a, b in zip(first_gradient(make(), **in_parts), first_gradient(make(), **at_once), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-12)
    (history, weights), (whole, expected) = train(make, **in_parts), train(make, **at_once)
    assert alike(history, whole)
    assert close(weights, expected)
    assert moved(weights, state(make())) > 0.01


class Small(Seeing):
    """Has memory for so many samples at a time. The loss walks with chains and data, two of each image."""

    room = 7
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def top_down(self, batch_size):
        if batch_size > self.room:
            raise self.error
        return super().top_down(batch_size)


def small():
    torch.manual_seed(0)
    return DiffusionEBMPrior(
        Small([(2,), (3,)], dtype=torch.float64), energy=SMALL, langevin=LangevinConfig(steps=2)
    ).double()


def test_parts_are_halved_until_they_fit():
    """9 and 5 images walk with 18 and 10 samples, 3 with 6. Encoding takes no walk down the prior."""
    settings = replace(SETTINGS, encode_batch=3, activity_images=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        history, weights = train(small, settings)
    told = [str(each.message) for each in seen if each.category is RuntimeWarning]
    assert [text.split(" (")[0] for text in told] == [
        "out of memory with 9 images at a time, going on with micro_batch=5",
        "out of memory with 5 images at a time, going on with micro_batch=3",
    ]
    assert all("CUDA out of memory" in text for text in told)
    whole, expected = train(diffusion, settings)
    assert alike(history, whole)
    assert close(weights, expected)


@pytest.mark.filterwarnings("ignore:out of memory with")
def test_one_image_that_does_not_fit_is_an_error(monkeypatch):
    monkeypatch.setattr(Small, "room", 2)
    prior = small()
    monkeypatch.setattr(Small, "room", 1)
    with pytest.raises(torch.OutOfMemoryError):
        prior.fit(IMAGES, training=replace(SETTINGS, activity_images=0), generator=seed(0), progress=False)


def test_an_encoder_that_does_not_fit_says_what_to_do(monkeypatch):
    prior = diffusion()

    def infer(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prior.backbone, "infer", infer)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        prior.fit(IMAGES, training=replace(SETTINGS, activity_images=0), generator=seed(0), progress=False)
    assert "the encoder on 9 images: set a smaller TrainingConfig(encode_batch=...)" in caught.value.__notes__[0]


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:  # no machine has an exbibyte
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    assert not out_of_memory(ValueError("out of memory"))


def test_persistent_chains_are_of_whole_batches():
    torch.manual_seed(0)
    prior = JointEBMPrior(Seeing([(2,)]), chains="persistent", kept=12, energy=SMALL, langevin=LangevinConfig(steps=2))
    with pytest.raises(ValueError, match=r"persistent chains are those of whole batches.*without micro_batch"):
        prior.fit(IMAGES, training=replace(SETTINGS, micro_batch=4), generator=seed(0), progress=False)
    prior.fit(IMAGES, training=SETTINGS, generator=seed(0), progress=False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("micro_batch", 0, "micro_batch must be a positive integer"),
        ("encode_batch", -1, "encode_batch"),
        ("workers", -1, "workers must not be"),
    ],
)
def test_bad_settings_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{name: value})


def kept_bytes(work):
    """Bytes of all storages that autograd keeps of `work`, parameters left out, if nothing is let go."""
    storages, held = {}, []

    def pack(tensor):
        if not (tensor.is_leaf and tensor.requires_grad):
            held.append(tensor)
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return storages


@pytest.mark.parametrize(
    ("kind", "context"), [(DiffusionEBMPrior, False), (DiffusionEBMPrior, True), (NCPPrior, False)]
)
def test_memory_of_activations_is_that_of_another_batch(kind, context):
    """Against all that the loss of 12 images keeps, and a gradient of its chain, whichever is more; measured here anew,
    on a larger batch. With context the last steps of a run take the most.
    """
    torch.manual_seed(0)
    prior = kind(Seeing([(4, 8, 8), (6,)], hidden=32), energy=replace(TINY, context=context))
    before = state(prior)
    found = prior.estimate(12)
    assert same(before, state(prior))
    apart = {value.untyped_storage().data_ptr() for value in prior.state_dict().values()}
    apart |= {value.untyped_storage().data_ptr() for value in prior.backbone.model.state_dict().values()}
    u, t = torch.randn(12, prior.dim, generator=seed(0)), torch.zeros(24, dtype=torch.long)
    both = prior.transform.states(torch.cat((u, u)))
    # What is kept at a time, each of it measured by itself: the loss alone, or a gradient of the chain; or two losses.
    moments = [[lambda: prior.batch_loss(u, None, seed(0)).total.sum()]]
    if kind is DiffusionEBMPrior and not context:
        terms = prior.terms_at(t[:12])
        moments = [
            [lambda: terms(prior.transform.states(u.clone().requires_grad_()), t[:12])[0].sum()],
            [lambda: prior.learned_corrections(both, t)[0].sum()],
        ]
    if context:
        last = replace(prior.objective(TrainingConfig(), 10**6), recovery=0.0)
        assert last.calibration
        moments = [
            [
                lambda: prior.batch_loss(u, None, seed(0), objective=last).total.sum(),
                lambda: prior.learned_corrections(both, t)[0].sum(),
            ]
        ]
    expected = max(
        sum(nbytes for part in parts for address, nbytes in kept_bytes(part).items() if address not in apart)
        for parts in moments
    )
    assert found.activations == pytest.approx(expected, rel=0.1)
    own, learned = (
        sum(value.nbytes for value in values) for values in (prior.state_dict().values(), prior.parameters())
    )
    assert found.weights == 4 * own + sum(value.nbytes for value in prior.backbone.model.state_dict().values())
    assert found.optimizer == 3 * learned
    assert found.free is None
    assert prior.estimate(24).total - found.total == 12 * found.per_image


def test_an_estimate_in_words():
    parts = "1 MiB of weights, 1.5 MiB of the optimiser, 10.1 KiB of activations (1 KiB per image)"
    assert (
        str(MemoryEstimate(10, 2**20, 3 * 2**19, 100, 1024, 2**31))
        == f"2.51 MiB for 10 images at a time: {parts}; 2 GiB are free"
    )


def test_estimates_of_nothing_are_refused():
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        diffusion().estimate(0)


@pytest.mark.parametrize(
    ("kind", "context"), [(DiffusionEBMPrior, False), (DiffusionEBMPrior, True), (NCPPrior, False)]
)
def test_bfloat16_is_for_what_is_computed_and_not_for_what_is_kept(kind, context):
    """The loss sees energies in bfloat16; weights, their gradients and u stay in float32, and the gradient is close to
    the exact one. With context that is the loss at the end of a run, all of whose parts are in it.
    """

    def prior(autocast):
        torch.manual_seed(0)
        made = kind(
            Seeing([(4, 8, 8), (6,)]),
            energy=replace(TINY, context=context),
            execution=ExecutionConfig(autocast=autocast),
        )
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=seed(3))
        return made

    gradients, dtypes = [], []
    for autocast in (None, "bfloat16"):
        made = prior(autocast)
        seen = []
        linear = made.energies[1].network.blocks[0].first if context else made.energies[1].readout
        linear.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out.dtype))
        u = torch.randn(32, made.dim, generator=seed(0))
        losses = made.batch_loss(u, None, seed(1), objective=made.objective(TrainingConfig(), 10**6))
        losses.total.mean().backward()
        assert losses.total.dtype == torch.float32
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in made.parameters()]))
        dtypes.append(set(seen))
    assert dtypes == [{torch.float32}, {torch.bfloat16}]
    assert gradients[1].dtype == torch.float32
    assert 0 < (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.1


def test_float16_leaves_the_loss_alone():
    assert isinstance(
        ExecutionConfig(autocast="float16").loss_precision(torch.device("cpu")),
        type(ExecutionConfig().precision(torch.device("cpu"))),
    )


class Augmented(Dataset):
    """Draws from the global generators as it is read."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return 0.9 * IMAGES[i] + 0.1 * torch.rand_like(IMAGES[i]), int(LABELS[i])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_reading_ahead_changes_nothing():
    """Batches are the same for any number of workers, from the start and from a place in the middle of a pass."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        given = [
            [next(batches) for _ in range(12)]
            for workers in (0, 1, 2)
            for batches in [Batches(Augmented(), 8, seed(4), None, workers)]
        ]
        assert torch.equal(torch.rand(3), expected)
    for images in given[1:]:
        assert all(
            torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
            for a, b in zip(images, given[0], strict=True)
        )
    source, other = seed(4), seed(9)
    first, second = Batches(Augmented(), 8, source, None, 1), Batches(Augmented(), 8, other, None, 2)
    for _ in range(7):
        next(first)
    second.go_to(*first.place())
    other.set_state(source.get_state())
    for expected in given[0][7:]:
        assert torch.equal(next(second)[0], expected[0])


class Foreign(Augmented):
    """Draws from the generators of Python and NumPy."""

    def __getitem__(self, i):
        return IMAGES[i] * (0.5 + 0.25 * random.random() + 0.25 * np.random.random())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_workers_all_generators_are_seeded():
    drawn = [next(Batches(Foreign(), 8, seed(4), None, workers))[0] for workers in (1, 2)]
    assert torch.equal(*drawn)


def test_speed_is_no_part_of_a_run(tmp_path):
    """A run goes on with another micro_batch or number of workers."""
    settings = replace(SETTINGS, iterations=4)
    with pytest.raises(InterruptedError):
        train(diffusion, settings, checkpoint_dir=tmp_path, checkpoint_every=2, callback=interrupt)
    _, weights = train(diffusion, replace(settings, micro_batch=2), checkpoint_dir=tmp_path, resume=True)
    assert close(weights, train(diffusion, settings)[1])
    with pytest.raises(ValueError, match=r"training.encode_batch is None there and 2 here"):
        train(diffusion, replace(settings, encode_batch=2), checkpoint_dir=tmp_path, resume=True)


def interrupt(prior, record):
    if record.iteration == 3:
        raise InterruptedError
    assert math.isfinite(record.loss)
