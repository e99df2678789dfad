"""Random numbers by sample, so that a sample's noise does not depend on the batch or chunk it is computed in.

`SampleStreams` draws from one generator of PyTorch per sample, which is fast on a CPU. `CounterStreams` computes noise
from counters, which is fast on a GPU: there the fused kernel draws it where it is used. Both offer `normal`, `levels`,
and `move`, a Langevin step with noise of its own.
"""

import contextlib
import copy
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels import choose_backend, drawn_noise, langevin_update
from .kernels.noise import philox_levels

# Held by a thread that torch's global generators work for.
GLOBAL_GENERATORS = threading.RLock()


def draw_key(generator: torch.Generator | None) -> int:
    """One random integer of `generator`, or of torch's default generator, from which all noise of a call follows."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            "generator: expected a torch.Generator, as torch.Generator().manual_seed(0), got "
            f"{type(generator).__name__}"
        )
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
        drift_limit: float = math.inf,
        renewed: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One Langevin step of a part of the dimensions; `previous` adds the noise of that part's step before, and the
        other arguments are those of `langevin_update`.
        """
        noise = self.normal(u.shape[1])
        if previous:
            before = self._last[part] if part in self._last else self.normal(u.shape[1])
            self._last[part] = noise
            noise = noise + before
        return langevin_update(
            u,
            u_next,
            gradient,
            coefficients,
            noise=noise,
            held=held,
            drift_limit=drift_limit,
            renewed=renewed,
            out=out,
        )


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
        self._numbers = torch.tensor([key, samples.start], device="cpu", dtype=torch.long)
        self._taken = [0] * (self.PARTS + 1)
        self._read(self.position(from_start=True))

    def __len__(self) -> int:
        return self._count

    def normal(self, dim: int) -> Tensor:
        """The next `dim` standard normal numbers of every sample, (N, dim)."""
        part = self.PARTS
        return drawn_noise(self.key, self.steps[part], self._next(part), part, len(self), dim, self.backend)

    def levels(self, steps: int) -> Tensor:
        """One level uniform over 0..steps-1 of every sample, (N,) long."""
        # On the CPU, as on a GPU so small a computation is many launches.
        step = torch.tensor([self._next(self.PARTS)], device="cpu", dtype=torch.long)
        return philox_levels(self._numbers, step, self.PARTS, len(self), steps).to(self.device)

    def begin(self) -> None:
        """A new chain begins: the step before its first one was never used."""
        self._taken = [taken + 1 for taken in self._taken]

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
        drift_limit: float = math.inf,
        renewed: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One Langevin step of a part of the dimensions; `previous` adds the noise of that part's step before, and the
        other arguments are those of `langevin_update`.
        """
        return langevin_update(
            u,
            u_next,
            gradient,
            coefficients,
            key=self.key,
            step=self.steps[part],
            ahead=self._next(part),
            stream=part,
            previous=previous,
            held=held,
            drift_limit=drift_limit,
            renewed=renewed,
            out=out,
            backend=self.backend,
        )

    def position(self, from_start: bool = False) -> Tensor:
        """Key, first sample, and the steps of every part that were taken so far, int64 (2 + PARTS + 1,) on the
        device: what noise to come depends on.
        """
        taken = [0] * len(self._taken) if from_start else self._taken
        return torch.cat((self._numbers, torch.tensor(taken, device="cpu", dtype=torch.long))).to(self.device)

    def at(self, position: Tensor) -> "CounterStreams":
        """The same noise from a `position` on, which is read where steps are computed: also at every replay of a
        graph.
        """
        new = copy.copy(self)
        new._taken = [0] * len(self._taken)
        new._read(position)
        return new

    def skip(self, part: int, steps: int) -> None:
        """Leave out so many steps, as others have taken them."""
        self._taken[part] += steps

    def _read(self, position: Tensor) -> None:
        self.key, self.steps = position[:2], position[2:, None]

    def _next(self, part: int) -> int:
        self._taken[part] += 1
        return self._taken[part]


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
