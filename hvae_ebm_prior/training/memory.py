"""How much memory training will take, before it begins: weights are counted, and what autograd keeps of a step is
measured on one image and on two.

    bytes = weights + optimiser + activations,      activations(n) = a(1) + (n - 1) (a(2) - a(1))

with a(n) the most that one training step of n images keeps for a backward pass at any moment: a gradient of its chain,
or the loss. What operations need for a moment, the encoder (`encode_batch`) and the allocator's own share are not in
it: leave a third of the memory free.
"""

import copy
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone.lock import backbone_modules
from ..backbone.validation import check_count
from .trainable import TrainablePrior


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes in one process.

    Attributes:
        images: images whose chains and gradients are computed at a time: the batch, or `micro_batch`.
        weights: the backbone, and four copies of the energies: the average, the trainee, and two states to go back to.
        optimizer: gradients and Adam's moments.
        fixed: activations whatever the number of images.
        per_image: activations of one image.
        free: what the device has free now; None on a CPU.
    """

    images: int
    weights: int
    optimizer: int
    fixed: int
    per_image: int
    free: int | None = None

    @property
    def activations(self) -> int:
        """Activations of all images."""
        return self.fixed + self.images * self.per_image

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = f"{size(self.weights)} of weights, {size(self.optimizer)} of the optimiser, {size(self.activations)} of activations"
        free = "" if self.free is None else f"; {size(self.free)} are free"
        return (
            f"{size(self.total)} for {self.images} images at a time: {parts} ({size(self.per_image)} per image){free}"
        )


def estimate(prior: TrainablePrior, images: int) -> MemoryEstimate:
    """What training `prior` with so many images at a time takes; see `DiffusionEBMPrior.estimate`."""
    check_count(images, "batch_size")
    one, two = (kept_by_a_step(prior, n) for n in (1, 2))
    own = sum(tensor.nbytes for tensor in prior.state_dict().values())
    learned = sum(parameter.nbytes for parameter in prior.parameters())
    backbone = sum(
        tensor.nbytes for module in backbone_modules(prior.backbone) for tensor in module.state_dict().values()
    )
    free = torch.cuda.mem_get_info(prior.device)[0] if prior.device.type == "cuda" else None
    return MemoryEstimate(images, backbone + 4 * own, 3 * learned, max(0, 2 * one - two), max(0, two - one), free)


def kept_by_a_step(prior: TrainablePrior, n: int) -> int:
    """The most bytes that a training step of `n` images keeps for backward passes at any moment, weights left out."""
    trainee = copy.deepcopy(prior).train()
    try:
        weights = [
            *trainee.state_dict().values(),
            *(x for module in backbone_modules(prior.backbone) for x in module.state_dict().values()),
        ]
        kept = Kept({tensor.untyped_storage().data_ptr() for tensor in weights})
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(n, prior.dim, generator=generator, dtype=prior.dtype).to(prior.device)
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda held: held.tensor):
            trainee.batch_loss(u, None, generator).total.sum().backward()
        return kept.most
    finally:
        trainee.release()


class Held:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Counts the bytes of tensors that autograd keeps, those of one storage once.

    Args:
        apart: addresses of storages that are not counted.

    Attributes:
        most: the most that was kept at any moment.
    """

    def __init__(self, apart: set[int]) -> None:
        self.apart, self.now, self.most = apart, 0, 0
        self.users: Counter[int] = Counter()

    def keep(self, tensor: Tensor) -> Held:
        """What autograd keeps instead of `tensor`."""
        held, storage = Held(tensor), tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address not in self.apart:
            self.users[address] += 1
            self.now += nbytes if self.users[address] == 1 else 0
            self.most = max(self.most, self.now)
            weakref.finalize(held, self.let_go, address, nbytes)
        return held

    def let_go(self, address: int, nbytes: int) -> None:
        """One user less of a storage."""
        self.users[address] -= 1
        self.now -= nbytes if self.users[address] == 0 else 0


def size(count: int) -> str:
    """Bytes for people."""
    power = max(0, (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
