"""Long work shows itself on a terminal, and nowhere else."""

import re
import sys

import pytest
import torch
from backbones import Seeing
from helpers import IMAGES, TINY
from huggingface_hub.utils import disable_progress_bars

from hvae_ebm_prior import DiffusionEBMPrior, LangevinConfig, TrainingConfig
from hvae_ebm_prior.evaluation import evaluate
from hvae_ebm_prior.evaluation.diagnosis import describe_layers
from hvae_ebm_prior.evaluation.likelihood import AnnealingConfig, log_normalizer
from hvae_ebm_prior.evaluation.outliers import inference_scores
from hvae_ebm_prior.evaluation.transitions import langevin_transitions
from hvae_ebm_prior.processes import progress_bar

TRAINING = TrainingConfig(iterations=2, batch_size=8, activity_images=16)


def make_prior():
    torch.manual_seed(0)
    return DiffusionEBMPrior(Seeing([(2,), (3,)]), energy=TINY, langevin=LangevinConfig(steps=2))


# What is done, and the bars that show it, in the order in which they appear.
WORK = {
    "fit": (lambda prior: prior.fit(IMAGES, training=TRAINING), ["activity", "prior"]),
    "sample": (lambda prior: prior.sample(5, chunk_size=2), ["samples"]),
    "diagnose": (lambda prior: describe_layers(prior.backbone, IMAGES, draws=4), ["posteriors"]),
    "outliers": (lambda prior: inference_scores(prior, IMAGES, draws=2), ["scores"]),
    "transitions": (lambda prior: langevin_transitions(prior, 3, steps=4), ["Langevin steps"]),
    "likelihood": (
        lambda prior: log_normalizer(prior, torch.zeros(3, 5), 0, annealing=AnnealingConfig(2, particles=2)),
        ["annealed paths"],
    ),
    "evaluation": (
        lambda prior: evaluate(prior, IMAGES[:20], IMAGES[20:], lambda images: images.flatten(1), temperatures=[]),
        [
            "features",
            *(each for row in ("real", "reconstruction", "Gaussian") for each in (row, "features")),
            *("ours", "samples", "features"),
        ],
    ),
}


def bars(text):
    """Names of the bars in a text, each with where it stands, in their order."""
    return re.findall(r"([A-Za-z][A-Za-z ]*): +\d+%\|[^|]*\| (\d+/\d+) ", text)


@pytest.mark.parametrize("name", WORK)
def test_work_is_shown_on_a_terminal_and_nowhere_else(name, capsys, monkeypatch):
    work, expected = WORK[name]
    work(make_prior())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with disable_progress_bars():
        work(make_prior())
    assert capsys.readouterr().err == ""
    work(make_prior())
    assert [name for name, done in bars(capsys.readouterr().err) if done.startswith("0/")] == expected


def test_a_bar_that_is_asked_for_is_shown_to_its_end(capsys, monkeypatch):
    """In a log as lines."""

    def show():
        with progress_bar(5, "images", done=2, shown=True, leave=True) as bar:
            bar.update(3)
        return capsys.readouterr().err

    assert re.findall(r"images: (\d/\d) after 00:00, [\d?:]+ left\n", show()) == ["2/5", "5/5"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert bars(show()) == [("images", "2/5"), ("images", "5/5")]
    with progress_bar(5, "images", shown=False) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""
