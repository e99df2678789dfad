"""Adapters, one file per backbone family; imported as `hvae_ebm_prior.adapters`."""

from .batch_norm import recalibrate_batch_norm
from .checkpoint import load_nvae, read_nvae_checkpoint
from .folding import freeze
from .hvae import HVAE, HVAEAdapter, HVAEConfig
from .ladder import LadderAdapter
from .logistic_mixture import mixture_mean
from .nvae import NVAEAdapter
from .vdvae import VDVAEAdapter
from .walk import posterior_draws, posteriors, priors

__all__ = [
    "HVAE",
    "HVAEAdapter",
    "HVAEConfig",
    "LadderAdapter",
    "NVAEAdapter",
    "VDVAEAdapter",
    "freeze",
    "load_nvae",
    "mixture_mean",
    "posterior_draws",
    "posteriors",
    "priors",
    "read_nvae_checkpoint",
    "recalibrate_batch_norm",
]
