"""Feature extractors: InceptionV3 as FID has it, or a function of yours.

An extractor maps images (n, C, H, W) in [0, 1] to features (n, K), or to features and class logits. It must see every
image by itself: no batch statistics. Figures of two extractors cannot be compared, so each has a name and, where it is
a module or a module's method, a digest of its weights.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..processes import progress_bar
from ..saving.digest import digest_file, digest_weights
from .metrics import fidelity

Features = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
# Features (N, K) and, if there are any, class logits (N, classes): float32, on the CPU.
Extracted = tuple[Tensor, Tensor | None]
# Of the weights that FID is defined with (converted from TensorFlow's of 2015-12-05), as torch-fidelity and pytorch-fid
# distribute them.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# 250 images of 299x299 would take gigabytes in the first layers.
INCEPTION_BATCH = 50
# On a CPU the maps of larger chunks are fresh memory in every layer: EfficientNet-lite0 takes twice as long with 250.
CPU_CHUNK = 25


@dataclass(frozen=True)
class Extractor:
    """A feature extractor, with the name and digest that its figures are recorded under.

    Attributes:
        compute: images (n, C, H, W) in [0, 1] to features (n, K), or to (features, logits).
        name: what it is.
        digest: SHA-256 of its weights, None if it has none that can be found.
        distance: "FID" for Inception with the published weights, "FD" for everything else.
    """

    compute: Features
    name: str
    digest: str | None = None
    distance: str = "FD"

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.compute(images)


def custom_extractor(name: str, compute: Features, device: torch.device | str = "cpu") -> Extractor:
    """An extractor of the user's own.

    Args:
        name: `package.module:function` or `path/to/file.py:function` that returned it; the
            extractor's name leaves folders out.
        compute: the extractor; if it is a module or a module's method, the module is put in eval mode.
        device: where the module is put.

    Returns:
        The extractor.

    Raises:
        TypeError: `compute` cannot be called.
    """
    if not callable(compute):
        raise TypeError(
            f"features: expected {name} to return a function of images (n, C, H, W), got {type(compute).__name__}"
        )
    module = compute if isinstance(compute, nn.Module) else getattr(compute, "__self__", None)
    where, _, function = name.rpartition(":")
    name = f"{Path(where).stem if where.endswith('.py') else where}:{function}"
    if not isinstance(module, nn.Module):
        return Extractor(compute, name)
    return Extractor(compute, name, digest_weights(module.eval().to(device)))


def inception_extractor(weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """InceptionV3 of torch-fidelity: 2,048 pool features and logits, of images rounded to 256 levels, grey ones as RGB.

    Args:
        weights: torch-fidelity's weights file; None takes it from torch.hub's cache, where it is downloaded first if it
            is not there.
        device: where the network is put.

    Returns:
        The extractor; its name says whether the weights are the published ones.

    Raises:
        FileNotFoundError: there is no such file, or no network.
        ValueError: the file holds other things than Inception's weights.
        ImportError: torch-fidelity cannot be imported.
    """
    inception = fidelity("feature_extractor_inceptionv3")
    path = find_inception(inception.URL_INCEPTION_V3, weights)
    try:
        # torch-fidelity would unpickle anything; this refuses a file that is more than tensors.
        torch.load(path, map_location="cpu", weights_only=True)
        network = inception.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except (pickle.UnpicklingError, RuntimeError, TypeError, AttributeError, KeyError, EOFError) as error:
        raise ValueError(f"{path} does not hold torch-fidelity's Inception weights: {error}") from error
    network.to(device)

    def compute(images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [network(to_rgb_bytes(chunk)) for chunk in images.split(INCEPTION_BATCH)]
        return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])

    published = digest_file(path) == INCEPTION_SHA256
    name = f"inception-v3-compat (2048), {'published' if published else 'other'} weights"
    return Extractor(compute, name, digest_weights(network), "FID" if published else "FD")


def find_inception(url: str, given: str | Path | None) -> Path:
    """The weights file: the given one, or that of torch.hub's cache, downloaded if need be."""
    name = url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if given is not None:
        if not Path(given).expanduser().is_file():
            raise FileNotFoundError(f"weights: there is no file {given}; it should be {name}, from {url}")
        return Path(given).expanduser()
    if not cached.exists():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"Inception's weights are not here and could not be downloaded ({error}). "
                f"Fetch {url} on another machine, and put it at {cached} or give it as --weights path/to/{name}; "
                "without it, take features of your own, --features file.py:function"
            ) from error
    return cached


def to_rgb_bytes(images: Tensor) -> Tensor:
    """uint8 RGB (N, 3, H, W) of images (N, 1 or 3, H, W) in [0, 1], rounded to the nearest level."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images: Inception takes 1 or 3 channels, (N, C, H, W), got {tuple(images.shape)}; "
            "give features of your own for others"
        )
    return (images * 255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


@torch.no_grad()
def extract(features: Features, images: Tensor, device: torch.device, chunk_size: int = 250) -> Extracted:
    """Features of images, a chunk at a time.

    Args:
        features: the extractor.
        images: (N, C, H, W) in [0, 1].
        device: where chunks are moved first.
        chunk_size: images per call; on a CPU at most 25.

    Returns:
        Features (N, K), and logits if the extractor gives them; float32, on the CPU.

    Raises:
        ValueError: the extractor returns other shapes.
    """
    if device.type == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK)
    matrices = []
    logits = []
    with progress_bar(len(images), "features") as bar:
        for chunk in images.split(chunk_size):
            returned = features(chunk.to(device))
            parts = returned if isinstance(returned, tuple) else (returned,)
            rows_match = (isinstance(part, Tensor) and part.ndim == 2 and len(part) == len(chunk) for part in parts)
            if len(parts) > 2 or not all(rows_match):
                shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
                raise ValueError(
                    f"features: expected a matrix ({len(chunk)}, K), or a pair of it and logits, "
                    f"of {len(chunk)} images, got {shapes}"
                )
            matrices.append(parts[0].to("cpu", torch.float32))
            logits += [part.to("cpu", torch.float32) for part in parts[1:]]
            bar.update(len(chunk))
    return torch.cat(matrices), torch.cat(logits) if logits else None
