"""Two processes give what one gives: gradients, weights, images, features, and the way out of trouble."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, Seeing
from helpers import IMAGES, SMALL, TINY, same, seed, state
from stand_ins import perturb
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from two_processes import free_port, run

from hvae_ebm_prior import (
    ChainDiverged,
    Coupling,
    DiffusionEBMPrior,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
    processes,
)
from hvae_ebm_prior.baselines import GaussianPrior, JointEBMPrior, NCPPrior
from hvae_ebm_prior.evaluation.protocol import evaluate
from hvae_ebm_prior.training.checkpoint import find_checkpoints

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LABELS = torch.arange(40) % 3 - 1
# Nine images a step do not divide by two.
SETTINGS = TrainingConfig(iterations=6, batch_size=9, activity_images=16, learning_rate=1e-2, warmup=0)


def backbone():
    return Seeing([(2,), (3,)], dtype=torch.float64)


def diffusion(**settings):
    """In double precision, as Adam turns roundings of gradients that are 0 (of offsets of F) into whole steps."""
    torch.manual_seed(0)
    return DiffusionEBMPrior(backbone(), langevin=LangevinConfig(steps=2), **{"energy": SMALL, **settings}).double()


def spectral():
    return diffusion(energy=replace(SMALL, spectral_norm=True))


def coupled():
    return diffusion(coupling=Coupling({"class": LabelSet(2)}, networks=SMALL))


def with_context(**settings):
    """With weights of which no gradient is 0."""
    return perturb(diffusion(energy=TINY, **settings))


def with_context_coupled():
    return with_context(coupling=Coupling({"class": LabelSet(2, layers=(1,))}, networks=TINY))


def ncp():
    torch.manual_seed(0)
    return NCPPrior(backbone(), energy=SMALL).double()


def joint():
    torch.manual_seed(0)
    return JointEBMPrior(backbone(), energy=SMALL, langevin=LangevinConfig(steps=2)).double()


# Priors, and what of the settings is their own: score matching alone, and what recovery adds at the end of training.
CASES = {
    "joint recovery": (diffusion, {}),
    "spectral norm": (spectral, {}),
    "coupled": (coupled, {"labels": LABELS}),
    "ncp": (ncp, {}),
    "joint": (joint, {}),
    "score": (with_context, {"objective": "score"}),
    "score-recovery": (with_context, {"recovery_share": 1.0}),
    "score-recovery, coupled": (with_context_coupled, {"recovery_share": 1.0, "labels": LABELS}),
    "recovery": (with_context, {"objective": "recovery"}),
    "joint recovery with context": (with_context_coupled, {"objective": "joint-recovery", "labels": LABELS}),
}
# What is measured rather than learned.
STATISTICS = ("activity", "context_mean", "context_scale")


def of_case(name, settings=SETTINGS):
    """How a case's prior is made, and what `train` and `first_gradient` are given."""
    make, own = CASES[name]
    arguments = {"labels": own["labels"]} if "labels" in own else {}
    changes = {key: value for key, value in own.items() if key != "labels"}
    return make, {"settings": replace(settings, **changes), **arguments}


def figures(history):
    return [
        (record.loss, *record.gaps, record.gradient_norm, record.cross_entropy, record.score, record.calibration)
        for record in history
    ]


def first_gradient(prior, images=IMAGES, settings=SETTINGS, **arguments):
    """The gradient of the first step, before clipping, by parameter."""
    found = []

    def clip(parameters, limit):
        found.append([None if each.grad is None else each.grad.clone() for each in parameters])
        return torch.tensor(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        prior.fit(images, training=replace(settings, iterations=1), generator=seed(1), progress=False, **arguments)
    return found[0]


def train(make, settings=SETTINGS, data=IMAGES, generator=1, **arguments):
    prior = make()
    history = prior.fit(data, training=settings, generator=seed(generator), progress=False, **arguments)
    return figures(history), state(prior)


def close(a, b, tolerance=1e-7):
    return a.keys() == b.keys() and all(
        torch.allclose(value, b[name], rtol=tolerance, atol=tolerance) for name, value in a.items()
    )


def alike(history, other):
    a, b = (torch.tensor(rows, dtype=torch.float64) for rows in (history, other))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)


def moved(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a if not name.endswith(STATISTICS))


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_weights_are_those_of_one_process(name):
    """Of one step the gradient, of several the weights and figures; between the processes weights are the same bits."""
    make, arguments = of_case(name)

    def work(rank):
        return first_gradient(make(), **arguments), *train(make, **arguments)

    gradient, history, weights = work(0)
    found = run(work)
    for theirs, their_history, their_weights in found:
        assert [each is None for each in theirs] == [each is None for each in gradient]
        for a, b in zip(theirs, gradient, strict=True):
            assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-12)
        assert torch.allclose(
            torch.tensor(their_history, dtype=torch.float64),
            torch.tensor(history, dtype=torch.float64),
            rtol=1e-6,
            atol=1e-9,
            equal_nan=True,
        )
        assert close(their_weights, weights)
    assert same(found[0][2], found[1][2])
    assert moved(weights, state(make())) > 0.01


def test_gradient_is_the_weighted_mean_of_the_shares():
    """Against the loss of the public API: rows 0..3 and 4..8 of a batch of nine, weighted 4 : 5."""
    calls = []

    def work(rank):
        prior = diffusion()
        plain = DiffusionEBMPrior.batch_loss

        def seen(self, u, labels, generator, rows=None, *others):
            calls.append(rows)
            return plain(self, u, labels, generator, rows, *others)

        DiffusionEBMPrior.batch_loss = seen
        first_gradient(prior)
        return calls

    assert run(work) == [[range(0, 4)], [range(4, 9)]]


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (3, 3), (40, 40)])
def test_any_batch_size(count, batch):
    """Also fewer images than processes."""
    settings = replace(SETTINGS, batch_size=batch, iterations=3)
    history, weights = train(diffusion, settings, IMAGES[:count])
    for their_history, their_weights in run(lambda rank: train(diffusion, settings, IMAGES[:count]), processes=2):
        assert torch.allclose(
            torch.tensor(their_history, dtype=torch.float64),
            torch.tensor(history, dtype=torch.float64),
            rtol=1e-6,
            atol=1e-9,
            equal_nan=True,
        )
        assert close(their_weights, weights)


def test_the_first_process_counts():
    """Other weights, another seed and no generator in the second process change nothing."""

    def work(rank, seeded):
        prior = diffusion()
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter += rank
        torch.manual_seed(rank)
        prior.fit(IMAGES, training=SETTINGS, generator=seed(rank) if seeded else None, progress=False)
        return state(prior)

    with torch.random.fork_rng():
        alone = work(0, True)
    first, second = run(work, True)
    assert same(first, second)
    assert close(first, alone)
    assert same(*run(work, False))


def test_posterior_draws_in_parts_do_not_depend_on_the_processes():
    """Parts of two images cut across the shares of 4 and 5; each process encodes only the parts it needs."""
    settings = replace(SETTINGS, encode_batch=2)

    def work(rank):
        sizes, plain = [], Seeing.infer_with_posterior
        Seeing.infer_with_posterior = lambda self, images: (sizes.append(len(images)), plain(self, images))[1]
        try:
            return *train(diffusion, replace(settings, activity_images=0)), sizes
        finally:
            Seeing.infer_with_posterior = plain

    _, weights, sizes = work(0)
    assert not close(weights, train(diffusion, replace(SETTINGS, activity_images=0))[1])
    assert sizes == [2, 2, 2, 2, 1] * 6
    found = run(work)
    assert [theirs[2] for theirs in found] == [[2, 2] * 6, [2, 2, 1] * 6]
    assert close(found[0][1], weights)
    assert same(found[0][1], found[1][1])


def test_trouble_in_one_process_is_trouble_in_all():
    """The chain of one row runs away at the third step: both processes go back to the last good state, and on with the
    same weights.
    """

    def work(rank, sick):
        prior, plain, steps = diffusion(), DiffusionEBMPrior.batch_loss, []

        def loss(self, *arguments):
            found = plain(self, *arguments)
            steps.append(None)
            if rank == sick and len(steps) == 3:
                raise ChainDiverged("a chain ran away")
            return found

        DiffusionEBMPrior.batch_loss = loss
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                history = prior.fit(IMAGES, training=SETTINGS, generator=seed(1), progress=False)
        finally:
            DiffusionEBMPrior.batch_loss = plain
        return (
            state(prior),
            figures(history),
            [str(each.message) for each in seen if "last good state" in str(each.message)],
        )

    weights, history, told = work(0, 0)
    for sick in (0, 1):
        found = run(work, sick)
        assert [theirs[2] for theirs in found] == [told, told]
        assert "step 3: a chain ran away; back to the last good state" in told[0]
        assert same(found[0][0], found[1][0])
        assert close(found[0][0], weights)
        assert len(found[0][1]) == len(history) == 6


def test_an_error_in_one_process_ends_all():
    def work(rank):
        prior = diffusion()
        plain = prior.encode_with_posterior
        prior.encode_with_posterior = lambda images, generator: (
            1 / 0 if rank == 1 and len(images) == 9 else plain(images, generator=generator)
        )
        prior.fit(IMAGES, training=replace(SETTINGS, activity_images=0), generator=seed(1), progress=False)

    for error in run(work):
        assert isinstance(error, ZeroDivisionError)
        assert error.__notes__ == ["(in process 1 of 2)"]


def test_an_error_that_cannot_be_sent_is_told():
    def work(rank):
        class Local(Exception):
            pass

        def fail():
            if rank == 0:
                raise Local("here")

        processes.collect(fail)

    for error in run(work):
        assert type(error) is RuntimeError
        assert str(error) == "Local: here"


def test_callback_and_checkpoints_are_of_the_first_process_alone(tmp_path):
    """The callback may draw samples, which then takes no other process; what it raises ends all."""

    def work(rank):
        prior, seen = diffusion(), []

        def callback(prior, record):
            seen.append((record.iteration, len(prior.sample(3, generator=seed(0)))))
            if record.iteration == 4:
                raise KeyError("enough")

        try:
            prior.fit(
                IMAGES,
                training=SETTINGS,
                generator=seed(1),
                callback=callback,
                checkpoint_dir=tmp_path,
                checkpoint_every=2,
                progress=False,
            )
        except KeyError as error:
            return seen, str(error)

    assert run(work) == [([(1, 3), (2, 3), (3, 3), (4, 3)], "'enough'"), ([], "'enough'")]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000002.json"]


@pytest.mark.parametrize("processes_before", [1, 2])
@pytest.mark.parametrize("make", [diffusion, with_context])
def test_a_run_goes_on_from_a_checkpoint(make, processes_before, tmp_path):
    """Begun by one or two processes and interrupted, gone on with by two: in the latter case bit for bit what was never
    interrupted. With context, recovery begins in between.
    """
    settings = replace(SETTINGS, iterations=8, recovery_share=0.5)

    def begin(rank):
        def stop(prior, record):
            if record.iteration == 5:
                raise InterruptedError

        try:
            train(make, settings, checkpoint_dir=tmp_path, checkpoint_every=3, callback=stop)
        except InterruptedError:
            return rank

    def go_on(rank):
        return train(make, settings, generator=7, checkpoint_dir=tmp_path, resume=True)

    assert begin(0) == 0 if processes_before == 1 else run(begin) == [0, 1]
    (whole, weights), _ = run(lambda rank: train(make, settings))
    found = run(go_on)
    assert same(found[0][1], found[1][1])
    assert close(found[0][1], weights)
    if processes_before == 2:
        assert same(found[0][1], weights)
        assert [row[0] for row in found[0][0]] == [row[0] for row in whole]


class Augmented(Dataset):
    """Draws from torch's global generator as it is read."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return 0.9 * IMAGES[i] + 0.1 * torch.rand_like(IMAGES[i])


def test_datasets_and_loaders():
    for data in (Augmented(), [IMAGES[:9], IMAGES[9:16]]):
        _, weights = train(diffusion, data=data)
        first, second = run(lambda rank, data=data: train(diffusion, data=data))
        assert same(first[1], second[1])
        assert close(first[1], weights)


def test_data_that_are_divided_already_are_refused():
    def work(rank):
        data = TensorDataset(IMAGES)
        loader = DataLoader(
            data, batch_size=8, sampler=DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
        )
        train(diffusion, data=loader, settings=replace(SETTINGS, activity_images=0))

    for error in run(work):
        assert isinstance(error, ValueError)
        assert re.search("processes read different batches.*no DistributedSampler", str(error))


def test_persistent_chains_are_refused():
    def work(rank):
        torch.manual_seed(0)
        prior = JointEBMPrior(
            Seeing([(2,)]), chains="persistent", kept=12, energy=SMALL, langevin=LangevinConfig(steps=2)
        )
        prior.fit(IMAGES, training=SETTINGS, generator=seed(0), progress=False)

    for error in run(work):
        assert isinstance(error, ValueError)
        assert "persistent chains are those of whole batches" in str(error)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_samples_are_those_of_one_process_in_order(n):
    """Each process computes its share, and both have all."""

    def work(rank):
        priors = [diffusion(), with_context(), ncp(), GaussianPrior(backbone())]
        drawn, plain = [], diffusion().transform.__class__.decode

        def decode(self, u):
            drawn.append(len(u))
            return plain(self, u)

        priors[0].transform.__class__.decode = decode
        try:
            images = [prior.sample(n, generator=seed(rank + 5)) for prior in priors]
            images.append(
                priors[0].sample(n, fixed={0: torch.arange(2.0 * n).reshape(n, 2)}, chunk_size=2, generator=seed(5))
            )
        finally:
            priors[0].transform.__class__.decode = plain
        return images, sum(drawn)

    expected, _ = work(0)
    found = run(work)
    for images, _ in found:
        for a, b in zip(images, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert [count for _, count in found] == [5 * (n // 2), 5 * (n - n // 2)]


def test_a_chain_that_runs_away_in_one_process_is_told_to_all():
    def work(rank):
        prior = DiffusionEBMPrior(IdentityBackbone((1,)), energy=[Quadratic(1)], langevin=LangevinConfig(steps=1))
        plain = prior.decode
        prior.decode = lambda u: plain(u * (float("nan") if rank else 1.0))
        prior.sample(4, generator=seed(0))

    for error in run(work):
        assert isinstance(error, ChainDiverged)


def test_evaluation_is_that_of_one_process():
    """Rows and distances, with every process seeing its share of the images only."""

    def work(rank):
        seen = []

        def features(images):
            seen.append(len(images))
            return images.flatten(1)

        rows = evaluate(
            diffusion(), IMAGES[:20], IMAGES[20:], features, temperatures=(0.8,), chunk_size=6, generator=seed(0)
        )
        return [(row.name, row.distance) for row in rows], sum(seen)

    expected, seen = work(0)
    found = run(work)
    for rows, _ in found:
        assert [name for name, _ in rows] == [name for name, _ in expected]
        assert [distance for _, distance in rows] == pytest.approx([distance for _, distance in expected], rel=1e-4)
    # The reference's 20 images are seen by both, the 100 of five rows by one of them.
    assert seen == 120
    assert sum(count for _, count in found) == 140


def test_by_itself_a_process_is_the_only_one():
    def work(rank):
        assert (processes.world(), processes.rank()) == (2, rank)
        if rank == 1:
            with processes.alone():
                assert (processes.world(), processes.rank(), processes.share(5)) == (1, 0, range(5))
                return len(diffusion().sample(3, generator=seed(0)))

    assert run(work) == [None, 3]


def test_shares_cover_everything_in_order():
    def work(rank):
        shares = [processes.share(n) for n in range(8)]
        processes.collect(lambda: None)  # one that left early would not be met by the others
        return shares

    found = run(work, processes=3)
    for n in range(8):
        shares = [theirs[n] for theirs in found]
        assert [i for each in shares for i in each] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


SCRIPT = """
import sys, torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
if {accelerate}:
    from accelerate import Accelerator
    Accelerator(cpu=True)
from test_processes import SETTINGS, diffusion, train
from helpers import seed
from hvae_ebm_prior.processes import rank, world
history, weights = train(diffusion)
images = diffusion().sample(5, generator=seed(5))
torch.save((world(), history, weights, images), {out!r} + str(rank()))
"""


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "accelerate"])
def test_the_same_script_runs_under_a_launcher(launcher, tmp_path):
    if launcher == "accelerate" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("needs accelerate")
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(path=[str(Path(__file__).parents[1])], out=f"{tmp_path}/out", accelerate=launcher == "accelerate")
    )
    port = free_port()
    # The launcher that takes two processes of one machine is named after GPUs; Accelerator(cpu=True) makes their group
    # one of the CPU.
    options = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={port}"],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", *options, str(script)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    history, weights = train(diffusion)
    images = diffusion().sample(5, generator=seed(5))
    for rank in range(2):
        count, their_history, their_weights, theirs = torch.load(f"{tmp_path}/out{rank}")
        assert count == 2
        assert torch.allclose(
            torch.tensor(their_history, dtype=torch.float64),
            torch.tensor(history, dtype=torch.float64),
            rtol=1e-6,
            atol=1e-9,
            equal_nan=True,
        )
        assert close(their_weights, weights)
        torch.testing.assert_close(theirs, images, rtol=1e-9, atol=1e-9)
