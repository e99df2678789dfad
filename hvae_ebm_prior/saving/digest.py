"""SHA-256 of files, texts, weights and images."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_weights(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's state dict."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def digest_images(images: Tensor) -> str:
    """SHA-256 over shape and values of images."""
    return hashlib.sha256(str(tuple(images.shape)).encode() + tensor_bytes(images.float())).hexdigest()


def tensor_bytes(value: Tensor) -> Any:
    """The bytes of a tensor's values, of any dtype."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
