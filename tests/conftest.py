import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from hvae_ebm_prior.evaluation.metrics import fidelity

sys.path.append(str(Path(__file__).parent.parent / "examples"))

# What a shell runs in the background ignores Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "quick",
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("slow", settings.get_profile("quick"), max_examples=1000)
settings.load_profile("quick")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Small tensors are quicker with one thread, and the other cores are free for other checks."""
    torch.set_num_threads(1)


@pytest.fixture
def counters(monkeypatch):
    """Noise from counters, which is the quicker one for thousands of samples of few dimensions."""
    monkeypatch.setenv("HVAE_EBM_PRIOR_BACKEND", "naive")


@pytest.fixture
def torch_fidelity():
    """torch-fidelity, imported as the package does it: with torchvision or without."""
    try:
        fidelity("metrics")
    except ImportError as error:
        pytest.skip(f"torch-fidelity is not installed; tests/run.py installs it: {error}")
    return sys.modules["torch_fidelity"]


IMPORTS = """
import sys
import hvae_ebm_prior
print(*sys.modules)
import hvae_ebm_prior.adapters, hvae_ebm_prior.baselines, hvae_ebm_prior.chains.kernels, hvae_ebm_prior.cli
import hvae_ebm_prior.evaluation, hvae_ebm_prior.evaluation.likelihood, hvae_ebm_prior.presets, hvae_ebm_prior.testing
import hvae_ebm_prior.cli.demo
print(*sys.modules)
"""


@pytest.fixture(scope="session")
def imported() -> tuple[set[str], set[str]]:
    """What a fresh Python has imported after `import hvae_ebm_prior`, and after all of its modules that need nothing
    optional.
    """
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    core, everything = (set(line.split()) for line in done.stdout.splitlines())
    return core, everything
