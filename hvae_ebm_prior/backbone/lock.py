"""Backbones are frozen while priors hold them, and as they were once the last prior has let go."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .transform import BackboneAdapter

# What holds no modules, and what would lead through all there is.
LEAVES = (type, ModuleType, Tensor, torch.Generator, str, bytes, int, float, type(None))
# What modules may hold modules in that they do not know as their own.
HOLDERS = (list, tuple, dict, MethodType, FunctionType, partial)
# Objects that are looked through at most.
MOST_OBJECTS = 10_000
# What priors hold frozen, by id: the module or parameter, the flag to restore, and how many hold it.
_held: dict[int, tuple[nn.Module | nn.Parameter, bool, int]] = {}


def lock(adapter: BackboneAdapter) -> Callable[[], None]:
    """Put the modules behind `adapter` in eval mode without parameter gradients.

    Args:
        adapter: the backbone; see `backbone_modules`.

    Returns:
        A function that restores every training flag and requires_grad; where several priors froze a part, the last call
        does.
    """
    modules = {id(m): m for root in backbone_modules(adapter) for m in root.modules()}
    parameters = {id(p): p for module in modules.values() for p in module.parameters(recurse=False)}
    for module in modules.values():
        _hold(module, module.training)
        module.training = False
    for parameter in parameters.values():
        _hold(parameter, parameter.requires_grad)
        parameter.requires_grad_(False)

    def release() -> None:
        for key in (*modules, *parameters):
            part, flag, holders = _held.pop(key)
            if holders > 1:
                _held[key] = part, flag, holders - 1
            elif isinstance(part, nn.Module):
                part.training = flag
            else:
                # Garbage is collected at any moment, also inside a functorch transform, where requires_grad_() raises.
                part.requires_grad = flag

    return release


@contextmanager
def watch_modules(watch: bool = True) -> Iterator[list[nn.Module]]:
    """A context that gives a list of the modules that this thread runs inside; an empty one unless it is to `watch`."""
    ran: list[nn.Module] = []
    if not watch:
        yield ran
        return
    thread = threading.get_ident()

    def note(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            ran.append(module)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield ran
    finally:
        handle.remove()


def check_frozen(ran: Sequence[nn.Module]) -> None:
    """Raise ValueError where modules that a locked adapter ran were not found behind it, and are not frozen.

    Args:
        ran: from `watch_modules`.

    Raises:
        ValueError: a module is in train mode, or has parameters that require gradients.
    """
    loose = [
        module
        for module in dict.fromkeys(ran)
        if module.training or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    if not loose:
        return
    names = ", ".join(type(each).__name__ for each in loose[:3]) + (f" and {len(loose) - 3} more" if loose[3:] else "")
    if all(id(module) in _held for module in loose):
        raise ValueError(
            f"backbone: it runs modules in train mode, or with gradients, that were frozen before: {names}; does the "
            "adapter call train() or requires_grad_()?"
        )
    raise ValueError(
        f"backbone: it runs modules that are not frozen, as they were not found: {names}; keep the model as an "
        "attribute of the adapter, or freeze it yourself by model.eval().requires_grad_(False)"
    )


def check_autograd(adapter: BackboneAdapter) -> None:
    """Raise ValueError where the backbone's weights cannot take part in autograd, which chains need."""
    for module in backbone_modules(adapter):
        for name, parameter in module.named_parameters():
            if parameter.is_inference():
                raise ValueError(
                    f"backbone: its {name} was made under torch.inference_mode(), where no gradient can go through it; "
                    "build or load the model outside"
                )


def _hold(part: nn.Module | nn.Parameter, flag: bool) -> None:
    _, original, holders = _held.get(id(part), (part, flag, 0))
    _held[id(part)] = part, original, holders + 1


def backbone_modules(adapter: BackboneAdapter) -> list[nn.Module]:
    """The modules behind an adapter: itself, or those that its attributes hold, also in collections, in other objects
    of whatever class, and in functions; and what modules hold besides their own parts, in plain lists and the like.
    """
    found: list[nn.Module] = []
    covered: set[int] = set()
    pending: list[Any] = [adapter]
    seen: set[int] = set()
    while pending and len(seen) < MOST_OBJECTS:
        value = pending.pop()
        if id(value) in seen or isinstance(value, LEAVES):
            continue
        seen.add(id(value))
        if not isinstance(value, nn.Module):
            pending += parts_of(value)
        elif id(value) not in covered:
            found.append(value)
            for module in value.modules():
                covered.add(id(module))
                pending += [part for name, part in vars(module).items() if name[0] != "_" and isinstance(part, HOLDERS)]
    return found


def parts_of(value: Any) -> list[Any]:
    """What an object holds: the entries of a collection, or its attributes, and what a function closes over."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    parts = list(getattr(value, "__dict__", {}).values())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        parts += [getattr(value, name, None) for name in ([slots] if isinstance(slots, str) else slots)]
    if isinstance(value, partial):
        parts += [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        parts += [value.__self__]
    if isinstance(value, FunctionType):
        parts += [cell.cell_contents for cell in value.__closure__ or () if cell_is_full(cell)]
    return parts


def cell_is_full(cell: CellType) -> bool:
    """Whether a variable that a function closes over has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
