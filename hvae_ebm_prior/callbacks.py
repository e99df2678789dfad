"""Callbacks of training, under the name users import, from training/callbacks.py and evaluation/early_stopping.py."""

from .evaluation.early_stopping import EarlyStopping
from .training.callbacks import TensorBoard, Trackio, sample_grid, scalars
from .training.record import StopTraining

__all__ = [
    "EarlyStopping",
    "StopTraining",
    "TensorBoard",
    "Trackio",
    "sample_grid",
    "scalars",
]
