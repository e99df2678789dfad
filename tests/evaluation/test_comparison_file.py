"""Runs that stand in a comparison's file are taken where they are of the same things, and where nobody changed them."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from backbones import RandomBackbone
from helpers import IMAGES, SMALL, seed

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig
from hvae_ebm_prior.baselines import GaussianPrior
from hvae_ebm_prior.evaluation.comparison import Budget, Candidate, FrechetMetric, compare
from hvae_ebm_prior.evaluation.features import Extractor

SHAPES = [(2,)]
TRAINING = TrainingConfig(iterations=1, batch_size=4, activity_images=0)
OURS = Candidate(partial(DiffusionEBMPrior, energy=SMALL), TRAINING)
OTHERS = torch.rand(40, 1, 2, 2, generator=seed(7))


def flat(images):
    return images.flatten(1)


def begin(path, *, backbone=None, train=IMAGES, images=OTHERS[:10], reference=IMAGES, features=None, ours=OURS):
    """Compare our prior after one step with a tempered Gaussian."""
    metric = FrechetMetric(images, reference, features or {"flat": flat})
    return compare(
        backbone or RandomBackbone(SHAPES),
        {"ours": ours, "gaussian": Candidate(partial(GaussianPrior, temperature=0.8))},
        train,
        metric,
        budgets=[Budget(iterations=1)],
        seeds=[0],
        path=path,
        report=lambda line: None,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file, and the runs in it."""
    path = tmp_path_factory.mktemp("comparison") / "compare.json"
    return path, begin(path)


@pytest.fixture
def path(written, tmp_path):
    """A copy of that file."""
    (tmp_path / "compare.json").write_bytes(written[0].read_bytes())
    return tmp_path / "compare.json"


def test_the_same_comparison_takes_the_runs_that_are_there(written, path):
    before = path.read_bytes()
    assert begin(path) == json.loads(json.dumps(written[1]))
    # What other weights of the same model make of rounding is no difference.
    nearby = RandomBackbone(SHAPES)
    with torch.no_grad():
        next(nearby.model.parameters()).mul_(1 + 1e-5)
    assert begin(path, backbone=nearby).keys() == written[1].keys()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": RandomBackbone(SHAPES, seed=1)}, "another model: the Gaussian of layer 0 differs"),
        (
            {"backbone": RandomBackbone([(3,)])},
            "another model: they were measured on a backbone with a latent of shape",
        ),
        ({"train": OTHERS}, "other training images"),
        ({"images": OTHERS[:9]}, "other held-out images"),
        ({"reference": OTHERS}, "other reference images"),
        ({"features": {"other": flat}}, "other features, flat there and other here"),
        ({"features": {"flat": flat, "more": flat}}, "other features, flat there and flat, more here"),
        ({"features": {"flat": lambda images: 2 * flat(images)}}, "another extractor of the name flat"),
        ({"features": {"flat": Extractor(flat, "flat", "abc")}}, "another extractor of the name flat"),
        ({"ours": replace(OURS, training=replace(TRAINING, batch_size=5))}, "its runs of ours are of other settings"),
        ({"ours": replace(OURS, make=DiffusionEBMPrior)}, "its runs of ours are of other settings"),
    ],
)
def test_runs_of_something_else_are_refused(path, changes, message):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as raised:
        begin(path, **changes)
    assert str(raised.value).startswith(f"{path}: ")
    assert str(raised.value).endswith("delete it to begin anew, or write to another file (--out)")
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == before


def better(values):
    values["runs"]["ours | 1 iterations | seed 0"]["distances"]["flat"] = 0.01


def without_subject(values):
    for name in ("sha256", "subject", "settings"):
        del values[name]


def without_digest(values):
    del values["sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (better, "not as it was written"),
        (without_digest, "not as it was written"),
        (lambda values: values["subject"].update(train="0"), "not as it was written"),
        (without_subject, "it does not say what model, images and features its runs are of"),
    ],
)
def test_edited_files_are_refused(path, change, message):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        begin(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"sha256": 1}', b'{"runs": {}}']
)
def test_broken_files_are_one_line(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="compare.json") as raised:
        begin(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
