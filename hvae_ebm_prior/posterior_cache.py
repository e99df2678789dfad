"""The cache of the posterior, under the name users import; it lives in training/posterior_cache.py."""

from .training.posterior_cache import GaussianPosterior, PosteriorCache

__all__ = [
    "GaussianPosterior",
    "PosteriorCache",
]
