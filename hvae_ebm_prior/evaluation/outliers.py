"""Out-of-distribution scores: how far an image is from the data that the prior was trained on. High is more outlying.

Every scheme gives one score per cut k, the number of lower layers left out: k = 0 looks at all layers, k = L - 1 at the
top one alone. Higher layers hold coarser features, and outliers that resemble the data in their details seldom do so at
the top. Of the prior:

    inference     -sum_i f_i(T(u_0)_i, 0) over the layers above the cut, of a posterior draw u_0
    diffusion     the same after a detour: the layers above the cut are diffused to a noise level, those below are the
                  states of samples of the prior at that level, whatever the image, and the last conditional priors draw
                  all of them down to u_0 (Cui & Han, 2024, Sec. 5.2)
    conditional-  the same with layers below the cut that the prior draws given those above, which are held at their
    diffusion     diffusion
    density       inference plus the Gaussian energy |u_i|^2 / 2: -log of the density that energies correct
    flow          -log p(u_i | z_<i) of the same draws, the normalised density of `log_prob`, of energies with context
    restoration   what the conditional detour costs the image, log p(x | T(u)) before it less log p(x | T(u)) after it
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

from collections.abc import Callable

import torch
from torch import Tensor

from ..backbone.elbo import density_adapter, teacher_forced
from ..backbone.validation import check_count
from ..chains.streams import seeded
from ..density.energy_model import EnergyModel
from ..density.log_prob import log_prob_by_layer
from .detours import conditional_diffusion_scores, diffusion_scores, restoration_scores
from .scoring import Chunk, above_cuts, averaged, gaussian_energies, posterior_means


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
    steps = check_count(steps, "steps")
    return above_cuts(posterior_means(prior, images, draws, generator, lambda u: -log_prob_by_layer(prior, u, steps)))


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
                posteriors.append(list(adapter.infer_with_density(image)))
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


# All schemes by name; the first seven are the prior's, and `typicality` takes `reference` images beside.
SCHEMES: dict[str, Callable[..., Tensor]] = {
    "inference": inference_scores,
    "diffusion": diffusion_scores,
    "conditional-diffusion": conditional_diffusion_scores,
    "density": density_scores,
    "flow": flow_scores,
    "restoration": restoration_scores,
    "typicality": typicality_scores,
    "bound": bound_scores,
    "ratio": ratio_scores,
}
