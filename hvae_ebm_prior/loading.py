"""What the command line names: functions of modules or files, and images in NumPy's files."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGES = "file.npy or file.npz:name of images, uint8 or floats in [0, 1], (N, C, H, W) or (N, H, W[, C])"


def load_function(name: str, what: str = "loader") -> Callable[..., Any]:
    """The function that a name refers to.

    Args:
        name: `package.module:function` or `path/to/file.py:function`.
        what: what it is for; errors begin with this word.

    Returns:
        The function.

    Raises:
        ValueError: the name has another form, or there is no such function.
        ImportError, OSError: the module or file cannot be read.
    """
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise ValueError(f"{what}: expected package.module:function or path/to/file.py:function, got {name!r}")
    if where.endswith(".py"):
        path = Path(where).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.exists():
            raise FileNotFoundError(f"{what}: there is no file {where}")
        # As `python file.py` does: modules beside the file can be imported.
        sys.path.insert(0, str(path.parent))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(where)
    found: Any = module
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{what}: {where} has no function {function}")
    return found


def load_images(path: str) -> Tensor:
    """Images from a .npy file, or from an array of a .npz file.

    Args:
        path: `file.npy` or `file.npz:name`; uint8 or floating-point pixels (N, C, H, W), (N, H, W, C) or (N, H, W).

    Returns:
        Images (N, C, H, W) in [0, 1].

    Raises:
        ValueError: the array is no batch of images.
        OSError: the file cannot be read.
    """
    file, archive, name = path.partition(".npz:")
    array = np.load(file + archive.rstrip(":"), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        if name not in array.files:
            raise ValueError(f"{path}: expected file.npz:name with a name out of {', '.join(array.files)}")
        array = array[name]
    if array.ndim not in (3, 4) or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"{path}: expected uint8 or floating-point images (N, C, H, W) or (N, H, W[, C]), got {array.dtype} {array.shape}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
