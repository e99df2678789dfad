"""Adapters, one file per backbone family; imported as `hvae_ebm_prior.adapters`."""

from .batch_norm import recalibrate_batch_norm
from .checkpoint import load_nvae, read_nvae_checkpoint
from .folding import freeze
from .hvae import HVAE, HVAEAdapter, HVAEConfig
from .ladder import LadderAdapter
from .nvae import NVAEAdapter
from .vdvae import VDVAEAdapter

__all__ = [
    "HVAE",
    "HVAEAdapter",
    "HVAEConfig",
    "LadderAdapter",
    "NVAEAdapter",
    "VDVAEAdapter",
    "freeze",
    "load_nvae",
    "read_nvae_checkpoint",
    "recalibrate_batch_norm",
]
