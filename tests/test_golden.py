"""What a seed gives is what it gave: samples, energies, short trainings, and a run that goes on from a checkpoint of
before.
"""

import shutil

import golden
import pytest
import torch
from safetensors.torch import load_file

# Other processors round otherwise, and Adam's first steps enlarge that.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def before():
    return load_file(golden.FILE)


def test_numbers_are_as_before(before):
    found = golden.numbers()
    assert found.keys() == {name for name in before if not name.startswith("resumed/")}
    for name, value in found.items():
        torch.testing.assert_close(value, before[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_a_checkpoint_of_before_goes_on(before, tmp_path):
    shutil.copytree(golden.CHECKPOINT, tmp_path / "run")
    for name, value in golden.resumed(tmp_path / "run").items():
        torch.testing.assert_close(value, before[f"resumed/{name}"], **TOLERANCE)
