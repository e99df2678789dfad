"""Data that are no images: arrays of tables, sound, point clouds or maps, as they are."""

import numpy as np
import torch
from torch import Tensor

from ..backbone.validation import check_images, takes_tensors
from .image_data import is_array, load_array, load_images


def load_data(path: str, adapter: object) -> Tensor:
    """What an adapter takes, from a .npy file or an array of a .npz file.

    Args:
        path: `file.npy` or `file.npz:name`; of images as `load_images` has it, of plain tensors floating-point
            (N, ...).
        adapter: the backbone's.

    Returns:
        Images (N, C, H, W) in [0, 1], or tensors (N, ...).

    Raises:
        ValueError: the file is broken, or the array nothing that the adapter takes.
        OSError: the file cannot be read.
    """
    if not takes_tensors(adapter):
        return load_images(path)
    if not is_array(path):
        raise ValueError(
            f"{path}: this model takes plain tensors: expected file.npy or file.npz:name of floats (N, ...)"
        )
    array = load_array(path)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: expected floats (N, ...), got {array.dtype} {array.shape}; save array.astype(float)")
    # PyTorch has neither long doubles nor another order of bytes.
    tensors = torch.from_numpy(np.ascontiguousarray(array, np.float64 if array.itemsize >= 8 else np.float32))
    try:
        check_images(tensors, adapter)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors
