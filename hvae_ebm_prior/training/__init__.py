"""Learning the energies: the loss, one step, the loop, its guard and checkpoints, data and caches, callbacks.

May import from backbone, energies, chains, density and saving.
"""

from .activity import measure_activity
from .config import TrainingConfig
from .guard import TrainingDiverged
from .record import TrainingRecord

__all__ = ["TrainingConfig", "TrainingDiverged", "TrainingRecord", "measure_activity"]
