"""NCP-VAE (Aneja et al., "A Contrastive Learning Approach for Training Variational Autoencoder Priors", NeurIPS 2021).

Layer by layer a binary classifier separates posterior latents from prior ones, given the same posterior latents above.
Its logit is learned to be

    f_i(z_i, z_<i) = log q(z_i | z_<i) - log p(z_i | z_<i),
    loss_i = softplus(-f_i(z_i)) + softplus(f_i(z_i^-)),      z_i^- ~ p(. | z_<i),

with q the aggregate posterior (noise-contrastive estimation, Gutmann & Hyvaerinen 2010); there are no chains in
training. The prior is then prod_i p(z_i | z_<i) exp f_i(z_i, z_<i), where every factor is normalised if the logits are
right. Two ways to draw from it:

- "sir", sampling-importance-resampling: top to bottom, of M proposals z_i ~ p(. | z_<i) one is taken with probability
  proportional to exp f_i;
- "langevin": chains in u over all layers, on sum_i f_i - |u|^2 / 2.

What the original takes from its own decoder as a summary of z_<i is here what any backbone offers: the networks see
z_i, u_i, mean_i and log std_i, stacked along the first dimension. Neither more proposals nor more steps are always
better: classifiers are trained on the posterior and the prior, on nothing between or beyond, and the harder one
searches for where f_i is high, the more one finds where it is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import check_count
from ..chains.execution import ExecutionConfig
from ..chains.langevin import LangevinConfig
from ..chains.schedule import DiffusionSchedule
from ..density.energy_model import Shapes
from ..density.sampling import SamplingRequest
from ..energies.coupling import Coupling, Labels
from ..energies.networks import EnergyConfig
from ..presets import PRESETS
from ..prior import DiffusionEBMPrior
from ..training.recovery import RecoveryLoss
from .layerwise import contrast_layers, sample_layers, stacked_inputs, stacked_shapes

Sampler = Literal["sir", "langevin"]


class NCPPrior(DiffusionEBMPrior):
    """Noise-contrastive priors over the layers of a hierarchical VAE; its `energy` is -sum_i f_i.

    A diffusion of one level without noise, whose energies are logits of binary classifiers. It learns no labels.

    Args:
        backbone: as of `LatentPrior`.
        sampler: "sir" or "langevin".
        proposals: number M of proposals per layer of "sir".
        langevin: the chain of "langevin".
        energy: settings of the default networks, or the user's own, one per layer: network(x, t) returns f_i, (N,), of
            x, (N, *input_shapes[i]): z_i, u_i, mean_i and log std_i stacked along the first dimension.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, an unknown sampler, or `proposals` is no positive integer.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {
        "sampler": Sampler,
        "proposals": int,
        "langevin": LangevinConfig,
    }

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
        check_count(proposals, "proposals")
        super().__init__(
            backbone, schedule=DiffusionSchedule.marginal(), langevin=langevin, energy=energy, execution=execution
        )
        self.sampler = sampler
        self.proposals = proposals

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sampler", "proposals", "langevin", "execution")}

    @staticmethod
    def network_shapes(latent_shapes: Shapes) -> Shapes:
        """Shapes of the classifiers' inputs for latents of the given shapes."""
        return stacked_shapes(latent_shapes)

    def inputs(self, z: Sequence[Tensor]) -> list[Tensor]:
        """The classifiers' inputs (N, *input_shapes[i]) for latents `z` of all layers, or of the first ones."""
        return stacked_inputs(self.transform, z)

    @property
    def gradients_per_step(self) -> int:
        """One, as there are no chains in training."""
        return 1

    def couple(self, coupling: Coupling) -> None:
        """Raises TypeError: classifiers of posterior and prior learn no labels."""
        raise TypeError("an NCPPrior learns no labels; take a DiffusionEBMPrior")

    def batch_loss(
        self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None, rows: range | None = None
    ) -> RecoveryLoss:
        """The classifiers' loss, less that of chance: `total` is the sum over layers, `recovery` their mean."""
        return contrast_layers(self, u, labels, generator, rows, 1, classification_loss)

    def _sample_levels(self, request: SamplingRequest, key: int, samples: range) -> list[Tensor]:
        if self.sampler == "langevin":
            return super()._sample_levels(request, key, samples)
        if request.condition is not None:
            raise ValueError('conditions need chains: make the prior with sampler="langevin"')
        return sample_layers(self, request, key, samples, self.proposals)


def classification_loss(f: Tensor) -> Tensor:
    """The classifiers' losses (L, N), less that of chance, 2 log 2, of logits (L, N, 2) of data and of a prior draw."""
    return F.softplus(-f[:, :, 0]) + F.softplus(f[:, :, 1]) - 2 * F.softplus(f.new_zeros(()))
