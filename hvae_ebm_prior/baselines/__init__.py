"""Other priors over the same frozen backbone, to compare with: all have `fit` and `sample`.

    GaussianPrior          the backbone's own prior, at a temperature
    GaussianMixturePrior   a mixture in u, fitted by EM
    JointEBMPrior          one marginal energy-based model, learned by maximum likelihood
    NCPPrior               binary classifiers layer by layer, learned by noise-contrastive estimation
    MultiStagePrior        one marginal model in stages of density-ratio estimation
    LatentDiffusionPrior   our diffusion with z in the place of u
    FlowMatchingPrior      a flow over all layers at once, learned by flow matching

docs/baselines.md says how they work, and with which settings they work best. May import from all rooms but evaluation
and cli, and from the prior itself.
"""

from ..density.gaussian import GaussianPrior
from .flow_matching import FlowMatchingPrior
from .joint import JointEBMPrior
from .mixture import GaussianMixturePrior
from .ncp import NCPPrior
from .staged import MultiStagePrior
from .zspace import LatentDiffusionPrior

__all__ = [
    "FlowMatchingPrior",
    "GaussianMixturePrior",
    "GaussianPrior",
    "JointEBMPrior",
    "LatentDiffusionPrior",
    "MultiStagePrior",
    "NCPPrior",
]
