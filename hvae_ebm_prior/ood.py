"""Outlier scores, under the name users import; they live in evaluation/outliers.py."""

from .evaluation.outliers import (
    SCHEMES,
    Detection,
    bound_scores,
    density_scores,
    detection,
    diffusion_scores,
    inference_scores,
    ratio_scores,
    restoration_scores,
    typicality_scores,
)

__all__ = [
    "SCHEMES",
    "Detection",
    "bound_scores",
    "density_scores",
    "detection",
    "diffusion_scores",
    "inference_scores",
    "ratio_scores",
    "restoration_scores",
    "typicality_scores",
]
