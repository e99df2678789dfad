"""Statistics of the real images that samples are compared with: worked out once, saved, and used again.

A saved file (safetensors) holds the features, which KID, precision and recall need, their mean and covariance, and in
its metadata the extractor's name and digest, the number of images and their digest. The widespread .npz files with `mu`
and `sigma` hold the moments alone, without the images or the extractor that they are of.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..saving.digest import digest_images
from ..saving.weights_file import write_weights
from .features import Extractor, Features, extract
from .metrics import Moments, moments


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Attributes:
        moments: mean (K,) and covariance (K, K) of their features, float64.
        features: (M, K) float32; None where there are moments alone.
        images: number of images M; None where it is not known.
        digest: SHA-256 of the images, None likewise.
        extractor: the extractor's name, None likewise.
        extractor_digest: SHA-256 of its weights, None also where it has none.
    """

    moments: Moments
    features: Tensor | None = None
    images: int | None = None
    digest: str | None = None
    extractor: str | None = None
    extractor_digest: str | None = None


def make_reference(images: Tensor, features: Features, device: torch.device, chunk_size: int = 250) -> Reference:
    """Statistics of `images` (M, C, H, W) in [0, 1], `chunk_size` at a time on `device`."""
    matrix, _ = extract(features, images, device, chunk_size)
    name, digest = (features.name, features.digest) if isinstance(features, Extractor) else (None, None)
    return Reference(moments(matrix), matrix, len(images), digest_images(images), name, digest)


def save_reference(reference: Reference, path: str | Path) -> None:
    """Write statistics as a safetensors file, whole or not at all.

    Args:
        reference: the statistics, with features.
        path: the file.

    Raises:
        ValueError: there are moments alone, or the file's name ends in .npz.
    """
    path = Path(path).expanduser()
    if reference.features is None or path.suffix == ".npz":
        raise ValueError(
            "statistics: expected features to save and a name such as statistics.safetensors; .npz files are only read"
        )
    mean, covariance = reference.moments
    tensors = {"features": reference.features, "mean": mean, "covariance": covariance}
    about = {key: getattr(reference, key) for key in ("images", "digest", "extractor", "extractor_digest")}
    write_weights(path, tensors, {"reference": json.dumps(about)})


def load_reference(path: str | Path, extractor: Extractor) -> Reference:
    """Statistics from a file of `save_reference`, or moments from a .npz file with `mu` and `sigma`.

    Args:
        path: the file.
        extractor: what the samples' features will be of.

    Returns:
        The statistics.

    Raises:
        ValueError: the file holds other things, or statistics of another extractor.
        OSError: it cannot be read.
    """
    if Path(path).suffix == ".npz":
        return load_moments(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["reference"])
            features, mean, covariance = (file.get_tensor(name) for name in ("features", "mean", "covariance"))
        reference = Reference((mean, covariance), features, **about)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected statistics that --save-statistics wrote, or a .npz file with mu and sigma ({error!r})"
        ) from error
    saved = reference.extractor, reference.extractor_digest
    ours = extractor.name, extractor.digest
    if saved != ours:
        raise ValueError(
            f"{path} holds statistics of another extractor: {extractor_in_words(*saved)}; "
            f"the samples' features would be of {extractor_in_words(*ours)}"
        )
    return reference


def load_moments(path: str | Path) -> Reference:
    """Mean and covariance of a .npz file with `mu` (K,) and `sigma` (K, K)."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected arrays mu (K,) and sigma (K, K) ({error})") from error
    if mean.ndim != 1 or tuple(covariance.shape) != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: expected mu (K,) and sigma (K, K), got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    return Reference((mean, covariance))


def extractor_in_words(name: str | None, digest: str | None) -> str:
    """Its name, and the beginning of its weights' digest."""
    return f"{name} (weights {digest[:12] if digest else 'not known'})"
