"""One random stream per sample, so that a sample's noise does not depend on the batch or chunk it is computed in."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def draw_seeds(n: int, generator: torch.Generator | None) -> list[int]:
    """`n` seeds from `generator`, or from torch's default generator where that is None; the first m do not depend on n."""
    first = torch.randint(2**62, (), generator=generator, device=generator.device if generator is not None else None)
    return torch.randint(2**62, (n,), generator=torch.Generator().manual_seed(int(first))).tolist()


class SampleStreams:
    """Standard normal noise, row i from sample i's own stream.

    Args:
        seeds: one seed per sample.
        device: where the noise is drawn; the bits differ between CPU and GPU.
        dtype: dtype of the noise.
    """

    def __init__(self, seeds: list[int], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, dim: int) -> Tensor:
        """The next `dim` numbers of every stream, (N, dim)."""
        noise = torch.empty(len(self), dim, device=self.device, dtype=self.dtype)
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def levels(self, steps: int) -> Tensor:
        """One level uniform over 0..steps-1 of every stream, (N,) long."""
        draws = [torch.randint(steps, (), generator=generator, device=self.device) for generator in self._generators]
        return torch.stack(draws)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global generators of the CPU and of a CUDA or XPU `device` start from `seed`; outside, they are as they were."""
    accelerators = [device] if device.type in ("cuda", "xpu") else []
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            with torch.get_device_module(accelerator).device(accelerator):
                torch.get_device_module(accelerator).manual_seed(seed)
        yield
