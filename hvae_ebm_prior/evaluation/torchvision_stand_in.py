"""torch-fidelity without torchvision, which it imports for data sets and networks that are not used here.

pip would bring a torchvision that may not fit the PyTorch that is there, and another PyTorch with it. Where torchvision
cannot be imported, an empty stand-in takes its place while torch-fidelity is imported, and then goes again.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Those that torch-fidelity imports.
NAMES = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


class StandIn(ModuleType):
    """A module without content. Names that begin with a capital are classes that can be inherited from; all other use
    of it raises ImportError.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        # Python itself asks for such as __path__, and takes this error for a no.
        if name.startswith("__"):
            raise AttributeError(name)
        message = f"{self.__name__}.{name} is not there: torchvision is not installed, or was built for another PyTorch"

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise ImportError(message)

        if name[0].isupper():
            return type(name, (), {"__init__": refuse})
        raise ImportError(message)


def import_torch_fidelity(module: str) -> ModuleType:
    """Import a module of torch-fidelity, with torchvision or without.

    Args:
        module: its name, as "metric_kid".

    Returns:
        The module `torch_fidelity.<module>`.

    Raises:
        ImportError: torch-fidelity, or what it needs besides torchvision, is missing.
    """
    name = f"torch_fidelity.{module}"
    if "torch_fidelity" in sys.modules:
        return importlib.import_module(name)
    # Parts of an earlier import that failed.
    forget("torch_fidelity")
    with torchvision_or_stand_in():
        return importlib.import_module(name)


@contextmanager
def torchvision_or_stand_in() -> Iterator[None]:
    """Inside, torchvision can be imported: itself if it works, else the stand-in. Afterwards no stand-in is left, and
    nothing of a failed import.
    """
    before = loaded("torchvision")
    if works("torchvision"):
        yield
        return
    stand_ins = {name: StandIn(name) for name in NAMES}
    for name in NAMES[1:]:
        parent, _, child = name.rpartition(".")
        setattr(stand_ins[parent], child, stand_ins[name])
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        forget("torchvision")
        sys.modules.update(before)


def works(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        importlib.import_module(package)
    # ImportError where it is missing; one built for another PyTorch raises RuntimeError, AttributeError or OSError.
    except Exception:
        return False
    return True


def loaded(package: str) -> dict[str, ModuleType]:
    """The modules of a package that are imported, by name."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}


def forget(package: str) -> None:
    """Make Python import a package anew when it is asked for it again."""
    for name in loaded(package):
        del sys.modules[name]
