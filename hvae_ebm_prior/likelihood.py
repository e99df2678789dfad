"""Normalisers and likelihood bounds, under the name users import; they live in evaluation/likelihood.py."""

from .evaluation.likelihood import (
    AnnealingConfig,
    LikelihoodBound,
    LogNormalizer,
    bits_per_dimension,
    log_likelihood_bound,
    log_normalizer,
)

__all__ = [
    "AnnealingConfig",
    "LikelihoodBound",
    "LogNormalizer",
    "bits_per_dimension",
    "log_likelihood_bound",
    "log_normalizer",
]
