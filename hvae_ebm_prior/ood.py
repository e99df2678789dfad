"""Outlier scores, under the name users import; they live in evaluation/outliers.py and evaluation/detection.py."""

from .evaluation.detection import Detection, detection
from .evaluation.outliers import (
    SCHEMES,
    bound_scores,
    conditional_diffusion_scores,
    density_scores,
    diffusion_scores,
    flow_scores,
    inference_scores,
    ratio_scores,
    restoration_scores,
    typicality_scores,
)

__all__ = [
    "SCHEMES",
    "Detection",
    "bound_scores",
    "conditional_diffusion_scores",
    "density_scores",
    "detection",
    "diffusion_scores",
    "flow_scores",
    "inference_scores",
    "ratio_scores",
    "restoration_scores",
    "typicality_scores",
]
