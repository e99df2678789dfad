"""Images of the recipes: CIFAR-10, CelebA, CelebA-HQ-256 and LSUN-Church, SVHN as outliers, and generated ones.

    python examples/recipe_data.py svhn --data-dir ~/data --count 10000 --out svhn.npy

writes images of SVHN's test set, for `hvae-ebm-prior ood` on a prior of CIFAR-10.

Every collection is a sequence of PIL pictures, or of dicts that hold one; `Pictures` makes float images of all. Nothing
is flipped.
"""

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hvae_ebm_prior.saving.extras import missing

CIFAR10 = "uoft-cs/cifar10"
SVHN = "ufldl-stanford/svhn"
# Aligned pictures, with 40 attributes as columns of truth values.
CELEBA = "flwrlabs/celeba"
ATTRIBUTES = ("Male", "Smiling", "Blond_Hair")
# Such a column, as the package datasets describes it.
TRUTH = SimpleNamespace(dtype="bool")
# A copy of CelebA-HQ at 256x256, 28,000 + 2,000 pictures. NVAE's own split is 27,000 + 3,000; bring its LMDB folder to
# have that.
CELEBA_HQ = "mattymchen/celeba-hq"
# LSUN's own validation set has 300 pictures, too few for a Fréchet distance: the last ones of its training set are held
# out instead.
CHURCHES_HELD_OUT = 10_000


class Pictures(Dataset[Any]):
    """Float images (3, size, size) in [0, 1] of a collection of pictures, or pairs of these and their labels by name.

    Args:
        source: PIL pictures, or rows of a data set of the package datasets, of which the first picture is taken.
        size: height and width; the shorter side is resized to it and the middle cut out.
        bits: per colour; an NVAE of 5 bits was trained on multiples of 1 / 31.
        columns: of the rows' labels, by name; none for images alone.
    """

    def __init__(
        self, source: Sequence[Any], size: int, bits: int = 8, columns: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.source = source
        self.size = size
        self.bits = bits
        self.columns = columns

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        row = self.source[index]
        image = self.image_of(self.levels_of(row))
        labels = {name: int(row[column]) for name, column in self.columns.items()}
        return (image, labels) if labels else image

    def image_of(self, levels: Tensor) -> Tensor:
        """Floats in [0, 1] of 8 bits."""
        return (levels // 2 ** (8 - self.bits)).float() / (2**self.bits - 1)

    def levels(self, index: int) -> Tensor:
        """A picture as uint8 (3, size, size), of 8 bits."""
        return self.levels_of(self.source[index])

    def levels_of(self, row: Any) -> Tensor:
        """The picture of a row, as `levels`."""
        picture = row
        if isinstance(picture, dict):
            picture = next(value for value in picture.values() if isinstance(value, Image.Image))
        picture = picture.convert("RGB")
        scale = self.size / min(picture.size)
        width, height = (max(self.size, round(scale * side)) for side in picture.size)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return torch.from_numpy(np.array(picture.crop((left, top, left + self.size, top + self.size)))).permute(2, 0, 1)

    def first(self, count: int) -> Tensor:
        """The first images (min(count, len), 3, size, size), as floats in [0, 1]."""
        return torch.stack([self.image_of(self.levels(i)) for i in range(min(count, len(self)))])


class Shapes(Sequence[Any]):
    """Generated pictures: a smooth ground and a soft ellipse, in random colours, of two classes in turn.

    Args:
        count: how many.
        size: height and width.
        seed: of the first; the next has the next one.
    """

    def __init__(self, count: int, size: int, seed: int = 0) -> None:
        self.count = count
        self.size = size
        self.seed = seed

    # As of a data set of the package datasets.
    features = MappingProxyType({"label": SimpleNamespace(names=["even", "odd"]), **dict.fromkeys(ATTRIBUTES, TRUTH)})

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        random, size = np.random.default_rng(self.seed + index), self.size
        corners = Image.fromarray(random.integers(0, 256, (3, 3, 3), np.uint8))
        picture = corners.resize((size, size), Image.Resampling.BICUBIC)
        left, top, width, height = random.uniform(size / 8, size / 2, 4).tolist()
        color = tuple(random.integers(0, 256, 3).tolist())
        ImageDraw.Draw(picture).ellipse((left, top, left + width, top + height), fill=color)
        attributes = {name: (index >> bit) % 2 == 1 for bit, name in enumerate(ATTRIBUTES)}
        return {"image": picture.filter(ImageFilter.GaussianBlur(size / 32)), "label": index % 2, **attributes}


class Lmdb(Sequence[Any]):
    """Pictures in an LMDB.

    Args:
        path: its folder.
        decode: the picture of a value's bytes.
        order: of a key, what the pictures are sorted by; None for LMDB's own order, that of the keys' bytes.
    """

    def __init__(
        self, path: Path, decode: Callable[[bytes], Image.Image], order: Callable[[bytes], Any] | None = None
    ) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise missing("this recipe's images need lmdb", "recipes") from error
        if not path.is_dir():
            raise FileNotFoundError(f"data: there is no folder {path}; docs/recipes.md says what it should be")
        self.file = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        self.decode = decode
        with self.file.begin() as transaction:
            self.keys = sorted(transaction.cursor().iternext(keys=True, values=False), key=order)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        with self.file.begin() as transaction:
            return self.decode(transaction.get(self.keys[index]))


def raw_picture(value: bytes) -> Image.Image:
    """A square picture of its RGB bytes."""
    pixels = np.frombuffer(value, np.uint8)
    size = round((len(pixels) / 3) ** 0.5)
    return Image.fromarray(pixels.reshape(size, size, 3))


def encoded_picture(value: bytes) -> Image.Image:
    """A picture of the bytes of an image file."""
    return Image.open(io.BytesIO(value))


def cifar10(folder: Path) -> tuple[Any, Any]:
    """CIFAR-10's training and test set: pictures in folders `train` and `test` of `folder`, or else a download."""
    return folders_or_download(folder, CIFAR10, "test")


def celeba_hq(folder: Path) -> tuple[Any, Any]:
    """CelebA-HQ's training and validation set: NVAE's LMDB files in `folder`, or pictures in its folders of these
    names, or else a download to it.
    """
    if (folder / "train.lmdb").exists():
        # NVAE's scripts/convert_tfrecord_to_lmdb.py writes raw pictures under their numbers.
        training_set = Lmdb(folder / "train.lmdb", raw_picture, order=int)
        return training_set, Lmdb(folder / "validation.lmdb", raw_picture, order=int)
    return folders_or_download(folder, CELEBA_HQ, "validation")


def lsun_churches(folder: Path) -> tuple[Any, Any]:
    """Two parts of LSUN's church_outdoor_train_lmdb in `folder`."""
    churches = Lmdb(folder / "church_outdoor_train_lmdb", encoded_picture)
    split = max(len(churches) - CHURCHES_HELD_OUT, len(churches) // 2)
    return Subset(churches, range(split)), Subset(churches, range(split, len(churches)))


def celeba(folder: Path) -> tuple[Any, Any]:
    """CelebA's training and validation set with its attributes, downloaded to `folder`."""
    return folders_or_download(folder, CELEBA, "valid")


# Training and held-out pictures in a folder.
SOURCES: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "cifar10": cifar10,
    "celeba": celeba,
    "celeba-hq": celeba_hq,
    "lsun-churches": lsun_churches,
}


def folders_or_download(folder: Path, name: str, held_out: str) -> tuple[Any, Any]:
    """The training set and `held_out`: of pictures in folders `train` and `held_out` of `folder`, or else of `name` on
    the Hub, kept in `folder`.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing("this recipe's images need datasets", "recipes") from error
    if (folder / "train").is_dir():
        # The first pictures by name, which are looked at and compared, may all show the same.
        splits = datasets.load_dataset("imagefolder", data_dir=str(folder)).shuffle(seed=0)
    else:
        splits = datasets.load_dataset(name, cache_dir=str(folder))
    return splits["train"], splits[held_out]


def category_names(source: Any, column: str) -> tuple[str, ...]:
    """The names of the categories in a column of labels: no and yes of a column of truth values.

    Args:
        source: rows of a data set of the package datasets.
        column: its name; of folders of classes "label".

    Returns:
        The names, in the order of the labels.

    Raises:
        ValueError: there is no such column.
    """
    feature = getattr(source, "features", {}).get(column)
    if getattr(feature, "dtype", None) == "bool":
        return ("no", "yes")
    if not getattr(feature, "names", None):
        raise ValueError(
            f"labels: these images have none; expected a data set with a column {column}, or for a column label "
            "folders of classes in the folder train"
        )
    return tuple(feature.names)


def main() -> None:
    """Write the outliers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["svhn"])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that they are downloaded to")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--out", type=Path, default=Path("svhn.npy"))
    options = parser.parse_args()
    import datasets

    rows = datasets.load_dataset(SVHN, "cropped_digits", split="test", cache_dir=str(options.data_dir.expanduser()))
    pictures = Pictures(rows, options.size)
    np.save(options.out, np.stack([pictures.levels(i).numpy() for i in range(min(options.count, len(pictures)))]))
    print(f"{options.out}: {min(options.count, len(pictures))} images")


if __name__ == "__main__":
    main()
