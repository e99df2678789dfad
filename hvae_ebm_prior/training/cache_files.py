"""The files of a posterior cache: an index in JSON, and shards in safetensors that are mapped into memory.

See `hvae_ebm_prior.training.posterior_cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..saving.digest import digest_file
from ..saving.fingerprint import BackboneMismatch, Fingerprint, check_backbone
from ..saving.typed_json import InvalidPrior, from_json, read_json_file
from ..saving.weights_file import check_header

FORMAT = 1
INDEX = "index.json"
Floating = Literal["float64", "float32", "float16", "bfloat16"]


# What to do about a damaged cache.
BUILD_ANEW = "remove the folder and build the cache anew"


class InvalidCache(ValueError):
    """A folder holds no posterior cache, an unfinished one, or a damaged one."""


@dataclass(frozen=True)
class Shard:
    """One file of a cache.

    Attributes:
        rows: how many images it holds.
        sha256: digest of the file.
    """

    rows: int
    sha256: str


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds.

    Attributes:
        images: number of images N.
        draws: draws per image M; 0 for mean and std.
        dtype: of the numbers.
        rows: images per shard, but for the last.
        labels: names of what is kept of labels; one empty name for labels without names.
        key: from which all draws follow, as hexadecimal digits.
        data: digest of the first images.
        fingerprint: of the backbone.
        shards: those that are written, in order.
        format: version of the format.
    """

    images: int
    draws: int
    dtype: Floating
    rows: int
    labels: Sequence[str]
    key: str
    data: str
    fingerprint: Fingerprint
    shards: Sequence[Shard] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(
                f"format: expected {FORMAT}, got {self.format}; read the cache with the version that wrote it"
            )
        if min(self.images, self.rows) < 1 or self.draws < 0 or len(self.shards) > self.shard_count:
            raise ValueError(
                f"expected images and shards of them, got {self.images} images, {self.draws} draws, {self.rows} a shard"
            )
        for i, shard in enumerate(self.shards):
            if shard.rows != len(self.span(i)):
                raise ValueError(f"shards[{i}].rows: expected {len(self.span(i))}, got {shard.rows}")
        int(self.key, 16)

    @property
    def shard_count(self) -> int:
        """How many shards the whole cache has."""
        return -(-self.images // self.rows)

    def span(self, i: int) -> range:
        """The images of shard `i`."""
        return range(i * self.rows, min((i + 1) * self.rows, self.images))


def label_key(name: str) -> str:
    """Name of the tensor of a label set in a shard."""
    return f"labels.{name}" if name else "labels"


def check_cache_backbone(folder: Path, index: CacheIndex, backbone: Fingerprint) -> None:
    """Raise BackboneMismatch unless the cache in `folder` was made with a backbone of this fingerprint."""
    if difference := check_backbone(index.fingerprint, backbone, f"the cache in {folder} was made with"):
        raise BackboneMismatch(f"{difference}; build a cache for this backbone in another folder")


def check_same_cache(folder: Path, saved: CacheIndex, index: CacheIndex) -> None:
    """Raise ValueError or BackboneMismatch unless the index saved in `folder` is of the same cache as `index`."""
    check_cache_backbone(folder, saved, index.fingerprint)
    names = {
        "images": "number of images",
        "draws": "draws",
        "dtype": "dtype",
        "rows": "images per shard",
        "labels": "labels",
        "data": "first images",
    }
    for name, words in names.items():
        there, here = getattr(saved, name), getattr(index, name)
        if there != here:
            values = "" if name == "data" else f": {there} there and {here} here"
            raise ValueError(
                f"{folder} holds a cache of something else, the {words} differ{values}; "
                "give the same to go on with it, or another folder"
            )


def read_index(folder: Path) -> CacheIndex | None:
    """The index of a folder, or None where there is none; raise InvalidCache for a damaged one."""
    try:
        return from_json(CacheIndex, read_json_file(folder / INDEX), INDEX)
    except FileNotFoundError:
        return None
    except InvalidPrior as error:
        raise InvalidCache(f"{folder}: {error}; {BUILD_ANEW}") from error


def shard_path(folder: Path, i: int) -> Path:
    """The file of shard `i`."""
    return folder / f"shard_{i:05}.safetensors"


def open_shard(folder: Path, index: CacheIndex, i: int, dim: int, verify: bool) -> dict[str, Tensor]:
    """Tensors of a shard, mapped into memory; raise InvalidCache unless they are what the index says."""
    path = shard_path(folder, i)
    n = len(index.span(i))
    dtype = getattr(torch, index.dtype)
    sizes = {"draws": (n, index.draws, dim)} if index.draws else {"mean": (n, dim), "std": (n, dim)}
    try:
        check_header(path)
        if verify and digest_file(path) != index.shards[i].sha256:
            raise InvalidCache(f"{path}: the file is damaged, its digest is not the one in {INDEX}; {BUILD_ANEW}")
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise InvalidCache(f"{path}: the file is missing; {BUILD_ANEW}") from error
    except (InvalidPrior, SafetensorError) as error:
        raise InvalidCache(f"{path}: this is no safetensors file ({error}); {BUILD_ANEW}") from error
    labels = {label_key(name) for name in index.labels}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name not in labels}
    if (
        found != {name: (dtype, size) for name, size in sizes.items()}
        or not labels <= tensors.keys()
        or any(tensors[name].shape[:1] != (n,) for name in labels)
    ):
        raise InvalidCache(f"{path}: expected {sizes} of {dtype} and labels {sorted(index.labels)}, got {found}")
    return tensors
