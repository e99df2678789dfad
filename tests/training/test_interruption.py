"""Ctrl-C and SIGTERM end training after the step that runs, with a checkpoint from which it goes on bit for bit."""

import signal
import threading

import pytest
from helpers import IMAGES, same, seed, state
from test_resume import SIX, diffusion, figures

from hvae_ebm_prior.training import loop
from hvae_ebm_prior.training.checkpoint import find_checkpoints

FORMER = signal.getsignal(signal.SIGINT)


def fit(prior, folder, **options):
    return prior.fit(IMAGES, training=SIX, generator=seed(1), checkpoint_dir=folder, progress=False, **options)


def interrupt(monkeypatch, *signals, step=3):
    """Send signals in the middle of a step: its batch is drawn, its gradient is not."""
    draw, steps = loop.Batches.__next__, []

    def sent(batches):
        found = draw(batches)
        steps.append(batches)
        # The first two batches are those whose activity is measured.
        if len(steps) == step + 2:
            for number in signals:
                signal.raise_signal(number)
        return found

    monkeypatch.setattr(loop.Batches, "__next__", sent)


def check_goes_on(folder, step):
    """From the checkpoint of a step, which is the only one, to where a run ends that was never interrupted."""
    assert [path.stem for path in find_checkpoints(folder)] == [f"step_{step:08}"]
    prior, whole = diffusion(), diffusion()
    history = fit(prior, folder, resume=True)
    assert figures(history) == figures(whole.fit(IMAGES, training=SIX, generator=seed(1), progress=False))
    assert same(state(prior), state(whole))


def test_ctrl_c_ends_with_a_checkpoint_of_the_step_that_runs(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            fit(diffusion(), tmp_path)
    assert signal.getsignal(signal.SIGINT) is FORMER
    check_goes_on(tmp_path, 3)


def test_sigterm_does_what_it_did_once_the_checkpoint_is_there(tmp_path, monkeypatch):
    seen = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append((number, find_checkpoints(tmp_path))))
    try:
        with monkeypatch.context() as patch:
            interrupt(patch, signal.SIGTERM)
            assert len(fit(diffusion(), tmp_path)) == 3
    finally:
        signal.signal(signal.SIGTERM, former)
    assert seen == [(signal.SIGTERM, [tmp_path / "step_00000003.json"])]
    check_goes_on(tmp_path, 3)


@pytest.mark.parametrize(("signals", "folder"), [((signal.SIGINT,) * 2, "checkpoints"), ((signal.SIGINT,), None)])
def test_a_second_ctrl_c_and_one_without_a_folder_do_not_wait(signals, folder, tmp_path, monkeypatch):
    interrupt(monkeypatch, *signals)
    prior, steps = diffusion(), []
    with pytest.raises(KeyboardInterrupt):
        fit(prior, folder and tmp_path / folder, callback=lambda _, record: steps.append(record.iteration))
    assert steps == [1, 2]
    assert not list(tmp_path.glob("*/*"))
    assert signal.getsignal(signal.SIGINT) is FORMER


def test_ignored_signals_stay_ignored(tmp_path, monkeypatch):
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt(monkeypatch, signal.SIGINT)
        assert len(fit(diffusion(), tmp_path)) == 6
    finally:
        signal.signal(signal.SIGINT, former)


def test_other_threads_train_too(tmp_path):
    histories = []
    thread = threading.Thread(target=lambda: histories.append(fit(diffusion(), tmp_path)))
    thread.start()
    thread.join()
    assert [len(history) for history in histories] == [6]
