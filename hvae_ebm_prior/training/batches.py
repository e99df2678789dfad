"""Batches of images without end, from a place in the data that can be saved and found again.

A pass over the data is fixed by one seed, drawn when it begins: the order of a tensor's or dataset's images follows
from it, and so does what the data themselves draw from torch's global CPU generator (a DataLoader its order, a dataset
its augmentation), which is forked for them. The place is then the pass, the number of batches given of it, the seed,
and the state of that generator. Worker processes read a dataset ahead, each batch with a seed of its own, so that
results depend neither on their number nor on interruptions.
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from ..backbone.posterior import Posterior
from ..backbone.validation import check_images
from ..chains.streams import GLOBAL_GENERATORS, draw_key, sample_seeds
from ..density.latent_prior import LatentPrior
from ..energies.coupling import Labels
from ..saving.digest import digest_images
from .image_data import DecodedImages
from .label_data import LabelledImages
from .posterior_cache import PosteriorCache

# Images (N, C, H, W), or numbers (N,) of rows of a posterior cache; labels or None; and the pass over the data, from 0.
Batch = tuple[Tensor, Tensor | Labels | None, int]
END = object()


# Images that a digest of the data looks at.
LOOKED_AT = 16


def some(count: int) -> list[int]:
    """Indices of a few images out of `count`, from the first to the last."""
    spread = torch.linspace(0, count - 1, min(count, LOOKED_AT), device="cpu", dtype=torch.float32)
    return spread.round().long().tolist()


class Batches:
    """An endless iterator over batches: images (N, C, H, W), labels, and the pass over the data, from 0.

    Of a batch that is a tuple the second entry is its labels. Of a posterior cache, numbers of rows come in the place
    of images; `noise` gives the posterior noise of either.

    Args:
        data: images (N, C, H, W), a dataset, a posterior cache, or an iterable of batches that can be started again.
        batch_size: images per batch of a tensor or dataset; what is left over at the end of a pass is not given.
        generator: source of every pass's seed; None takes torch's default generator.
        labels: of the images of a tensor.
        workers: processes that read a dataset ahead; 0 for none.
        pin: put a dataset's batches in pinned memory, from which copies to a GPU need not wait for each other.
        check: raises for images that are none, as `check_images` of an adapter.

    Attributes:
        epoch: the pass over the data, from 0.
        index: how many batches of it were given.

    Raises:
        TypeError: `data` is none of these.
        ValueError: there are no images, or they are out of range; batches are checked as they are read.
    """

    def __init__(
        self,
        data: Tensor | Dataset[Any] | Iterable[Any],
        batch_size: int,
        generator: torch.Generator | None,
        labels: Labels | None = None,
        workers: int = 0,
        pin: bool = False,
        check: Callable[[Tensor], None] = check_images,
    ) -> None:
        if isinstance(data, Tensor):
            check(data)
        elif isinstance(data, IterableDataset):
            data = DataLoader(data, batch_size)
        elif isinstance(data, Dataset) and hasattr(data, "__len__"):
            if len(data) == 0:
                raise ValueError("data: the dataset is empty")
        elif not isinstance(data, Iterable):
            raise TypeError(
                "data: expected images (N, C, H, W), a dataset with a length, or an iterable of batches, "
                f"got {type(data).__name__}"
            )
        self.data: Any = data
        self.batch_size = batch_size
        self.generator = generator
        self.labels = labels
        self.check = check
        self.epoch = 0
        self.index = 0
        # Whether batches are picked here by index; of other data they come as they are.
        self._indexed = isinstance(data, Tensor) or (isinstance(data, Dataset) and hasattr(data, "__len__"))
        self._loading: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "batch_size": None}
        # The pass: its seed, -1 before the first, what is left of it, and the state of torch's generator for its data.
        self._seed = -1
        self._rest: Iterator[Any] = iter(())
        self._random = torch.Generator().get_state()
        # Generators of a DataLoader and its sampler, and their states at the start of the pass.
        owned = [getattr(owner, "generator", None) for owner in (data, getattr(data, "sampler", None))]
        self._own = [each for each in owned if isinstance(each, torch.Generator) and each.device.type == "cpu"]
        self._own_start = [generator.get_state() for generator in self._own]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._seed < 0:
            self._begin(draw_key(self.generator))
        batch = self._read()
        if batch is END and self.index:
            self.epoch += 1
            self.index = 0
            self._begin(draw_key(self.generator))
            batch = self._read()
        if batch is END:
            raise ValueError(
                f"data: the {type(self.data).__name__} gave no batch in pass {self.epoch + 1}; "
                "it must hold images and allow several passes"
            )
        self.index += 1
        images, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        if isinstance(images, Mapping):
            keys = ", ".join(map(str, images))
            raise TypeError(f"data: expected batches of images, or of (images, labels), got a mapping of {keys}")
        if not isinstance(self.data, PosteriorCache):
            self.check(images)
        return images, rest[0] if rest else None, self.epoch

    def noise(self, prior: LatentPrior, images: Tensor, draw: int, generator: torch.Generator | None) -> Tensor:
        """Posterior noise of what a batch holds.

        Args:
            prior: the prior that learns from it.
            images: of a batch, images or rows of a cache.
            draw: which draw to take of a cache that holds several, modulo their number; in training the pass over the
                data.
            generator: source of the posterior noise that is not in a cache.

        Returns:
            Noise (N, D), of the prior's dtype and device.
        """
        if isinstance(self.data, PosteriorCache):
            return self.data.noise(images, draw, generator).to(prior.device, prior.dtype)
        return prior.encode(images.to(prior.device, non_blocking=True), generator=generator)

    def noise_with_posterior(
        self, prior: LatentPrior, images: Tensor, draw: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Posterior | None]:
        """As `noise`, and the Gaussians that it was drawn from where they are known: of a cache of draws they are not.

        Args:
            prior: as of `noise`.
            images: as of `noise`.
            draw: as of `noise`.
            generator: as of `noise`.

        Returns:
            Noise (N, D), and its Gaussians or None.
        """
        if isinstance(self.data, PosteriorCache):
            known = None if self.data.index.draws else self.data.gaussians(images)
            gaussians = known and Posterior(*(part.to(prior.device, prior.dtype) for part in known))
            return self.noise(prior, images, draw, generator), gaussians
        return prior.encode_with_posterior(images.to(prior.device, non_blocking=True), generator=generator)

    def summary(self) -> dict[str, Any]:
        """Kind and size of the data, as JSON values, and a digest of some images where these are always the same, as
        those of a tensor or of files are.
        """
        if isinstance(self.data, Tensor):
            labels = sorted(self.labels) if self.labels else None
            form = {"shape": list(self.data.shape), "dtype": str(self.data.dtype), "labels": labels}
            return {"kind": "tensor", **form, "digest_of_images": digest_images(self.data[some(len(self.data))])}
        if isinstance(self.data, PosteriorCache):
            return {"kind": "posterior cache", "length": len(self.data), "digest": self.data.digest}
        try:
            length = len(self.data)
        except TypeError:  # a loader of a stream has the method and no length
            length = None
        about: dict[str, Any] = {"kind": "dataset" if self._indexed else "batches", "length": length}
        files = self.data.images if isinstance(self.data, LabelledImages) else self.data
        if length and isinstance(files, DecodedImages):
            about["digest_of_images"] = digest_images(torch.stack([files[i] for i in some(length)]))
        return about

    def place(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Where the next batch is in the data: random states, and numbers, by name."""
        starts = {f"generator_{i}": state for i, state in enumerate(self._own_start)}
        return {"random": self._random, **starts}, {"epoch": self.epoch, "index": self.index, "seed": self._seed}

    def go_to(self, states: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Go to a place as from `place`; batches of an iterable are read and dropped on the way.

        Args:
            states: its random states.
            numbers: its numbers.

        Raises:
            ValueError: the data end before it.
        """
        for i, generator in enumerate(self._own):
            generator.set_state(states[f"generator_{i}"])
        self.epoch = numbers["epoch"]
        self.index = numbers["index"]
        self._begin(numbers["seed"], self.index)
        self._random = states["random"]

    def _begin(self, seed: int, given: int = 0) -> None:
        """Begin the pass of a seed, after the first `given` batches of it."""
        self._seed = seed
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._own_start = [generator.get_state() for generator in self._own]
        if self._indexed:
            order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed), device="cpu")
            # What is left over at the end is no batch, unless it is all there is.
            self._begin_indexed(order.split(self.batch_size)[: max(1, len(order) // self.batch_size)], given)
            return
        with self._own_randomness():
            self._rest = iter(self.data)
        for done in range(given):
            if self._read() is END:
                raise ValueError(
                    f"data: pass {self.epoch + 1} ended after {done} batches, where training was interrupted after "
                    f"{given}; give the same"
                )

    def _begin_indexed(self, chosen: Sequence[Tensor], given: int) -> None:
        """Begin a pass over batches of the given indices, after the first `given` of them."""
        rest = chosen[given:]
        if isinstance(self.data, Tensor):
            self._rest = (take(self.data, self.labels, part) for part in rest)
        elif isinstance(self.data, PosteriorCache):
            self._rest = ((part, self.data.labels(part)) for part in rest)
        else:
            seeds = sample_seeds(self._seed, range(given, len(chosen)))
            parts = [(part.tolist(), seed) for part, seed in zip(rest, seeds, strict=True)]
            # A DataLoader draws a seed when it begins, on PyTorch's default device.
            with self._own_randomness(), torch.device("cpu"):
                self._rest = iter(DataLoader(SeededBatches(self.data), sampler=parts, **self._loading))

    def _read(self) -> Any:
        """The next batch of the pass, or `END`."""
        if isinstance(self.data, Tensor):
            return next(self._rest, END)
        with self._own_randomness():
            return next(self._rest, END)

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """A context in which torch's global CPU generator is as the data left it; after it, it is as it was before."""
        with GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            yield
            self._random = torch.get_rng_state()


class SeededBatches(Dataset[Any]):
    """Batches of a dataset, each read with the global generators of the CPU at a seed of its own.

    Args:
        data: the dataset.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, item: tuple[list[int], int]) -> Any:
        """The batch of some indices, read with a seed."""
        indices, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if get_worker_info() is not None:  # a process for this alone
                random.seed(seed)
                np.random.seed(seed % 2**32)
            many = getattr(self.data, "__getitems__", None)
            return default_collate(many(indices) if many else [self.data[i] for i in indices])


def take(images: Tensor, labels: Labels | None, chosen: Tensor) -> tuple[Tensor, Labels | None]:
    """Images and labels of the given indices."""
    taken = labels and {name: values[chosen.to(values.device)] for name, values in labels.items()}
    return images[chosen.to(images.device)], taken
