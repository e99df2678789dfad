"""NCP-VAE (Aneja et al., "A Contrastive Learning Approach for Training Variational Autoencoder Priors", NeurIPS 2021).

Layer by layer a binary classifier tells posterior latents from prior ones, given the same posterior latents above. Its
logit is learned to be

    f_i(z_i, z_<i) = log q(z_i | z_<i) - log p(z_i | z_<i),      loss_i = softplus(-f_i(z_i)) + softplus(f_i(z_i^-)),      z_i^- ~ p(. | z_<i),

with q the aggregate posterior (noise-contrastive estimation, Gutmann & Hyvaerinen 2010); there are no chains in
training. The prior is then prod_i p(z_i | z_<i) exp f_i(z_i, z_<i), where every factor is normalised if the logits are
right. Two ways to draw from it:

- "sir", sampling-importance-resampling: top to bottom, of M proposals z_i ~ p(. | z_<i) one is taken with probability
  proportional to exp f_i;
- "langevin": chains in u over all layers, on sum_i f_i - |u|^2 / 2.

What the original takes from its own decoder as a summary of z_<i is here what any backbone offers: the networks see
z_i, u_i, mean_i and log std_i, stacked along the first dimension. Neither more proposals nor more steps are always
better: classifiers have seen the posterior and the prior, nothing between or beyond, and the harder one looks for where
f_i is high, the more one finds where it is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter
from ..chains.execution import ExecutionConfig
from ..chains.langevin import LangevinConfig
from ..chains.schedule import DiffusionSchedule
from ..density.sampling import SamplingRequest, sample_levels
from ..energies.networks import EnergyConfig
from ..presets import PRESETS
from .layerwise import LayerwisePrior

Sampler = Literal["sir", "langevin"]


class NCPPrior(LayerwisePrior):
    """Noise-contrastive priors over the layers of a hierarchical VAE; its `energy` is -sum_i f_i.

    A `LayerwisePrior` of one level without noise, which tells one draw of each layer's prior from the data by a binary
    classifier.

    Args:
        backbone: as of `LatentPrior`.
        sampler: "sir" or "langevin".
        proposals: number M of proposals per layer of "sir".
        langevin: the chain of "langevin".
        energy: settings of the default networks, or the user's own, as of `LayerwisePrior`.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `LayerwisePrior`, or an unknown sampler.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {
        "sampler": Sampler,
        "proposals": int,
        "langevin": LangevinConfig,
    }
    # Logits of classifiers are log density ratios, offsets and all.
    comparable: ClassVar[bool] = True
    NAME = "an NCPPrior"

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        sampler: Sampler = "sir",
        proposals: int = 100,
        langevin: LangevinConfig = PRESETS["ncp"].langevin,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        if sampler not in ("sir", "langevin"):
            raise ValueError(f'sampler: expected "sir" or "langevin", got {sampler!r}')
        if not isinstance(langevin, LangevinConfig):
            raise TypeError(f"langevin: expected a LangevinConfig, got {type(langevin).__name__}")
        schedule = DiffusionSchedule.marginal()
        super().__init__(
            backbone, schedule=schedule, proposals=proposals, negatives=1, energy=energy, execution=execution
        )
        self.sampler, self.langevin = sampler, langevin

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sampler", "proposals", "langevin", "execution")}

    def ranking_loss(self, f: Tensor) -> Tensor:
        """The classifiers' losses (L, N), less that of chance, 2 log 2, of logits `f` (L, N, 2) of data and of a draw
        of the prior.
        """
        return F.softplus(-f[:, :, 0]) + F.softplus(f[:, :, 1]) - 2 * F.softplus(f.new_zeros(()))

    def _sample_levels(self, request: SamplingRequest, key: int, samples: range) -> list[Tensor]:
        if self.sampler == "langevin":
            return sample_levels(self, request, key, samples)
        if request.condition is not None:
            raise ValueError('conditions need chains: make the prior with sampler="langevin"')
        return super()._sample_levels(request, key, samples)
