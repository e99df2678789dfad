import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def torch_fidelity(monkeypatch):
    """torch-fidelity, importable. It imports torchvision, of which PyPI has no build for the CPU build of PyTorch, for data sets and networks that
    are not used here: where it is missing, an empty stand-in takes its place while torch-fidelity is imported."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        for name in ("CIFAR10", "STL10", "CIFAR100"):
            setattr(sys.modules["torchvision.datasets"], name, object)
    return pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed; tests/run.py installs it")
