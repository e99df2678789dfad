"""Priors compared on one backbone: trained for an equal time, or for an equal number of gradients, over several seeds.

A *gradient* is one of the networks for a batch: one per Langevin step of a chain, and one to learn from. Every budget
is a run of its own, as the learning rate decays over a run. Training that diverged for good counts by its last good
state. Results are kept in a file as they come (`comparison_file`): a comparison that was interrupted goes on where it
stopped, and one that is asked for more seeds measures those alone.
"""

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
from ..saving.digest import digest_images
from ..training.config import TrainingConfig
from ..training.guard import TrainingDiverged
from ..training.record import TrainingRecord
from .comparison_file import describe_subject, open_records
from .features import Features, extract
from .metrics import frechet_distance, moments
from .protocol import closure, in_chunks

# Training steps that are timed to find how many fit into a budget, all but the first ones; phases keep their shares.
TIMED = 30
WARM_UP = 3
# Parts of the budget after which a run is measured on the way.
SNAPSHOTS = (0.125, 0.25, 0.5)
# Rows that every table begins with.
REAL, RECONSTRUCTION, GAUSSIAN = "real images", "reconstructions", "Gaussian prior"


@dataclass(frozen=True)
class Candidate:
    """A prior to compare.

    Attributes:
        make: a fresh prior over a backbone; its initial weights follow torch's default generator.
        training: its settings, but for the number of iterations, which follows from the budget; None for a prior with
            a `fit` that takes none.
    """

    make: Callable[[BackboneAdapter | nn.Module], LatentPrior]
    training: TrainingConfig | None = None


@dataclass(frozen=True)
class Budget:
    """What every candidate may use for training; exactly one of them.

    Attributes:
        seconds: time as of `clock`.
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


class FrechetMetric:
    """The Fréchet distance of images to reference images, under one or more feature extractors.

    Args:
        images: held-out images (N, C, H, W) in [0, 1]: they are reconstructed, and N samples of each prior are drawn.
        reference: real images (M, C, H, W), other than `images`, whose features are the target.
        features: extractors by name, each maps images (n, C, H, W) to features (n, K).
        device: where the extractors are.
    """

    def __init__(
        self, images: Tensor, reference: Tensor, features: Mapping[str, Features], device: torch.device | str = "cpu"
    ) -> None:
        self.images = images
        self.features = dict(features)
        self.device = torch.device(device)
        self.digests = {"images": digest_images(images), "reference": digest_images(reference)}
        self.targets = {name: moments(self._extract(name, reference)) for name in self.features}

    def _extract(self, name: str, images: Tensor) -> Tensor:
        return extract(self.features[name], images, self.device)[0]

    def distance(self, name: str, images: Tensor) -> float:
        """Fréchet distance to the reference under the features of that name."""
        return frechet_distance(self._extract(name, images), self.targets[name])

    def distances(self, images: Tensor) -> dict[str, float]:
        """Fréchet distance to the reference by name of the features."""
        return {name: self.distance(name, images) for name in self.targets}


def compare(
    backbone: BackboneAdapter | nn.Module,
    candidates: Mapping[str, Candidate],
    train_images: Tensor,
    metric: FrechetMetric,
    *,
    budgets: Sequence[Budget],
    seeds: Sequence[int] = (0, 1, 2),
    path: str | Path,
    report: Callable[[str], object] = print,
) -> dict[str, dict[str, Any]]:
    """Train and measure every candidate under every budget and seed.

    Args:
        backbone: the trained model or its adapter.
        candidates: what to compare, by name.
        train_images: (N, C, H, W) in [0, 1].
        metric: how samples are measured.
        budgets: what each may use.
        seeds: one run each.
        path: a JSON file; runs that stand in it are not repeated, if they are of the same model, images, features and
            settings.
        report: called with a line of text after each run.

    Returns:
        Runs as in the file, "name | budget | seed" -> the fields of `Result`. Rows without training have the budget
        "none".

    Raises:
        ValueError: no candidate, budget or seed; or the file is of something else, damaged, or edited.
        OSError: the file cannot be read or written.
    """
    for name, values in (("candidates", candidates), ("budgets", budgets), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name}: expected at least one")
    path = Path(path).expanduser()
    features = {name: (metric.features[name], target) for name, target in metric.targets.items()}
    subject = describe_subject(backbone, {"train": digest_images(train_images), **metric.digests}, features)
    records = open_records(path, subject, candidates)
    iterations, runs = records.iterations, records.runs

    def keep(place: str, result: Mapping[str, Any]) -> None:
        runs[place] = dict(result)
        records.save()
        distances = ", ".join(f"{name} {value:.2f}" for name, value in result["distances"].items())
        report(f"{place}: {distances}, {result['seconds']:.0f} s")

    for seed in seeds:
        if run_key(GAUSSIAN, "none", seed) not in runs:
            for name, distances in floor_and_hole(backbone, metric, seed).items():
                keep(run_key(name, "none", seed), asdict(Result(distances)))
        for budget in budgets:
            for name, candidate in candidates.items():
                label = str(budget) if candidate.training else "none"
                if run_key(name, label, seed) in runs:
                    continue
                # Worked out once, so that the runs of all seeds are alike.
                counts = iterations.setdefault(name, {})
                if label not in counts:
                    counts[label] = affordable(backbone, candidate, train_images, budget)
                # Budgets that pay for the same number of iterations share a run.
                equal = [run_key(name, other, seed) for other, count in counts.items() if count == counts[label]]
                result = next((runs[other] for other in equal if other in runs), None)
                if result is None:
                    result = asdict(run(backbone, candidate, train_images, metric, counts[label], seed))
                keep(run_key(name, label, seed), result)
    return runs


def clock(device: torch.device) -> float:
    """Seconds that count in a comparison: on a CPU those of the processor, per thread, so that what else the machine
    does costs nobody anything; on other devices those of the wall.
    """
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.monotonic()


def run_key(name: str, budget: str, seed: int) -> str:
    """The name of a run in compare.json: candidate, budget and seed."""
    return f"{name} | {budget} | seed {seed}"


def floor_and_hole(
    backbone: BackboneAdapter | nn.Module, metric: FrechetMetric, seed: int
) -> dict[str, dict[str, float]]:
    """Distances of held-out images, of their reconstructions and of the backbone's own samples."""
    prior = GaussianPrior(backbone)
    generator = torch.Generator().manual_seed(seed)

    def reconstruct(images: Tensor) -> Tensor:
        return prior.decode(prior.encode(images.to(prior.device), generator=generator))

    samples = prior.sample(len(metric.images), generator=generator)
    rows = {REAL: metric.images, RECONSTRUCTION: in_chunks(reconstruct, metric.images), GAUSSIAN: samples}
    return {name: metric.distances(images) for name, images in rows.items()}


def run(
    backbone: BackboneAdapter | nn.Module,
    candidate: Candidate,
    train_images: Tensor,
    metric: FrechetMetric,
    iterations: int,
    seed: int,
) -> Result:
    """Train one prior and measure it.

    Args:
        backbone: the trained model or its adapter.
        candidate: what to train.
        train_images: (N, C, H, W) in [0, 1].
        metric: how samples are measured.
        iterations: optimiser steps, of a candidate that has settings for them.
        seed: of its initial weights and everything else.

    Returns:
        The result.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = candidate.make(backbone)
    count = len(metric.images)
    first = next(iter(metric.features))
    marks = {max(1, round(part * iterations)) for part in SNAPSHOTS}
    curve: list[tuple[float, float]] = []
    measuring = 0.0

    def snapshot(_: Any, record: TrainingRecord) -> None:
        # The time that a snapshot takes is not training time.
        nonlocal measuring
        if record.iteration in marks:
            begin = clock(prior.device)
            images = prior.sample(count, generator=torch.Generator().manual_seed(seed))
            curve.append((begin - start - measuring, metric.distance(first, images)))
            measuring += clock(prior.device) - begin

    options: dict[str, Any] = {}
    if candidate.training is not None:
        training = replace(candidate.training, iterations=iterations)
        options = {"training": training, "callback": snapshot}
    generator = torch.Generator().manual_seed(seed)
    diverged = False
    start = clock(prior.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*back to the last good state", category=RuntimeWarning)
        try:
            steps = len(prior.fit(train_images, generator=generator, **options))  # type: ignore[operator]
        except TrainingDiverged as error:
            diverged = True
            steps = len(error.history)
    seconds = clock(prior.device) - start - measuring
    begin = clock(prior.device)
    images = prior.sample(count, generator=generator)
    sampling_seconds = clock(prior.device) - begin
    distances = metric.distances(images)
    return Result(
        distances,
        iterations=steps,
        gradients=steps * getattr(prior, "gradients_per_step", 0),
        seconds=seconds,
        sampling_seconds=sampling_seconds,
        diverged=diverged,
        curve=[*curve, (seconds, distances[first])],
    )


def affordable(
    backbone: BackboneAdapter | nn.Module, candidate: Candidate, train_images: Tensor, budget: Budget
) -> int:
    """Iterations that a budget pays for; of seconds, by timing a few."""
    seconds = budget.seconds
    if candidate.training is None or budget.iterations is not None:
        return budget.iterations or 0
    with torch.random.fork_rng():
        prior = candidate.make(backbone)
    if seconds is None:
        return max(1, (budget.gradients or 0) // int(prior.gradients_per_step))  # type: ignore[arg-type]
    training = replace(candidate.training, iterations=TIMED)
    generator = torch.Generator().manual_seed(0)
    ends: list[float] = []
    start = clock(prior.device)
    prior.fit(  # type: ignore[operator]
        train_images,
        training=training,
        progress=False,
        generator=generator,
        callback=lambda *_: ends.append(clock(prior.device)),
    )
    step = (ends[-1] - ends[WARM_UP - 1]) / (TIMED - WARM_UP)
    # What comes before the first step (activities of the latents) counts too.
    before = max(0.0, ends[0] - start - step)
    return max(1, int((seconds - before) / step))


def comparison_table(
    results: Mapping[str, Mapping[str, Any]], names: Iterable[str], budget: str, seeds: Sequence[int]
) -> str:
    """Results as a Markdown table: means and standard errors over seeds.

    Args:
        results: from `compare`.
        names: rows, in order; those without a run under the budget, or without training, are left out.
        budget: as text, see `Budget`; rows of training-free priors stand in every table.
        seeds: what to average over.

    Returns:
        The table, with closure and distance under every extractor.
    """
    extractors = list(next(iter(results.values()))["distances"])
    head = ["prior", *(f"{what}, {name}" for name in extractors for what in ("FD", "closure"))]
    head += ["iterations", "gradients", "training, s", "sampling, s", "runs"]
    rows = [head, ["---"] * len(head)]
    for name in (REAL, RECONSTRUCTION, GAUSSIAN, *names):
        runs = {}
        for seed in seeds:
            result = results.get(run_key(name, budget, seed)) or results.get(run_key(name, "none", seed))
            if result:
                runs[seed] = result
        if runs:
            rows.append([name, *quality_cells(results, runs, extractors), *cost_cells(list(runs.values()))])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def quality_cells(
    results: Mapping[str, Mapping[str, Any]], runs: Mapping[int, Mapping[str, Any]], extractors: Sequence[str]
) -> list[str]:
    """Distance and closure under every extractor, of one row's runs by seed; `results` have the closure's ends."""
    cells = []
    for extractor in extractors:
        distances = [result["distances"][extractor] for result in runs.values()]
        closures = []
        for seed, distance in zip(runs, distances, strict=True):
            gaussian = results[run_key(GAUSSIAN, "none", seed)]["distances"][extractor]
            reconstruction = results[run_key(RECONSTRUCTION, "none", seed)]["distances"][extractor]
            hole = reconstruction < gaussian
            closures.append(closure(distance, gaussian, reconstruction) if hole else math.nan)
        cells += [spread(distances, 2), spread(closures, 3)]
    return cells


def cost_cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean iterations, gradients and times of one row's runs, empty where nothing was trained, and their number."""
    trained = any(result["iterations"] for result in runs)
    cells = []
    for name in ("iterations", "gradients", "seconds", "sampling_seconds"):
        values = [result[name] for result in runs]
        measured = trained or (any(values) and "seconds" in name)
        cells.append(f"{statistics.mean(values):.0f}" if measured else "")
    lost = sum(result["diverged"] for result in runs)
    return [*cells, f"{len(runs)} ({lost} diverged)" if lost else f"{len(runs)}"]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard error of the mean; a dash where there is no value."""
    if any(math.isnan(value) for value in values):
        return "–"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")
