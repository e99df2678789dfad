"""Training that is interrupted, killed or has its files damaged ends where an uninterrupted run ends, bit for bit."""

import functools
import json
import math
import os
import random
import shutil
import signal
import time
import traceback
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from backbones import IdentityBackbone, Seeing
from helpers import IMAGES, SMALL, TINY, same, seed, state
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    EnergyConfig,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.baselines import JointEBMPrior, NCPPrior
from hvae_ebm_prior.saving.digest import digest_file
from hvae_ebm_prior.training import loop
from hvae_ebm_prior.training.batches import Batches
from hvae_ebm_prior.training.checkpoint import COLUMNS, find_checkpoints, list_differences, state_of_run

LABELS = torch.arange(40) % 3
SHAPES = [(2,), (3,)]
SETTINGS = TrainingConfig(iterations=24, batch_size=8, activity_images=16, learning_rate=1e-3, warmup=10)


def diffusion():
    torch.manual_seed(0)
    return DiffusionEBMPrior(Seeing(SHAPES), energy=SMALL, langevin=LangevinConfig(steps=2))


def coupled():
    torch.manual_seed(0)
    coupling = Coupling({"class": LabelSet(3), "smile": LabelSet(2, layers=(1,))}, networks=SMALL)
    return DiffusionEBMPrior(Seeing(SHAPES), energy=SMALL, langevin=LangevinConfig(steps=2), coupling=coupling)


def with_context():
    torch.manual_seed(0)
    return DiffusionEBMPrior(Seeing(SHAPES), energy=TINY, langevin=LangevinConfig(steps=2))


def with_context_coupled():
    prior = with_context()
    prior.couple(Coupling({"class": LabelSet(3), "smile": LabelSet(2, layers=(1,))}, networks=TINY))
    return prior


def half_inactive():
    """The second layer stays Gaussian: its network is not run."""
    prior = with_context()
    prior.energies[1].set_statistics(torch.zeros(3), torch.zeros(2, 3), torch.ones(2, 3))
    return prior


def spectral():
    torch.manual_seed(0)
    return DiffusionEBMPrior(
        Seeing(SHAPES), energy=replace(SMALL, spectral_norm=True), langevin=LangevinConfig(steps=2)
    )


class Dropping(nn.Module):
    """Draws from torch's global generator while it is trained."""

    def __init__(self, size):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, z, t):
        return self.layers(z.flatten(1))[:, 0]


def dropping():
    torch.manual_seed(0)
    return DiffusionEBMPrior(Seeing(SHAPES), energy=[Dropping(2), Dropping(3)], langevin=LangevinConfig(steps=2))


def ncp():
    torch.manual_seed(0)
    return NCPPrior(Seeing(SHAPES), energy=SMALL)


def persistent():
    torch.manual_seed(0)
    return JointEBMPrior(
        Seeing(SHAPES), chains="persistent", kept=12, renewal=0.2, energy=SMALL, langevin=LangevinConfig(steps=2)
    )


class Augmented(Dataset):
    """Images with noise from torch's global generator, as augmentation has it."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return 0.9 * IMAGES[i] + 0.1 * torch.rand_like(IMAGES[i])


class Stream(IterableDataset):
    def __iter__(self):
        yield from (0.9 * image + 0.1 * torch.rand_like(image) for image in IMAGES)


def timeless(tensors):
    """A checkpoint's tensors without the time that steps took; NaN stands for itself."""
    tensors["history"][:, [COLUMNS.index(name) for name in ("seconds", "gradients_per_second")]] = 0
    return {name: value.nan_to_num(-1.0) for name, value in tensors.items()}


def state_in(path):
    """All that a checkpoint holds, but for the time that steps took."""
    return json.loads(path.read_text())["state"], timeless(load_file(path.with_suffix(".safetensors")))


def same_state(folder, other):
    (numbers, tensors), (others, other_tensors) = (state_in(find_checkpoints(each)[0]) for each in (folder, other))
    return numbers == others and same(tensors, other_tensors)


def figures(history):
    """Records without the time, NaN as text so that they can be compared."""
    return [repr(replace(record, seconds=0.0, gradients_per_second=0.0)) for record in history]


class Interrupted(Exception):
    pass


def stop_at(step):
    def callback(prior, record):
        if record.iteration == step:
            raise Interrupted

    return callback


def begin(generator, global_seed):
    """A run's generator, and torch's global one in a known state."""
    given = generator()
    torch.manual_seed(global_seed)
    return given


def interrupted_run(make, data, folder, steps, *, every, training=SETTINGS, generator=lambda: seed(3), **arguments):
    """A run that is interrupted after each of `steps` and gone on with by a fresh prior under other seeds; the prior
    and its history.
    """
    for step in [*steps, None]:
        prior, given = make(), begin(generator, 5)
        if find_checkpoints(folder):
            torch.manual_seed(78)
            given = given and seed(77)
        files = {"checkpoint_dir": folder, "checkpoint_every": every, "resume": True}
        try:
            return prior, prior.fit(
                data(), training=training, callback=stop_at(step), generator=given, progress=False, **files, **arguments
            )
        except Interrupted:
            pass
    raise AssertionError("the last run was interrupted")


def whole_run(make, data, *, training=SETTINGS, generator=lambda: seed(3), **arguments):
    prior, given = make(), begin(generator, 5)
    return prior, prior.fit(data(), training=training, generator=given, progress=False, **arguments)


@functools.cache
def uninterrupted():
    """Weights and history of the plainest run."""
    prior, history = whole_run(diffusion, lambda: IMAGES)
    return state(prior), figures(history)


# Recovery begins at the sixth step, or of six steps at the fourth.
RECOVERING = replace(SETTINGS, recovery_share=0.8)
SIX = TrainingConfig(iterations=6, batch_size=8, activity_images=16, warmup=2, recovery_share=0.5)
RUNS = {
    "tensor": (diffusion, lambda: IMAGES, {}),
    "tensor, global generator": (diffusion, lambda: IMAGES, {"generator": lambda: None}),
    "dataset": (diffusion, lambda: TensorDataset(IMAGES), {}),
    "dataset with augmentation": (diffusion, Augmented, {}),
    "loader": (diffusion, lambda: DataLoader(TensorDataset(IMAGES), batch_size=7, shuffle=True), {}),
    "loader, global generator": (
        diffusion,
        lambda: DataLoader(Augmented(), batch_size=7, shuffle=True),
        {"generator": lambda: None},
    ),
    "loader with augmentation": (diffusion, lambda: DataLoader(Augmented(), batch_size=7, shuffle=True), {}),
    "loader with a generator": (
        diffusion,
        lambda: DataLoader(Augmented(), batch_size=7, shuffle=True, generator=seed(8)),
        {},
    ),
    "loader whose sampler has one": (
        diffusion,
        lambda: DataLoader(Augmented(), batch_size=7, sampler=RandomSampler(IMAGES, generator=seed(8))),
        {},
    ),
    "stream": (diffusion, Stream, {}),
    "list of batches": (diffusion, lambda: list(IMAGES.split(9)), {}),
    "labels": (coupled, lambda: IMAGES, {"labels": {"class": LABELS}}),
    "labels of a dataset": (
        coupled,
        lambda: [({"class": LABELS[:8]}, IMAGES[:8])[::-1], (IMAGES[8:16], {"smile": LABELS[8:16] % 2})],
        {},
    ),
    "spectral norm": (spectral, lambda: IMAGES, {}),
    "dropout": (dropping, lambda: IMAGES, {}),
    "ncp": (ncp, lambda: IMAGES, {}),
    "persistent chains": (persistent, lambda: IMAGES, {}),
    "context": (with_context, lambda: IMAGES, {"training": RECOVERING}),
    "context, an inactive layer": (half_inactive, lambda: IMAGES, {"training": replace(SETTINGS, objective="score")}),
    "context, score alone": (with_context, lambda: IMAGES, {"training": replace(SETTINGS, objective="score")}),
    "context, recovery alone": (with_context, lambda: IMAGES, {"training": replace(SETTINGS, objective="recovery")}),
    "context, labels": (
        with_context_coupled,
        lambda: IMAGES,
        {"labels": {"class": LABELS}, "training": RECOVERING, "generator": lambda: None},
    ),
    "context, loader with augmentation": (
        with_context,
        lambda: DataLoader(Augmented(), batch_size=7, shuffle=True),
        {"training": RECOVERING},
    ),
}


@pytest.mark.parametrize("name", ["tensor", "loader, global generator", "persistent chains", "context, labels"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(name, tmp_path):
    make, data, arguments = RUNS[name]
    expected, whole = whole_run(make, data, **arguments, checkpoint_dir=tmp_path / "whole", checkpoint_every=100)
    # Before the first checkpoint, on one and between two, at the end of a pass (5 batches of 8 images), and twice
    # between the same two; with context before and after recovery begins.
    folder = tmp_path / "interrupted"
    prior, history = interrupted_run(make, data, folder, [3, 8, 11, 15, 18, 19], every=4, **arguments)
    assert same(state(prior), state(expected))
    assert same_state(folder, tmp_path / "whole")
    assert figures(history) == figures(whole)
    assert all(a.seconds < b.seconds for a, b in pairwise(history))
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step_{step:08}.{kind}" for step in (20, 24) for kind in ("json", "safetensors")
    ]


@pytest.mark.parametrize("make", [with_context, with_context_coupled])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_recovery_begins_as_in_a_run_that_was_never_interrupted(make, step, tmp_path):
    """Interrupted before the fourth step, on the checkpoint before it, and after it."""
    arguments = {"training": SIX, **({"labels": {"class": LABELS}} if make is with_context_coupled else {})}
    expected, whole = whole_run(make, lambda: IMAGES, **arguments, checkpoint_dir=tmp_path / "whole")
    prior, history = interrupted_run(make, lambda: IMAGES, tmp_path / "interrupted", [step], every=1, **arguments)
    assert same(state(prior), state(expected))
    assert same_state(tmp_path / "interrupted", tmp_path / "whole")
    assert figures(history) == figures(whole)
    assert [math.isnan(record.displacement) for record in whole] == [True] * 3 + [False] * 3
    assert not any(math.isnan(record.calibration) for record in whole)
    assert not any(math.isnan(record.score) for record in history)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_goes_on_from_a_checkpoint(name, tmp_path):
    """From the fourth step over the end of a pass (5 or 6 batches) to the seventh, under other seeds: the checkpoint
    there is that of the run that was never interrupted.
    """
    make, data, arguments = RUNS[name]
    arguments = {"generator": lambda: seed(3), **arguments}
    given = arguments.pop("generator")
    files = {"training": SETTINGS, "checkpoint_every": 1, "resume": True, "progress": False} | arguments

    def callback(prior, record):
        if record.iteration == 5:
            shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        stop_at(8)(prior, record)

    with pytest.raises(Interrupted):
        make().fit(data(), generator=begin(given, 5), callback=callback, checkpoint_dir=tmp_path / "whole", **files)
    prior, generator = make(), given() and seed(77)
    torch.manual_seed(78)
    with pytest.raises(Interrupted):
        prior.fit(data(), generator=generator, callback=stop_at(8), checkpoint_dir=tmp_path / "resumed", **files)
    for folder in ("whole", "resumed"):
        assert find_checkpoints(tmp_path / folder)[0].stem == "step_00000007"
    assert same_state(tmp_path / "resumed", tmp_path / "whole")


def test_runs_of_this_file_can_be_told_apart():
    """The comparison above would fail had the noise, the learning rate or the order of the images been others."""
    for data, changes in (
        (IMAGES, {"generator": lambda: seed(4)}),
        (IMAGES, {"training": replace(SETTINGS, learning_rate=1.1e-3)}),
        (IMAGES.flip(0), {}),
    ):
        other, _ = whole_run(diffusion, lambda data=data: data, **changes)
        assert not same(state(other), uninterrupted()[0])


def test_the_global_generator_is_where_an_uninterrupted_run_leaves_it(tmp_path):
    whole_run(dropping, lambda: IMAGES)
    expected = torch.rand(3)
    interrupted_run(dropping, lambda: IMAGES, tmp_path, [11], every=4)
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_run_is_read_back_without_a_step(tmp_path):
    prior, history = interrupted_run(diffusion, lambda: IMAGES, tmp_path, [], every=100)
    again, files = diffusion(), {"checkpoint_dir": tmp_path, "resume": True}
    read = again.fit(
        IMAGES,
        training=SETTINGS,
        callback=lambda *_: pytest.fail("a step was taken"),
        generator=seed(1),
        progress=False,
        **files,
    )
    assert same(state(again), state(prior))
    assert [repr(record) for record in read] == [repr(record) for record in history]


def test_the_optimiser_goes_on_with_its_moments(tmp_path):
    """What the files hold is Adam's own state after as many steps, tensor by tensor."""
    kept = []
    original = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        kept[:] = [self]
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        diffusion().fit(
            IMAGES, training=replace(SETTINGS, iterations=6), generator=seed(0), progress=False, checkpoint_dir=tmp_path
        )
    tensors = load_file(tmp_path / "step_00000006.safetensors")
    moments = kept[0].state_dict()["state"]
    assert moments
    for i, named in moments.items():
        for name, value in named.items():
            assert torch.equal(tensors[f"adam.{i}.{name}"], value)
    assert tensors["adam.0.step"].item() == 6


class Faulty(nn.Module):
    """w . z, but for some calls of the trainee's: a stand-in for the blow-up of a real run. The calls are counted in a
    buffer.
    """

    def __init__(self, calls):
        super().__init__()
        self.w, self.faults = nn.Parameter(torch.full((), 1e-3)), calls
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, z, t):
        if self.training:
            self.calls += 1
        return self.w * (torch.nan if self.training and int(self.calls) in self.faults else 1.0) * z.flatten(1).sum(1)


@pytest.mark.parametrize("steps", [[60, 62], [57, 70, 90]])
def test_the_guards_state_survives(steps, tmp_path):
    """Blow-ups before and after interruptions: the same snapshots come back, and the same learning rates follow."""

    def make():
        # A step calls the network three times, two of them in the chain.
        return DiffusionEBMPrior(
            IdentityBackbone((2,)), energy=[Faulty({177, 183, 297})], langevin=LangevinConfig(steps=2)
        )

    training = TrainingConfig(iterations=100, batch_size=8, learning_rate=1e-3, warmup=10, restarts=5)
    data = lambda: torch.full((16, 1, 1, 2), 0.55)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="back to the last good state") as caught:
        expected, whole = whole_run(make, data, training=training, checkpoint_dir=tmp_path / "whole")
    assert len(caught) >= 2
    with pytest.warns(RuntimeWarning, match="back to the last good state"):
        prior, history = interrupted_run(make, data, tmp_path / "interrupted", steps, every=6, training=training)
    assert same(state(prior), state(expected))
    assert same_state(tmp_path / "interrupted", tmp_path / "whole")
    assert figures(history) == figures(whole)
    assert min(record.learning_rate for record in history[70:]) < 0.5 * 1e-3


def test_checkpoints_change_nothing(tmp_path):
    prior, history = whole_run(diffusion, lambda: IMAGES, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert same(state(prior), uninterrupted()[0])
    assert figures(history) == uninterrupted()[1]


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in (
        ("pickle", "dump"),
        ("pickle", "dumps"),
        ("pickle", "load"),
        ("pickle", "loads"),
        ("torch", "save"),
        ("torch", "load"),
    ):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    interrupted_run(persistent, lambda: IMAGES, tmp_path, [11], every=4)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "checkpoints"
    with pytest.raises(Interrupted):
        diffusion().fit(
            IMAGES,
            training=SETTINGS,
            callback=stop_at(15),
            checkpoint_dir=folder,
            checkpoint_every=4,
            generator=seed(3),
            progress=False,
        )
    return folder


@pytest.fixture
def begun(template, tmp_path):
    """A run interrupted at step 15, with checkpoints of steps 8 and 12."""
    return shutil.copytree(template, tmp_path / "checkpoints")


def go_on(folder, make=diffusion, data=IMAGES, training=SETTINGS, given=1, every=4, **arguments):
    prior, generator = make(), given and seed(given)
    files = {"checkpoint_dir": folder, "checkpoint_every": every, "resume": True}
    return prior, prior.fit(data, training=training, generator=generator, progress=False, **files, **arguments)


def resumed(folder):
    """The run that `fit` goes on with, before its next step."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_steps", lambda run, *_: runs.append(run))
        go_on(folder)
    return runs[0]


def change_json(path, change):
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def change_tensors(path, change):
    """Other tensors under a digest that is right: what only a look at them can find."""
    weights = path.with_suffix(".safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    change_json(path, lambda about: about.update(sha256=digest_file(weights)))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "weights truncated": lambda path: os.truncate(path.with_suffix(".safetensors"), 1000),
    "weights empty": lambda path: os.truncate(path.with_suffix(".safetensors"), 0),
    "weights missing": lambda path: path.with_suffix(".safetensors").unlink(),
    "weights with one bit flipped": lambda path: flip_a_bit(path.with_suffix(".safetensors")),
    "json truncated": lambda path: os.truncate(path, 500),
    "json empty": lambda path: os.truncate(path, 0),
    "json of another kind": lambda path: path.write_text("[1, 2]"),
    "json binary": lambda path: path.write_bytes(bytes(range(256))),
    "json deep": lambda path: path.write_text("[" * 100_000),
    "json without a state": lambda path: change_json(path, lambda about: about.pop("state")),
    "state of another kind": lambda path: change_json(path, lambda about: about.update(state=3)),
    "another format": lambda path: change_json(path, lambda about: about.update(format=99)),
    "index negative": lambda path: change_json(path, lambda about: about["state"].update(index=-1)),
    "index text": lambda path: change_json(path, lambda about: about["state"].update(index="3")),
    "restarts missing": lambda path: change_json(path, lambda about: about["state"].pop("restarts_left")),
    "learning rate not a number": lambda path: change_json(
        path, lambda about: about["state"].update(lr_scale=float("nan"))
    ),
    "a learning rate below zero": lambda path: change_json(path, lambda about: about["state"].update(lr_scale=-1.0)),
    "a seed that is too large": lambda path: change_json(path, lambda about: about["state"].update(seed=10**30)),
    "no digest": lambda path: change_json(path, lambda about: about.update(sha256=None)),
    "no safetensors": lambda path: (
        path.with_suffix(".safetensors").write_bytes(b"x" * 3000),
        change_json(path, lambda about: about.update(sha256=digest_file(path.with_suffix(".safetensors")))),
    ),
    "a weight missing": lambda path: change_tensors(
        path, lambda tensors: tensors.pop("trainee.energies.0.readout.weight")
    ),
    "a weight of another shape": lambda path: change_tensors(
        path, lambda t: t.update({"prior.energies.0.readout.bias": torch.zeros(9)})
    ),
    "a weight of another type": lambda path: change_tensors(
        path, lambda t: t.update({"good.energies.0.readout.bias": torch.zeros(3).double()})
    ),
    "a stranger": lambda path: change_tensors(path, lambda tensors: tensors.update(stranger=torch.zeros(1))),
    "a stranger kept": lambda path: change_tensors(
        path, lambda tensors: tensors.update({"kept._modules": torch.zeros(1)})
    ),
    "a moment missing": lambda path: change_tensors(path, lambda tensors: tensors.pop("adam.0.exp_avg")),
    "a moment too many": lambda path: change_tensors(
        path, lambda tensors: tensors.update({"adam.99.exp_avg": torch.zeros(1)})
    ),
    "a moment without a number": lambda path: change_tensors(
        path, lambda tensors: tensors.update({"adam.x.exp_avg": torch.zeros(1)})
    ),
    "history too short": lambda path: change_tensors(
        path, lambda tensors: tensors.update(history=tensors["history"][:5].clone())
    ),
    "no random state": lambda path: change_tensors(
        path, lambda t: t.update({"random.given": torch.full_like(t["random.given"], 255)})
    ),
    "no random state of the data": lambda path: change_tensors(
        path, lambda t: t.update({"data.random": torch.full_like(t["data.random"], 255)})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, begun):
    newest, before = find_checkpoints(begun)
    assert (newest.stem, before.stem) == ("step_00000012", "step_00000008")
    expected = state_in(before)
    DAMAGE[damage](newest)
    with pytest.warns(RuntimeWarning, match=r"step_00000012\..*; going on from the checkpoint before") as caught:
        run = resumed(begun)
    assert len(caught) == 1
    tensors, numbers = state_of_run(run)
    assert (numbers, len(run.history)) == (expected[0], 8)
    assert same(timeless(tensors), expected[1])


@pytest.mark.parametrize("damage", ["weights truncated", "weights missing", "json truncated", "a weight missing"])
def test_damage_to_all_is_an_error_that_names_the_file_and_changes_nothing(damage, begun):
    for path in find_checkpoints(begun):
        DAMAGE[damage](path)
    files = {path.name: path.read_bytes() for path in begun.iterdir()}
    prior = diffusion()
    before = state(prior)
    with (
        pytest.warns(RuntimeWarning, match="going on from the checkpoint before"),
        pytest.raises(
            ValueError, match=r"step_00000008\..*holds no whole checkpoint: begin anew in another checkpoint_dir"
        ),
    ):
        prior.fit(IMAGES, training=SETTINGS, checkpoint_dir=begun, resume=True, generator=seed(1), progress=False)
    assert same(state(prior), before)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == files


def test_what_a_killed_process_leaves_is_no_checkpoint_and_is_cleared_away(begun):
    """Weights without their JSON file, and parts of files, as a kill between two renames leaves them."""
    newest, _ = find_checkpoints(begun)
    shutil.copy(newest.with_suffix(".safetensors"), begun / "step_00000016.safetensors")
    (begun / "step_00000016.4711.part.safetensors").write_bytes(b"half")
    (begun / "step_00000016.4711.part.json").write_text("{")
    (begun / "notes.txt").write_text("the user's own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior, _ = go_on(begun)
    assert same(state(prior), uninterrupted()[0])
    assert len(list(begun.iterdir())) == 5
    assert (begun / "notes.txt").exists()


def test_files_of_others_are_never_removed(tmp_path):
    others = [
        *("step_notes.txt", "step_1.json", "step_00000001.png", "step_00000001_notes.json", "step_00000001.txt"),
        *("step_00000001.part.json", "step_00000001.old.json", "my_step_00000001.json", "history.json"),
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    for name in ("step_00000001.safetensors.d", "step_00000009.json"):
        (tmp_path / name).mkdir()
    settings = replace(SETTINGS, iterations=4, activity_images=0)
    diffusion().fit(IMAGES, training=settings, checkpoint_dir=tmp_path, checkpoint_every=1, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        *others,
        *("step_00000001.safetensors.d", "step_00000009.json"),
        *(f"step_0000000{step}.{kind}" for step in (3, 4) for kind in ("json", "safetensors")),
    }
    assert all((tmp_path / name).read_text() == "mine" for name in others)


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_while_a_checkpoint_is_written_leaves_the_last_one(call, begun, monkeypatch):
    """The disk is full while weights (call 1) or JSON (call 2) of step 16 are written."""
    calls = []

    def full(descriptor):
        calls.append(1)
        # Each file is synced with its folder.
        if len(calls) == 2 * call - 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        go_on(begun)
    monkeypatch.undo()
    assert [path.stem for path in find_checkpoints(begun)] == ["step_00000012", "step_00000008"]
    assert not list(begun.glob("*.part.*"))
    prior, _ = go_on(begun)
    assert same(state(prior), uninterrupted()[0])


def with_step_size():
    torch.manual_seed(0)
    return DiffusionEBMPrior(Seeing(SHAPES), energy=SMALL, langevin=LangevinConfig(steps=2, step_size=0.1))


def wider():
    torch.manual_seed(0)
    return DiffusionEBMPrior(
        Seeing(SHAPES), energy=EnergyConfig(context=False, vector_width=16), langevin=LangevinConfig(steps=2)
    )


def over_another_training():
    torch.manual_seed(0)
    return DiffusionEBMPrior(Seeing(SHAPES, seed=1), energy=SMALL, langevin=LangevinConfig(steps=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"make": over_another_training},
            r"the Gaussian of layer \d differs from that of the model which the prior was learned for",
        ),
        (
            {"training": replace(SETTINGS, iterations=30)},
            r"training\.iterations is 24 there and 30 here\. Give what .*depends on iterations",
        ),
        (
            {"training": replace(SETTINGS, learning_rate=2e-3)},
            r"training\.learning_rate is 0\.001 there and 0\.002 here",
        ),
        ({"make": with_step_size}, r"prior\.langevin\.step_size is 0\.3 there and 0\.1 here"),
        (
            {"make": wider},
            r"weights\.energies\.0\.features\.inputs\.weight is torch\.float32 \(8, 2\) there and .*\(16, 2\) here.* "
            r"and \d+ more",
        ),
        ({"make": coupled, "labels": {"class": LABELS}}, r"prior\.coupling is None there"),
        ({"make": ncp}, r"prior\.class is DiffusionEBMPrior there and NCPPrior here"),
        ({"data": IMAGES[:32]}, r"data\.shape is \[40, 1, 2, 2\] there and \[32, 1, 2, 2\] here"),
        ({"data": TensorDataset(IMAGES)}, r"data\.kind is tensor there and dataset here"),
        ({"given": None}, r"random\.given is cpu there and None here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(arguments, message, begun):
    files = {path.name: path.read_bytes() for path in begun.iterdir()}
    with pytest.raises(ValueError, match=r"step_00000012\.json: this checkpoint is of another run: .*" + message):
        go_on(begun, **arguments)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == files


def test_settings_of_older_versions_count_where_they_mean_another_thing():
    """Both settings were in every file of the versions that had them."""
    saved = {"langevin": {"steps": 5, "curvature_limit": None}, "networks": {"width": 8, "vector_size": 0}}
    current = {"langevin": {"steps": 5}, "networks": {"width": 8}}
    assert list_differences(saved, current) == []
    saved["langevin"]["curvature_limit"] = 0.5
    assert list_differences(saved, current) == ["langevin.curvature_limit is 0.5 there and None here"]


def test_a_run_is_not_overwritten_unless_asked(begun):
    files = {path.name: path.read_bytes() for path in begun.iterdir()}
    with pytest.raises(
        FileExistsError,
        match=r"holds checkpoints of a run: resume=True goes on with it; to begin anew, give another checkpoint_dir",
    ):
        diffusion().fit(IMAGES, training=SETTINGS, checkpoint_dir=begun, generator=seed(1), progress=False)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == files


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resume": True}, ValueError, "resume: there is nothing to go on from without checkpoint_dir"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected a positive integer, got 0"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every: expected a positive integer, got float"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        diffusion().fit(IMAGES, iterations=1, progress=False, **arguments)


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        diffusion().fit(IMAGES, iterations=1, checkpoint_dir=tmp_path / "file", progress=False)


def test_shorter_data_are_noticed_by_batches(tmp_path):
    """A list of batches tells its length; an iterable that does not is found out when it ends too soon."""

    class Some:
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return iter(IMAGES.split(8)[: self.count])

    with pytest.raises(Interrupted):
        diffusion().fit(
            Some(5),
            training=SETTINGS,
            callback=stop_at(10),
            checkpoint_dir=tmp_path,
            checkpoint_every=4,
            generator=seed(3),
            progress=False,
        )
    prior = diffusion()
    before = state(prior)
    with pytest.raises(
        ValueError, match="pass 2 ended after 2 batches, where training was interrupted after 3; give the same"
    ):
        prior.fit(Some(2), training=SETTINGS, checkpoint_dir=tmp_path, resume=True, generator=seed(3), progress=False)
    assert same(state(prior), before)


@pytest.mark.parametrize("given", [0, 1, 3, 5, 6, 13])
def test_batches_go_on_from_any_place(given):
    """The batches after a place are those that a stream which was never interrupted gives."""
    for data in (IMAGES, Augmented(), DataLoader(Augmented(), batch_size=8, shuffle=True)):
        source, other = seed(4), seed(99)
        first, second = Batches(data, 8, source), Batches(data, 8, other)
        for _ in range(given + 1):
            next(first)
        states, numbers = first.place()
        second.go_to({name: value.clone() for name, value in states.items()}, dict(numbers))
        other.set_state(source.get_state())
        for _ in range(9):
            (a, _, epoch_a), (b, _, epoch_b) = next(first), next(second)
            assert torch.equal(a, b)
            assert epoch_a == epoch_b


def test_data_draw_apart_from_training():
    """What augmentation draws does not depend on what is drawn between batches, and does not move torch's global
    generator.
    """
    torch.manual_seed(1)
    quiet = [next(batches)[0] for batches in [Batches(Augmented(), 8, seed(4))] for _ in range(7)]
    untouched = torch.rand(1)
    torch.manual_seed(1)
    batches, noisy = Batches(Augmented(), 8, seed(4)), []
    for _ in range(7):
        noisy.append(next(batches)[0])
        torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(quiet, noisy, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), untouched)


def train_in_child(folder, training):
    """Train in a fork of this process until it ends or is killed; the child's id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        go_on(folder, training=training, every=2)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("count", "steps"), [(5, 40), pytest.param(50, 300, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(count, steps, tmp_path):
    """Processes are killed without warning wherever they are, as a rule while they write, and each time another one
    goes on with the same folder.

    A run that ends between two kills has the weights of a run that was never touched; then another one begins.
    """
    training = replace(SETTINGS, iterations=steps)
    draws, kills, runs, progress = random.Random(0), 0, [], []
    begun = time.monotonic()
    expected = state(go_on(tmp_path / "whole", training=training, every=2)[0])
    duration = time.monotonic() - begun
    while kills < count or not runs or runs[-1][1] is None:
        if not runs or runs[-1][1] is not None:
            runs.append([tmp_path / f"run_{len(runs)}", None])
        child = train_in_child(runs[-1][0], training)
        if kills < count:
            time.sleep(draws.uniform(0, 4 / count * duration))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), "training failed"
        kills += status != 0
        checkpoints = find_checkpoints(runs[-1][0])
        progress.append((len(runs), int(checkpoints[0].stem[5:]) if checkpoints else 0))
        if status == 0:
            runs[-1][1] = load_file(checkpoints[0].with_suffix(".safetensors"))
    assert kills == count
    assert progress == sorted(progress)
    assert len(set(progress)) > count // 4
    for folder, tensors in runs:
        assert [path.stem for path in find_checkpoints(folder)] == [f"step_{steps:08}", f"step_{steps - 2:08}"]
        assert all(torch.equal(value, tensors[f"prior.{name}"]) for name, value in expected.items())
