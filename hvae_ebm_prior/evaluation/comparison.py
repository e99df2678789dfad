"""Priors compared on one backbone: trained for an equal time, or for an equal number of gradients, over several seeds.

A *gradient* is one of the networks for a batch: one per Langevin step of a chain, and one to learn from. Every budget
is a run of its own, as the learning rate decays over a run. Training that diverged for good counts by its last good
state. Results are kept in a file as they come: a comparison that was interrupted goes on where it stopped, and one that
is asked for more seeds measures those alone.
"""

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter
from ..baselines import GaussianPrior
from ..density.latent_prior import LatentPrior
from ..saving.files import write_json
from ..training.config import TrainingConfig
from ..training.guard import TrainingDiverged
from ..training.record import TrainingRecord
from .features import Features, extract
from .metrics import frechet_distance, moments
from .protocol import closure, in_chunks

# Training steps that are timed to find how many fit into a budget, after as many that are not.
TIMED = 10
# Parts of the budget after which a run is measured on the way.
SNAPSHOTS = (0.125, 0.25, 0.5)
# Rows that every table begins with.
REAL, RECONSTRUCTION, GAUSSIAN = "real images", "reconstructions", "Gaussian prior"


@dataclass(frozen=True)
class Contender:
    """A prior to compare.

    Attributes:
        make: a fresh prior over a backbone; its initial weights follow torch's default generator.
        training: its settings, but for the number of iterations, which follows from the budget. None for a prior that
            is fitted at once.
    """

    make: Callable[[BackboneAdapter | nn.Module], LatentPrior]
    training: TrainingConfig | None = None


@dataclass(frozen=True)
class Budget:
    """What every contender may use for training; exactly one of them.

    Attributes:
        seconds: wall time.
        gradients: gradients of the networks for a batch.
        iterations: optimiser steps.
    """

    seconds: float | None = None
    gradients: int | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1 or not next(iter(given.values())) > 0:
            raise ValueError(
                f"budget: expected one positive number, of seconds, gradients or iterations, got {given or 'none'}"
            )

    def __str__(self) -> str:
        name, value = next((name, value) for name, value in asdict(self).items() if value is not None)
        return f"{value:g} {name}"


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        distances: Fréchet distance by name of the features.
        iterations: optimiser steps taken.
        gradients: gradients of the networks for a batch in them.
        seconds: training time.
        sampling_seconds: time to draw the samples.
        diverged: whether training gave up.
        curve: (seconds of training, distance under the first features) on the way and at the end.
    """

    distances: dict[str, float]
    iterations: int = 0
    gradients: int = 0
    seconds: float = 0.0
    sampling_seconds: float = 0.0
    diverged: bool = False
    curve: Sequence[tuple[float, float]] = ()


class Yardstick:
    """Measures images against reference images, under one or more feature extractors.

    Args:
        images: held-out images (N, C, H, W) in [0, 1]: they are reconstructed, and N samples of each prior are drawn.
        reference: real images (M, C, H, W), other than `images`, whose features are the target.
        features: extractors by name, each maps images (n, C, H, W) to features (n, K).
        device: where the extractors are.
    """

    def __init__(
        self, images: Tensor, reference: Tensor, features: Mapping[str, Features], device: torch.device | str = "cpu"
    ) -> None:
        self.images, self.features, self.device = images, dict(features), torch.device(device)
        self.targets = {name: moments(self._see(name, reference)) for name in self.features}

    def _see(self, name: str, images: Tensor) -> Tensor:
        return extract(self.features[name], images, self.device)[0]

    def distance(self, name: str, images: Tensor) -> float:
        """Fréchet distance to the reference under the features of that name."""
        return frechet_distance(self._see(name, images), self.targets[name])

    def distances(self, images: Tensor) -> dict[str, float]:
        """Fréchet distance to the reference by name of the features."""
        return {name: self.distance(name, images) for name in self.targets}


def compare(
    backbone: BackboneAdapter | nn.Module,
    contenders: Mapping[str, Contender],
    train_images: Tensor,
    yardstick: Yardstick,
    *,
    budgets: Sequence[Budget],
    seeds: Sequence[int] = (0, 1, 2),
    path: str | Path,
    report: Callable[[str], object] = print,
) -> dict[str, dict[str, Any]]:
    """Train and measure every contender under every budget and seed.

    Args:
        backbone: the trained model or its adapter.
        contenders: what to compare, by name.
        train_images: (N, C, H, W) in [0, 1].
        yardstick: how samples are measured.
        budgets: what each may use.
        seeds: one run each.
        path: a JSON file; runs that stand in it are not repeated.
        report: called with a line of text after each run.

    Returns:
        Runs as in the file, "name | budget | seed" -> the fields of `Result`. Rows that learn nothing have the budget
        "none".

    Raises:
        ValueError: no contender, budget or seed.
    """
    for name, values in (("contenders", contenders), ("budgets", budgets), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name}: expected at least one")
    path = Path(path)
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {"iterations": {}, "runs": {}}
    iterations, runs = kept["iterations"], kept["runs"]

    def keep(name: str, budget: str, seed: int, result: Mapping[str, Any]) -> None:
        runs[key(name, budget, seed)] = result
        write_json(path, kept)
        report(
            f"{key(name, budget, seed)}: "
            + ", ".join(f"{k} {v:.2f}" for k, v in result["distances"].items())
            + f", {result['seconds']:.0f} s"
        )

    for seed in seeds:
        if key(GAUSSIAN, "none", seed) not in runs:
            for name, distances in floor_and_hole(backbone, yardstick, seed).items():
                keep(name, "none", seed, asdict(Result(distances)))
        for budget in budgets:
            for name, contender in contenders.items():
                label = str(budget) if contender.training else "none"
                if key(name, label, seed) in runs:
                    continue
                # Worked out once, so that the runs of all seeds are alike.
                counts = iterations.setdefault(name, {})
                if label not in counts:
                    counts[label] = affordable(backbone, contender, train_images, budget)
                equal = (key(name, other, seed) for other, count in counts.items() if count == counts[label])
                known = next((runs[other] for other in equal if other in runs), None)
                keep(
                    name,
                    label,
                    seed,
                    known or asdict(run(backbone, contender, train_images, yardstick, counts[label], seed)),
                )
    return runs


def key(name: str, budget: str, seed: int) -> str:
    """Under which a run stands in the results."""
    return f"{name} | {budget} | seed {seed}"


def floor_and_hole(
    backbone: BackboneAdapter | nn.Module, yardstick: Yardstick, seed: int
) -> dict[str, dict[str, float]]:
    """Distances of held-out images, of their reconstructions and of the backbone's own samples."""
    prior, generator = GaussianPrior(backbone), torch.Generator().manual_seed(seed)
    samples = prior.sample(len(yardstick.images), generator=generator)
    reconstructions = in_chunks(
        lambda x: prior.decode(prior.encode(x.to(prior.device), generator=generator)), yardstick.images
    )
    found = {REAL: yardstick.images, RECONSTRUCTION: reconstructions, GAUSSIAN: samples}
    return {name: yardstick.distances(images) for name, images in found.items()}


def run(
    backbone: BackboneAdapter | nn.Module,
    contender: Contender,
    train_images: Tensor,
    yardstick: Yardstick,
    iterations: int,
    seed: int,
) -> Result:
    """Train one prior and measure it.

    Args:
        backbone: the trained model or its adapter.
        contender: what to train.
        train_images: (N, C, H, W) in [0, 1].
        yardstick: how samples are measured.
        iterations: optimiser steps, of a contender that has settings for them.
        seed: of its initial weights and everything else.

    Returns:
        The result.
    """
    count, first, curve, measuring = len(yardstick.images), next(iter(yardstick.features)), [], 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = contender.make(backbone)
    marks = {max(1, round(part * iterations)) for part in SNAPSHOTS}

    def snapshot(_: Any, record: TrainingRecord) -> None:
        nonlocal measuring
        if record.iteration in marks:
            begin = time.monotonic()
            images = prior.sample(count, generator=torch.Generator().manual_seed(seed))
            curve.append((begin - start - measuring, yardstick.distance(first, images)))
            measuring += time.monotonic() - begin

    options: dict[str, Any] = {}
    if contender.training is not None:
        options = {
            "training": replace(contender.training, iterations=iterations),
            "callback": snapshot,
            "progress": False,
        }
    generator, start, diverged = torch.Generator().manual_seed(seed), time.monotonic(), False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*back to the last good state", category=RuntimeWarning)
        try:
            steps = len(prior.fit(train_images, generator=generator, **options))  # type: ignore[operator]
        except TrainingDiverged as error:
            diverged, steps = True, len(error.history)
    seconds, begin = time.monotonic() - start - measuring, time.monotonic()
    images = prior.sample(count, generator=generator)
    sampling_seconds = time.monotonic() - begin
    distances = yardstick.distances(images)
    gradients = steps * getattr(prior, "gradients_per_step", 0)
    return Result(
        distances, steps, gradients, seconds, sampling_seconds, diverged, [*curve, (seconds, distances[first])]
    )


def affordable(
    backbone: BackboneAdapter | nn.Module, contender: Contender, train_images: Tensor, budget: Budget
) -> int:
    """Iterations that a budget pays for; of seconds, by timing a few."""
    if contender.training is None or budget.iterations is not None:
        return budget.iterations or 0
    with torch.random.fork_rng():
        prior = contender.make(backbone)
    if budget.gradients is not None:
        return max(1, budget.gradients // int(prior.gradients_per_step))  # type: ignore[arg-type]
    assert budget.seconds is not None
    # What comes before the first step (activities of the latents) counts too.
    start, trial = time.monotonic(), replace(contender.training, iterations=2 * TIMED)
    history = prior.fit(train_images, training=trial, generator=torch.Generator().manual_seed(0), progress=False)  # type: ignore[operator]
    before = time.monotonic() - start - history[-1].seconds
    step = statistics.median(b.seconds - a.seconds for a, b in zip(history[TIMED - 1 :], history[TIMED:], strict=False))
    return max(1, int((budget.seconds - before) / step))


def table(results: Mapping[str, Mapping[str, Any]], names: Iterable[str], budget: str, seeds: Sequence[int]) -> str:
    """Results as a Markdown table: means and standard errors over seeds.

    Args:
        results: from `compare`.
        names: rows, in order; those without a run under the budget, or without training, are left out.
        budget: as text, see `Budget`; rows of training-free priors stand in every table.
        seeds: what to average over.

    Returns:
        The table, with closure and distance under every extractor.
    """
    rows, extractors = [], list(next(iter(results.values()))["distances"])
    for name in (REAL, RECONSTRUCTION, GAUSSIAN, *names):
        found = {seed: results.get(key(name, budget, seed)) or results.get(key(name, "none", seed)) for seed in seeds}
        runs = {seed: result for seed, result in found.items() if result}
        if not runs:
            continue
        cells = [name]
        for extractor in extractors:
            distances = [result["distances"][extractor] for result in runs.values()]
            ends = [
                [results[key(end, "none", seed)]["distances"][extractor] for end in (GAUSSIAN, RECONSTRUCTION)]
                for seed in runs
            ]
            closed = [
                closure(value, *pair) if pair[1] < pair[0] else math.nan
                for value, pair in zip(distances, ends, strict=True)
            ]
            cells += [spread(distances, 2), spread(closed, 3)]
        trained = any(result["iterations"] for result in runs.values())
        for field in ("iterations", "gradients", "seconds", "sampling_seconds"):
            values = [result[field] for result in runs.values()]
            cells.append(f"{statistics.mean(values):.0f}" if trained or (any(values) and "seconds" in field) else "")
        lost = sum(result["diverged"] for result in runs.values())
        rows.append([*cells, f"{len(runs)}" + (f" ({lost} diverged)" if lost else "")])
    head = ["prior", *(f"{what}, {name}" for name in extractors for what in ("FD", "closure"))]
    head += ["iterations", "gradients", "training, s", "sampling, s", "runs"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard error of the mean; a dash where there is no value."""
    if any(math.isnan(value) for value in values):
        return "–"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")
