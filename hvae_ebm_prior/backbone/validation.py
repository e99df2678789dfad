"""Checks of arguments at the border; errors name the value that came, the one expected, and what to do."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_IMAGES = 'if they are no images, give the adapter data_kind = "tensors"'
# What an adapter's attribute `data_kind` may be; "images" where it has none.
DATA_KINDS = ("images", "tensors")


def takes_tensors(adapter: object) -> bool:
    """Whether an adapter's data are plain tensors (N, ...) of any range, by its attribute `data_kind`, and not images;
    ValueError where that is a text other than "images" and "tensors".
    """
    kind = getattr(adapter, "data_kind", "images")
    if isinstance(kind, str) and kind not in DATA_KINDS:
        raise ValueError(f"{type(adapter).__name__}.data_kind: expected one of {', '.join(DATA_KINDS)}, got {kind!r}")
    return isinstance(kind, str) and kind == "tensors"


def check_pictures(adapter: object, what: str) -> None:
    """Raise ValueError, which begins with `what`, where an adapter's data are plain tensors, of which there are no
    pictures.
    """
    if takes_tensors(adapter):
        raise ValueError(
            f"{what}: pictures are of images, and {type(adapter).__name__} takes plain tensors "
            '(data_kind = "tensors"); sample, diagnose, ood and train work with them, and the rest from Python'
        )


# What an adapter has.
METHODS = ("top_down", "infer", "decode")


def lacking_methods(value: object) -> str:
    """Why a value is no adapter, and what to do, where it lacks methods of one; empty where it has them all."""
    missing = [name for name in METHODS if not callable(getattr(value, name, None))]
    if not missing:
        return ""
    return (
        f"{type(value).__name__} is not a backbone adapter: it has no method {', '.join(missing)}; wrap the model in "
        "one of hvae_ebm_prior.adapters, or write an adapter with top_down, infer and decode"
    )


def check_images(images: Tensor, adapter: object = None) -> None:
    """Raise TypeError or ValueError unless `images` are what an adapter takes: floating-point (N, C, H, W), N >= 1,
    finite and in [0, 1]; of one that takes plain tensors, floating-point (N, ...), N >= 1, and finite.
    """
    tensors = takes_tensors(adapter)
    name, form = ("data", "(N, ...)") if tensors else ("images", "(N, C, H, W)")
    if not isinstance(images, Tensor):
        advice = f"; convert them with torch.from_numpy({name})" if isinstance(images, np.ndarray) else ""
        raise TypeError(f"{name}: expected a tensor {form}, got {type(images).__name__}{advice}")
    if not images.is_floating_point():
        wanted, advice = ("", ".float()") if tensors else (" in [0, 1]", ".float() / 255")
        raise TypeError(
            f"{name}: expected floating-point values{wanted}, got {images.dtype}; convert with {name}{advice}"
        )
    if (images.ndim < 2 if tensors else images.ndim != 4) or images.numel() == 0:
        hint = f"; {NO_IMAGES}" if images.ndim != 4 and not tensors else ""
        raise ValueError(f"{name}: expected a non-empty batch {form}, got shape {tuple(images.shape)}{hint}")
    low, high = images.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        what = "values" if tensors else "pixels"
        raise ValueError(f"{name}: {bad} of {len(images)} hold NaN or infinite {what}; drop or repair them")
    if not tensors and (low < 0 or high > 1):
        raise ValueError(
            f"images: expected values in [0, 1], got {low.item():.4g} to {high.item():.4g}; rescale them, for example "
            f"by (x + 1) / 2 or x / 255; {NO_IMAGES}"
        )


# How far images may leave [0, 1] by rounding, also in half precision.
ROUNDING = 1e-2


def check_decoded(images: Tensor, n: int, adapter: object = None) -> None:
    """Raise TypeError or ValueError unless what an adapter decoded is floating-point images (n, C, H, W) with values in
    [0, 1], as far as they are finite; of one that takes plain tensors, a floating-point tensor (n, ...).
    """
    tensors = takes_tensors(adapter)
    what, form, shape = ("tensors", "(N, ...)", "...") if tensors else ("images", "(N, C, H, W) in [0, 1]", "C, H, W")
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"decode: the backbone's adapter must return floating-point {what} {form}, got {kind}")
    if (images.ndim < 2 if tensors else images.ndim != 4) or len(images) != n:
        raise ValueError(
            f"decode: the backbone's adapter must return {n} {what} ({n}, {shape}), got shape {tuple(images.shape)}"
            f"{'' if tensors else f'; {NO_IMAGES}'}"
        )
    if tensors:
        return
    low, high = images.detach().nan_to_num(0.5, 0.5, 0.5).aminmax()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f"decode: the backbone's adapter must return images in [0, 1], got {low.item():.4g} to {high.item():.4g}; "
            f"rescale them in its decode, for example by (x + 1) / 2; {NO_IMAGES}"
        )


def check_noise(u: Tensor, dim: int, device: torch.device | None = None, *, finite: bool = True) -> None:
    """Raise TypeError or ValueError unless `u` is a floating-point (N, dim) tensor, on `device` where that is given,
    and, if asked, finite.
    """
    if not isinstance(u, Tensor) or not u.is_floating_point():
        kind = u.dtype if isinstance(u, Tensor) else type(u).__name__
        raise TypeError(f"u: expected a floating-point tensor (N, {dim}), got {kind}")
    if u.ndim != 2 or u.shape[1] != dim:
        raise ValueError(
            f"u: expected shape (N, {dim}), all layers packed top to bottom (see prior.join), got {tuple(u.shape)}"
        )
    if device is not None and u.device.type != device.type:
        raise ValueError(
            f"u: expected a tensor on {device}, where the energies are, got {u.device}; move one of them with .to()"
        )
    if finite and not bool(torch.isfinite(u.detach()).all()):
        bad = int((~torch.isfinite(u)).any(1).sum())
        raise ValueError(
            f"u: {bad} of {len(u)} hold NaN or infinite noise; drop them, and look at where they come from"
        )


def check_levels(t: int | Tensor, n: int, steps: int, device: torch.device) -> Tensor:
    """Levels 0..steps-1 as a long tensor (n,) on `device`; raise TypeError or ValueError for anything else."""
    if isinstance(t, Tensor):
        if t.dtype != torch.long:
            raise TypeError(f"t: expected an int or a torch.long tensor, got {t.dtype}")
        levels = t.to(device)
    elif (level := as_integer(t)) is not None:
        levels = torch.full((n,), level, dtype=torch.long, device=device)
    else:
        raise TypeError(f"t: expected an int or a torch.long tensor, got {type(t).__name__}")
    if tuple(levels.shape) != (n,):
        raise ValueError(f"t: expected one level per sample, shape ({n},), got {tuple(levels.shape)}")
    if n and not bool(((levels >= 0) & (levels < steps)).all()):
        raise ValueError(f"t: expected levels 0..{steps - 1}, got {levels.min().item()} to {levels.max().item()}")
    return levels


def check_count(n: int, name: str = "n") -> int:
    """A positive integer of any kind, NumPy's or a tensor's too, as Python's; TypeError or ValueError for anything
    else.
    """
    number = as_integer(n)
    if number is None:
        raise TypeError(f"{name}: expected a positive integer, got {type(n).__name__}")
    if number < 1:
        raise ValueError(f"{name}: expected a positive integer, got {number}")
    return number


def as_integer(value: Any) -> int | None:
    """A whole number of any kind as Python's; None for what is none, truth values among them."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def set_integers(settings: Any, least: Mapping[str, int]) -> None:
    """Make fields of a frozen dataclass Python's integers.

    Args:
        settings: the dataclass, as it is being made.
        least: the smallest value of every field; one that is None is left alone.

    Raises:
        ValueError: a field is no integer, or a smaller one.
    """
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        number = as_integer(value)
        if number is None or number < lowest:
            kind = "a positive integer" if lowest == 1 else f"an integer from {lowest}"
            raise ValueError(f"{name} must be {kind}, got {value!r}")
        object.__setattr__(settings, name, number)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


def check_fixed(fixed: Mapping[int, Tensor], shapes: tuple[tuple[int, ...], ...], n: int) -> None:
    """Raise TypeError or ValueError unless every layer to hold exists and has noise of the right shape."""
    if not isinstance(fixed, Mapping):
        raise TypeError(f"fixed: expected a mapping of layer index to noise u_i, got {type(fixed).__name__}")
    for i, part in fixed.items():
        if i not in range(len(shapes)):
            raise ValueError(f"fixed: expected layer indices 0 (top) to {len(shapes) - 1} (bottom), got {i!r}")
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise TypeError(f"fixed[{i}]: expected a floating-point tensor of noise u_{i}, got {type(part).__name__}")
        if tuple(part.shape) not in ((n, *shapes[i]), (1, *shapes[i])):
            raise ValueError(
                f"fixed[{i}]: expected shape {(n, *shapes[i])}, or {(1, *shapes[i])} for one noise held in all, "
                f"got {tuple(part.shape)}"
            )
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"fixed[{i}]: expected finite noise, got NaN or infinite entries")
