"""Labels to train with: the names of folders, a column of the Hub's, or an array of NumPy's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .array_data import is_array, load_array
from .image_data import image_files

LABELS = (
    "folders (of --images, each class in its own), column:NAME (of an hf: data set), "
    "or file.npy or file.npz:name of whole numbers, -1 where unknown"
)
# More categories than any data set has; a file with larger numbers holds something else.
LARGEST_LABEL = 1_000_000


class LabelledImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """A dataset of images with the labels (N,) of every label set."""

    def __init__(self, images: Dataset[Tensor], labels: Mapping[str, Tensor]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # as those of `open_images` have

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {name: labels[index] for name, labels in self.labels.items()}


def open_labels(source: str, data: str, count: int, rows: Any = None) -> tuple[int | tuple[str, ...], Tensor]:
    """The labels that a source names.

    Args:
        source: "folders" for the first folder under `data` on the way to each image, `column:NAME` of the data set of
            the Hub, or `file.npy` or `file.npz:name`, integers, -1 where the label is unknown.
        data: where the images come from, as of `hvae_ebm_prior.training.image_data.open_images`.
        count: how many images were taken of it, from the start.
        rows: the data set of the Hub that `data` names.

    Returns:
        The categories' names, or their number where they have none, and labels (count,) long.

    Raises:
        ValueError: there are no such labels, or not as many as images.
        OSError: a file cannot be read.
    """
    if source == "folders":
        return labels_of_folders(data, count)
    if source.startswith("column:"):
        return labels_of_column(data, rows, source.removeprefix("column:"), count)
    if not is_array(source):
        raise ValueError(f"labels: expected {LABELS}; got {source}")
    array = load_array(source)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels: expected whole numbers (N,), got {array.dtype} {array.shape} in {source}")
    if len(array) < count:
        raise ValueError(f"labels: {source} has {len(array)} for {count} images")
    low, high = int(array.min()), int(array.max())
    if low < -1 or high > LARGEST_LABEL:
        raise ValueError(
            f"labels: expected whole numbers from 0, and -1 where unknown, up to {LARGEST_LABEL}, got {low} to {high} "
            f"in {source}"
        )
    return high + 1, torch.from_numpy(array[:count].astype(np.int64))


def labels_of_folders(data: str, count: int) -> tuple[tuple[str, ...], Tensor]:
    """See `open_labels`."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"labels: folders are those of a folder of images, and --images is {data}")
    everything = [path.relative_to(folder) for path in image_files(folder)]
    paths = everything[:count]
    loose = [path for path in paths if len(path.parts) == 1]
    if loose:
        raise ValueError(
            f"labels: expected every image in a folder named by its class, and {len(loose)} of {len(paths)} lie in "
            f"{folder} itself, {loose[0]} the first of them"
        )
    # Those of all images, so that a limit leaves their numbers as they are.
    names = tuple(sorted({path.parts[0] for path in everything}))
    return names, torch.tensor([names.index(path.parts[0]) for path in paths], device="cpu", dtype=torch.long)


def labels_of_column(data: str, rows: Any, column: str, count: int) -> tuple[int | tuple[str, ...], Tensor]:
    """See `open_labels`."""
    if not data.startswith("hf:"):
        raise ValueError(f"labels: columns are those of an hf: data set, and --images is {data}")
    if column not in rows.features:
        raise ValueError(f"labels: {data} has no column {column}, but {', '.join(rows.features)}")
    names: Sequence[str] | None = getattr(rows.features[column], "names", None)
    values: list[Any] = list(rows[column][:count])
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        values = [names.index(value) for value in values]
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"labels: expected whole numbers or names in the column {column}, got {values[0]!r}")
    return max(values) + 1 if names is None else tuple(names), torch.tensor(values, device="cpu", dtype=torch.long)
