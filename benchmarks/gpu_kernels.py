"""The fused kernel's part of `gpu_check.py`: its bits, and its bandwidth."""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_models import synchronize
from torch import Tensor

from hvae_ebm_prior.chains.kernels import choose_backend, drawn_noise, langevin_update

Rows = list[tuple[str, str]]


def inputs(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + dim)
    u, u_next, gradient = (torch.randn(n, dim, generator=g) for _ in range(3))
    return u, u_next, gradient.to(dtype), torch.rand(n, 4, generator=g) + 0.1


def check_bits(args: argparse.Namespace) -> Rows:
    """The kernel against its twin on the CPU."""
    device, backend = args.device, choose_backend("auto" if args.device.type == "cuda" else "naive", args.device)
    tolerance = 2e-7 if torch.version.hip else 0.0
    shapes = [(1, 1), (2, 1023)] if args.quick else [(1, 1), (3, 3), (2, 1023), (5, 8192), (3, 8193), (1, 4_500_000)]
    cases = 0
    for (n, dim), dtype, previous, held, limit in itertools.product(
        shapes, (torch.float32, torch.bfloat16), (False, True), (False, True), (float("inf"), 1.0)
    ):
        tensors = inputs(n, dim, dtype)
        part = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
        settings: dict[str, Any] = {"key": torch.tensor([123456789, 7]), "step": torch.tensor([3])}
        settings |= {"held": torch.arange(dim) % 5 == 0} if held else {}
        there = {name: value.to(device) for name, value in settings.items()}
        options = {"ahead": 2, "stream": 1, "previous": previous, "drift_limit": limit}
        renewed = tuple(part) if previous else None
        expected = langevin_update(*tensors, **settings, **options, renewed=renewed, backend="naive")
        actual = langevin_update(
            *(x.to(device) for x in tensors),
            **there,
            **options,
            renewed=renewed and tuple(x.to(device) for x in renewed),
            backend=backend,
        ).cpu()
        error = ((actual - expected).abs() / expected.abs().clamp(min=1)).max().item()
        noise = [drawn_noise(settings["key"], settings["step"], 1, 2, n, dim, "naive")]
        noise.append(drawn_noise(there["key"], there["step"], 1, 2, n, dim, backend).cpu())
        error = max(error, (noise[0] - noise[1]).abs().max().item())
        if not error <= tolerance:
            raise AssertionError(f"off by {error:.1e}: {(n, dim)}, {dtype}, previous={previous}, held={held}, {limit}")
        cases += 1
    return [(f"{backend} = twin on the CPU", f"{cases} cases")]


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 20, rounds: int = 7) -> float:
    """Median time of `function` on the device, while the host runs ahead."""
    times = []
    for _ in range(rounds + 2):
        synchronize(device)
        if device.type != "cuda":
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # some ten milliseconds, in which the host fills the queue
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return statistics.median(times[2:])


def bandwidth(args: argparse.Namespace) -> Rows:
    """The kernel's bytes per second over those of a copy that reads and writes as many."""
    rows, device = [], args.device
    sizes = {"no limit": (64, 2**18, float("inf")), "limit, D = 153,600": (100, 153_600, 1.0)}
    sizes |= {"limit, D = 8,192": (2048, 8192, 1.0), "limit, D = 1,792": (8192, 1792, 1.0)}
    key, step = torch.tensor([1, 0], device=device), torch.tensor([0], device=device)
    for name, (n, dim, limit) in sizes.items():
        n, dim = (2, 64) if args.quick else (n, dim)
        u, u_next, gradient, coefficients = (x.to(device) for x in inputs(n, dim, torch.float32))
        settings = {"key": key, "step": step, "drift_limit": limit, "out": torch.empty_like(u)}
        settings["backend"] = choose_backend("auto" if device.type == "cuda" else "naive", device)
        update = milliseconds(partial(langevin_update, u, u_next, gradient, coefficients, **settings), device)
        # Three inputs and an output: twice what a copy of u reads and writes.
        big, other = (torch.empty(2 * u.numel(), device=device) for _ in range(2))
        copy = milliseconds(partial(other.copy_, big), device)
        rows.append((f"share of a copy's bandwidth, {name}", f"{copy / update:.0%} ({update:.3f} ms)"))
    small = [x.to(device) for x in inputs(4, 64, torch.float32)]
    start = time.perf_counter()
    for _ in range(200):
        langevin_update(*small, key=key, step=step, backend=settings["backend"])
    synchronize(device)
    return [*rows, ("one small update, host and all", f"{5000 * (time.perf_counter() - start):.0f} us")]
