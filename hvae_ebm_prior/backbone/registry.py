"""Which adapter fits a model, of those that installed packages announce.

A package announces its adapters as entry points of the group `hvae_ebm_prior.adapters`, in its pyproject.toml:

    [project.entry-points."hvae_ebm_prior.adapters"]
    my-vae = "my_package.adapter:MyAdapter"

The class has an attribute `needs`, the dotted names of the attributes by which it recognises its models, and is called
with the model alone.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from torch import nn

from .transform import BackboneAdapter

GROUP = "hvae_ebm_prior.adapters"


def find_adapter(model: Any) -> BackboneAdapter:
    """An adapter for `model`: itself if it has a top-down pass, else the first announced one whose attributes it has.

    Wrappers that hold the model as `module` (DistributedDataParallel, DataParallel) are looked through.

    Args:
        model: an adapter, or a model of an announced family.

    Returns:
        The adapter.

    Raises:
        TypeError: no adapter fits; the message says what each would need.
        ValueError: the adapter that fits cannot be made from the model alone.
    """
    if callable(getattr(model, "top_down", None)) or not isinstance(model, nn.Module):
        return cast(BackboneAdapter, model)
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    tried = []
    for name, adapter in announced().items():
        missing = [path for path in adapter.needs if not has_path(model, path)]
        if not missing:
            return cast(BackboneAdapter, adapter(model))
        tried.append(f"{name} (has no {', no '.join(missing[:3])})")
    raise TypeError(
        f"no adapter fits {type(model).__name__}; tried {'; '.join(tried) or 'none, as no package announces any'}. "
        "Write one for it: a class with top_down, infer and decode, see docs/your_own_vae.md"
    )


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
