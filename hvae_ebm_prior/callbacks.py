"""Callbacks of training, under the name users import; they live in training/callbacks.py."""

from .training.callbacks import TensorBoard, Trackio, sample_grid, scalars

__all__ = [
    "TensorBoard",
    "Trackio",
    "sample_grid",
    "scalars",
]
