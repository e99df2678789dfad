"""Random numbers by sample, so that a sample's noise does not depend on the batch or chunk it is computed in.

`SampleStreams` draws from one generator of PyTorch per sample, which is fast on a CPU. `CounterStreams` computes noise
from counters, which is fast on a GPU: there the fused kernel draws it where it is used. Both offer `normal`, `levels`,
and `move`, a Langevin step with noise of its own.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels import choose_backend, langevin_update
from .kernels.noise import philox_levels, philox_normal

# Held by a thread that torch's global generators work for.
GLOBAL_GENERATORS = threading.RLock()


def draw_key(generator: torch.Generator | None) -> int:
    """One random integer of `generator`, or of torch's default generator, from which all noise of a call follows."""
    device = "cpu" if generator is None else generator.device
    with contextlib.nullcontext() if generator else GLOBAL_GENERATORS:
        return int(torch.randint(2**62, (), generator=generator, device=device))


def draw_seeds(n: int, generator: torch.Generator | None) -> list[int]:
    """`n` seeds of `generator`, or of torch's default generator where it is None; the first m do not depend on n."""
    return sample_seeds(draw_key(generator), range(n))


def sample_seeds(key: int, samples: range) -> list[int]:
    """Seeds of the given samples; they do not depend on which others there are."""
    seeds = torch.randint(2**62, (samples.stop,), generator=torch.Generator().manual_seed(key), device="cpu")
    return seeds[samples.start :].tolist()


def open_streams(
    key: int, samples: range, device: torch.device, dtype: torch.dtype, backend: str = "auto"
) -> "Streams":
    """The noise of some samples of a call.

    Args:
        key: from `draw_key`.
        samples: their numbers.
        device: where noise is drawn; the bits of PyTorch's generators differ between CPU and GPU, those of counters do
            not.
        dtype: dtype of the noise; counters make float32 alone, so others take generators unless another backend is
            asked for.
        backend: see `hvae_ebm_prior.chains.kernels`.

    Returns:
        The streams.

    Raises:
        ValueError: a backend that does not exist, or does not run here.
    """
    chosen = choose_backend(backend, device)
    if chosen == "torch" or (dtype != torch.float32 and backend == "auto"):
        return SampleStreams(sample_seeds(key, samples), device, dtype)
    return CounterStreams(key, samples, device, chosen)


class SampleStreams:
    """Noise from one generator of PyTorch per sample.

    Args:
        seeds: one seed per sample.
        device: where the noise is drawn; the bits differ between CPU and GPU.
        dtype: dtype of the noise.
    """

    def __init__(self, seeds: list[int], device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._last: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, dim: int) -> Tensor:
        """The next `dim` standard normal numbers of every stream, (N, dim)."""
        noise = torch.empty(len(self), dim, device=self.device, dtype=self.dtype)
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def levels(self, steps: int) -> Tensor:
        """One level uniform over 0..steps-1 of every stream, (N,) long."""
        draws = [torch.randint(steps, (), generator=generator, device=self.device) for generator in self._generators]
        return torch.stack(draws)

    def begin(self) -> None:
        """A new chain begins: no step was before its first one."""
        self._last.clear()

    def move(
        self,
        u: Tensor,
        u_next: Tensor,
        gradient: Tensor,
        coefficients: Tensor,
        *,
        part: int,
        previous: bool,
        held: Tensor | None,
    ) -> Tensor:
        """One Langevin step of a part of the dimensions; `previous` adds the noise of that part's step before."""
        noise = self.normal(u.shape[1])
        if previous:
            before = self._last[part] if part in self._last else self.normal(u.shape[1])
            self._last[part] = noise
            noise = noise + before
        return langevin_update(u, u_next, gradient, coefficients, noise=noise, held=held)


class CounterStreams:
    """Noise from counters (Philox), the same bits on every device.

    Args:
        key: the key of all samples.
        samples: their numbers.
        device: where the noise is computed.
        backend: "naive" or "triton".
    """

    dtype = torch.float32
    # Independent noises of one step: those of two parts of the dimensions, and what is drawn by itself.
    PARTS = 2

    def __init__(self, key: int, samples: range, device: torch.device, backend: str) -> None:
        self.device = device
        self.backend = backend
        self._count = len(samples)
        # On the device, where kernels read them, and where a captured graph counts steps on.
        self.key = torch.tensor([key, samples.start], device=device, dtype=torch.long)
        self.steps = torch.zeros(self.PARTS + 1, 1, dtype=torch.long, device=device)

    def __len__(self) -> int:
        return self._count

    def normal(self, dim: int) -> Tensor:
        """The next `dim` standard normal numbers of every sample, (N, dim)."""
        if self.backend == "triton":
            zeros = torch.zeros(len(self), dim, device=self.device, dtype=self.dtype)
            only_noise = torch.tensor([0.0, 0.0, 0.0, 1.0], device=self.device, dtype=self.dtype).repeat(len(self), 1)
            return self.move(zeros, zeros, zeros, only_noise, part=self.PARTS, previous=False, held=None)
        return philox_normal(self.key, self._next(self.PARTS), self.PARTS, len(self), dim)

    def levels(self, steps: int) -> Tensor:
        """One level uniform over 0..steps-1 of every sample, (N,) long."""
        return philox_levels(self.key, self._next(self.PARTS), self.PARTS, len(self), steps)

    def begin(self) -> None:
        """A new chain begins: the step before its first one was never used."""
        self.steps += 1

    def move(
        self,
        u: Tensor,
        u_next: Tensor,
        gradient: Tensor,
        coefficients: Tensor,
        *,
        part: int,
        previous: bool,
        held: Tensor | None,
    ) -> Tensor:
        """One Langevin step of a part of the dimensions; `previous` adds the noise of that part's step before."""
        step = self._next(part)
        return langevin_update(
            u,
            u_next,
            gradient,
            coefficients,
            key=self.key,
            step=step,
            stream=part,
            previous=previous,
            held=held,
            backend=self.backend,
        )

    def _next(self, part: int) -> Tensor:
        return self.steps[part].add_(1)


Streams = SampleStreams | CounterStreams


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global generators of the CPU and of a CUDA or XPU `device` start from `seed`; outside, they are as
    they were. One thread is inside at a time; others wait.
    """
    accelerators = [device] if device.type in ("cuda", "xpu") else []
    with (
        GLOBAL_GENERATORS,
        torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"),
    ):
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            with torch.get_device_module(accelerator).device(accelerator):
                torch.get_device_module(accelerator).manual_seed(seed)
        yield


@contextlib.contextmanager
def drawing_by(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Inside, what draws from torch's global generators, as a backbone may, follows from one number of `generator`;
    where that is None, they are as they are. One thread is inside at a time.
    """
    with GLOBAL_GENERATORS if generator is None else seeded(draw_seeds(1, generator)[0], device):
        yield
