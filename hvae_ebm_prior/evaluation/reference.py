"""Statistics of the real images that samples are compared with: worked out once, saved, and used again.

A saved file (safetensors) holds the features, which KID, precision and recall need, their mean and covariance, and in
its metadata the extractor's name and digest, the number of images and their digest. The widespread .npz files with `mu`
and `sigma` hold the moments alone, without the images or the extractor that they are of. What a file holds is looked at
before it is used: a covariance that is none makes distances of any size, 0 among them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..saving.digest import digest_images
from ..saving.typed_json import InvalidPrior, from_json
from ..saving.weights_file import check_header, write_weights
from ..training.array_data import load_array
from .features import Extractor, Features, extract
from .metrics import Moments, moments

# How far a covariance may be from symmetric, and its eigenvalues below 0, in units of its largest entry and eigenvalue:
# the rounding of sums in single precision. Moments of a file's own features are in double precision.
ROUNDING = 1e-4
ROUNDING_OWN = 1e-6


@dataclass(frozen=True)
class Origin:
    """What a saved file's statistics are of; see `Reference`."""

    images: int | None = None
    digest: str | None = None
    extractor: str | None = None
    extractor_digest: str | None = None


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
        ValueError: the file is damaged or holds other things: numbers that are not finite, what is no covariance, or
            statistics of another extractor.
        OSError: it cannot be read.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npz":
        return load_moments(path)
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            about = from_json(Origin, json.loads(file.metadata()["reference"]), "reference")
            features, mean, covariance = (file.get_tensor(name) for name in ("features", "mean", "covariance"))
    except (SafetensorError, InvalidPrior, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected statistics that --save-statistics wrote, or a .npz file with mu and sigma ({error!r})"
        ) from error
    check_moments(path, mean, covariance)
    check_features(path, features, mean, covariance, about.images)
    reference = Reference((mean.double(), covariance.double()), features.float(), **vars(about))
    saved = reference.extractor, reference.extractor_digest
    ours = extractor.name, extractor.digest
    if saved != ours:
        raise ValueError(
            f"{path} holds statistics of another extractor: {extractor_in_words(*saved)}; "
            f"the samples' features would be of {extractor_in_words(*ours)}"
        )
    return reference


def load_moments(path: Path) -> Reference:
    """Mean and covariance of a .npz file with `mu` (K,) and `sigma` (K, K)."""
    try:
        arrays = [load_array(f"{path}:{name}") for name in ("mu", "sigma")]
    except ValueError as error:
        raise ValueError(f"{path}: expected arrays mu (K,) and sigma (K, K) ({error})") from error
    if not all(np.issubdtype(array.dtype, np.floating) for array in arrays):
        raise ValueError(
            f"{path}: expected mu and sigma of floating-point numbers, got {arrays[0].dtype} and {arrays[1].dtype}"
        )
    mean, covariance = (torch.from_numpy(np.asarray(array, np.float64)) for array in arrays)
    check_moments(path, mean, covariance)
    return Reference((mean, covariance))


def check_moments(path: Path, mean: Tensor, covariance: Tensor) -> None:
    """Raise ValueError, naming the file, unless these are a mean (K,) and a covariance (K, K), up to rounding."""
    if mean.ndim != 1 or len(mean) == 0 or tuple(covariance.shape) != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: expected a mean (mu) (K,) and a covariance (sigma) (K, K), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}"
        )
    for name, values in (("mean (mu)", mean), ("covariance (sigma)", covariance)):
        if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
            raise ValueError(f"{path}: expected a {name} of finite floating-point numbers")
    difference = (covariance - covariance.T).abs().max().item()
    if difference > ROUNDING * covariance.abs().max().item():
        raise ValueError(
            f"{path}: expected a symmetric covariance (sigma), got one with a difference of {difference:.3g}"
        )
    eigenvalues = torch.linalg.eigvalsh(covariance.double())
    if eigenvalues[0] < -ROUNDING * eigenvalues[-1].clamp(min=0):
        raise ValueError(
            f"{path}: expected a covariance (sigma) without negative eigenvalues, got {eigenvalues[0].item():.3g} "
            f"beside {eigenvalues[-1].item():.3g}"
        )


def check_features(path: Path, features: Tensor, mean: Tensor, covariance: Tensor, images: int | None) -> None:
    """Raise ValueError, naming the file, unless these are features (M, K) of `images` M with that mean, and with the
    variances of that covariance, up to rounding.
    """
    if features.ndim != 2 or features.shape[1] != len(mean) or len(features) < 2 or len(features) != images:
        raise ValueError(f"{path}: expected features ({images}, {len(mean)}), got {tuple(features.shape)}")
    if not features.is_floating_point() or not bool(torch.isfinite(features).all()):
        raise ValueError(f"{path}: expected features of finite floating-point numbers")
    x = features.double()
    size = x.abs().max()
    off_mean = (x.mean(0) - mean).abs().max() > ROUNDING_OWN * size
    off_variance = (x.var(0) - covariance.diagonal()).abs().max() > ROUNDING_OWN * size**2
    if off_mean or off_variance:
        raise ValueError(f"{path}: its mean and covariance are not those of its features; make the file again")


def extractor_in_words(name: str | None, digest: str | None) -> str:
    """Its name, and the beginning of its weights' digest."""
    return f"{name} (weights {digest[:12] if digest else 'not known'})"
