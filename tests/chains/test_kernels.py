"""The update and its noise: known answers, moments, and the fused kernel (in Triton's interpreter) against its twin,
bit for bit.
"""

import importlib.metadata
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seed
from scipy import stats

from hvae_ebm_prior.chains import kernels
from hvae_ebm_prior.chains.kernels import choose_backend, langevin_update
from hvae_ebm_prior.chains.kernels.naive import sum_of_squares
from hvae_ebm_prior.chains.kernels.noise import cos_sin, log, philox, philox_levels, philox_normal

TRITON = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")


def step(value=0):
    return torch.tensor([value])


def inputs(n, dim, g=None, dtype=torch.float32):
    g = g or seed(0)
    u, u_next, gradient = (torch.randn(n, dim, generator=g) for _ in range(3))
    return u, u_next.to(dtype), gradient.to(dtype), torch.rand(n, 4, generator=g)


# Random123's kat_vectors for philox4x32, 10 rounds: counters, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counters", "key", "words"), KNOWN)
def test_philox_known_answers(counters, key, words):
    packed = key[0] | (key[1] << 32)
    as_int64 = torch.tensor(packed - (1 << 64) if packed >= 1 << 63 else packed)
    assert tuple(int(word) for word in philox(as_int64, tuple(torch.tensor([c]) for c in counters))) == words


def test_elementary_functions_are_accurate():
    """On all 24-bit uniforms near both ends and a grid between, against double precision."""
    k = torch.cat((torch.arange(4096), torch.arange(0, 2**24, 37), torch.arange(2**24 - 4096, 2**24)))
    x = k.float() * 2.0**-24 + 2.0**-25
    exact = x.double().log()
    assert ((log(x).double() - exact).abs() <= 2e-7 * exact.abs().clamp(min=0.5)).all()
    cosine, sine = cos_sin(k.float() * 2.0**-24)
    angle = 2 * math.pi * (k.double() * 2.0**-24)
    assert (cosine.double() - angle.cos()).abs().max() < 1.5e-7
    assert (sine.double() - angle.sin()).abs().max() < 1.5e-7


def test_noise_is_standard_normal():
    """Four million draws: Kolmogorov-Smirnov, and four moments within five standard errors."""
    x = philox_normal(torch.tensor([11, 0]), step(), 0, 400, 10_000).double().flatten()
    n = x.numel()
    assert stats.kstest(x[:1_000_000].numpy(), "norm").pvalue > 1e-3
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert x.abs().max() < 5.9


def test_noise_is_uncorrelated_along_every_counter():
    """Neighbours in element (within a group and across), sample, step and stream: correlation within five standard
    errors.
    """
    key, n, dim = torch.tensor([5, 0]), 64, 4096
    x = philox_normal(key, step(3), 0, n, dim)
    others = [
        (x[:, :-1], x[:, 1:]),
        (x[:, :-4], x[:, 4:]),
        (x[:-1], x[1:]),
        (x, philox_normal(key, step(4), 0, n, dim)),
        (x, philox_normal(key, step(3), 1, n, dim)),
        (x, philox_normal(torch.tensor([6, 0]), step(3), 0, n, dim)),
    ]
    for a, b in others:
        for power in (1, 2):
            first, second = a**power - (power - 1), b**power - (power - 1)
            assert abs((first * second).mean().item()) < 5 * power / math.sqrt(a.numel())


def test_no_number_is_used_twice():
    """Over samples, steps, streams and elements of one key all four-word groups differ."""
    words = [
        torch.stack(
            philox(torch.tensor(9), tuple(torch.as_tensor(c) for c in (group, sample, number, stream))), -1
        ).flatten(0, -2)
        for number in range(3)
        for stream in range(3)
        for sample in [torch.arange(20)[:, None]]
        for group in [torch.arange(500)[None].expand(20, -1)]
    ]
    rows = torch.cat(words).numpy()
    assert len(np.unique(rows, axis=0)) == len(rows) == 3 * 3 * 20 * 500


def test_noise_depends_on_the_sample_not_on_its_batch():
    """A shard that starts at sample 3 has the bits of rows 3.. of the whole, and more elements do not change the first
    ones.
    """
    whole = philox_normal(torch.tensor([1, 0]), step(7), 2, 8, 100)
    assert torch.equal(philox_normal(torch.tensor([1, 3]), step(7), 2, 5, 100), whole[3:])
    assert torch.equal(philox_normal(torch.tensor([1, 0]), step(7), 2, 8, 33), whole[:, :33])


def test_levels_are_uniform():
    levels = philox_levels(torch.tensor([2, 0]), step(), 0, 30_000, 3)
    counts = torch.bincount(levels, minlength=3)
    assert counts.numel() == 3
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_update_is_the_affine_map():
    """Both paths against float64 arithmetic; the second with the noise it draws."""
    u, u_next, gradient, coefficients = inputs(5, 37)
    key = torch.tensor([3, 0])
    a, b, c, d = coefficients.double().unsqueeze(2).unbind(1)
    for noise, given in ((torch.randn(5, 37, generator=seed(1)), True), (philox_normal(key, step(2), 1, 5, 37), False)):
        arguments = {"noise": noise} if given else {"key": key, "step": 2, "stream": 1, "backend": "naive"}
        expected = a * u.double() + b * u_next.double() + c * gradient.double() + d * noise.double()
        torch.testing.assert_close(
            langevin_update(u, u_next, gradient, coefficients, **arguments).double(), expected, atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dim", [7, 20_000])
def test_limited_drift_is_as_long_as_the_limit(given, dim):
    """Against double precision, for a limit that binds for one sample and not for the other, with a renewed part."""
    u, u_next, gradient, coefficients = inputs(2, dim)
    coefficients += 0.1
    gradient[0] *= 100
    now, before = torch.randn(2, 2, dim, generator=seed(1))
    noise = {"noise": torch.randn(2, dim, generator=seed(2))} if given else {"key": torch.tensor([3, 0])}
    settings = {"backend": "naive", **noise}
    g = gradient.double() + now.double() - before.double()
    drift = coefficients[:, 2:3].double() * g
    limit = (drift.norm(dim=1) / coefficients[:, 3] / dim**0.25).mean().item()
    shorter = (limit * dim**0.25 * coefficients[:, 3].double() / drift.norm(dim=1)).clamp(max=1)
    assert shorter[0] < 0.6
    assert shorter[1] == 1
    still = langevin_update(u, u_next, torch.zeros(2, dim), coefficients, **settings)
    out = torch.zeros(2, dim + 3)[:, 3:]
    for place in (None, out):
        moved = langevin_update(
            u, u_next, gradient, coefficients, drift_limit=limit, renewed=(now, before), out=place, **settings
        )
        expected = still.double() + shorter[:, None] * drift
        torch.testing.assert_close(moved.double(), expected, atol=1e-4, rtol=1e-5)
    assert moved.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dim", [7, 1500, 8192, 9000])
def test_sums_have_one_order(dim):
    """By hand, in single precision; where another order would give other bits."""
    x = torch.randn(2, dim, generator=seed(0))
    squares = (x * x).numpy()
    expected = []
    for row in squares:
        sections = []
        for first in range(0, dim, 8192):
            lanes = [np.float32(0)] * 1024
            for i, value in enumerate(row[first : first + 8192]):
                lanes[i % 1024] = lanes[i % 1024] + value
            while len(lanes) > 1:
                lanes = [a + b for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
            sections += lanes
        expected.append(sum(sections))
    found = sum_of_squares(x)
    assert found.tolist() == [float(value) for value in expected]
    assert dim == 7 or found.tolist() != squares.cumsum(1)[:, -1].tolist()


@pytest.mark.parametrize("given", [True, False])
def test_held_elements_and_a_gradient_that_is_not_finite(given):
    u, u_next, gradient, coefficients = inputs(4, 50)
    gradient[1, 7], gradient[2, 3] = float("nan"), float("inf")
    held = torch.zeros(50, dtype=torch.bool)
    held[10:20] = True
    arguments = (
        {"noise": torch.randn(4, 50, generator=seed(1))} if given else {"key": torch.tensor([3, 0]), "backend": "naive"}
    )
    clean = langevin_update(u, u_next, gradient.nan_to_num(0, 0), coefficients, **arguments)
    new = langevin_update(u, u_next, gradient, coefficients, held=held, **arguments)
    assert torch.equal(new[:, 10:20], u[:, 10:20])
    # What is not finite stays where it is.
    assert not torch.isfinite(new[1, 7])
    assert not torch.isfinite(new[2, 3])
    untouched = torch.ones_like(u, dtype=torch.bool)
    untouched[:, 10:20], untouched[1, 7], untouched[2, 3] = False, False, False
    assert torch.equal(new[untouched], clean[untouched])


def test_wrong_arguments_are_explained():
    u, u_next, gradient, coefficients = inputs(2, 8)
    key = torch.tensor([1, 0])
    for arguments, changed, error, message in (
        ({}, {}, ValueError, "either noise or a key"),
        ({"key": key, "noise": u}, {}, ValueError, "either noise or a key"),
        ({"key": key}, {"u": torch.empty(0, 8)}, ValueError, r"non-empty \(N, D\), got \(0, 8\)"),
        ({"key": key}, {"u": torch.empty(2, 0)}, ValueError, "non-empty"),
        ({"key": key}, {"gradient": gradient[:, :4]}, ValueError, r"gradient: expected shape \(2, 8\)"),
        ({"key": key.float()}, {}, TypeError, "int64 key"),
        ({"key": key}, {"u": u.double()}, TypeError, "float32 u"),
        ({"key": key, "held": torch.ones(8)}, {}, TypeError, "bool mask"),
        ({"noise": u, "previous": True}, {}, ValueError, "add the noise of the step before"),
        ({"key": key, "renewed": (u, u[:, :4])}, {}, ValueError, r"renewed\[1\]: expected shape \(2, 8\)"),
        ({"key": key, "out": u.double()}, {}, ValueError, "out: expected torch.float32"),
        ({"key": key, "backend": "cuda"}, {}, ValueError, "one of auto, torch, naive, triton, got 'cuda'"),
    ):
        tensors = {"u": u, "u_next": u_next, "gradient": gradient, "coefficients": coefficients} | changed
        with pytest.raises(error, match=message):
            langevin_update(**tensors, **arguments)


def test_backend_is_chosen_and_overridden(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("HVAE_EBM_PRIOR_BACKEND", raising=False)
    assert choose_backend("auto", cpu) == "torch"
    assert choose_backend("naive", cpu) == "naive"
    monkeypatch.setenv("HVAE_EBM_PRIOR_BACKEND", "naive")
    assert choose_backend("auto", cpu) == "naive"
    assert choose_backend("torch", cpu) == "torch"
    monkeypatch.setenv("HVAE_EBM_PRIOR_BACKEND", "fast")
    with pytest.raises(ValueError, match="HVAE_EBM_PRIOR_BACKEND: expected one of"):
        choose_backend("auto", cpu)
    with pytest.raises(ValueError, match="triton does not run on cpu here"):
        choose_backend("triton", cpu)


def test_a_gpu_without_triton_counts_its_noise_and_says_so_once(monkeypatch):
    monkeypatch.delenv("HVAE_EBM_PRIOR_BACKEND", raising=False)
    monkeypatch.setattr(kernels, "triton_runs_on", lambda kind: False)
    kernels.warn_of_missing_triton.cache_clear()
    gpu = torch.device("cuda")
    with pytest.warns(UserWarning, match=r"(?s)Triton is not installed.*two hundred.*Install triton"):
        assert choose_backend("auto", gpu) == "naive"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", gpu) == "naive"
        # What is asked for is taken without a word.
        assert choose_backend("torch", gpu) == "torch"
        assert choose_backend("auto", torch.device("mps")) == choose_backend("auto", torch.device("cpu")) == "torch"
    monkeypatch.setattr(kernels, "triton_runs_on", lambda kind: True)
    assert choose_backend("auto", gpu) == "triton"


def test_compile_sees_one_operator():
    """The whole update in one graph, with the same bits as without."""
    u, u_next, gradient, coefficients = inputs(3, 40)
    key = torch.tensor([1, 0])

    def update(u):
        return langevin_update(u, u_next, gradient, coefficients, key=key, step=torch.tensor([4]), backend="naive") * 2

    compiled = torch.compile(update, backend="eager", fullgraph=True)
    assert torch.equal(compiled(u), update(u))
    rest = (key, torch.tensor([4]), 0, 0, False, None, 2.0, torch.empty(3, 40), "naive")
    arguments = (u, u_next, gradient, None, None, coefficients, *rest)
    torch.library.opcheck(torch.ops.hvae_ebm_prior.drawn_update.default, arguments)
    torch.library.opcheck(torch.ops.hvae_ebm_prior.drawn_noise.default, (key, torch.tensor([4]), 1, 0, 3, 40, "naive"))


INTERPRETED = Path(__file__).parents[1] / "interpreted.py"


@TRITON
def test_fused_kernel_is_its_twin_bit_for_bit():
    """In a process of its own, as the interpreter is switched on before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(INTERPRETED)], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases are equal" in done.stdout


# Every variant for one of the targets, which take turns.
CHECK_SOME = """
import itertools
from hvae_ebm_prior.chains.kernels.aot_check import VARIANTS, check, linkable
for target, variant in zip(itertools.cycle(linkable()), VARIANTS):
    report = check(target, variant)
    print("| ok |" if not report.faults else report)
"""


@TRITON
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernel_compiles_for_gpus_that_are_not_here(every, tmp_path):
    """Registers, spills, widths of memory accesses, no fused multiply-adds: for sm_80, sm_90 and gfx942."""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    code = ["-m", "hvae_ebm_prior.chains.kernels.aot_check"] if every else ["-c", CHECK_SOME]
    done = subprocess.run([sys.executable, *code], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Before Triton 3.3 AMD's linker is ROCm's, which is not here.
    targets = 2 if "no AMD target" in done.stderr else 3
    assert done.stdout.count("| ok |") == (10 * targets if every else 10), done.stdout
    assert targets == 3 or importlib.metadata.version("triton") < "3.3"
