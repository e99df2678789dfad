"""The backbone's own prior, u = temperature eps with eps ~ N(0, I): what every other prior has to beat."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import check_temperature
from ..chains.streams import open_streams
from .latent_prior import LatentPrior


class GaussianPrior(LatentPrior):
    """The Gaussian prior of a hierarchical VAE.

    Args:
        backbone: as of `LatentPrior`.
        temperature: multiplies the std of the backbone's Gaussian layers; below 1 samples are cleaner and less diverse.

    Raises:
        TypeError: `backbone` is no adapter and none fits it.
        ValueError: the backbone breaks its contract, or the temperature is not positive.
    """

    def __init__(self, backbone: BackboneAdapter | nn.Module, temperature: float = 1.0) -> None:
        check_temperature(temperature)
        super().__init__(backbone)
        self.temperature = temperature

    def fit(
        self, data: Tensor | Dataset[Any] | Iterable[Any], *, generator: torch.Generator | None = None
    ) -> list[Any]:
        """Nothing is learned: `data` and `generator` are ignored, and there are no records."""
        return []

    def _draw(self, key: int, samples: range) -> Tensor:
        return self.temperature * open_streams(key, samples, self.device, self.dtype).normal(self.dim)
