"""Good samples out of a trained hierarchical VAE: conditional energy-based diffusion priors in its noise space."""

from .backbone.transform import BackboneAdapter
from .baselines.layerwise import LayerwisePrior
from .chains.execution import ExecutionConfig
from .chains.kernels import langevin_update
from .chains.langevin import ChainDiverged, LangevinConfig
from .chains.schedule import DiffusionSchedule
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
    "EnergyConfig",
    "ExecutionConfig",
    "Expert",
    "Label",
    "LabelSet",
    "LangevinConfig",
    "LayerwisePrior",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingRecord",
    "langevin_update",
]
