"""Arrays of NumPy's files: images, and data that are none, as of tables, sound, point clouds or maps."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def load_images(path: str) -> Tensor:
    """Images from a .npy file, or from an array of a .npz file.

    Args:
        path: `file.npy` or `file.npz:name`; uint8 or floating-point pixels (N, C, H, W), (N, H, W, C) or (N, H, W).

    Returns:
        Images (N, C, H, W) in [0, 1].

    Raises:
        ValueError: the file is broken, or the array no batch of images.
        OSError: the file cannot be read.

    Warns:
        RuntimeWarning: bytes that are 0 and 1 alone, as of a mask, which are nearly black as images.
    """
    array = load_array(path)
    if array.ndim not in (3, 4) or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(
            f"{path}: expected uint8 or floating-point images (N, C, H, W) or (N, H, W[, C]), "
            f"got {array.dtype} {array.shape}"
        )
    if array.dtype == np.uint8 and array.size and array.max() == 1:
        warnings.warn(
            f"{path}: bytes that are 0 and 1 alone in {len(array)} images, which as pixels up to 255 are nearly black; "
            "multiply them by 255, or save floats",
            RuntimeWarning,
            stacklevel=2,
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array)).float() / 255
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def load_tensors(path: str, shape: tuple[int, ...], *, limit: int | None = None) -> Tensor:
    """Plain tensors from a .npy file, or from an array of a .npz file.

    Args:
        path: `file.npy` or `file.npz:name`; floating-point numbers (N, *shape).
        shape: shape of each, without batch.
        limit: use so many from the start; None for all.

    Returns:
        The tensors (N, *shape), of single or double precision.

    Raises:
        ValueError: the file is broken, or holds another array, or numbers that are not finite.
        OSError: the file cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number, got {limit}")
    wanted = f"floats {('N', *shape)}, as this model takes plain tensors"
    if not is_array(path):
        raise ValueError(f"{path}: expected file.npy or file.npz:name of {wanted}")
    array = load_array(path)
    if not np.issubdtype(array.dtype, np.floating) or array.shape[1:] != shape or len(array) == 0:
        raise ValueError(f"{path}: expected {wanted}, got {array.dtype} {array.shape}")
    # PyTorch has neither long doubles nor another order of bytes.
    tensors = torch.from_numpy(np.ascontiguousarray(array, np.float64 if array.itemsize >= 8 else np.float32))
    if bad := int((~tensors.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"{path}: {bad} of {len(tensors)} hold NaN or infinite values; drop or repair them")
    return tensors[:limit]


def split_array(source: str) -> tuple[str, str]:
    """The file and the array's name, "" for none, of `file.npy` or `file.npz[:name]`; a colon elsewhere is the file's,
    as in C:/images.npy.
    """
    file, archive, name = source.rpartition(".npz:")
    return (f"{file}.npz", name) if archive else (source, "")


def is_array(source: str) -> bool:
    """Whether a source is of the form `file.npy` or `file.npz[:name]`."""
    return split_array(source)[0].endswith((".npy", ".npz"))


def load_array(path: str) -> np.ndarray:
    """The array of `file.npy` or `file.npz:name`; ValueError where the file is broken or the archive has none of that
    name, OSError where it cannot be read.
    """
    file, name = split_array(path)
    try:
        # Opened here, as NumPy leaves broken archives open.
        with Path(file).expanduser().open("rb") as opened:
            array = np.load(opened, allow_pickle=False)
            if isinstance(array, np.ndarray):
                return array
            if name in array.files:
                return array[name]
    except Exception as error:  # whatever NumPy and zipfile make of damaged files
        if isinstance(error, OSError) and error.filename is not None:
            raise
        kind = (
            "too large, or its header is damaged"
            if isinstance(error, MemoryError)
            else "cut, damaged or something else"
        )
        raise ValueError(
            f"{file}: expected a file that numpy.save or numpy.savez wrote, and this one is {kind}"
        ) from error
    raise ValueError(f"{path}: expected file.npz:name with a name out of {', '.join(array.files)}")
