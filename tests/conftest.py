import sys

import pytest
import torch

from hvae_ebm_prior.evaluation.metrics import fidelity


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def torch_fidelity():
    """torch-fidelity, imported as the package does it: with torchvision or without."""
    try:
        fidelity("metrics")
    except ImportError as error:
        pytest.skip(f"torch-fidelity is not installed; tests/run.py installs it: {error}")
    return sys.modules["torch_fidelity"]
