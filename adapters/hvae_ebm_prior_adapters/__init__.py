"""Adapters, one file per backbone family; imported as `hvae_ebm_prior.adapters`."""

from .hvae import HVAE, HVAEAdapter, HVAEConfig

__all__ = ["HVAE", "HVAEAdapter", "HVAEConfig"]
