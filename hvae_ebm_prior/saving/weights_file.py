"""Tensors in a safetensors file: written whole or not at all, and read only where every one of them is as expected.

A file from elsewhere is compared with what should be in it by its header, before a number is read, so that what it
makes us allocate is bounded by its own size. Nothing in it is executed.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..backbone.text import visible
from .files import write_atomically
from .typed_json import InvalidPrior

# Longest header that is parsed: room for about 50,000 tensors.
LARGEST_HEADER = 8 * 2**20
# Beyond any weight that training arrives at; what they make of images is noise.
LARGEST_WEIGHT = 1e6
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, of any device and layout, to a safetensors file; the metadata are texts in its header."""
    write_atomically(path, partial(save_weights, tensors, metadata))


def save_weights(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, path: Path) -> None:
    """The same, in place."""
    # Copies, as the format takes no tensors that share memory, and networks may.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata=dict(metadata or {}))


def read_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], title: str = "") -> dict[str, Tensor]:
    """Read floating-point tensors whose names and shapes are given.

    Args:
        path: the safetensors file.
        shapes: shape by name of every tensor that it must hold.
        title: what errors call the file; empty for its name.

    Returns:
        The tensors by name, on the CPU, in the dtype of the file.

    Raises:
        InvalidPrior: the file is damaged, lacks a tensor, holds another one, or one of another shape, of integers, or
            with numbers that are not finite, or beyond `LARGEST_WEIGHT`.
        OSError: it cannot be read.
    """
    title = title or path.name
    check_header(path, title)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            for problem, wrong in (("lacks", shapes.keys() - names), ("has an unexpected", names - shapes.keys())):
                if wrong:
                    raise InvalidPrior(
                        f"{title}: {problem} tensor {sorted(wrong)[0][:100]!r}; "
                        f"expected {len(shapes)} tensors, got {len(names)}"
                    )
            for name, shape in shapes.items():
                header = file.get_slice(name)
                if tuple(header.get_shape()) != shape:
                    raise InvalidPrior(f"{title}: {name}: expected the shape {shape}, got {tuple(header.get_shape())}")
                if header.get_dtype() not in FLOATS:
                    raise InvalidPrior(
                        f"{title}: {name}: expected floating-point numbers ({', '.join(FLOATS)}), "
                        f"got {header.get_dtype()}"
                    )
            # Copies: as mapped from the file they lie at any address, and sums over them differ in the last bit.
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
    except SafetensorError as error:
        # The library's words may hold parts of the file.
        raise InvalidPrior(f"{title}: no safetensors file, or a damaged one ({visible(str(error))[:300]})") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidPrior(f"{title}: {name} holds numbers that are not finite")
        if tensor.numel() and (largest := tensor.abs().max().item()) > LARGEST_WEIGHT:
            raise InvalidPrior(
                f"{title}: {name} holds a number of size {largest:.3g}, expected at most {LARGEST_WEIGHT:.0e}"
            )
    return tensors


def check_header(path: Path, title: str = "") -> None:
    """Raise InvalidPrior unless the header's length, the file's first eight bytes, fits into the file and our bound."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise InvalidPrior(
            f"{title or path.name}: no safetensors file, or a truncated one: "
            f"a header of {length} bytes in a file of {size} bytes"
        )
