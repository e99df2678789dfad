"""How much of the prior hole is gone: one protocol for the prior, the Gaussian prior, reconstructions and real images.

    closure = (FD_gauss - FD) / (FD_gauss - FD_recon)

is 0 for the backbone's Gaussian prior and 1 for samples as good as its reconstructions. All rows use one number of
images, one decoder and one extractor of features (see `hvae_ebm_prior.evaluation.features`), against one set of real
images. No row is the best of several, but for the tempered Gaussian prior's, whose temperature is chosen by the
distance itself, in its favour.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..chains.streams import draw_key, open_streams
from ..processes import agree, join_rows, progress_bar, share, world
from .features import Extracted, Features, extract
from .metrics import SPLITS, fidelity, inception_score, kernel_distance, precision_recall
from .metrics import frechet_distance as frechet_distance
from .reference import Reference, make_reference

# What `evaluate` can measure besides the Fréchet distance.
METRICS = ("kid", "precision-recall", "inception-score")
TEMPERATURES = (0.9, 0.8, 0.7, 0.6, 0.5)
# Samples asked of a prior at a time; it may divide them further.
SAMPLES = 10_000


class SampledPrior(Protocol):
    """What a prior must offer to be evaluated."""

    @property
    def dim(self) -> int:
        """Number of noise dimensions D."""

    @property
    def device(self) -> torch.device:
        """Where noise and images are."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the noise."""

    def sample(self, n: int, /, *, generator: torch.Generator | None) -> Tensor:
        """Images (n, C, H, W) in [0, 1] of the prior."""

    def encode(self, images: Tensor, /, *, generator: torch.Generator | None) -> Tensor:
        """A posterior draw, as noise (n, D), of images (n, C, H, W)."""

    def decode(self, u: Tensor, /) -> Tensor:
        """Images (n, C, H, W) of noise (n, D)."""


@dataclass(frozen=True)
class EvaluationRow:
    """One prior's figures.

    Attributes:
        name: what was sampled.
        distance: Fréchet distance to the reference images.
        closure: share of the prior hole that is closed; NaN where there is none, as reconstructions are no better than
            Gaussian samples.
        seconds: time to make the images.
        metrics: other figures by name, see `hvae_ebm_prior.evaluation.metrics`.
    """

    name: str
    distance: float
    closure: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def closure(distance: float, gaussian: float, reconstruction: float) -> float:
    """Share of the prior hole that is closed, (gaussian - distance) / (gaussian - reconstruction).

    Args:
        distance: Fréchet distance of the prior's samples.
        gaussian: of samples of the backbone's own Gaussian prior.
        reconstruction: of reconstructions.

    Returns:
        The closure, 0 for the Gaussian prior, 1 for the reconstructions.

    Raises:
        ValueError: reconstructions are no better than Gaussian samples, so there is no prior hole to close.
    """
    if not reconstruction < gaussian:
        raise ValueError(
            f"reconstructions ({reconstruction:.4g}) are no better than Gaussian samples ({gaussian:.4g}): "
            "there is no prior hole to close"
        )
    return (gaussian - distance) / (gaussian - reconstruction)


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, chunk_size: int = 250) -> Tensor:
    """`function` of `inputs` (N, ...), a chunk of rows at a time."""
    return torch.cat([function(chunk) for chunk in inputs.split(chunk_size)])


def evaluate(
    prior: SampledPrior,
    images: Tensor,
    reference: Tensor | Reference,
    features: Features,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    metrics: Collection[str] | None = (),
    name: str = "ours",
    chunk_size: int = 250,
    generator: torch.Generator | None = None,
) -> list[EvaluationRow]:
    """Compare the prior with the Gaussian prior, the Gaussian prior at its best temperature, and reconstructions.

    Args:
        prior: the trained prior, or any other with the same few methods.
        images: held-out images (N, C, H, W) in [0, 1]; they are reconstructed, and N samples of each prior are drawn.
        reference: real images (M, C, H, W), other than `images`, whose features are the target, or their statistics.
        features: maps images (n, C, H, W) to features (n, K), or to features and class logits.
        temperatures: temperatures of the Gaussian prior to choose from, by the Fréchet distance.
        metrics: further figures, out of `METRICS`, which need torch-fidelity; None takes all that `reference` and
            `features` allow.
        name: of the prior's row.
        chunk_size: images decoded and given to the extractor at a time; the posterior's draws depend on it.
        generator: source of all randomness.

    Returns:
        Rows "real" (the held-out images, the floor for N images), "reconstruction", "Gaussian",
        "Gaussian, temperature ..." and `name`.

    Raises:
        ValueError: fewer than two images, 10 with further metrics; a metric that does not exist, or needs features or
            logits that are not there.
        ImportError: further metrics without torch-fidelity.
    """
    check_metrics(metrics, len(images))
    if isinstance(reference, Tensor):
        reference = make_reference(reference, features, prior.device, chunk_size)
    key = agree(draw_key(generator))
    # An `encode` takes one number from the generator: so each process can make any chunk.
    draws = {first: fork(generator) if world() > 1 else generator for first in range(0, len(images), chunk_size)}

    def real(rows: range) -> Tensor:
        return images[rows.start : rows.stop]

    def reconstruct(rows: range) -> Tensor:
        return prior.decode(prior.encode(real(rows).to(prior.device), generator=draws[rows.start]))

    def gaussian(rows: range, temperature: float = 1.0) -> Tensor:
        # The same noise at every temperature.
        return prior.decode(temperature * open_streams(key, rows, prior.device, prior.dtype).normal(prior.dim))

    def sample(rows: range) -> Tensor:
        return prior.sample(len(rows), generator=generator)

    def measure(
        title: str, make: Callable[[range], Tensor], size: int = chunk_size, *, together: bool = False
    ) -> FeatureSet:
        matrix, logits, seconds = timed_features(
            title, make, features, len(images), size, prior.device, chunk_size, together
        )
        return FeatureSet(title, matrix, logits, frechet_distance(matrix, reference.moments), seconds)

    def row(found: FeatureSet) -> EvaluationRow:
        others = other_metrics(metrics, found.features, found.logits, reference)
        return EvaluationRow(found.name, found.distance, math.nan, found.seconds, others)

    rows = [row(measure("real", real)), row(measure("reconstruction", reconstruct)), row(measure("Gaussian", gaussian))]
    best: FeatureSet | None = None
    for t in temperatures:
        found = measure(f"Gaussian, temperature {t:g}", partial(gaussian, temperature=t))
        best = found if best is None or found.distance < best.distance else best
    if best is not None:
        rows.append(row(best))
    rows.append(row(measure(name, sample, SAMPLES, together=True)))
    reconstruction, plain = rows[1].distance, rows[2].distance
    if reconstruction < plain:
        rows = [replace(each, closure=closure(each.distance, plain, reconstruction)) for each in rows]
    return rows


class FeatureSet(NamedTuple):
    """Features of one row's images, class logits if any, the Fréchet distance, and the seconds to make the images."""

    name: str
    features: Tensor
    logits: Tensor | None
    distance: float
    seconds: float


def fork(generator: torch.Generator | None) -> torch.Generator | None:
    """A copy of `generator`, which goes on by one draw; None for None."""
    if generator is None:
        return None
    copy = torch.Generator(generator.device).set_state(generator.get_state())
    draw_key(generator)
    return copy


@torch.no_grad()
def timed_features(
    title: str,
    make: Callable[[range], Tensor],
    features: Features,
    n: int,
    size: int,
    device: torch.device,
    chunk_size: int,
    together: bool,
) -> tuple[Tensor, Tensor | None, float]:
    """Features and logits of `n` images, and the seconds that `make` took for them, `size` at a time; no more are held.
    `title` is the progress bar's.

    Several processes make different images, or, where `make` is one call of all of them (`together`), extract the
    features of different ones. All get all features.
    """
    blocks = [range(first, min(first + size, n)) for first in range(0, n, size)]
    seconds = 0.0
    joined: list[Extracted] = []
    own: list[Extracted] = []
    mine = blocks if together else [blocks[i] for i in share(len(blocks))]
    with progress_bar(sum(map(len, mine)), title) as bar:
        for rows in mine:
            start = time.monotonic()
            images = make(rows)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += time.monotonic() - start
            part = share(len(images)) if together else range(len(images))
            if part:
                own.append(extract(features, images[part.start : part.stop], device, chunk_size))
            if together:
                joined.append(join_features(own))
                own = []
            bar.update(len(rows))
    if not together:
        joined.append(join_features(own))
    logits = [part for _, part in joined if part is not None]
    return torch.cat([part for part, _ in joined]), torch.cat(logits) if logits else None, seconds


def join_features(own: Sequence[Extracted]) -> Extracted:
    """Features, and logits if there are any, of all processes in their order, from what this one has of them."""
    matrix = join_rows(torch.cat([part for part, _ in own]) if own else None)
    logits = [part for _, part in own if part is not None]
    if matrix is None:
        raise ValueError("there are no images to extract features of")
    return matrix, join_rows(torch.cat(logits) if logits else None)


def check_metrics(metrics: Collection[str] | None, images: int) -> None:
    """Raise ValueError or ImportError, before anything long begins, for metrics that so many images cannot have."""
    if metrics is not None and not set(metrics) <= set(METRICS):
        raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {', '.join(metrics)}")
    if metrics is None or metrics:
        fidelity("metric_kid")
        if images < SPLITS:
            raise ValueError(
                f"images: expected at least {SPLITS}, got {images}; with fewer, ask for the Fréchet distance alone"
            )


def other_metrics(
    metrics: Collection[str] | None, features: Tensor, logits: Tensor | None, reference: Reference
) -> dict[str, float]:
    """The asked-for metrics of features and logits; None takes those that there are data for."""
    available = {
        "kid": reference.features is not None,
        "precision-recall": reference.features is not None,
        "inception-score": logits is not None,
    }
    for name in metrics or ():
        if not available[name]:
            need = "the reference's features, not moments alone"
            if name == "inception-score":
                need = "class logits, which these features come without"
            raise ValueError(f"metrics: {name} needs {need}")
    wanted = [name for name in METRICS if available[name] and (metrics is None or name in metrics)]
    figures: dict[str, float] = {}
    if "kid" in wanted and reference.features is not None:
        figures |= kernel_distance(features, reference.features)
    if "precision-recall" in wanted and reference.features is not None:
        figures |= precision_recall(features, reference.features)
    if "inception-score" in wanted and logits is not None:
        figures |= inception_score(logits)
    return figures
