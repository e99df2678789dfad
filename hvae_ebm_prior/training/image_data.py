"""Images: files of a folder or a data set of the Hugging Face Hub, decoded when needed, or NumPy arrays."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..backbone.validation import check_images
from ..density.latent_prior import LatentPrior
from ..processes import progress_bar
from ..saving.extras import missing
from .array_data import is_array, load_images

IMAGES = (
    "a folder of PNG, JPEG or WebP files, hf:NAME[:SPLIT[:COLUMN]] of the Hugging Face Hub, or file.npy or "
    "file.npz:name of uint8 or floats in [0, 1], (N, C, H, W) or (N, H, W[, C])"
)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
MODES = {1: "L", 3: "RGB"}
# Turns of Pillow's by the orientation in EXIF data, its tag 0x112.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# How many broken images a warning names.
SHOWN = 10


class BrokenImageError(OSError):
    """An image that cannot be decoded; the message names it."""


def open_images(
    source: str,
    shape: tuple[int, int, int],
    *,
    size: int | None = None,
    limit: int | None = None,
    background: str = "white",
    skip_broken: bool = False,
) -> "Tensor | DecodedImages":
    """The images that a source names.

    Args:
        source: a folder, whose files are taken in the order of their paths, those of folders in it too, also where
            these are links, and without what is hidden; `hf:NAME[:SPLIT[:COLUMN]]`, by default the split "train" and
            the first column of images; or what `load_images` takes.
        shape: shape (C, H, W) that they must have. Those of folders and the Hub become grey or RGB as C says, and are
            turned as their EXIF data say.
        size: side of the square that those of folders and the Hub are resized and, about their centre, cropped to; None
            leaves them as they are, as those of arrays always are.
        limit: use so many from the start; None for all.
        background: color behind transparent pixels of folders and the Hub, by name or as #rrggbb; a warning says where
            there are some.
        skip_broken: look at all images of a folder or the Hub now, and leave out, with a warning that names them, those
            that cannot be decoded.

    Returns:
        Images (N, C, H, W), or a dataset of images (C, H, W), in [0, 1].

    Raises:
        ValueError: there is no such source, it has no images, or they have another shape.
        ImportError: a package is missing.
        OSError: a file cannot be read; `BrokenImageError` where it is no whole image.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of images, got {limit}")
    if size is not None and (size, size) != shape[1:]:
        raise ValueError(f"size: expected {shape[1]}, as the backbone draws {shape[2]}x{shape[1]} pixels, got {size}")
    rows = None
    if Path(source).expanduser().is_dir():
        images = folder_images(Path(source).expanduser(), limit)
    elif source.startswith("hf:"):
        import_pillow()
        rows, column = hub_rows(source)
        images = hub_images(source, rows, column, limit)
    elif not is_array(source):
        raise ValueError(f"images: there is no folder {source}; expected {IMAGES}")
    else:
        array = load_images(source)[:limit]
        try:
            check_images(array)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if array.shape[1:] != shape:
            raise ValueError(
                f"{source}: expected images {shape} (channels, height, width), as the backbone draws, "
                f"got {tuple(array.shape[1:])}; those of arrays are taken as they are, and folders' with --size resized"
            )
        return array
    names, read = images
    return DecodedImages(names, read, Decoding(shape, size, background), rows=rows, skip_broken=skip_broken)


@torch.no_grad()
def data_shape(prior: LatentPrior) -> tuple[int, ...]:
    """Shape of what a prior's backbone draws, without batch."""
    return tuple(prior.decode(torch.zeros(1, prior.dim, device=prior.device, dtype=prior.dtype)).shape[1:])


def image_shape(prior: LatentPrior) -> tuple[int, int, int]:
    """Shape (C, H, W) of the images that a prior's backbone draws."""
    channels, height, width = data_shape(prior)
    return channels, height, width


@dataclass(frozen=True)
class Decoding:
    """How pictures become tensors.

    Attributes:
        shape: the shape (C, H, W) that they must have.
        size: side to resize and crop to; None for none.
        background: color behind transparent pixels.
        transparent: the first image that had some; one warning says it for all.
    """

    shape: tuple[int, int, int]
    size: int | None = None
    background: str = "white"
    transparent: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if self.shape[0] not in MODES:
            raise ValueError(
                f"images: expected a backbone of grey or RGB images, this one's have {self.shape[0]} channels; "
                "give an array of NumPy's"
            )

    def __call__(self, name: str, picture: Any) -> Tensor:
        """The image (C, H, W) in [0, 1] of a Pillow image; errors begin with its name."""
        from PIL import Image, ImageOps

        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"{name}: expected an image, got {type(picture).__name__}; "
                "name the column of images, as hf:NAME:SPLIT:COLUMN"
            )
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"{name}: expected 8 bits per channel, got an image of mode {picture.mode}; convert it")
        try:
            picture = self.opaque(name, upright(picture)).convert(MODES[self.shape[0]])
        except ValueError as error:
            raise ValueError(f"{name}: an image of mode {picture.mode} cannot be read ({error}); convert it") from error
        if self.size is not None:
            picture = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)
        if (picture.height, picture.width) != self.shape[1:]:
            raise ValueError(
                f"{name}: expected {self.shape[2]}x{self.shape[1]} pixels, as the backbone draws, "
                f"got {picture.width}x{picture.height}; --size {self.shape[1]} resizes and crops"
            )
        pixels = torch.from_numpy(np.array(picture)).reshape(*self.shape[1:], self.shape[0])
        return pixels.permute(2, 0, 1).float() / 255

    def opaque(self, name: str, picture: Any) -> Any:
        """The picture on the background, where it is transparent anywhere."""
        from PIL import Image

        if not picture.has_transparency_data:
            return picture
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] == 255:
            return picture
        if not self.transparent:
            self.transparent.append(name)
            warnings.warn(
                f"{name} has transparent pixels: they are shown on {self.background}, as those of all images are",
                RuntimeWarning,
                stacklevel=2,
            )
        return Image.alpha_composite(Image.new("RGBA", picture.size, self.background), picture)


def upright(picture: Any) -> Any:
    """The picture as viewers show it: turned as its EXIF data say, and as it is stored where these cannot be read."""
    from PIL import Image

    try:
        turn = TURNS.get(picture.getexif().get(0x112))
    except Exception:  # whatever Pillow makes of damaged ones
        return picture
    return picture.transpose(Image.Transpose[turn]) if turn else picture


class DecodedImages(Dataset[Tensor]):
    """A dataset of images (C, H, W) in [0, 1] that are decoded when they are asked for.

    Args:
        names: of all images, for errors.
        read: the Pillow image of an index.
        decoding: how it becomes a tensor.
        rows: the data set of the Hub that they are of; None for files.
        skip_broken: leave out those that cannot be decoded.

    Attributes:
        indices: which of the images are in it, in order.

    Raises:
        BrokenImageError: the first image, or with `skip_broken` every one, cannot be decoded.
        ValueError: the first image has another shape.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[int], Any],
        decoding: Decoding,
        *,
        rows: Any = None,
        skip_broken: bool = False,
    ) -> None:
        self.names = names
        self.rows = rows
        self.read = read
        self.decoding = decoding
        self.indices = list(range(len(names)))
        if skip_broken:
            self.indices = self.whole_images()
        self[0]  # so that what is wrong with all of them is an error now

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.decode(self.indices[index])

    def decode(self, index: int) -> Tensor:
        """The image of an index of `names`."""
        name = self.names[index]
        try:
            picture = self.read(index)
        except Exception as error:  # Pillow's decoders raise whatever a damaged file makes of them
            raise BrokenImageError(
                f"{name}: cannot be read as an image ({error or type(error).__name__}); repair it or take it away, or "
                "leave such images out with --skip-broken"
            ) from error
        try:
            return self.decoding(name, picture)
        except MemoryError as error:
            raise BrokenImageError(f"{name}: {picture.width}x{picture.height} pixels do not fit into memory") from error

    def whole_images(self) -> list[int]:
        """Indices of the images that can be decoded."""
        whole, broken = [], []
        with progress_bar(len(self.names), "checking images") as bar:
            for index, name in enumerate(self.names):
                try:
                    self.decode(index)
                except BrokenImageError:
                    broken.append(name)
                else:
                    whole.append(index)
                bar.update()
        if not whole:
            raise BrokenImageError(f"images: none of the {len(broken)} images can be decoded, {broken[0]} the first")
        if broken:
            more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            warnings.warn(
                f"images: {len(broken)} of {len(self.names)} images cannot be decoded and are left out: "
                f"{', '.join(broken[:SHOWN])}{more}",
                RuntimeWarning,
                stacklevel=3,
            )
        return whole


def folder_images(folder: Path, limit: int | None) -> tuple[list[str], Callable[[int], Any]]:
    """Names of the images of a folder and the folders in it, and a function that reads one; see `open_images`."""
    Image = import_pillow()
    paths = image_files(folder)[:limit]

    def read(index: int) -> Any:
        with Image.open(paths[index]) as image:
            image.load()
            return image

    return [str(path) for path in paths], read


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and the folders in it, in the order of their paths: links are followed, each real folder
    is taken once, and what begins with a dot is left alone. ValueError if there are none.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # Folders are entered in the order of their names, so that of two links to one it is always the same.
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            paths += [
                Path(place, name)
                for name in files
                if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
            ]
        seen.add(real)
    if not paths:
        raise ValueError(f"images: {folder} holds no images; expected files {', '.join(sorted(SUFFIXES))}")
    return sorted(paths)


def hub_images(source: str, rows: Any, column: str, limit: int | None) -> tuple[list[str], Callable[[int], Any]]:
    """Names of the images in a column of a data set of the Hub, and a function that reads one; see `open_images`."""
    count = len(rows) if limit is None else min(limit, len(rows))
    if count == 0:
        raise ValueError(f"images: {source} is empty")
    return [f"{source}, image {index}" for index in range(count)], lambda index: rows[index][column]


def hub_rows(source: str) -> tuple[Any, str]:
    """A data set of the Hub, and its column of images."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise missing("data sets of the Hub need the package datasets", "data") from error
    parts = source.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"images: expected hf:NAME[:SPLIT[:COLUMN]], got {source}")
    name, split, column = [*parts, "", ""][:3]
    rows = load_dataset(name, split=split or "train")
    columns = [column] if column else [each for each, kind in rows.features.items() if type(kind).__name__ == "Image"]
    if not columns or columns[0] not in rows.features:
        raise ValueError(f"images: {source} has no column {column or 'of images'}, but {', '.join(rows.features)}")
    return rows, columns[0]


def import_pillow() -> Any:
    """Pillow's module Image; ImportError that names the extra where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("images of folders and the Hub need Pillow", "data") from error
    return Image
