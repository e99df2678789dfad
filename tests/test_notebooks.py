"""The notebooks: what stands in them is of their present code, and that runs, with fewer steps or as it stands."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "docs"))
from run_notebooks import DIGEST, code_cells, digest_code, read_notebook, run_cell, run_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FEWER = {
    "tutorial": {
        "test[:400], draws=4": "test[:40], draws=4",
        "iterations=100": "iterations=2",
        "steps=60": "steps=4",
        "test[:150]": "test[:10]",
        "test[150:300]": "test[10:20]",
    },
    "your_own_vae": {"range(800)": "range(150)", "iterations=150": "iterations=2", "test[:400]": "test[:100]"},
}
# Of tensors that cells hand to matplotlib, and of what the runner opens.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == sorted(FEWER)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_stands_in_a_notebook_is_of_its_code(path):
    """If not: python docs/run_notebooks.py."""
    notebook = read_notebook(path)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook["metadata"][DIGEST] == digest_code(notebook)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    assert path.stat().st_size < 1e6
    # Nothing of the machine that ran it.
    assert not any(word in path.read_text() for word in ("/tmp", "/home", "/root"))


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few steps", "full"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, full, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    notebook, fewer, names = read_notebook(path), FEWER[path.stem], {}
    code = "".join("".join(cell["source"]) for cell in code_cells(notebook))
    assert all(code.count(old) == 1 for old in fewer)
    ran = run_notebook(path, names, None if full else fewer)
    kinds = [[[o["output_type"] for o in cell["outputs"]] for cell in code_cells(each)] for each in (notebook, ran)]
    assert kinds[0] == kinds[1]
    assert names["again"].trained is not None
    assert code_cells(ran)[-1]["outputs"][-1]["data"]["text/plain"] == ["True"]
    if path.stem == "tutorial":
        # Chains keep what is seen better than what is hidden.
        errors = names["errors"]
        assert errors[:, :, :14].mean() < errors[:, :, 14:].mean()
    if full and path.stem == "tutorial":
        assert names["history"][-1].score < -1
        assert errors[:, :, :14].mean() < 0.02


def test_cells_run_as_in_jupyter():
    """Their last expression's value, what they print and show; names stay, errors come out."""
    names = {}
    first, second = run_cell("print('a')\nx = 2\nx + 1", names, "cell 1")
    assert (first["name"], first["text"], second["data"]) == ("stdout", ["a\n"], {"text/plain": ["3"]})
    assert run_cell("y = x", names, "cell 2") == []
    assert names["y"] == 2
    (shown,) = run_cell("import matplotlib.pyplot as plt\nfigure = plt.figure()\nplt.show()", names, "cell 3")
    assert shown["output_type"] == "display_data"
    with pytest.raises(ZeroDivisionError):
        run_cell("1 / 0", names, "cell 4")
    assert torch.is_grad_enabled()
