"""Images to train on: files of a folder or a data set of the Hugging Face Hub, decoded when needed, or NumPy arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..backbone.validation import check_images
from ..density.latent_prior import LatentPrior
from ..extras import missing

DATA = (
    "a folder of PNG, JPEG or WebP files, hf:NAME[:SPLIT[:COLUMN]] of the Hugging Face Hub, "
    "or file.npy or file.npz:name of images"
)
IMAGES = "file.npy or file.npz:name of images, uint8 or floats in [0, 1], (N, C, H, W) or (N, H, W[, C])"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
MODES = {1: "L", 3: "RGB"}


def open_images(
    source: str, shape: tuple[int, int, int], *, size: int | None = None, limit: int | None = None
) -> Tensor | Dataset[Tensor]:
    """The images that a source names.

    Args:
        source: a folder, whose files are taken in the order of their paths, those of folders in it too;
            `hf:NAME[:SPLIT[:COLUMN]]`, by default the split "train" and the first column of images; or what
            `load_images` takes.
        shape: shape (C, H, W) that they must have. Those of folders and the Hub become grey or RGB as C says.
        size: side of the square that those of folders and the Hub are resized and, about their centre, cropped to; None
            leaves them as they are.
        limit: use so many from the start; None for all.

    Returns:
        Images (N, C, H, W), or a dataset of images (C, H, W), in [0, 1].

    Raises:
        ValueError: there is no such source, it has no images, or they have another shape.
        ImportError: a package is missing.
        OSError: a file cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of images, got {limit}")
    if size is not None and (size, size) != shape[1:]:
        raise ValueError(f"size: expected {shape[1]}, as the backbone draws {shape[2]}x{shape[1]} pixels, got {size}")
    if Path(source).is_dir():
        return folder_images(Path(source), shape, size, limit)
    if source.startswith("hf:"):
        return hub_images(source, shape, size, limit)
    if not source.partition(":")[0].endswith((".npy", ".npz")):
        raise ValueError(f"data: expected {DATA}; there is no folder {source}")
    if size is not None:
        raise ValueError(f"size: images of {source} are taken as they are; resize them before they are saved")
    images = load_images(source)[:limit]
    check_images(images)
    if images.shape[1:] != shape:
        raise ValueError(
            f"{source}: expected images {shape} (channels, height, width), as the backbone draws, "
            f"got {tuple(images.shape[1:])}"
        )
    return images


@torch.no_grad()
def image_shape(prior: LatentPrior) -> tuple[int, int, int]:
    """Shape (C, H, W) of the images that a prior's backbone draws."""
    channels, height, width = prior.decode(torch.zeros(1, prior.dim, device=prior.device, dtype=prior.dtype)).shape[1:]
    return channels, height, width


class DecodedImages(Dataset[Tensor]):
    """A dataset of images (C, H, W) in [0, 1] that are decoded when they are asked for.

    Args:
        count: how many there are.
        read: the name and the Pillow image of an index.
        shape: the shape (C, H, W) that they must have.
        size: side to resize and crop to; None for none.
    """

    def __init__(
        self, count: int, read: Callable[[int], tuple[str, Any]], shape: tuple[int, int, int], size: int | None
    ) -> None:
        if shape[0] not in MODES:
            raise ValueError(
                f"data: expected a backbone of grey or RGB images, this one's have {shape[0]} channels; "
                "give an array of NumPy's"
            )
        self.count = count
        self.read = read
        self.shape = shape
        self.size = size
        self[0]  # so that what is wrong with all of them is an error now

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image, ImageOps

        name, image = self.read(index)
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"{name}: expected an image, got {type(image).__name__}; "
                "name the column of images, as hf:NAME:SPLIT:COLUMN"
            )
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{name}: expected 8 bits per channel, got an image of mode {image.mode}; convert it")
        image = image.convert(MODES[self.shape[0]])
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        if (image.height, image.width) != self.shape[1:]:
            raise ValueError(
                f"{name}: expected {self.shape[2]}x{self.shape[1]} pixels, as the backbone draws, "
                f"got {image.width}x{image.height}; --size {self.shape[1]} resizes and crops"
            )
        pixels = torch.from_numpy(np.array(image)).reshape(*self.shape[1:], self.shape[0])
        return pixels.permute(2, 0, 1).float() / 255


def folder_images(folder: Path, shape: tuple[int, int, int], size: int | None, limit: int | None) -> Dataset[Tensor]:
    """The images of a folder and the folders in it; see `open_images`."""
    Image = import_pillow()
    paths = image_files(folder)[:limit]

    def read(index: int) -> tuple[str, Any]:
        with Image.open(paths[index]) as image:
            image.load()
            return str(paths[index]), image

    return DecodedImages(len(paths), read, shape, size)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and the folders in it, in the order of their paths; ValueError if there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"data: {folder} holds no images; expected files {', '.join(sorted(SUFFIXES))}")
    return paths


def hub_images(source: str, shape: tuple[int, int, int], size: int | None, limit: int | None) -> Dataset[Tensor]:
    """The images of a data set of the Hub; see `open_images`."""
    import_pillow()
    rows, column = hub_rows(source)
    count = len(rows) if limit is None else min(limit, len(rows))
    if count == 0:
        raise ValueError(f"data: {source} is empty")

    def read(index: int) -> tuple[str, Any]:
        return f"{source}, image {index}", rows[index][column]

    return DecodedImages(count, read, shape, size)


def hub_rows(source: str) -> tuple[Any, str]:
    """A data set of the Hub, and its column of images."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise missing("data sets of the Hub need the package datasets", "data") from error
    parts = source.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"data: expected hf:NAME[:SPLIT[:COLUMN]], got {source}")
    name, split, column = [*parts, "", ""][:3]
    rows = load_dataset(name, split=split or "train")
    columns = [column] if column else [each for each, kind in rows.features.items() if type(kind).__name__ == "Image"]
    if not columns or columns[0] not in rows.features:
        raise ValueError(f"data: {source} has no column {column or 'of images'}, but {', '.join(rows.features)}")
    return rows, columns[0]


def import_pillow() -> Any:
    """Pillow's module Image; ImportError that names the extra where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("images of folders and the Hub need Pillow", "data") from error
    return Image


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
    array = load_array(path)
    if array.ndim not in (3, 4) or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(
            f"{path}: expected uint8 or floating-point images (N, C, H, W) or (N, H, W[, C]), "
            f"got {array.dtype} {array.shape}"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def load_array(path: str) -> np.ndarray:
    """The array of `file.npy` or `file.npz:name`; ValueError where the archive has none of that name."""
    file, archive, name = path.partition(".npz:")
    array = np.load(file + archive.rstrip(":"), allow_pickle=False)
    if isinstance(array, np.ndarray):
        return array
    if name not in array.files:
        raise ValueError(f"{path}: expected file.npz:name with a name out of {', '.join(array.files)}")
    return array[name]
