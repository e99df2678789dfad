"""A mixture of Gaussians in u, p(u) = sum_k w_k N(u; m_k, S_k), fitted to posterior draws by expectation-maximisation: a cheap control.

It says how much of the prior hole is a matter of a few clusters. In many dimensions S_k should be diagonal: inactive dimensions are N(0, 1) in every
component and cost nothing, while full covariances have D^2 numbers each to estimate.
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbone import BackboneAdapter
from ..latent_prior import LatentPrior
from ..streams import draw_key, open_streams
from ..training import TrainingRecord, endless_batches
from ..validation import check_count

Covariance = Literal["diag", "full"]


class GaussianMixturePrior(LatentPrior):
    """A Gaussian mixture over the noise of a hierarchical VAE; before `fit`, the Gaussian prior.

    Args:
        backbone: as of `LatentPrior`.
        components: number of Gaussians K.
        covariance: "diag", or "full" for small D.

    Attributes:
        weights: w_k, (K,).
        means: m_k, (K, D).
        factors: stds (K, D), or lower Cholesky factors of S_k (K, D, D).

    Raises:
        TypeError: `backbone` is no adapter and none fits it, or `components` is no integer.
        ValueError: the backbone breaks its contract, `components` is not positive, or the covariance is of an unknown kind.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, backbone: BackboneAdapter | nn.Module, components: int = 100, covariance: Covariance = "diag") -> None:
        check_count(components, "components")
        if covariance not in ("diag", "full"):
            raise ValueError(f'covariance: expected "diag" or "full", got {covariance!r}')
        super().__init__(backbone)
        self.components, self.covariance = components, covariance
        like = {"device": self.device, "dtype": self.dtype}
        one = torch.ones(self.dim, **like)  # type: ignore[call-overload]
        self.register_buffer("weights", torch.full((components,), 1 / components, **like))  # type: ignore[call-overload]
        self.register_buffer("means", torch.zeros(components, self.dim, **like))  # type: ignore[call-overload]
        self.register_buffer("factors", (one if covariance == "diag" else torch.diag(one)).repeat(components, *([1] * (1 + (covariance == "full")))))

    def fit(
        self,
        data: Tensor | Dataset[Any] | Iterable[Any],
        *,
        images: int = 10_000,
        iterations: int = 100,
        regularization: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> list[TrainingRecord]:
        """Fit the mixture by scikit-learn, on the CPU.

        Args:
            data: images (N, C, H, W) in [0, 1], a dataset of them, or a loader of batches.
            images: how many images to take at most, of one pass over the data; D numbers of each are held in memory.
            iterations: largest number of EM steps.
            regularization: added to every variance.
            generator: source of the order of the images, their posterior draws and the first clusters.

        Returns:
            No records: EM has no steps like those of other priors.

        Raises:
            TypeError, ValueError: data of the wrong type, empty, out of range, or fewer images than components.
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.mixture import GaussianMixture  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("the Gaussian mixture needs scikit-learn; install hvae-ebm-prior[baselines]") from error
        check_count(images, "images")
        drawn: list[Tensor] = []
        for batch, _, _ in takewhile(lambda batch: batch[2] == 0, endless_batches(data, min(images, 100), generator)):
            drawn.append(self.encode(batch.to(self.device), generator=generator).cpu())
            if sum(map(len, drawn)) >= images:
                break
        u = torch.cat(drawn)[:images].double().numpy()
        if len(u) < self.components:
            raise ValueError(f"data: expected at least one image per component, {self.components} in all, got {len(u)}")
        mixture = GaussianMixture(
            self.components,
            covariance_type=self.covariance,
            max_iter=iterations,
            reg_covar=regularization,
            random_state=draw_key(generator) % 2**32,
        ).fit(u)
        self.weights.copy_(torch.from_numpy(mixture.weights_))
        self.means.copy_(torch.from_numpy(mixture.means_))
        covariances = torch.from_numpy(mixture.covariances_)
        self.factors.copy_(covariances.sqrt() if self.covariance == "diag" else torch.linalg.cholesky(covariances))
        return []

    def _draw(self, key: int, samples: range) -> Tensor:
        # One number more than dimensions: it decides on the component.
        noise = open_streams(key, samples, self.device, self.dtype).normal(self.dim + 1)
        noise, uniform = noise[:, :-1], torch.special.ndtr(noise[:, -1].contiguous())
        chosen = torch.searchsorted(self.weights.cumsum(0), uniform).clamp(max=self.components - 1)
        if self.covariance == "diag":
            return self.means[chosen] + self.factors[chosen] * noise
        u = self.means[chosen]
        for k in chosen.unique().tolist():
            u[chosen == k] += noise[chosen == k] @ self.factors[k].T
        return u
