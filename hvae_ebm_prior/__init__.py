"""Good samples out of a trained hierarchical VAE: conditional energy-based diffusion priors in its noise space.

The package in the order in which it is built; every line imports from those above it alone:

    backbone                  the frozen model as a map from noise u to latents z
    energies                  the networks that are learned, and labels
    chains                    noise levels, Langevin steps, their kernels, noise by sample
    density                   the density that these make, sampling, composition of several
    saving                    folders and the Hub
    training                  loss, step and loop; data, checkpoints, callbacks
    prior, presets, control   DiffusionEBMPrior, its settings by name, editing with it
    baselines                 other priors over the same noise
    evaluation                metrics, likelihoods, outlier scores, comparisons, checks of adapters
    cli                       the commands
"""

from . import baselines  # saved priors may be of these classes  # noqa: F401
from .backbone.transform import BackboneAdapter
from .chains.execution import ExecutionConfig
from .chains.kernels import langevin_update
from .chains.langevin import ChainDiverged, LangevinConfig
from .chains.schedule import DiffusionSchedule
from .density.ancestral import DrawingConfig
from .density.composition import AND, NOT, OR, Expert, Label
from .energies.coupling import Coupling, LabelSet
from .energies.networks import EnergyConfig
from .prior import DiffusionEBMPrior
from .training.config import TrainingConfig
from .training.guard import TrainingDiverged
from .training.record import TrainingRecord

__version__ = "0.1.0"
__all__ = [
    "AND",
    "NOT",
    "OR",
    "BackboneAdapter",
    "ChainDiverged",
    "Coupling",
    "DiffusionEBMPrior",
    "DiffusionSchedule",
    "DrawingConfig",
    "EnergyConfig",
    "ExecutionConfig",
    "Expert",
    "Label",
    "LabelSet",
    "LangevinConfig",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingRecord",
    "langevin_update",
]
