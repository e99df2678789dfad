"""What training shows: independent numbers, event files read back, and the same weights without any of it."""

import copy
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone, images_of
from helpers import COSINE, IMAGES, SMALL, TINY, same, seed, state

from hvae_ebm_prior import (
    ChainDiverged,
    Coupling,
    DiffusionEBMPrior,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.density import conditional
from hvae_ebm_prior.training import loop
from hvae_ebm_prior.training import step as step_module
from hvae_ebm_prior.training.batches import Batches
from hvae_ebm_prior.training.callbacks import TensorBoard, Trackio, open_log, sample_grid, scalars
from hvae_ebm_prior.training.checkpoint import find_checkpoints
from hvae_ebm_prior.training.recovery import recovery_loss

SETTINGS = TrainingConfig(iterations=6, batch_size=8, activity_images=0)


class Noisy(RandomBackbone):
    """Images with noise from torch's global generator, as a backbone that samples p(x | z) has them."""

    def decode(self, features):
        return (super().decode(features) + 0.1 * torch.rand(len(features), 1, 2, 2)).clamp(0, 1)


def make_prior(**settings):
    torch.manual_seed(0)
    settings = {"energy": SMALL, "langevin": LangevinConfig(steps=2), **settings}
    prior = DiffusionEBMPrior(Noisy([(2,), (3,)]), **settings)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seed(1)))
    return prior


@pytest.mark.parametrize("energy", [SMALL, TINY])
def test_gradient_norms_are_those_of_autograd_by_layer(energy):
    """Before clipping, of energies and label networks: a layer's share is found by the names of its parameters. With
    context, score matching and recovery together.
    """
    labels = {"class": torch.arange(40) % 3}
    coupling = Coupling({"class": LabelSet(3), "smile": LabelSet(2, layers=(1,))}, networks=SMALL)
    prior = make_prior(energy=energy, coupling=coupling)
    settings = replace(SETTINGS, iterations=1, clip_norm=1e-3, recovery_share=1.0)
    expected_of, g = copy.deepcopy(prior).train(), seed(3)
    images, batch_labels, _ = next(Batches(IMAGES, 8, g, labels))
    u = expected_of.encode(images, generator=g)
    loss = expected_of.batch_loss(u, batch_labels, g, objective=prior.objective(settings, 0)).total.mean()
    names, parameters = zip(*expected_of.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    squares = [0.0, 0.0]
    for name, gradient in zip(names, gradients, strict=True):
        layer = int(next(part for part in name.split(".") if part.isdecimal()))
        squares[layer] += 0.0 if gradient is None else gradient.double().square().sum().item()
    assert any(name.startswith("heads") for name in names)
    record = prior.fit(
        IMAGES,
        labels=labels,
        training=settings,
        generator=seed(3),
        progress=False,
    )[0]
    assert record.gradient_norms == pytest.approx([math.sqrt(each) for each in squares], rel=1e-4)
    assert record.gradient_norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)


def test_displacement_of_chains_without_energies_is_known():
    """Where F = 0, K exponential steps end at (A^K + (1 - A^K) w) u_{t+1} + sqrt((1 - A^2K)/lambda) noise."""
    dim, h, steps, schedule = 4000, 0.3, 3, COSINE
    prior = DiffusionEBMPrior(
        IdentityBackbone((dim,)),
        energy=[Quadratic(dim)],
        schedule=schedule,
        langevin=LangevinConfig(steps=steps, step_size=h, start="next"),
    )
    u = torch.full((60, dim), 1.5)
    loss = recovery_loss(prior, u, generator=seed())
    left = math.exp(-h * steps)
    for t in range(3):
        alpha, sigma, kept = (float(x[t + 1]) for x in (schedule.alpha, schedule.sigma, schedule.alpha_bar))
        precision = 1 + (alpha / sigma) ** 2
        weight = alpha / (sigma**2 * precision)
        square = (1 - left) ** 2 * (1 - weight) ** 2 * (kept**2 * 1.5**2 + 1 - kept**2) + (1 - left**2) / precision
        found = loss.displacement[loss.levels == t]
        assert len(found) > 5
        # A norm over D dimensions varies by about 1/sqrt(2 D) of itself.
        torch.testing.assert_close(
            found, torch.full_like(found, math.sqrt(square)), rtol=5 / math.sqrt(2 * dim), atol=0
        )
    images = images_of(u)
    record = prior.fit(
        images,
        training=TrainingConfig(iterations=1, batch_size=60, activity_images=0),
        generator=seed(),
        progress=False,
    )[0]
    assert loss.displacement.min() < record.displacement < loss.displacement.max()
    assert math.isnan(record.acceptance)


def test_acceptance_is_the_share_of_steps_that_were_taken(monkeypatch):
    original, moved = conditional.metropolis_chain, []

    def spy(function, u, *rest, **options):
        end, acceptance = original(function, u, *rest, **options)
        moved.append((end != u).any(1).double().mean().item())
        return end, acceptance

    monkeypatch.setattr(conditional, "metropolis_chain", spy)
    langevin = LangevinConfig(steps=2, step_size=0.9, corrector_steps=1, integrator="euler")
    prior = DiffusionEBMPrior(IdentityBackbone((3,)), energy=[Quadratic(3, w=2.0, v=-2.0)], langevin=langevin)
    settings = TrainingConfig(iterations=1, batch_size=4000, activity_images=0)
    record = prior.fit(torch.full((4000, 1, 1, 3), 0.55), training=settings, generator=seed(), progress=False)[0]
    assert 0.1 < record.acceptance < 0.95
    # Of 4,000 decisions the share of one outcome is off by at most 0.008 in a standard deviation.
    assert record.acceptance == pytest.approx(moved[0], abs=5 * 0.5 / math.sqrt(4000))


# Of one image 4 gradients of the chain and one to learn from; with context one at each of two noise levels.
@pytest.mark.parametrize(("energy", "gradients"), [(SMALL, 5), (TINY, 2)])
def test_speed_counts_the_gradients_of_a_step_and_not_the_callbacks(energy, gradients, monkeypatch):
    clock = [0.0]
    original = DiffusionEBMPrior.batch_loss

    def slow(*arguments):
        clock[0] += 0.25
        return original(*arguments)

    def callback(prior, record):
        clock[0] += 100

    monkeypatch.setattr(DiffusionEBMPrior, "batch_loss", slow)
    for module in (loop, step_module):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    prior = make_prior(energy=energy, langevin=LangevinConfig(steps=4))
    history = prior.fit(IMAGES, training=SETTINGS, callback=callback, generator=seed(), progress=False)
    # 8 images in a quarter of a second.
    assert [record.gradients_per_second for record in history] == [8 * gradients / 0.25] * 6
    assert history[-1].seconds == 6 * 0.25 + 5 * 100


def test_numbers_that_were_not_measured_are_not_shown():
    prior = make_prior()
    record = prior.fit(IMAGES, training=SETTINGS, generator=seed(), progress=False)[0]
    shown = scalars(record)
    assert {
        "loss",
        "gradient_norm/layer1",
        "chain/displacement",
        "gradients_per_second",
        "learning_rate",
    } <= shown.keys()
    assert not {"chain/acceptance", "cross_entropy", "score", "calibration"} & shown.keys()
    assert all(math.isfinite(value) for value in shown.values())
    settings = replace(SETTINGS, recovery_share=0.5)
    history = make_prior(energy=TINY).fit(IMAGES, training=settings, generator=seed(), progress=False)
    first, last = scalars(history[0]), scalars(history[-1])
    assert first["score"] == first["loss"] == history[0].score
    assert not {"chain/displacement", "gap/t0", "gap/t1", "gap/t2"} & first.keys()
    assert last["calibration"] == history[-1].calibration
    assert "chain/displacement" in last


class Stub:
    """Stands in for trackio, as version 0.43 behaves: it prints, and a run logs numbers and images by step."""

    def __init__(self):
        self.calls = []

    def init(self, *, project, name, space_id, resume):
        print("* Trackio project initialized")
        self.calls.append(("init", project, name, space_id, resume))
        return types.SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, metrics, step=None):
        self.calls.append(("log", step, dict(metrics)))

    def finish(self):
        print("* Run finished")
        self.calls.append(("finish",))

    def Image(self, pixels, caption):
        assert str(pixels.dtype) == "uint8"
        return pixels, caption


@pytest.fixture
def trackio(monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "trackio", stub)
    return stub


@pytest.mark.parametrize("energy", [SMALL, TINY])
def test_trackio_is_told_everything_and_says_nothing(energy, trackio, capsys):
    prior = make_prior(energy=energy)
    history = prior.fit(
        IMAGES,
        training=SETTINGS,
        callback=Trackio("p", name="a", samples_every=4, samples=3, every=2),
        generator=seed(),
    )
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert trackio.calls[0] == ("init", "p", "a", None, "allow")
    assert trackio.calls[-1] == ("finish",)
    logs = trackio.calls[1:-1]
    assert [step for _, step, _ in logs] == [2, 4, 6]
    for _, step, values in logs:
        samples = values.pop("samples", None)
        assert values == scalars(history[step - 1])
        assert (samples is not None) == (step == 4)


@pytest.mark.parametrize("energy", [SMALL, TINY])
def test_a_picture_is_of_the_moving_average_and_of_the_same_noise(energy, trackio):
    shown = {}

    def keep(prior, record):
        if record.iteration == 4:
            torch.manual_seed(5)
            shown[4] = prior.sample(3, generator=seed(5))

    make_prior(energy=energy).fit(
        IMAGES,
        training=SETTINGS,
        callback=[Trackio("p", samples_every=2, samples=3, seed=5), keep],
        generator=seed(),
        progress=False,
    )
    pictures = {step: values["samples"] for _, step, values in trackio.calls[1:-1] if "samples" in values}
    assert sorted(pictures) == [2, 4, 6]
    pixels, caption = pictures[4]
    assert caption == "step 4"
    expected = torch.zeros(4, 4)
    for i, image in enumerate(shown[4][:, 0]):
        expected[2 * (i // 2) : 2 * (i // 2) + 2, 2 * (i % 2) : 2 * (i % 2) + 2] = image
    assert torch.equal(torch.from_numpy(pixels), (expected * 255).round().byte()[:, :, None].expand(-1, -1, 3))


@pytest.mark.parametrize("energy", [SMALL, TINY])
def test_event_files_hold_the_records(energy, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prior = make_prior(energy=energy)
    callback = TensorBoard(tmp_path, samples_every=3, samples=4)
    history = prior.fit(IMAGES, training=SETTINGS, callback=callback, generator=seed(), progress=False)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(scalars(history[0])) | set(scalars(history[-1]))
    for name in events.Tags()["scalars"]:
        expected = [(record.iteration, scalars(record)[name]) for record in history if name in scalars(record)]
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected
        ]
    pictures = events.Images("samples")
    assert [(event.step, event.width, event.height) for event in pictures] == [(3, 4, 4), (6, 4, 4)]


def test_a_run_that_goes_on_hides_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(prior, record):
        if record.iteration == 5:
            raise InterruptedError

    files = {
        "checkpoint_dir": tmp_path / "checkpoints",
        "checkpoint_every": 2,
        "resume": True,
        "progress": False,
        "training": SETTINGS,
    }
    with pytest.raises(InterruptedError):
        make_prior().fit(
            IMAGES, callback=[TensorBoard(tmp_path / "log", samples_every=0), stop], generator=seed(), **files
        )
    make_prior().fit(IMAGES, callback=TensorBoard(tmp_path / "log", samples_every=0), generator=seed(), **files)
    events = EventAccumulator(str(tmp_path / "log")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("generator", [lambda: seed(3), lambda: None], ids=["given", "global"])
@pytest.mark.parametrize("energy", [replace(SMALL, spectral_norm=True), TINY], ids=["spectral norm", "context"])
def test_training_is_the_same_with_and_without(energy, generator, trackio):
    """Networks whose buffers change, a backbone that draws from the global generator, and every step shown."""
    ends = []
    for callback in (None, [Trackio("p", samples_every=1, samples=2)]):
        prior = make_prior(energy=energy)
        torch.manual_seed(7)
        prior.fit(
            IMAGES,
            training=replace(SETTINGS, recovery_share=0.5),
            callback=callback,
            generator=generator(),
            progress=False,
        )
        ends.append({**state(prior), "random": torch.get_rng_state()})
    assert sum("samples" in call[2] for call in trackio.calls[1:-1]) == 6
    assert same(*ends)


@pytest.mark.parametrize("energy", [replace(SMALL, spectral_norm=True), TINY], ids=["spectral norm", "context"])
def test_a_grid_leaves_the_prior_as_it_was(energy):
    prior = make_prior(energy=energy).train()
    before, random = state(prior), torch.get_rng_state()
    assert sample_grid(prior, 5, 0).shape == (1, 4, 6)
    assert prior.training
    assert same(state(prior), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_diverged_samples_are_no_end_of_training(trackio, monkeypatch):
    def diverged(*arguments, **options):
        raise ChainDiverged("far away")

    monkeypatch.setattr(DiffusionEBMPrior, "sample", diverged)
    with pytest.warns(RuntimeWarning, match="no samples are shown: far away"):
        history = make_prior().fit(
            IMAGES, training=SETTINGS, callback=Trackio("p", samples_every=5), generator=seed(), progress=False
        )
    assert len(history) == 6


class Closing:
    def __init__(self, fail=0):
        self.steps, self.closed, self.fail = [], 0, fail

    def __call__(self, prior, record):
        self.steps.append(record.iteration)
        if record.iteration == self.fail:
            raise OSError("disk full")

    def close(self):
        self.closed += 1


def test_a_callback_that_raises_ends_training_and_loses_nothing(tmp_path):
    expected = make_prior()
    expected.fit(IMAGES, training=SETTINGS, generator=seed(), progress=False)
    first, second, averages = Closing(), Closing(fail=5), []
    prior = make_prior()
    files = {"checkpoint_dir": tmp_path, "checkpoint_every": 2, "resume": True, "progress": False, "training": SETTINGS}
    with pytest.raises(OSError, match="disk full"):
        prior.fit(
            IMAGES,
            callback=[first, lambda prior, record: averages.append(state(prior)), second],
            generator=seed(),
            **files,
        )
    assert (first.steps, first.closed, second.closed) == ([1, 2, 3, 4, 5], 1, 1)
    assert same(state(prior), averages[-1])
    assert prior.trained.iterations == 5
    assert [path.stem for path in find_checkpoints(tmp_path)] == ["step_00000004", "step_00000002"]
    again = make_prior()
    again.fit(IMAGES, generator=seed(9), **files)
    assert same(state(again), state(expected))


def test_callbacks_are_closed_at_the_end_and_after_an_error_in_training():
    callback = Closing()
    make_prior().fit(IMAGES, training=SETTINGS, callback=callback, generator=seed(), progress=False)
    assert (callback.steps, callback.closed) == ([1, 2, 3, 4, 5, 6], 1)
    broken, settings = [IMAGES[:8], IMAGES[:8] * torch.nan], TrainingConfig(iterations=4, activity_images=0)
    with pytest.raises(ValueError, match="NaN"):
        make_prior().fit(broken, training=settings, callback=(callback,), generator=seed(), progress=False)
    assert callback.closed == 2


@pytest.mark.parametrize("callback", [3, [print, "text"], "text"])
def test_what_cannot_be_called_is_refused_before_training(callback):
    with pytest.raises(
        TypeError, match=r"callback: expected a function of \(prior, record\), or a sequence of such, got (int|str)"
    ):
        make_prior().fit(IMAGES, training=SETTINGS, callback=callback, generator=seed())


@pytest.mark.parametrize(
    ("module", "place", "extra"),
    [("torch.utils.tensorboard", "tensorboard:log", "tensorboard"), ("trackio", "trackio:p", "trackio")],
)
def test_a_missing_package_is_named_with_its_extra(module, place, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"install hvae-ebm-prior\[{extra}\]"):
        open_log(place, 0, "run")


@pytest.mark.parametrize("place", ["tensorboard", "tensorboard:", "wandb:p", ""])
def test_other_places_are_refused(place):
    with pytest.raises(ValueError, match="log: expected tensorboard:FOLDER or trackio:PROJECT, got"):
        open_log(place, 0, "run")


@pytest.mark.parametrize("settings", [{"every": 0}, {"samples_every": -1}, {"samples": 0}])
def test_wrong_counts_are_refused(settings, trackio):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Trackio("p", **settings)
