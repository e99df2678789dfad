"""A mixture of Gaussians in u, fitted to posterior draws by expectation-maximisation: a cheap control.

    p(u) = sum_k w_k N(u; m_k, S_k)

Most of a deep VAE's dimensions are inactive: their posterior is the prior for every image. To a mixture they are
noise that hides the clusters, so it is over the most active dimensions alone, those in which two posterior draws of one
image are the most correlated; the others stay N(0, 1). It shows how much of the prior hole is in few dimensions with a
simple density.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import check_count, check_images
from ..chains.streams import draw_key, open_streams
from ..density.latent_prior import LatentPrior
from ..saving.extras import missing
from ..training.batches import Batches

Covariance = Literal["diag", "full"]


class GaussianMixturePrior(LatentPrior):
    """A Gaussian mixture over the most active dimensions of a VAE's noise; before `fit`, the Gaussian prior.

    Args:
        backbone: as of `LatentPrior`.
        components: number of Gaussians K.
        covariance: "full" or "diag"; full ones have A^2 numbers each to hold and to estimate.
        dims: number of dimensions A that the mixture is over; all D where there are no more.

    Attributes:
        weights: w_k, (K,).
        active: indices (A,) of the dimensions.
        means: m_k, (K, A).
        factors: lower Cholesky factors of S_k (K, A, A), or stds (K, A).

    Raises:
        TypeError: `backbone` is no adapter and none fits it, or a count is no integer.
        ValueError: the backbone breaks its contract, a count is not positive, or the covariance is of an unknown kind.
    """

    weights: Tensor
    active: Tensor
    means: Tensor
    factors: Tensor

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        components: int = 50,
        covariance: Covariance = "full",
        dims: int = 16,
    ) -> None:
        components = check_count(components, "components")
        dims = check_count(dims, "dims")
        if covariance not in ("diag", "full"):
            raise ValueError(f'covariance: expected "diag" or "full", got {covariance!r}')
        super().__init__(backbone)
        self.components = components
        self.covariance = covariance
        zeros = torch.zeros(components, min(dims, self.dim), device=self.device, dtype=self.dtype)
        self.register_buffer("weights", torch.full_like(zeros[:, 0], 1 / components))
        self.register_buffer("active", torch.arange(zeros.shape[1], device=self.device))
        self.register_buffer("means", zeros)
        ones = torch.ones_like(zeros)
        self.register_buffer("factors", ones if covariance == "diag" else torch.diag_embed(ones))

    def fit(
        self,
        data: Tensor | Dataset[Any] | Iterable[Any],
        *,
        images: int = 10_000,
        iterations: int = 100,
        regularization: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> list[Any]:
        """Fit the mixture by scikit-learn, on the CPU.

        Args:
            data: images (N, C, H, W) in [0, 1], a dataset of them, or a loader of batches.
            images: how many images to take at most, of one pass over the data; D numbers of each are held in memory.
            iterations: largest number of EM steps.
            regularization: added to every variance.
            generator: source of the order of the images, their posterior draws and the first clusters.

        Returns:
            No records, as EM has no steps like those of other priors.

        Raises:
            TypeError, ValueError: data of the wrong type, empty, out of range, or fewer images than components.
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.mixture import GaussianMixture  # type: ignore[import-untyped]
        except ImportError as error:
            raise missing("the Gaussian mixture needs scikit-learn", "baselines") from error
        images = check_count(images, "images")
        u = self._posterior_pairs(data, images, generator)
        if u.shape[1] < self.components:
            raise ValueError(
                f"data: expected at least one image per component, {self.components} in all, got {u.shape[1]}"
            )
        centred = u - u.mean(1, keepdim=True)
        correlation = centred.prod(0).mean(0) / centred.square().mean(1).sqrt().prod(0).clamp(min=1e-12)
        self.active.copy_(correlation.argsort(descending=True, stable=True)[: len(self.active)].sort()[0])
        mixture = GaussianMixture(
            self.components,
            covariance_type=self.covariance,
            max_iter=iterations,
            reg_covar=regularization,
            random_state=draw_key(generator) % 2**32,
        ).fit(u[..., self.active.cpu()].flatten(0, 1).numpy())
        self.weights.copy_(torch.from_numpy(mixture.weights_))
        self.means.copy_(torch.from_numpy(mixture.means_))
        covariances = torch.from_numpy(mixture.covariances_)
        self.factors.copy_(covariances.sqrt() if self.covariance == "diag" else torch.linalg.cholesky(covariances))
        return []

    def _posterior_pairs(
        self, data: Tensor | Dataset[Any] | Iterable[Any], count: int, generator: torch.Generator | None
    ) -> Tensor:
        """Two posterior draws (2, N, D) of each of up to `count` images, of one pass over the data."""
        pairs: list[Tensor] = []
        for batch, _, epoch in Batches(
            data, min(count, 100), generator, check=partial(check_images, adapter=self.backbone)
        ):
            if epoch > 0:
                break
            pairs.append(torch.stack([self.encode(batch.to(self.device), generator=generator).cpu() for _ in range(2)]))
            if sum(pair.shape[1] for pair in pairs) >= count:
                break
        return torch.cat(pairs, dim=1)[:, :count].double()

    def _draw(self, key: int, samples: range) -> Tensor:
        # One number more than dimensions: it chooses the component.
        noise = open_streams(key, samples, self.device, self.dtype).normal(self.dim + 1)
        u = noise[:, :-1].contiguous()
        uniform = torch.special.ndtr(noise[:, -1].contiguous())
        chosen = torch.searchsorted(self.weights.cumsum(0), uniform).clamp(max=self.components - 1)
        active = u[:, self.active]
        if self.covariance == "diag":
            u[:, self.active] = self.means[chosen] + self.factors[chosen] * active
            return u
        for k in chosen.unique().tolist():
            rows = (chosen == k).nonzero()
            u[rows, self.active] = self.means[k] + active[rows[:, 0]] @ self.factors[k].T
        return u
