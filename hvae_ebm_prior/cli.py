"""The command `hvae-ebm-prior`."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .diagnosis import describe_layers, table
from .kernels import VARIABLE, choose_backend
from .registry import find_adapter


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 2 with a message on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(prog="hvae-ebm-prior", description="Better samples from a trained hierarchical VAE.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    diagnose = commands.add_parser(
        "diagnose",
        help="is there a prior hole, and in which layers?",
        description="Encode images with your model and print, layer by layer, whether its prior matches where they come to lie.",
    )
    diagnose.add_argument(
        "loader", help="function that returns your model or an adapter of it, as package.module:function or path/to/file.py:function"
    )
    diagnose.add_argument("checkpoint", nargs="?", help="handed to the function, if given")
    diagnose.add_argument(
        "--images", required=True, help="file.npy or file.npz:name of held-out images, uint8 or floats in [0, 1], (N, C, H, W) or (N, H, W[, C])"
    )
    diagnose.add_argument("--limit", type=int, default=500, help="use so many images from the start of the file (%(default)s)")
    diagnose.add_argument("--draws", type=int, default=8, help="posterior draws per image (%(default)s)")
    diagnose.add_argument("--device", default="cpu", help="where to put the model, if the function returns one (%(default)s)")
    diagnose.add_argument("--seed", type=int, default=0, help="seed of all randomness (%(default)s)")
    commands.add_parser("info", help="versions, devices, and the code that computes Langevin steps on each")
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(describe_installation())
        return 0
    try:
        model = load_function(options.loader)(*([options.checkpoint] if options.checkpoint else []))
        if isinstance(model, torch.nn.Module):
            model = model.to(options.device)
        images = load_images(options.images)[: options.limit]
        generator = torch.Generator().manual_seed(options.seed)
        print(table(describe_layers(find_adapter(model), images, draws=options.draws, generator=generator)))
    except (ValueError, TypeError, ImportError, OSError, AttributeError) as error:
        print(f"hvae-ebm-prior: {error}", file=sys.stderr)
        return 2
    return 0


def describe_installation() -> str:
    """Versions, and the backend of every device, one per line."""
    packages = ("hvae-ebm-prior", "torch", "numpy", "triton")
    lines = [f"{name:16}{version(name) if is_installed(name) else 'not installed'}" for name in packages]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    devices += [torch.device("mps")] if torch.backends.mps.is_available() else []
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        lines.append(f"{name:16}Langevin steps by {choose_backend('auto', device)}")
    if os.environ.get(VARIABLE):
        lines.append(f"{VARIABLE} is set to {os.environ[VARIABLE]}")
    return "\n".join(lines)


def is_installed(package: str) -> bool:
    """Whether a distribution of this name is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def load_function(name: str) -> Callable[..., Any]:
    """The function that a name refers to.

    Args:
        name: `package.module:function` or `path/to/file.py:function`.

    Returns:
        The function.

    Raises:
        ValueError: the name has another form, or there is no such function.
        ImportError, OSError: the module or file cannot be read.
    """
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise ValueError(f"loader: expected package.module:function or path/to/file.py:function, got {name!r}")
    if where.endswith(".py"):
        path = Path(where).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.exists():
            raise FileNotFoundError(f"loader: there is no file {where}")
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
        raise ValueError(f"loader: {where} has no function {function}")
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
