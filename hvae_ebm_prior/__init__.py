"""Good samples out of a trained hierarchical VAE: conditional energy-based diffusion priors in its noise space."""

from .backbone import BackboneAdapter
from .composition import AND, NOT, OR, Expert, Label
from .coupling import Coupling, LabelSet
from .energy import EnergyConfig
from .execution import ExecutionConfig
from .langevin import ChainDiverged, LangevinConfig, langevin_update
from .layerwise import LayerwisePrior
from .prior import DiffusionEBMPrior
from .schedule import DiffusionSchedule
from .training import TrainingConfig, TrainingDiverged, TrainingRecord

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
