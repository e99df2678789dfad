"""Out-of-distribution scores: how far an image is from the data that the prior was trained on. High is more outlying.

Every scheme gives one score per cut k, the number of lower layers left out: k = 0 looks at all layers, k = L - 1 at the
top one alone. Higher layers hold coarser features, and outliers that resemble the data in their details seldom do so at
the top. Of the prior:

    inference     -sum_i f_i(T(u_0)_i, 0) over the layers above the cut, of a posterior draw u_0
    diffusion     the same after a detour: the layers above the cut are diffused to a noise level, those below come
                  from the prior's chains at that level, and the last conditional priors draw all of them down to u_0
    density       inference plus the Gaussian energy |u_i|^2 / 2: -log of the density that energies correct
    flow          -log p(u_i | z_<i) of the same draws, the normalised density of `log_prob`, of energies with context
    restoration   what that detour costs the image, log p(x | T(u)) before it less log p(x | T(u)) after it
    typicality    the Mahalanobis distance of the layers' energies at all levels t and their Gaussian energies to those
                  of reference images: with few training data an energy may be low as well as high, and both mark
                  outliers (Nalisnick et al., 2019, on typical sets; Morningstar et al., 2021, on density statistics)

Energies are log-ratios of the learned prior to the Gaussian one. Where no data were, nothing bounds them, and they may
be low for some outliers; with the Gaussian energy they are safer. Of a posterior draw, |u|^2 is mostly noise in
directions that do not depend on the image: only a mean over draws shows the rest. And of the backbone, to compare with
(Havtorn et al., 2021):

    bound         -L^{>k}, the ELBO with the layers below the cut left to the Gaussian prior; k = 0 is the ELBO itself
    ratio         LLR^{>k} = L - L^{>k}; nothing at k = 0

Noise belongs to an image's place in the call, so no score depends on the other images.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..backbone.elbo import density_adapter, teacher_forced
from ..backbone.validation import check_count
from ..chains.streams import Streams, seeded
from ..density.conditional import draw_conditional
from ..density.energy_model import EnergyModel
from ..density.log_prob import log_prob_by_layer
from ..density.sampling import held_states
from .scoring import Chunk, above_cuts, averaged, encode_each, gaussian_energies, posterior_means


@torch.no_grad()
def inference_scores(
    prior: EnergyModel, images: Tensor, *, draws: int = 1, generator: torch.Generator | None = None
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
    prior: EnergyModel, images: Tensor, *, draws: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Energies and Gaussian energies of posterior draws; arguments, result and errors as of `inference_scores`."""

    def statistics(u: Tensor) -> Tensor:
        return prior.layer_energies(u, 0) + gaussian_energies(prior, u)

    return above_cuts(posterior_means(prior, images, draws, generator, statistics))


@torch.no_grad()
def flow_scores(
    prior: EnergyModel, images: Tensor, *, draws: int = 1, steps: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """Normalised density of posterior draws, by the probability flow.

    Args:
        prior: the trained prior; its energies have context.
        images: (N, C, H, W) in [0, 1].
        draws: posterior draws per image, whose scores are averaged.
        steps: as of `DiffusionEBMPrior.log_prob`.
        generator: source of the posterior noise.

    Returns:
        Scores (N, L) in nats, entry k for the cut k.

    Raises:
        TypeError: energies without context, or images of a wrong type.
        ValueError: images of a wrong shape or range.
    """
    check_count(steps, "steps")
    return above_cuts(posterior_means(prior, images, draws, generator, lambda u: -log_prob_by_layer(prior, u, steps)))


@torch.no_grad()
def diffusion_scores(
    prior: EnergyModel,
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

    def score(chunk: Chunk) -> Tensor:
        u = encode_each(prior, chunk)[0]
        restored = restore_above_cuts(prior, u, level, noise, chunk.streams)
        return torch.stack([above_cuts(prior.layer_energies(u_0, 0))[:, k] for k, u_0 in enumerate(restored)], dim=1)

    return averaged(prior, images, draws, generator, score)


@torch.no_grad()
def restoration_scores(
    prior: EnergyModel,
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
        TypeError: the adapter gives no densities, see `hvae_ebm_prior.backbone.elbo.DensityAdapter`, or images of a
            wrong type.
        ValueError: images of a wrong shape or range, or no such level.
        ChainDiverged: a chain left the finite numbers.
    """
    check_detour(prior, level, noise)
    adapter = density_adapter(prior.backbone)

    def log_likelihood(images: Tensor, u: Tensor) -> Tensor:
        _, features = prior.transform.states_and_features(u)
        return adapter.log_likelihood(features, images)

    def score(chunk: Chunk) -> Tensor:
        u = encode_each(prior, chunk)[0]
        before = log_likelihood(chunk.images, u)
        restored = restore_above_cuts(prior, u, level, noise, chunk.streams)
        return torch.stack([before - log_likelihood(chunk.images, u_0) for u_0 in restored], dim=1)

    return averaged(prior, images, draws, generator, score)


def check_detour(prior: EnergyModel, level: int, noise: float) -> None:
    """Raise ValueError unless the level exists and noise is non-negative."""
    if level not in range(1, prior.schedule.steps + 1):
        raise ValueError(f"level: expected a noise level 1..{prior.schedule.steps}, got {level!r}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: expected a non-negative factor, got {noise!r}")


def restore_above_cuts(prior: EnergyModel, u: Tensor, level: int, noise: float, streams: Streams) -> Iterator[Tensor]:
    """For every cut in turn, u_0 (N, D) of the detour: the layers of `u` (N, D) above the cut diffused to `level`, the
    others drawn there by the prior given them, and all drawn down together.
    """
    parts = prior.split(u)
    for k in range(len(parts)):
        inferred = dict(enumerate(parts[: len(parts) - k]))
        yield restore(prior, inferred, level, noise, streams)


def restore(prior: EnergyModel, inferred: dict[int, Tensor], level: int, noise: float, streams: Streams) -> Tensor:
    """The u_0 of one cut, from the layers `inferred` above it."""
    mask, states = held_states(inferred, prior.transform, prior.schedule, streams, noise)
    u = torch.where(mask, states[-1], streams.normal(prior.dim))
    for t in reversed(range(prior.schedule.steps)):
        # With all layers inferred nothing is drawn above the level.
        if t >= level and bool(mask.all()):
            u = states[t]
            continue
        levels = torch.full((len(u),), t, dtype=torch.long, device=u.device)
        u = draw_conditional(prior, u, levels, streams, hold=(mask, states[t]) if t >= level else None)
    return u


@torch.no_grad()
def bound_scores(
    prior: EnergyModel, images: Tensor, *, draws: int = 1, generator: torch.Generator | None = None
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
        TypeError: the adapter gives no densities, see `hvae_ebm_prior.backbone.elbo.DensityAdapter`, or images of a
            wrong type.
        ValueError: images of a wrong shape or range.
    """
    adapter = density_adapter(prior.backbone)
    layers = len(prior.latent_shapes)

    def score(chunk: Chunk) -> Tensor:
        posteriors = []
        for image, seed in zip(chunk.images.split(1), chunk.seeds, strict=True):
            with seeded(seed, image.device):
                posteriors.append(adapter.infer_with_density(image))
        z = [torch.cat([posterior[i][0] for posterior in posteriors]) for i in range(layers)]
        log_densities = [torch.cat([posterior[i][1] for posterior in posteriors]) for i in range(layers)]
        lower = chunk.streams.normal(prior.dim)
        bounds = [teacher_forced(prior.transform, chunk.images, z, log_densities, lower, k)[1] for k in range(layers)]
        return -torch.stack(bounds, dim=1)

    return averaged(prior, images, draws, generator, score)


def ratio_scores(
    prior: EnergyModel, images: Tensor, *, draws: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """LLR^{>k} of the backbone, 0 at k = 0; arguments, result and errors as of `bound_scores`."""
    scores = bound_scores(prior, images, draws=draws, generator=generator)
    return scores - scores[:, :1]


@torch.no_grad()
def typicality_scores(
    prior: EnergyModel,
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
    levels = prior.schedule.steps
    layers = len(prior.latent_shapes)
    if len(reference) <= layers * (levels + 1):
        raise ValueError(
            f"reference: expected more images than statistics, {layers * (levels + 1)}, got {len(reference)}"
        )

    def statistics(u: Tensor) -> Tensor:
        energies = [prior.layer_energies(u, t) for t in range(levels)]
        return torch.stack([*energies, gaussian_energies(prior, u)], dim=2)

    typical = posterior_means(prior, reference, draws, generator, statistics).double()
    given = posterior_means(prior, images, draws, generator, statistics).double()
    distances = [mahalanobis(given[:, : layers - k], typical[:, : layers - k]) for k in range(layers)]
    return torch.stack(distances, dim=1).to(prior.dtype)


def mahalanobis(given: Tensor, typical: Tensor) -> Tensor:
    """Squared distances (N,) of statistics (N, ...) to those of a reference (M, ...), in its covariance."""
    given, typical = given.flatten(1), typical.flatten(1)
    scale = typical.std(0).clamp(min=1e-12)
    given, typical = given / scale, typical / scale
    # A statistic that others determine, or that never varies, leaves the covariance singular.
    ridge = 1e-6 * torch.eye(typical.shape[1], dtype=typical.dtype, device=typical.device)
    root = torch.linalg.cholesky(torch.cov(typical.T) + ridge)
    return torch.linalg.solve_triangular(root, (given - typical.mean(0)).T, upper=False).square().sum(0)


# All schemes by name; the first six are the prior's, and `typicality` takes `reference` images beside.
SCHEMES: dict[str, Callable[..., Tensor]] = {
    "inference": inference_scores,
    "diffusion": diffusion_scores,
    "density": density_scores,
    "flow": flow_scores,
    "restoration": restoration_scores,
    "typicality": typicality_scores,
    "bound": bound_scores,
    "ratio": ratio_scores,
}
