"""One command for a machine with a GPU: is the fused kernel right there, and how fast is it?

    python benchmarks/gpu_check.py

checks, and fails if one does not hold: the kernel's steps are those of its twin on the CPU, bit for bit on NVIDIA and
to one unit in the last place on AMD, for all options; chains replayed from a CUDA graph are the eager ones. Then it
prints a Markdown table: the kernel's share of the bandwidth of a copy of as many bytes, rho (chain time over that of
its bare gradients) with and without a graph, and the device.
"""

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from quickstart import make_prior

from hvae_ebm_prior import ExecutionConfig
from hvae_ebm_prior.chains.autograd import walk_gradient
from hvae_ebm_prior.chains.kernels import langevin_update
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.density.conditional import draw_conditional


def milliseconds(function: Callable[[], object], rounds: int = 30) -> float:
    """Median time of `function` on the GPU."""
    times = []
    for i in range(rounds + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def inputs(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + dim)
    u, u_next, gradient = (torch.randn(n, dim, generator=g) for _ in range(3))
    return u, u_next, gradient.to(dtype), torch.rand(n, 4, generator=g)


def check_bits(device: torch.device) -> int:
    """Compare the kernel with its twin; returns the number of cases."""
    cases = 0
    tolerance = 2e-7 if torch.version.hip else 0.0
    shapes = [(1, 1), (3, 3), (2, 1023), (5, 4096), (1, 4_500_000)]
    for (n, dim), dtype, previous in itertools.product(
        shapes, (torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        tensors, held = inputs(n, dim, dtype), torch.arange(dim) % 5 == 0
        for extra in ({}, {"held": held}):
            settings = {
                "key": torch.tensor([123456789, 7]),
                "step": torch.tensor([3]),
                "stream": 1,
                "previous": previous,
                **extra,
            }
            on_gpu = {
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in settings.items()
            }
            expected = langevin_update(*tensors, **settings, backend="naive")
            actual = langevin_update(*(x.to(device) for x in tensors), **on_gpu, backend="triton").cpu()
            error = ((actual - expected).abs() / expected.abs().clamp(min=1)).max().item()
            if not error <= tolerance:
                raise SystemExit(
                    f"the kernel differs from its twin by {error:.1e} for {(n, dim)}, {dtype}, previous={previous}, "
                    f"{list(extra)}"
                )
            cases += 1
    return cases


def bandwidth_share(device: torch.device) -> float:
    """The kernel's bytes per second over those of a copy, at 64 x 2^18 elements."""
    u, u_next, gradient, coefficients = (x.to(device) for x in inputs(64, 2**18, torch.float32))
    key, step = torch.tensor([1, 0], device=device), torch.tensor([0], device=device)
    update = milliseconds(
        lambda: langevin_update(u, u_next, gradient, coefficients, key=key, step=step, backend="triton")
    )
    # A copy reads and writes: as many bytes as three inputs and one output.
    big = torch.empty(2 * u.numel(), device=device)
    copy = milliseconds(lambda: big.clone())
    return copy / update


def chains(device: torch.device) -> tuple[float, float]:
    """rho of the quickstart's prior, eager and from a graph, whose states must be equal."""
    prior = make_prior().to(device)
    prior.backbone.model.to(device)
    g = torch.Generator().manual_seed(0)
    for network in prior.energies:
        torch.nn.init.normal_(network.readout.weight, std=0.1)
    n = 64
    u_next, t = torch.randn(n, prior.dim, generator=g).to(device), (torch.arange(n) % 3).to(device)
    prior.langevin = dataclasses.replace(prior.langevin, top_steps=1, steps=20)
    terms = prior.terms_at(t)

    def run(graph: bool) -> Tensor:
        prior.execution = ExecutionConfig(graph=graph)
        return draw_conditional(prior, u_next, t, open_streams(1, range(n), device, torch.float32))

    if not torch.equal(run(False), run(True)):
        raise SystemExit("a chain from a graph differs from the eager one")

    def total(u: Tensor, t: Tensor) -> Tensor:
        return terms(prior.transform.to_latents(u), t)[0].sum()

    def gradients() -> None:
        for _ in range(20):
            walk_gradient(total, u_next, t)

    bare = milliseconds(gradients, rounds=10)
    return milliseconds(lambda: run(False), rounds=10) / bare, milliseconds(lambda: run(True), rounds=10) / bare


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA or ROCm GPU")
    device = torch.device("cuda")
    torch.backends.cudnn.deterministic = True
    cases = check_bits(device)
    eager, graph = chains(device)
    print("| device | torch | kernel = twin | share of copy bandwidth | rho, eager | rho, graph |")
    print("|---" * 6 + "|")
    name = torch.cuda.get_device_name()
    print(
        f"| {name} | {torch.__version__} | {cases} cases | {bandwidth_share(device):.0%} | {eager:.2f} | {graph:.2f} |"
    )


if __name__ == "__main__":
    main()
