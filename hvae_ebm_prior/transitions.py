"""Recorded Langevin chains, under the name users import; they live in evaluation/transitions.py."""

from .evaluation.transitions import (
    Saturation,
    Transitions,
    langevin_transitions,
    oversaturation,
    pixel_statistics,
    relaxation_time,
)

__all__ = [
    "Saturation",
    "Transitions",
    "langevin_transitions",
    "oversaturation",
    "pixel_statistics",
    "relaxation_time",
]
