"""Posterior noise of images, worked out once and kept on disk, so that training need not run the encoder.

What training needs of an image x is a draw u ~ q(u|x), u = T⁻¹(z). In a hierarchical VAE a layer's posterior depends on
the latents drawn above it,

    q(u|x) = q(u_1|x) q(u_2|u_1, x) ... q(u_L|u_<L, x),

so that q(u|x) is no Gaussian, and the mean and std of u say too little. There are thus two kinds of cache:

    draws     M draws of q(u|x) per image, for every backbone. Pass e over the data takes draw e mod M of every image:
              up to M passes, training is the same in distribution as with the encoder; beyond, it has N M fixed points
              in the place of N densities.
    Gaussian  mean and std of u, from which every step draws anew, where q(u|x) is a Gaussian: for adapters with a
              method `posterior`, of models with one latent, or with layers whose posteriors do not depend on each
              other.

A folder holds `index.json` and shards of bounded size, `shard_00000.safetensors` and so on, each written whole or not
at all, then the index. Shards are mapped into memory: a batch reads its own rows.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..backbone.posterior import DEVIATIONS, Posterior, deviations
from ..backbone.validation import check_count, check_images
from ..chains.streams import GLOBAL_GENERATORS, draw_key, sample_seeds, seeded
from ..density.latent_prior import LatentPrior
from ..processes import progress_bar
from ..saving.digest import digest_file, digest_images
from ..saving.files import write_json
from ..saving.fingerprint import fingerprint
from ..saving.typed_json import to_json
from ..saving.weights_file import write_weights
from .cache_files import (
    INDEX,
    CacheIndex,
    InvalidCache,
    Shard,
    check_cache_backbone,
    check_same_cache,
    label_key,
    open_shard,
    read_index,
    shard_path,
)

# Draws per image by default, where the posterior of u is no Gaussian.
DRAWS = 8


@runtime_checkable
class GaussianPosterior(Protocol):
    """An adapter whose posterior of u is a Gaussian in closed form."""

    def posterior(self, images: Tensor) -> Iterable[tuple[Tensor, Tensor]] | None:
        """The Gaussian q(u|x).

        Args:
            images: (N, C, H, W) in [0, 1].

        Returns:
            Mean and std, each (N, *latent_shapes[i]), of every layer; None where q(u|x) is not their product.
        """


class PosteriorCache(Dataset[Tensor]):
    """A cache of posterior noise in a folder, which `fit` takes instead of images; `PosteriorCache.build` makes one.

    Args:
        folder: where it lies.
        verify: read all files once, to compare them with their digests.

    Attributes:
        folder: where it lies.
        index: what it holds.

    Raises:
        InvalidCache: the cache is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder).expanduser()
        index = read_index(self.folder)
        if index is None:
            raise InvalidCache(
                f"{self.folder}: expected a posterior cache, but there is no {INDEX}; PosteriorCache.build makes one"
            )
        if len(index.shards) < index.shard_count:
            raise InvalidCache(
                f"{self.folder}: unfinished, with {len(index.shards)} of {index.shard_count} shards; "
                "PosteriorCache.build goes on with it"
            )
        self.index = index
        dim = sum(math.prod(shape) for shape in index.fingerprint.latent_shapes)
        self._shards = [open_shard(self.folder, index, i, dim, verify) for i in range(len(index.shards))]

    def __len__(self) -> int:
        return self.index.images

    @property
    def digest(self) -> str:
        """SHA-256 of all that the cache holds."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.index.shards).encode()).hexdigest()

    def check(self, prior: LatentPrior) -> None:
        """Raise BackboneMismatch unless the cache was made with the backbone of `prior`."""
        check_cache_backbone(self.folder, self.index, fingerprint(prior))

    def noise(self, rows: Tensor, draw: int, generator: torch.Generator | None = None) -> Tensor:
        """Posterior noise of images.

        Args:
            rows: their numbers (N,), long.
            draw: which of the M draws, modulo M.
            generator: source of noise where the cache holds mean and std; None takes torch's default generator.

        Returns:
            Noise (N, D), on the CPU, in the cache's dtype.
        """
        if self.index.draws:
            return self._read(rows, "draws", draw % self.index.draws)
        noise = torch.Generator().manual_seed(draw_key(generator))
        mean, std = self.gaussians(rows)
        return mean + std * torch.randn(mean.shape, generator=noise, device="cpu", dtype=mean.dtype)

    def gaussians(self, rows: Tensor) -> Posterior:
        """The Gaussians of images of numbers `rows` (N,), where the cache holds mean and std."""
        return Posterior(*(self._read(rows, name) for name in ("mean", "std")))

    def labels(self, rows: Tensor) -> Tensor | dict[str, Tensor] | None:
        """Labels of the images of numbers `rows` (N,), as the data had them: one tensor, tensors by name, or none."""
        named = {name: self._read(rows, label_key(name)) for name in self.index.labels}
        return named.get("", named or None)

    def _read(self, rows: Tensor, name: str, draw: int | None = None) -> Tensor:
        """Rows of a tensor of the shards; of draws (n, M, D) those of one number."""
        rows = rows.cpu()
        shard, place = rows // self.index.rows, rows % self.index.rows
        parts = []
        for i in shard.unique().tolist():
            tensor = self._shards[i][name]
            parts.append(tensor[place[shard == i]] if draw is None else tensor[place[shard == i], draw])
        # The parts come shard by shard; back to the order of the rows.
        return torch.cat(parts)[shard.argsort(stable=True).argsort()]

    @classmethod
    def build(
        cls,
        prior: LatentPrior,
        data: Tensor | Dataset[Any],
        folder: str | Path,
        *,
        labels: Tensor | Mapping[str, Tensor] | None = None,
        draws: int | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
        shard_size: int = 2**28,
        progress: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Run the encoder over all images, or go on with a cache that was interrupted, or open one that is finished.

        Args:
            prior: any prior over the backbone.
            data: images (N, C, H, W) in [0, 1], or a dataset of them with a length; of tuples the second entry is kept
                as labels. Random augmentation is frozen: every image is read once.
            folder: where to write; made if need be.
            labels: of the images of a tensor, as of `fit`.
            draws: draws per image M; None takes mean and std where the adapter gives them (`GaussianPosterior`), and
                8 draws elsewhere.
            dtype: of the numbers kept; None for the prior's. Half precision halves the size.
            batch_size: images encoded at a time.
            shard_size: largest size of a file, in bytes.
            progress: show a progress bar; None shows one on a terminal only.
            generator: source of all randomness; None takes torch's default generator. A cache that is gone on with
                keeps its own.

        Returns:
            The cache.

        Raises:
            TypeError, ValueError: bad data or settings, or a folder with a cache of something else.
            InvalidCache: a damaged cache is there.
            BackboneMismatch: a cache of another backbone is there.
        """
        images = check_data(data, labels, prior.backbone)
        batch_size = check_count(batch_size, "batch_size")
        shard_size = check_count(shard_size, "shard_size")
        check_count(1 if draws is None else draws, "draws")
        folder = Path(folder).expanduser()
        saved = read_index(folder)
        key = draw_key(generator)
        if saved is not None:
            key = int(saved.key, 16)
        first, first_labels = next(read_data(data, labels, range(min(batch_size, images)), batch_size, key, 0))
        check_images(first, prior.backbone)
        if draws is None:
            draws = 0 if has_gaussian_posterior(prior, first, key) else DRAWS
        dtype = dtype or prior.dtype
        rows = max(1, shard_size // (prior.dim * (draws or 2) * dtype.itemsize))
        index = CacheIndex(
            images=images,
            draws=draws,
            dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
            rows=rows,
            labels=tuple(sorted(first_labels)),
            key=f"{key:x}",
            data=digest_images(first),
            fingerprint=fingerprint(prior),
        )
        if saved is not None:
            check_same_cache(folder, saved, index)
            index = replace(index, shards=saved.shards)
        folder.mkdir(parents=True, exist_ok=True)
        done = sum(shard.rows for shard in index.shards)
        with progress_bar(images, "posteriors", done=done, shown=progress, leave=True) as bar:
            for i in range(len(index.shards), index.shard_count):
                parts = []
                batches = read_data(data, labels, index.span(i), batch_size, key, i)
                for tensors in encode_shard(prior, batches, index, i):
                    parts.append(tensors)
                    bar.update(len(next(iter(tensors.values()))))
                path = shard_path(folder, i)
                write_weights(path, {name: torch.cat([tensors[name] for tensors in parts]) for name in parts[0]})
                index = replace(index, shards=(*index.shards, Shard(len(index.span(i)), digest_file(path))))
                write_json(folder / INDEX, to_json(index))
        return cls(folder, verify=saved is not None)


def check_data(data: Tensor | Dataset[Any], labels: Tensor | Mapping[str, Tensor] | None, adapter: object) -> int:
    """Check data for a cache.

    Args:
        data: images (N, C, H, W), or a dataset of them.
        labels: of the images of a tensor.
        adapter: of the backbone.

    Returns:
        The number of images N.

    Raises:
        TypeError, ValueError: data without an order or a length, no images, or labels that do not go with them.
    """
    if isinstance(data, Tensor):
        check_images(data, adapter)
    elif (
        not isinstance(data, Dataset)
        or isinstance(data, IterableDataset | PosteriorCache)
        or not hasattr(data, "__len__")
    ):
        raise TypeError(
            f"data: expected images (N, C, H, W) or a dataset with a length, got {type(data).__name__}; "
            "of a DataLoader give its dataset, as a cache keeps one order"
        )
    n = len(data)
    if n == 0:
        raise ValueError("data: the dataset is empty")
    if labels is not None and not isinstance(data, Tensor):
        raise ValueError(
            f"labels: they go with a tensor of images; a {type(data).__name__} gives (images, labels) itself"
        )
    for name, values in by_name(labels).items():
        if len(values) != n:
            raise ValueError(f"labels: expected {n} of {name or 'the images'}, one per image, got {len(values)}")
    return n


def by_name(labels: Any) -> dict[str, Tensor]:
    """Labels by name, a single tensor under the empty name; what is no tensor is left out."""
    named = labels if isinstance(labels, Mapping) else {"": labels}
    return {name: values for name, values in named.items() if isinstance(values, Tensor)}


def read_data(
    data: Tensor | Dataset[Any],
    labels: Tensor | Mapping[str, Tensor] | None,
    span: range,
    batch_size: int,
    key: int,
    shard: int,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Images of one shard and their labels, in batches.

    Args:
        data: of the whole cache.
        labels: of the images of a tensor.
        span: the images of the shard.
        batch_size: images per batch.
        key: of the cache; what a dataset draws from torch's global generator follows from it and the shard.
        shard: number of the shard.

    Yields:
        Images (N, C, H, W), and labels by name.
    """
    if isinstance(data, Tensor):
        for rows in (slice(a, min(a + batch_size, span.stop)) for a in span[::batch_size]):
            yield data[rows], {name: values[rows] for name, values in by_name(labels).items()}
        return
    cpu = torch.device("cpu")
    with seeded(sample_seeds(key, range(2 * shard + 1, 2 * shard + 2))[0], cpu), cpu:
        batches = iter(DataLoader(Subset(data, span), batch_size))
        state = torch.get_rng_state()
    while True:
        with GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            batch = next(batches, None)
            state = torch.get_rng_state()
        if batch is None:
            return
        images, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        yield images, by_name(rest[0]) if rest else {}


def encode_shard(
    prior: LatentPrior, batches: Iterator[tuple[Tensor, dict[str, Tensor]]], index: CacheIndex, shard: int
) -> Iterator[dict[str, Tensor]]:
    """Posterior noise and labels of a shard, by the names of its tensors, batch by batch.

    Args:
        prior: any prior over the backbone.
        batches: images and labels of the shard.
        index: of the cache.
        shard: number of the shard.

    Yields:
        Tensors (N, ...) by name.

    Raises:
        ValueError: the adapter gives mean and std of some images, and not of others.
    """
    dtype = getattr(torch, index.dtype)
    # Even numbers seed the encoder, odd ones the dataset (`read_data`).
    noise = torch.Generator().manual_seed(sample_seeds(int(index.key, 16), range(2 * shard, 2 * shard + 1))[0])
    for images, labels in batches:
        check_images(images, prior.backbone)
        kept = {label_key(name): values for name, values in labels.items()}
        if index.draws:
            u = [prior.encode(images.to(prior.device), generator=noise).cpu().to(dtype) for _ in range(index.draws)]
            yield {"draws": torch.stack(u, dim=1), **kept}
        elif (gaussian := gaussian_noise(prior, images)) is not None:
            mean, std = gaussian
            yield {"mean": mean.cpu().to(dtype), "std": std.cpu().to(dtype), **kept}
        else:
            raise ValueError("the adapter's `posterior` gave mean and std of some images and None of others; set draws")


@torch.no_grad()
def gaussian_noise(prior: LatentPrior, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and std (N, D) of the posterior noise of images, or None where the adapter does not give them."""
    if not isinstance(prior.backbone, GaussianPosterior):
        return None
    posterior = prior.backbone.posterior(prior.transform.take(images))
    if posterior is None:
        return None
    layers = list(posterior)
    mean = prior.join([mean for mean, _ in layers])
    std = prior.join([std for _, std in layers])
    if not bool(torch.isfinite(mean).all() & torch.isfinite(std).all() & (std > 0).all()):
        raise ValueError(
            f"{type(prior.backbone).__name__}.posterior: expected finite means and positive, finite stds of u, "
            "got others"
        )
    return mean, std


def has_gaussian_posterior(prior: LatentPrior, images: Tensor, key: int) -> bool:
    """Whether the adapter gives mean and std of u.

    Args:
        prior: any prior over the backbone.
        images: some to try it on, (N, C, H, W).
        key: seed of posterior draws, which are compared with the mean and std.

    Returns:
        Whether it does.

    Raises:
        ValueError: its posterior draws have another mean or std.
    """
    if (gaussian := gaussian_noise(prior, images)) is None:
        return False
    mean, std = gaussian
    drawn = prior.encode(images.to(prior.device), generator=torch.Generator().manual_seed(key))
    if (off := deviations((drawn - mean) / std)) > DEVIATIONS:
        raise ValueError(
            f"{type(prior.backbone).__name__}.posterior: expected mean and std of the u that `infer` draws, got "
            f"others: {off:.3g} standard deviations apart over the first images; return None "
            "where the layers' posteriors depend on each other"
        )
    return True
