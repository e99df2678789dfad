"""The file of a comparison: runs as they come, and what they were measured on.

Runs that stand in it are not repeated, so they must be of the same model, images and features, and of the same settings
of the candidates; and they must be as they were written, which a digest tells.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..backbone.text import visible
from ..backbone.transform import BackboneAdapter
from ..baselines import GaussianPrior
from ..saving.digest import digest_text
from ..saving.files import write_json
from ..saving.fingerprint import BackboneMismatch, Fingerprint, check_backbone, fingerprint
from ..saving.typed_json import InvalidPrior, from_json, to_json
from .metrics import Moments

# Largest relative difference of one extractor's features on two machines.
ROUNDING = 1e-2
ANEW = "delete it to begin anew, or write to another file (--out)"


@dataclass(frozen=True)
class FeatureSet:
    """An extractor, and what it makes of the reference images.

    Attributes:
        digest: SHA-256 of its weights; None where there are none that can be found.
        mean: length of the mean of the reference's features.
        variance: sum of their variances.
    """

    digest: str | None
    mean: float
    variance: float


@dataclass(frozen=True)
class Subject:
    """What runs are measured on.

    Attributes:
        model: fingerprint of the backbone.
        train: SHA-256 of the images that priors are trained on.
        images: of those held out.
        reference: of those that samples are compared with.
        features: extractors by name.
    """

    model: Fingerprint
    train: str
    images: str
    reference: str
    features: Mapping[str, FeatureSet]


@dataclass
class Records:
    """What a file holds.

    Attributes:
        path: the file.
        subject: what runs are measured on.
        settings: of every candidate, by name.
        iterations: that a budget pays for, by candidate and budget.
        runs: the fields of `Result` by candidate, budget and seed.
    """

    path: Path
    subject: Subject
    settings: dict[str, Any] = field(default_factory=dict)
    iterations: dict[str, dict[str, int]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file."""
        parts = {name: to_json(getattr(self, name)) for name in ("subject", "settings")}
        parts |= {"iterations": self.iterations, "runs": self.runs}
        write_json(self.path, {"sha256": digest_values(parts), **parts})


def open_records(path: Path, subject: Subject, candidates: Mapping[str, Any]) -> Records:
    """The runs that stand in a file, or none where there is no file.

    Args:
        path: the file.
        subject: what runs are to be measured on.
        candidates: what is to be compared, by name.

    Returns:
        The runs.

    Raises:
        ValueError: the file is damaged, was edited, or is of another model, other images, features or settings.
        OSError: it cannot be read.
    """
    settings = {name: describe_candidate(candidate) for name, candidate in candidates.items()}
    if not path.exists():
        return Records(path, subject, settings)
    try:
        found = json.loads(path.read_bytes())
        digest = found.pop("sha256", None)
        if digest is None and found.keys() == {"iterations", "runs"}:
            raise ValueError("it does not say what model, images and features its runs are of")
        if digest != digest_values(found):
            raise ValueError("it is not as it was written: damaged, or edited")
        there = from_json(Subject, found["subject"], "subject")
        if difference := find_difference(there, subject):
            raise ValueError(f"its runs are of {difference}")
        for name in settings.keys() & found["settings"].keys():
            if found["settings"][name] != to_json(settings[name]):
                raise ValueError(f"its runs of {name} are of other settings")
        return Records(path, subject, found["settings"] | settings, found["iterations"], found["runs"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = visible(str(error))[:300]
        if type(error) not in (ValueError, InvalidPrior):
            why = f"it is no file of a comparison ({type(error).__name__}: {why})"
        raise ValueError(f"{path}: {why}; {ANEW}") from error


def describe_subject(
    backbone: BackboneAdapter | nn.Module, images: Mapping[str, str], features: Mapping[str, tuple[Any, Moments]]
) -> Subject:
    """What runs are measured on.

    Args:
        backbone: the model or its adapter.
        images: SHA-256 by the names "train", "images" and "reference".
        features: extractors by name, with the moments of the reference images under each.

    Returns:
        The same in a form that can be kept.
    """
    prior = GaussianPrior(backbone)
    try:
        model = fingerprint(prior)
    finally:
        prior.release()
    kept = {
        name: FeatureSet(getattr(extractor, "digest", None), mean.norm().item(), covariance.trace().item())
        for name, (extractor, (mean, covariance)) in features.items()
    }
    return Subject(model, features=kept, **images)


def find_difference(there: Subject, here: Subject) -> str:
    """What is another one in a file than it is now, in words; empty where nothing is."""
    try:
        if difference := check_backbone(there.model, here.model, "they were measured on"):
            return f"another model: {difference}"
    except BackboneMismatch as error:
        return f"another model: {error}"
    for name, words in (("train", "training"), ("images", "held-out"), ("reference", "reference")):
        if getattr(there, name) != getattr(here, name):
            return f"other {words} images"
    if there.features.keys() != here.features.keys():
        return f"other features, {', '.join(there.features)} there and {', '.join(here.features)} here"
    for name, saved in there.features.items():
        found = here.features[name]
        near = partial(math.isclose, rel_tol=ROUNDING, abs_tol=1e-9)
        if saved.digest != found.digest or not (near(saved.mean, found.mean) and near(saved.variance, found.variance)):
            return f"another extractor of the name {name}"
    return ""


def describe_candidate(candidate: Any) -> dict[str, Any]:
    """What a candidate is made and trained with, as JSON values, as far as that can be told."""
    make = candidate.make
    arguments: Any = {}
    if isinstance(make, partial):
        arguments = {**{str(i): value for i, value in enumerate(make.args)}, **make.keywords}
        make = make.func
    about = {
        "make": name_of(make),
        "arguments": {name: name_of(value) if callable(value) else to_json(value) for name, value in arguments.items()},
        "training": to_json(candidate.training),
    }
    # Other objects say where in memory they are.
    return dict(json.loads(re.sub(r" at 0x[0-9a-fA-F]+", "", json.dumps(about))))


def name_of(value: Any) -> str:
    """The name of a function or class, of other objects that of their class."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def digest_values(values: Any) -> str:
    """SHA-256 of JSON values."""
    return digest_text(json.dumps(values, sort_keys=True))
