"""Outlier scores, under the name users import; they live in outliers.py, detours.py and detection.py of evaluation."""

from .evaluation.detection import Detection, detection
from .evaluation.detours import conditional_diffusion_scores, diffusion_scores, restoration_scores
from .evaluation.outliers import (
    SCHEMES,
    bound_scores,
    density_scores,
    flow_scores,
    inference_scores,
    ratio_scores,
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
