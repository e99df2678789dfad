"""How much memory training takes: weights are counted, and what autograd keeps is measured on one image and on two.

    bytes = weights + optimiser + activations,      activations(n) = a(1) + (n - 1) (a(2) - a(1))

with a(n) the most that one training step of n images keeps for a backward pass at any moment: a gradient of its chain,
or the loss. It leaves out what operations need for a moment, the encoder (`encode_batch`) and the allocator's own
share: leave a third of the memory free.
"""

import copy
import weakref
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backbone.lock import backbone_modules
from ..backbone.validation import check_count
from .config import TrainingConfig
from .objective import Objective
from .trainable import TrainablePrior


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes in one process.

    Attributes:
        images: images whose chains and gradients are computed at a time: the batch, or `micro_batch`.
        weights: the backbone, and four copies of the energies: the average, the trainee, and two states to go back to.
        optimizer: gradients and Adam's moments.
        fixed: activations that do not depend on the number of images.
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
        free = "" if self.free is None else f"; {in_bytes(self.free)} are free"
        return (
            f"{in_bytes(self.total)} for {self.images} images at a time: {in_bytes(self.weights)} of weights, "
            f"{in_bytes(self.optimizer)} of the optimiser, {in_bytes(self.activations)} of activations "
            f"({in_bytes(self.per_image)} per image){free}"
        )


def estimate_memory(prior: TrainablePrior, images: int) -> MemoryEstimate:
    """What training `prior` with so many images at a time takes; see `LearnedPrior.estimate`."""
    images = check_count(images, "batch_size")
    one = peak_activations(prior, 1)
    two = peak_activations(prior, 2)
    energies = sum(tensor.nbytes for tensor in prior.state_dict().values())
    parameters = sum(parameter.nbytes for parameter in prior.parameters())
    return MemoryEstimate(
        images,
        weights=sum(tensor.nbytes for tensor in backbone_tensors(prior)) + 4 * energies,
        optimizer=3 * parameters,
        fixed=max(0, 2 * one - two),
        per_image=max(0, two - one),
        free=torch.cuda.mem_get_info(prior.device)[0] if prior.device.type == "cuda" else None,
    )


def backbone_tensors(prior: TrainablePrior) -> list[Tensor]:
    """Parameters and buffers of the backbone."""
    return [tensor for module in backbone_modules(prior.backbone) for tensor in module.state_dict().values()]


def peak_activations(prior: TrainablePrior, n: int) -> int:
    """The most bytes that a training step of `n` images keeps for backward passes at any moment, weights left out."""
    trainee = copy.deepcopy(prior).train()
    trainee.execution = replace(trainee.execution, graph=False)  # whose memory autograd does not keep
    try:
        weights = [*trainee.state_dict().values(), *backbone_tensors(prior)]
        saved = SavedBytes({tensor.untyped_storage().data_ptr() for tensor in weights})
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(n, prior.dim, generator=generator, device="cpu", dtype=prior.dtype).to(prior.device)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            trainee.batch_loss(u, None, generator, objective=heaviest_objective(prior)).total.sum().backward()
        return saved.peak
    finally:
        trainee.release()


def heaviest_objective(prior: TrainablePrior) -> Objective | None:
    """What the last steps of training minimise by default, which keeps the most."""
    config = TrainingConfig()
    return prior.objective(config, config.iterations - 1)


class SavedTensor:
    """A tensor that autograd keeps; when it lets go of it, this object is collected."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Counts the bytes of tensors that autograd keeps, those of one storage once.

    Args:
        uncounted: addresses of storages that are not counted.

    Attributes:
        peak: the most that was kept at any moment.
    """

    def __init__(self, uncounted: set[int]) -> None:
        self.uncounted = uncounted
        self.now = 0
        self.peak = 0
        # Tensors that autograd keeps, by the address of their storage.
        self.users: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> SavedTensor:
        """What autograd is to keep instead of `tensor`."""
        held, storage = SavedTensor(tensor), tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address not in self.uncounted:
            self.users[address] += 1
            self.now += nbytes if self.users[address] == 1 else 0
            self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._release, address, nbytes)
        return held

    def _release(self, address: int, nbytes: int) -> None:
        self.users[address] -= 1
        self.now -= nbytes if self.users[address] == 0 else 0


def in_bytes(count: int) -> str:
    """A number of bytes with its unit, as 1.5 MiB."""
    power = max(0, (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
