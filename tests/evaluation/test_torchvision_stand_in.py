"""torch-fidelity is imported with any torchvision or none, and nobody else finds the stand-in."""

import importlib
import sys

import pytest
import torch

from hvae_ebm_prior.evaluation.metrics import fidelity, kernel_distance
from hvae_ebm_prior.evaluation.torchvision_stand_in import forget, loaded

FAILING = {
    "missing": "raise ModuleNotFoundError('No module named torchvision')",
    "of another PyTorch": "import torchvision.datasets\nraise RuntimeError('operator torchvision::nms does not exist')",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write a package that Python finds before all others; torchvision and torch-fidelity are as if never imported."""
    names = ("torchvision", "torch_fidelity")
    before = {name: module for package in names for name, module in loaded(package).items()}
    monkeypatch.syspath_prepend(tmp_path)
    # Files of one second and size would be taken for each other.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(package, **files):
        (tmp_path / package).mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / package / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    for package in names:
        forget(package)
    yield write
    for package in names:
        forget(package)
    sys.modules.update(before)


@pytest.mark.parametrize("failing", FAILING)
def test_metrics_do_without_torchvision(torch_fidelity, packages, failing):
    packages("torchvision", __init__=FAILING[failing], datasets="")
    found = kernel_distance(torch.zeros(20, 3), torch.ones(20, 3))
    assert found["kid"] == pytest.approx(7)  # (0 + 1)^3 + (1 + 1)^3 - 2 (0 + 1)^3
    assert not loaded("torchvision")
    with pytest.raises(
        (ImportError, RuntimeError), match=r"^(No module named torchvision|operator torchvision::nms does not exist)$"
    ):
        importlib.import_module("torchvision")


def test_what_needs_torchvision_says_so(torch_fidelity, packages):
    from PIL import Image

    packages("torchvision", __init__=FAILING["missing"])
    datasets = fidelity("datasets")
    with pytest.raises(
        ImportError,
        match=r"datasets\.CIFAR10 is not there: torchvision is not installed, or was built for another PyTorch",
    ):
        datasets.Cifar10_RGB("folder")
    with pytest.raises(ImportError, match=r"functional\.pil_to_tensor is not there: torchvision is not installed"):
        datasets.TransformPILtoRGBTensor()(Image.new("RGB", (2, 2)))


def test_a_torchvision_that_works_is_used(torch_fidelity, packages):
    packages("torchvision", __init__="", datasets="class CIFAR10: ...\nclass CIFAR100: ...\nclass STL10: ...")
    packages("torchvision/transforms", __init__="", functional="")
    datasets = fidelity("datasets")
    torchvision = importlib.import_module("torchvision.datasets")
    assert issubclass(datasets.Cifar10_RGB, torchvision.CIFAR10)
    assert torchvision.__file__


def test_a_failure_leaves_nothing_behind(packages):
    packages("torchvision", __init__=FAILING["missing"])
    packages(
        "torch_fidelity",
        __init__="from . import early, metric_kid",
        early="import torchvision",
        metric_kid="import no_such_package",
    )
    with pytest.raises(
        ImportError, match=r"pip install --no-deps torch-fidelity.*no_such_package.*install hvae-ebm-prior\[evaluate\]"
    ):
        fidelity("metric_kid")
    assert not loaded("torchvision")
    # What is installed meanwhile is found, by the parts that could be imported before as well.
    packages("torchvision", __init__="installed = True")
    packages("torch_fidelity", metric_kid="from .early import torchvision")
    assert fidelity("metric_kid").torchvision.installed
