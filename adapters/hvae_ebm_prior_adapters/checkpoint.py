"""Official NVAE checkpoints, read without running what is in them.

They hold an argparse Namespace beside the weights, which `torch.load(weights_only=True)` refuses; that one class is
allowed here, and nothing else.
"""

import argparse
import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .nvae import make_portable

# What checkpoints of older versions lack, as evaluate.py of NVAE sets it.
DEFAULTS = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}


def read_nvae_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint that NVAE's train.py wrote, on the CPU.

    Args:
        path: the file.

    Returns:
        Its entries, with `args` completed by the defaults of arguments that older versions lack, and `state_dict`
        without `module.` prefixes.

    Raises:
        ValueError: the file holds objects other than tensors, plain containers and an argparse Namespace, or is no NVAE
            checkpoint.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path}: holds objects that are not loaded for safety; NVAE's own hold tensors and one argparse "
                f"Namespace. {error}"
            ) from error
    missing = [name for name in ("args", "state_dict") if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise ValueError(
            f"{path}: expected an NVAE checkpoint with args and state_dict, but it has no {' and no '.join(missing)}"
        )
    arguments = {**DEFAULTS, **vars(checkpoint["args"])}
    weights = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    return {**checkpoint, "args": argparse.Namespace(**arguments), "state_dict": weights}


def load_nvae(
    path: str | Path, autoencoder: Callable[..., nn.Module], architecture: Mapping[str, Any] | None = None
) -> nn.Module:
    """An NVAE from an official checkpoint, also where there is no CUDA.

    Args:
        path: the checkpoint.
        autoencoder: the class `AutoEncoder` of your clone of NVAE.
        architecture: what `utils.get_arch_cells(args.arch_instance)` returns there; None takes that of the checkpoint.

    Returns:
        The model, on the CPU and in eval mode.

    Raises:
        ValueError: the file is refused (see `read_nvae_checkpoint`), has no architecture and none was given, or its
            weights do not fit the model.
    """
    checkpoint = read_nvae_checkpoint(path)
    architecture = architecture if architecture is not None else checkpoint.get("arch_instance")
    if not isinstance(architecture, Mapping):
        name = getattr(checkpoint["args"], "arch_instance", "...")
        raise ValueError(
            f"{path}: holds no architecture; pass architecture=utils.get_arch_cells({name!r}), with `utils` of your "
            "clone of NVAE"
        )
    with contextlib.nullcontext() if torch.cuda.is_available() else without_cuda():
        model = autoencoder(checkpoint["args"], None, architecture)
    # `weight_normalized` is what convolutions work out; some versions saved it.
    weights = {
        name: value for name, value in checkpoint["state_dict"].items() if not name.endswith("weight_normalized")
    }
    result = model.load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("weight_normalized")]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path}: the weights do not fit the model: {len(missing)} are missing "
            f"({', '.join(missing[:3]) or 'none'}), {len(result.unexpected_keys)} are unknown "
            f"({', '.join(result.unexpected_keys[:3]) or 'none'}); is it of another version of NVAE?"
        )
    return make_portable(model.cpu()).eval()


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Inside, `tensor.cuda()` leaves the tensor where it is: NVAE calls it while it builds a model."""
    original = Tensor.cuda
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = original  # type: ignore[method-assign]
