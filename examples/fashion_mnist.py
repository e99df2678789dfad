"""Fashion-MNIST (Zalando SE, MIT licence): the committed subset, and the full set where it is installed.

    python examples/fashion_mnist.py --full /usr/share/datasets/fashion-mnist

writes the subset again from the full files (Debian's package `dataset-fashion-mnist` installs them there): the first
10,000 images of the training set and the first 2,000 of the test set, with their labels.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUBSET = Path(__file__).parent / "data" / "fashion_mnist.npz"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 pixels (N, 28, 28) as float images (N, 1, 28, 28) in [0, 1]."""
    return torch.from_numpy(pixels).unsqueeze(1).float() / 255


def load_subset(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels (N,) of the committed subset; `split` is "train" (10,000) or "test"
    (2,000).
    """
    with np.load(SUBSET) as arrays:
        return to_images(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]).long()


def load_full(folder: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """The same from the original IDX files in `folder`: 60,000 images for "train", 10,000 for "test"."""
    images, labels = read_idx(Path(folder), split)
    return to_images(images), torch.from_numpy(labels).long()


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    prefix = {"train": "train", "test": "t10k"}[split]
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28).copy()
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).copy()
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", required=True, help="folder of the four IDX files")
    folder = Path(parser.parse_args().full)
    arrays = {}
    for split, count in (("train", 10_000), ("test", 2_000)):
        images, labels = read_idx(folder, split)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[:count], labels[:count]
    SUBSET.parent.mkdir(exist_ok=True)
    np.savez_compressed(SUBSET, **arrays)
    print(f"{SUBSET.name}: {SUBSET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
