"""Which adapter fits a model, of those that installed packages announce.

A package announces its adapters as entry points of the group `hvae_ebm_prior.adapters`, in its pyproject.toml:

    [project.entry-points."hvae_ebm_prior.adapters"]
    my-vae = "my_package.adapter:MyAdapter"

The class has an attribute `needs`, the dotted names of the attributes by which it recognises its models, and is called
with the model alone.
"""

from collections import deque
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from torch import nn

from .lock import LEAVES
from .transform import BackboneAdapter
from .validation import METHODS, lacking_methods

GROUP = "hvae_ebm_prior.adapters"
# Parts of a model that are looked at for one that would fit, at most.
MOST_PARTS = 10_000


def find_adapter(model: Any) -> BackboneAdapter:
    """An adapter for `model`: itself if it is one, else the first announced one whose attributes it has.

    Wrappers that hold the model or the adapter as `module` (DistributedDataParallel, DataParallel, AveragedModel) are
    looked through.

    Args:
        model: an adapter, or a model of an announced family.

    Returns:
        The adapter.

    Raises:
        TypeError: no adapter fits; the message says what each would need, and which part of the model would fit.
        ValueError: the adapter that fits cannot be made from the model alone.
    """
    families = announced() if isinstance(model, nn.Module) else {}
    inner = model
    while not is_adapter(inner):
        for adapter in families.values():
            if not missing_of(inner, adapter):
                return cast(BackboneAdapter, adapter(inner))
        if not isinstance(getattr(inner, "module", None), nn.Module):
            raise TypeError(refusal(model, inner))
        inner = inner.module
    return cast(BackboneAdapter, inner)


def is_adapter(value: Any) -> bool:
    """Whether a value has an adapter's three methods; a model with a part of the name of one has them not, nor has a
    class.
    """
    if isinstance(value, type):
        return False
    methods = [getattr(value, name, None) for name in METHODS]
    return all(callable(method) for method in methods) and not isinstance(methods[0], nn.Module)


def missing_of(model: Any, adapter: Any) -> list[str]:
    """What `model` lacks of what an announced adapter needs."""
    return [path for path in adapter.needs if not has_path(model, path)]


def refusal(model: Any, inner: Any) -> str:
    """Why no adapter fits `model`, whose wrappers end in `inner`."""
    families = announced()
    hint = ""
    if found := fitting_part(model, families):
        path, part = found
        kind = "entry" if path.startswith("[") else "attribute"
        hint = f"; its {kind} {path.removeprefix('.')} is a {type(part).__name__}: pass model{path}"
    if isinstance(inner, type):
        return f"expected a model or an adapter, got the class {inner.__name__}: pass an object of it"
    if not isinstance(inner, nn.Module):
        return lacking_methods(inner) + hint
    tried = [f"{name} (has no {', no '.join(missing_of(inner, adapter)[:3])})" for name, adapter in families.items()]
    return (
        f"no adapter fits {type(inner).__name__}{hint}; tried "
        f"{'; '.join(tried) or 'none, as no package announces any'}. "
        "Write one for it: a class with top_down, infer and decode, see docs/your_own_vae.md"
    )


def fitting_part(model: Any, families: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first part of a model, those of its own first, that is an adapter or of an announced family, and how it is
    reached from the model.
    """
    pending = deque([("", model)])
    seen = {id(model)}
    while pending and len(seen) < MOST_PARTS:
        path, value = pending.popleft()
        for step, part in parts_by_name(value):
            if id(part) in seen:
                continue
            seen.add(id(part))
            if is_adapter(part) or not all(missing_of(part, adapter) for adapter in families.values()):
                return path + step, part
            pending.append((path + step, part))
    return None


def parts_by_name(value: Any) -> list[tuple[str, Any]]:
    """The modules and other objects that a value holds, each with how it is reached from it."""
    if isinstance(value, Mapping):
        named = [(f"[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, list | tuple | nn.ModuleList | nn.Sequential):
        named = [(f"[{i}]", part) for i, part in enumerate(value)]
    else:
        modules = value._modules if isinstance(value, nn.Module) else {}
        named = [
            (f".{name}", part)
            for name, part in {**getattr(value, "__dict__", {}), **modules}.items()
            if not name.startswith("_")
        ]
    return [(step, part) for step, part in named if not isinstance(part, LEAVES)]


def announced() -> Mapping[str, Any]:
    """Adapter classes by their name, those of this package first.

    Returns:
        Name to class.

    Raises:
        TypeError: a package announces something without `needs`.
    """
    adapters = {}
    for point in sorted(entry_points(group=GROUP), key=own_first):
        adapters[point.name] = adapter = point.load()
        if not isinstance(getattr(adapter, "needs", None), tuple):
            raise TypeError(
                f"the adapter {point.name} ({point.value}) must have `needs`, a tuple of the attribute names by which "
                "it recognises its models"
            )
    return adapters


def own_first(point: EntryPoint) -> tuple[bool, str]:
    """Sorts this package's entry points before those of others, each by name."""
    return not point.value.startswith("hvae_ebm_prior"), point.name


def has_path(value: Any, path: str) -> bool:
    """Whether the dotted attribute `path` exists on `value` and is not None."""
    for name in path.split("."):
        value = getattr(value, name, None)
    return value is not None
