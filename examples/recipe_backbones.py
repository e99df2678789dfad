"""Backbones of the recipes: official NVAEs from your clone of github.com/NVlabs/NVAE, and the library's 3-layer HVAE.

The architectures are those of the command lines that NVAE's README gives for CIFAR-10, CelebA-64 and CelebA-HQ-256, and
VAEBM's README for LSUN-Church-64. They are for `--estimate` and `--smoke`, which build models with random weights; a
checkpoint brings its own.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hvae_ebm_prior_adapters.checkpoint import without_cuda
from torch import nn

from hvae_ebm_prior.adapters import HVAEConfig, load_nvae

COMMON = {
    "arch_instance": "res_mbconv",
    "use_se": True,
    "res_dist": True,
    "num_latent_per_group": 20,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 2,
    "num_cell_per_cond_enc": 2,
    "num_cell_per_cond_dec": 2,
    "num_x_bits": 8,
    "num_mixture_dec": 10,
    "num_nf": 1,
    "ada_groups": False,
    "min_groups_per_scale": 1,
}
NVAE_CIFAR10 = COMMON | {
    "dataset": "cifar10",
    "num_latent_scales": 1,
    "num_groups_per_scale": 30,
    "num_channels_enc": 128,
    "num_channels_dec": 128,
}
NVAE_CELEBAHQ256 = COMMON | {
    "dataset": "celeba_256",
    "num_latent_scales": 5,
    "num_groups_per_scale": 16,
    "ada_groups": True,
    "min_groups_per_scale": 4,
    "num_channels_enc": 30,
    "num_channels_dec": 30,
    "num_x_bits": 5,
    "num_nf": 2,
}
NVAE_CELEBA64 = COMMON | {
    "dataset": "celeba_64",
    "num_latent_scales": 3,
    "num_groups_per_scale": 20,
    "ada_groups": True,
    "num_channels_enc": 64,
    "num_channels_dec": 64,
}
NVAE_CHURCH64 = COMMON | {
    "dataset": "lsun_church_64",
    "num_latent_scales": 3,
    "num_groups_per_scale": 5,
    "num_channels_enc": 48,
    "num_channels_dec": 48,
    "num_mixture_dec": 1,
}
# For --smoke: few and thin cells.
TINY = {
    "num_groups_per_scale": 2,
    "min_groups_per_scale": 1,
    "num_latent_per_group": 4,
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
}

# Ours: the published code has none.
HVAE_CIFAR10 = HVAEConfig(image_channels=3, image_size=32, latent_channels=(32, 16, 8), widths=(256, 128, 96))
HVAE_TINY = HVAEConfig(image_channels=3, image_size=32, latent_channels=(4, 2, 2), widths=(8, 8, 8))


def official_nvae(repo: str | None, arguments: Mapping[str, Any], checkpoint: str | None = None) -> nn.Module:
    """An official NVAE.

    Args:
        repo: your clone of NVAE.
        arguments: the architecture of a model with random weights.
        checkpoint: the file of a trained one, whose own architecture it has.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: there is no clone, or the checkpoint is refused; see `load_nvae`.
    """
    if repo is None or not (Path(repo) / "model.py").exists():
        raise ValueError(
            f"repo: expected a clone of https://github.com/NVlabs/NVAE, got {repo}; give it with --repo or NVAE_REPO, "
            "or a function with --loader"
        )
    utils, model = modules_of(repo, "utils", "model")

    def make(args: argparse.Namespace, writer: Any, _: Any) -> nn.Module:
        # Not the cells in the file: files of older versions hold the architecture's name alone.
        return model.AutoEncoder(args, writer, utils.get_arch_cells(args.arch_instance))

    if checkpoint is not None:
        return load_nvae(checkpoint, make, {})
    with without_cuda():
        return make(argparse.Namespace(**arguments), None, None)


def modules_of(folder: str, *names: str) -> list[ModuleType]:
    """Modules of a clone."""
    # Its folder does not stay on the path: NVAE has a datasets.py, which would hide the package `datasets`.
    sys.path.insert(0, folder)
    sys.modules.setdefault("tensorboardX", ModuleType("tensorboardX")).SummaryWriter = None  # type: ignore[attr-defined]
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(folder)
