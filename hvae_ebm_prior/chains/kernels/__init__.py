"""One step of Langevin dynamics as one call, and which code computes it.

    backend    where                         noise
    torch      everywhere                    PyTorch's generators, one per sample
    naive      everywhere, in plain torch    Philox, a pure function of (key, sample, step, stream, element)
    triton     CUDA, ROCm; one launch        the same bits

"auto" takes torch on a CPU, where it is the fastest. On CUDA and ROCm it takes triton, and naive, with a warning, where
Triton is not installed: there, a generator per sample would be a launch per sample. The environment variable
HVAE_EBM_PRIOR_BACKEND overrides "auto".
"""

import functools
import importlib.util
import math
import os
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .naive import naive_update
from .noise import philox_normal

Backend = Literal["auto", "torch", "naive", "triton"]
VARIABLE = "HVAE_EBM_PRIOR_BACKEND"


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend that runs on `device`: "torch", "naive" or "triton".

    Args:
        backend: the one that is asked for; "auto" asks the environment variable first.
        device: where the states are.

    Returns:
        The backend.

    Raises:
        ValueError: an unknown backend, or triton where it cannot run.
    """
    source = "backend"
    if backend == "auto" and os.environ.get(VARIABLE):
        backend, source = os.environ[VARIABLE], VARIABLE
    if backend not in get_args(Backend):
        raise ValueError(f"{source}: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    runs = triton_runs_on(device.type)
    if backend == "triton" and not runs:
        raise ValueError(
            f"{source}: triton does not run on {device.type} here; install it beside a CUDA or ROCm build of PyTorch, "
            "or use auto"
        )
    if backend != "auto":
        return backend
    if device.type == "cuda" and not runs:
        warn_of_missing_triton()
        return "naive"
    return "triton" if runs and device.type != "cpu" else "torch"


@functools.cache
def warn_of_missing_triton() -> None:
    """Say once how steps on a GPU become one launch each."""
    warnings.warn(
        "Triton is not installed, so noise and steps on this GPU are computed in plain PyTorch, in some two hundred "
        "launches each instead of one; the bits are the same. Install triton (on Windows triton-windows), or ask for "
        f'what you want by ExecutionConfig(backend="naive") or {VARIABLE}=naive',
        stacklevel=2,
    )


@functools.cache
def triton_runs_on(kind: str) -> bool:
    """Whether Triton is installed and runs on a kind of device; on the CPU it does in its interpreter alone
    (TRITON_INTERPRET=1).
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return kind == "cuda" or (kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def langevin_update(
    u: Tensor,
    u_next: Tensor,
    gradient: Tensor,
    coefficients: Tensor,
    *,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    step: Tensor | int = 0,
    ahead: int = 0,
    stream: int = 0,
    previous: bool = False,
    held: Tensor | None = None,
    drift_limit: float = math.inf,
    renewed: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One Langevin step of every first-order integrator: A u + B u_next + C gradient + D xi, with xi ~ N(0, I).

    Give either `noise`, or a `key` from which it is drawn. Of a key, the noise of an element is a pure function of
    (key, sample, step, stream, element): it does not depend on the batch, on the device or on the backend.

    Args:
        u: states (N, D).
        u_next: states of the noisier level (N, D).
        gradient: grad_u F at `u` (N, D); with a key it may be in bfloat16 or float16, and arithmetic is in float32.
        coefficients: A, B, C, D of every sample (N, 4).
        noise: standard normal (N, D).
        key: int64 (2,) on the device of `u`: a Philox key, and the number of the first sample.
        step: number of the step, 0..2^32 - 1, an int or int64 (1,) on the device, where a captured graph reads it anew
            at every replay.
        ahead: added to the step, an int.
        stream: which of a step's independent noises, an int.
        previous: add the noise of the step before, as the Leimkuhler-Matthews integrator does.
        held: mask (D,) of elements to leave as they are.
        drift_limit: largest length of the drift C gradient, in units of D^(1/4) standard deviations of the step's
            noise; where it is longer, C is smaller for that sample.
        renewed: a part of the gradient as it is now, and as it is in `gradient`, each (N, D): the first takes the place
            of the second.
        out: where the new states go, (N, D) with contiguous rows and in the dtype of `u`, which it may be; None for new
            memory.
        backend: for a key, "naive" or "triton"; "auto" chooses, and "torch" is "naive" here.

    Returns:
        The new states (N, D), without gradient.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not match, there are no elements, neither or both of noise
            and key are given, or the backend does not run here.
    """
    now, before = renewed or (None, None)
    check(u, u_next, gradient, coefficients, noise, key, held, now, before, out)
    with torch.no_grad():
        if noise is not None:
            if previous:
                raise ValueError("previous: with `noise` given, add the noise of the step before to it")
            g = gradient if renewed is None else gradient + (renewed[0] - renewed[1])
            new = given_update(u, u_next, g, limit_drift(coefficients, g, drift_limit), noise, held)
            return new if out is None else out.copy_(new)
        if out is None:
            out = torch.empty_like(u, memory_format=torch.contiguous_format)
        torch.ops.hvae_ebm_prior.drawn_update(
            rows(u),
            rows(u_next),
            rows(gradient),
            None if now is None else rows(now),
            None if before is None else rows(before),
            coefficients.contiguous(),
            key,
            step if isinstance(step, Tensor) else torch.tensor([step], device=u.device, dtype=torch.long),
            ahead,
            stream,
            previous,
            held,
            drift_limit * u.shape[1] ** 0.25,
            out,
            backend,
        )
        return out


def limit_drift(coefficients: Tensor, gradient: Tensor, drift_limit: float) -> Tensor:
    """Coefficients of steps whose drift C grad F is no longer than the limit.

    Args:
        coefficients: A, B, C, D of every sample (N, 4).
        gradient: grad F (N, d).
        drift_limit: as of `langevin_update`.

    Returns:
        Coefficients (N, 4) with a smaller C where the drift was longer, so that the step stays one affine map.
    """
    if drift_limit == math.inf:
        return coefficients
    longest = drift_limit * gradient.shape[1] ** 0.25 * coefficients[:, 3] / coefficients[:, 2]
    shorter = (longest / torch.linalg.vector_norm(gradient, dim=1)).clamp(max=1)
    return torch.cat((coefficients[:, :2], (coefficients[:, 2] * shorter)[:, None], coefficients[:, 3:]), dim=1)


def given_update(
    u: Tensor,
    u_next: Tensor,
    gradient: Tensor,
    coefficients: Tensor,
    noise: Tensor,
    held: Tensor | None,
) -> Tensor:
    """The update with noise from outside, in the dtype of `u`."""
    a, b, c, d = coefficients.unsqueeze(2).unbind(1)
    new = (a * u).addcmul_(b, u_next).addcmul_(c, gradient.to(u.dtype)).addcmul_(d, noise)
    return new if held is None else torch.where(held, u, new)


# Defined by their schemas: the wrapper `torch.library.custom_op` takes several times as long as all else on the host.
OPERATORS = torch.library.Library("hvae_ebm_prior", "DEF")
OPERATORS.define(
    "drawn_update(Tensor u, Tensor u_next, Tensor gradient, Tensor? renewed, Tensor? replaced, Tensor coefficients, "
    "Tensor key, Tensor step, int ahead, int stream, bool previous, Tensor? held, float reach, Tensor(a!) out, "
    "str backend) -> ()"
)
OPERATORS.define("drawn_noise(Tensor key, Tensor step, int ahead, int stream, int n, int dim, str backend) -> Tensor")


@torch.library.impl(OPERATORS, "drawn_update", "CompositeExplicitAutograd")
def _drawn_update(
    u: Tensor,
    u_next: Tensor,
    gradient: Tensor,
    renewed: Tensor | None,
    replaced: Tensor | None,
    coefficients: Tensor,
    key: Tensor,
    step: Tensor,
    ahead: int,
    stream: int,
    previous: bool,
    held: Tensor | None,
    reach: float,
    out: Tensor,
    backend: str,
) -> None:
    """One node for torch.compile, which would not get through the twin's integer arithmetic in any useful time."""
    states = (u, u_next, gradient, renewed, replaced, coefficients, key, step)
    settings: tuple[Any, ...] = (ahead, stream, previous, held, reach, out)
    if choose_backend(backend, u.device) == "triton":
        from .fused import fused_update

        fused_update(*states, *settings)
    else:
        naive_update(*states, *settings)


@torch.library.register_fake("hvae_ebm_prior::drawn_update")  # type: ignore[untyped-decorator]
def _(*_: object) -> None:
    return None


def drawn_noise(key: Tensor, step: Tensor, ahead: int, stream: int, n: int, dim: int, backend: str) -> Tensor:
    """Standard normal noise (n, dim), float32, of step `step` + `ahead`; see `philox_normal` and `choose_backend`."""
    return torch.ops.hvae_ebm_prior.drawn_noise(key, step, ahead, stream, n, dim, backend)


@torch.library.impl(OPERATORS, "drawn_noise", "CompositeExplicitAutograd")
def _drawn_noise(key: Tensor, step: Tensor, ahead: int, stream: int, n: int, dim: int, backend: str) -> Tensor:
    if choose_backend(backend, key.device) == "triton":
        from .fused import fused_noise

        return fused_noise(key, step, ahead, stream, n, dim)
    return philox_normal(key, step + ahead, stream, n, dim)


@torch.library.register_fake("hvae_ebm_prior::drawn_noise")  # type: ignore[untyped-decorator]
def _(key: Tensor, step: Tensor, ahead: int, stream: int, n: int, dim: int, backend: str) -> Tensor:
    return torch.empty(n, dim, device=key.device, dtype=torch.float32)


def rows(x: Tensor) -> Tensor:
    """`x` with contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def check(
    u: Tensor,
    u_next: Tensor,
    gradient: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    held: Tensor | None,
    renewed: Tensor | None,
    replaced: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments of `langevin_update` fit each other."""
    if u.ndim != 2 or u.numel() == 0:
        raise ValueError(f"u: expected a non-empty (N, D), got {tuple(u.shape)}")
    n, dim = u.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "u_next": (u_next, (n, dim)),
        "gradient": (gradient, (n, dim)),
        "coefficients": (coefficients, (n, 4)),
        "noise": (noise, (n, dim)),
        "key": (key, (2,)),
        "held": (held, (dim,)),
        "renewed[0]": (renewed, (n, dim)),
        "renewed[1]": (replaced, (n, dim)),
        "out": (out, (n, dim)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and (tuple(value.shape) != shape or value.device != u.device):
            raise ValueError(
                f"{name}: expected shape {shape} on {u.device}, got {tuple(value.shape)} on {value.device}"
            )
    if out is not None and (out.dtype != u.dtype or (dim > 1 and out.stride(1) != 1)):
        raise ValueError(f"out: expected {u.dtype} with contiguous rows, got {out.dtype} with strides {out.stride()}")
    if (noise is None) == (key is None):
        raise ValueError("give either noise or a key to draw it from")
    if held is not None and held.dtype != torch.bool:
        raise TypeError(f"held: expected a bool mask, got {held.dtype}")
    if key is not None and (
        key.dtype != torch.int64 or u.dtype != torch.float32 or coefficients.dtype != torch.float32
    ):
        raise TypeError(
            f"with a key, expected int64 key and float32 u and coefficients, got {key.dtype}, {u.dtype} and "
            f"{coefficients.dtype}"
        )
