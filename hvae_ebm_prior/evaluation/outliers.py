"""Out-of-distribution scores: how far an image is from what the prior learned. High is more outlying.

Every scheme gives one score per cut k, the number of lower layers left out: k = 0 looks at all layers, k = L - 1 at the
top one alone. What a layer knows of an image is coarser the higher it is, and outliers that fool the details seldom
fool the top. Of the prior:

    inference     -sum_i f_i(T(u_0)_i, 0) over the layers above the cut, of a posterior draw u_0
    diffusion     the same after a detour: the layers above the cut are diffused to a noise level, those below come from the prior's chains at that
                  level, and the last conditional priors draw all of them down to u_0 together
    density       inference plus the Gaussian part, |u_i|^2 / 2: -log of the density that energies correct
    restoration   what that detour costs the image, log p(x | T(u)) before it less log p(x | T(u)) after it
    typicality    how unusual the layers' energies at all levels t and their Gaussian parts are together: the Mahalanobis distance to those of
                  reference images. Where few data trained it, an energy may be low as well as high, and that is as telling (Nalisnick et al., 2019,
                  on typical sets; Morningstar et al., 2021, on densities of such statistics)

Energies are log-ratios of the learned prior to the Gaussian one. Where no data were, nothing bounds them, and they may
be low for some outliers; with the Gaussian part they are safer. Of a posterior draw, |u|^2 is mostly noise of what the
image does not tell, alike for all images: it takes draws to see past it. And of the backbone, to compare with (Havtorn
et al., 2021):

    bound         -L^{>k}, the ELBO with the layers below the cut left to the Gaussian prior; k = 0 is the ELBO itself
    ratio         LLR^{>k} = L - L^{>k}; nothing at k = 0

Noise belongs to an image's place in the call, so no score depends on the other images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone.elbo import density_adapter, teacher_forced
from ..backbone.validation import check_count, check_images
from ..chains.streams import Streams, draw_key, open_streams, sample_seeds, seeded
from ..density.conditional import draw_conditional
from ..density.sampling import held_states
from ..extras import missing
from ..prior import DiffusionEBMPrior


@torch.no_grad()
def inference_scores(
    prior: DiffusionEBMPrior, images: Tensor, *, draws: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Energies of posterior draws.

    Args:
        prior: the trained prior.
        images: (N, C, H, W) in [0, 1].
        draws: posterior draws per image, whose scores are averaged.
        generator: source of all noise.

    Returns:
        Scores (N, L) in nats, entry k for the cut k.

    Raises:
        TypeError, ValueError: images of a wrong type, shape or range.
    """
    return above_cuts(posterior_means(prior, images, draws, generator, lambda u: prior.layer_energies(u, 0)))


@torch.no_grad()
def density_scores(
    prior: DiffusionEBMPrior, images: Tensor, *, draws: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Energies and Gaussian part of posterior draws; arguments, result and errors as of `inference_scores`."""
    return above_cuts(
        posterior_means(prior, images, draws, generator, lambda u: prior.layer_energies(u, 0) + gaussian_part(prior, u))
    )


@torch.no_grad()
def diffusion_scores(
    prior: DiffusionEBMPrior,
    images: Tensor,
    *,
    level: int = 1,
    noise: float = 1.0,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Energies after diffusing the layers above each cut and drawing them back.

    Args:
        prior: the trained prior.
        images: (N, C, H, W) in [0, 1].
        level: noise level t that images are diffused to, 1..T.
        noise: factor on the std of that noise; 1 for what the conditional priors were trained on.
        draws: posterior draws per image, whose scores are averaged.
        generator: source of all noise.

    Returns:
        Scores (N, L) in nats, entry k for the cut k; each costs the chains of a sample.

    Raises:
        TypeError, ValueError: images of a wrong type, shape or range, or no such level.
        ChainDiverged: a chain left the finite numbers.
    """
    check_detour(prior, level, noise)

    def score(chunk: Tensor, streams: Streams, key: int, first: int) -> Tensor:
        u = prior.split(encode_each(prior, chunk, key, first)[0])
        kept = [restored(prior, dict(enumerate(u[: len(u) - k])), level, noise, streams) for k in range(len(u))]
        return torch.stack([above_cuts(prior.layer_energies(each, 0))[:, k] for k, each in enumerate(kept)], dim=1)

    return averaged(prior, images, draws, generator, score)


@torch.no_grad()
def restoration_scores(
    prior: DiffusionEBMPrior,
    images: Tensor,
    *,
    level: int = 1,
    noise: float = 1.0,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How much worse images are explained after the detour of `diffusion_scores`.

    Args:
        prior: the trained prior.
        images: (N, C, H, W) in [0, 1].
        level: noise level t that images are diffused to, 1..T.
        noise: factor on the std of that noise.
        draws: posterior draws per image, whose scores are averaged.
        generator: source of all noise.

    Returns:
        Scores (N, L) in nats, entry k for the cut k, the layers below which are the prior's own.

    Raises:
        TypeError: the adapter knows no densities, see `hvae_ebm_prior.backbone.elbo.DensityAdapter`, or images of a
            wrong type.
        ValueError: images of a wrong shape or range, or no such level.
        ChainDiverged: a chain left the finite numbers.
    """
    check_detour(prior, level, noise)
    adapter = density_adapter(prior.backbone)

    def score(chunk: Tensor, streams: Streams, key: int, first: int) -> Tensor:
        def explained(u: Tensor) -> Tensor:
            return adapter.log_likelihood(prior.transform.to_latents_and_features(u)[1], chunk)

        u = encode_each(prior, chunk, key, first)[0]
        before, parts = explained(u), prior.split(u)
        kept = [
            restored(prior, dict(enumerate(parts[: len(parts) - k])), level, noise, streams) for k in range(len(parts))
        ]
        return torch.stack([before - explained(each) for each in kept], dim=1)

    return averaged(prior, images, draws, generator, score)


def check_detour(prior: DiffusionEBMPrior, level: int, noise: float) -> None:
    """Raise ValueError unless the schedule has the level, and noise is a non-negative factor."""
    if level not in range(1, prior.schedule.steps + 1):
        raise ValueError(f"level: expected a noise level 1..{prior.schedule.steps}, got {level!r}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: expected a non-negative factor, got {noise!r}")


def restored(
    prior: DiffusionEBMPrior, inferred: dict[int, Tensor], level: int, noise: float, streams: Streams
) -> Tensor:
    """u_0 (N, D): inferred layers diffused to `level`, the others drawn there by the prior given them, and all drawn
    down together.
    """
    mask, states = held_states(inferred, prior.transform, prior.schedule, streams, noise)
    u = torch.where(mask, states[-1], streams.normal(prior.dim))
    for t in reversed(range(prior.schedule.steps)):
        levels = torch.full((len(u),), t, dtype=torch.long, device=u.device)
        # All layers inferred: nothing is to be drawn above the level.
        if t >= level and bool(mask.all()):
            u = states[t]
        else:
            u = draw_conditional(prior, u, levels, streams, hold=(mask, states[t]) if t >= level else None)
    return u


@torch.no_grad()
def bound_scores(
    prior: DiffusionEBMPrior, images: Tensor, *, draws: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """-L^{>k} of the backbone.

    Args:
        prior: the prior, for its backbone.
        images: (N, C, H, W) in [0, 1].
        draws: posterior draws per image, whose scores are averaged.
        generator: source of all noise.

    Returns:
        Scores (N, L) in nats, entry k for the cut k.

    Raises:
        TypeError: the adapter knows no densities, see `hvae_ebm_prior.backbone.elbo.DensityAdapter`, or images of a
            wrong type.
        ValueError: images of a wrong shape or range.
    """
    adapter, layers = density_adapter(prior.backbone), len(prior.latent_shapes)

    def score(chunk: Tensor, streams: Streams, key: int, first: int) -> Tensor:
        found = []
        for image, seed in zip(chunk.split(1), sample_seeds(key, range(first, first + len(chunk))), strict=True):
            with seeded(seed, chunk.device):
                found.append(adapter.infer_with_density(image))
        z = [torch.cat([each[i][0] for each in found]) for i in range(layers)]
        log_densities = [torch.cat([each[i][1] for each in found]) for i in range(layers)]
        lower = streams.normal(prior.dim)
        return torch.stack(
            [-teacher_forced(prior.transform, chunk, z, log_densities, lower, k)[1] for k in range(layers)], dim=1
        )

    return averaged(prior, images, draws, generator, score)


def ratio_scores(
    prior: DiffusionEBMPrior, images: Tensor, *, draws: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """LLR^{>k} of the backbone, 0 at k = 0; arguments, result and errors as of `bound_scores`."""
    scores = bound_scores(prior, images, draws=draws, generator=generator)
    return scores - scores[:, :1]


@torch.no_grad()
def typicality_scores(
    prior: DiffusionEBMPrior,
    images: Tensor,
    *,
    reference: Tensor,
    draws: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mahalanobis distances of energies and Gaussian parts to those of reference images.

    Args:
        prior: the trained prior.
        images: (N, C, H, W) in [0, 1].
        reference: images (M, C, H, W) of the data, such as those it was trained on; some hundreds.
        draws: posterior draws per image, over which statistics are averaged.
        generator: source of all noise.

    Returns:
        Squared distances (N, L), entry k for the cut k.

    Raises:
        TypeError, ValueError: images of a wrong type, shape or range, or too few reference images to estimate a
            covariance.
    """
    levels, layers = prior.schedule.steps, len(prior.latent_shapes)
    if len(reference) <= layers * (levels + 1):
        raise ValueError(
            f"reference: expected more images than statistics, {layers * (levels + 1)}, got {len(reference)}"
        )

    def describe(u: Tensor) -> Tensor:
        return torch.stack([*(prior.layer_energies(u, t) for t in range(levels)), gaussian_part(prior, u)], dim=2)

    usual, found = (posterior_means(prior, batch, draws, generator, describe).double() for batch in (reference, images))
    columns = []
    for k in range(layers):
        typical, seen = (part[:, : layers - k].flatten(1) for part in (usual, found))
        scale = typical.std(0).clamp(min=1e-12)
        typical, seen = (typical / scale, seen / scale)
        covariance = torch.cov(typical.T) + 1e-6 * torch.eye(
            typical.shape[1], dtype=typical.dtype, device=typical.device
        )
        root = torch.linalg.cholesky(covariance)
        columns.append(torch.linalg.solve_triangular(root, (seen - typical.mean(0)).T, upper=False).square().sum(0))
    return torch.stack(columns, dim=1).to(prior.dtype)


# All schemes by name; the first five are the prior's, and `typicality` takes `reference` images beside.
SCHEMES: dict[str, Callable[..., Tensor]] = {
    "inference": inference_scores,
    "diffusion": diffusion_scores,
    "density": density_scores,
    "restoration": restoration_scores,
    "typicality": typicality_scores,
    "bound": bound_scores,
    "ratio": ratio_scores,
}


def averaged(
    prior: DiffusionEBMPrior,
    images: Tensor,
    draws: int,
    generator: torch.Generator | None,
    score: Callable[[Tensor, Streams, int, int], Tensor],
    copies: int = 1,
) -> Tensor:
    """Mean over draws of the scores of chunks of images, given their streams, a key and the number of the first image.

    Args:
        prior: the prior.
        images: (N, C, H, W).
        draws: how often all are scored.
        generator: source of the noise.
        score: the scores (n, ...) of a chunk (n, C, H, W).
        copies: how many times `score` holds each image in memory.

    Returns:
        Scores (N, ...).
    """
    check_images(images)
    check_count(draws, "draws")
    check_count(copies, "draws")
    images, scores = images.to(prior.device, prior.transform.dtype), []
    chunk_size = max(1, prior.samples_per_chunk // copies)
    for _ in range(draws):
        key, noise, found = draw_key(generator), draw_key(generator), []
        for first in range(0, len(images), chunk_size):
            chunk = images[first : first + chunk_size]
            streams = open_streams(
                noise, range(first, first + len(chunk)), prior.device, prior.dtype, prior.execution.backend
            )
            found.append(score(chunk, streams, key, first))
        scores.append(torch.cat(found))
    return torch.stack(scores).mean(0)


def posterior_means(
    prior: DiffusionEBMPrior,
    images: Tensor,
    draws: int,
    generator: torch.Generator | None,
    describe: Callable[[Tensor], Tensor],
) -> Tensor:
    """Means (N, ...) over posterior draws of what `describe` tells of noise (n, D), (n, ...)."""

    def score(chunk: Tensor, streams: Streams, key: int, first: int) -> Tensor:
        u = encode_each(prior, chunk, key, first, draws)
        return describe(u.flatten(0, 1)).unflatten(0, u.shape[:2]).mean(0)

    return averaged(prior, images, 1, generator, score, copies=draws)


def gaussian_part(prior: DiffusionEBMPrior, u: Tensor) -> Tensor:
    """|u_i|^2 / 2 of every layer, (N, L)."""
    return torch.stack([0.5 * part.flatten(1).square().sum(1) for part in prior.split(u)], dim=1)


def encode_each(prior: DiffusionEBMPrior, images: Tensor, key: int, first: int, draws: int = 1) -> Tensor:
    """Posterior noise (draws, N, D) of images, each under a seed of its own, so that it does not depend on the others."""
    seeds = sample_seeds(key, range(first, first + len(images)))
    pairs = zip(images.split(1), seeds, strict=True)
    found = [
        prior.encode(image.expand(draws, -1, -1, -1), generator=torch.Generator().manual_seed(seed))
        for image, seed in pairs
    ]
    return torch.stack(found, dim=1)


def above_cuts(layers: Tensor) -> Tensor:
    """Sums over the layers above each cut, entry k without the k lowest, of values per layer (N, L)."""
    return layers.cumsum(1).flip(1)


@dataclass(frozen=True)
class Detection:
    """How well a score tells outliers from the data.

    Attributes:
        auroc: area under the ROC curve, the probability that an outlier scores higher.
        auprc: area under the precision-recall curve, as average precision; outliers are positive.
        fpr80: share of the data above the score that 80 % of the outliers reach.
    """

    auroc: float
    auprc: float
    fpr80: float


def detection(scores: Tensor, outliers: Tensor) -> list[Detection]:
    """Figures of every cut.

    Args:
        scores: of the data (N, L).
        outliers: of what is to be told apart (M, L).

    Returns:
        One entry per cut k.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the two differ in L, one is empty, or they are not finite.
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing("detection needs scikit-learn", "ood") from error
    if (
        scores.ndim != 2
        or outliers.ndim != 2
        or scores.shape[1] != outliers.shape[1]
        or not len(scores)
        or not len(outliers)
    ):
        raise ValueError(f"scores: expected (N, L) and (M, L), got {tuple(scores.shape)} and {tuple(outliers.shape)}")
    truth = torch.cat((torch.zeros(len(scores)), torch.ones(len(outliers)))).numpy()
    found = []
    for column in torch.cat((scores, outliers)).cpu().double().unbind(1):
        false, true, _ = roc_curve(truth, column.numpy())
        fpr80 = float(false[(true >= 0.8).argmax()])
        found.append(
            Detection(
                float(roc_auc_score(truth, column.numpy())),
                float(average_precision_score(truth, column.numpy())),
                fpr80,
            )
        )
    return found
