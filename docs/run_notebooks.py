"""Runs the notebooks and writes what they print and draw into them: python docs/run_notebooks.py [NOTEBOOK ...]

(all of examples/*.ipynb where none is named). It takes matplotlib, and no Jupyter: code cells are plain Python, run one
after the other in one namespace, in the notebook's folder. What a cell prints, the figures that it shows and the value
of its last expression become its outputs, but not its progress bars; an error stops.
"""

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

EXAMPLES = Path(__file__).parent.parent / "examples"
DPI = 90
# Where a notebook keeps the digest of the code that its outputs are of.
DIGEST = "code_sha256"


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook's JSON."""
    return json.loads(path.read_text())


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Its code cells, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def digest_code(notebook: dict[str, Any]) -> str:
    """SHA-256 of its code cells."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def run_cell(source: str, names: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Run a cell as Jupyter does.

    Args:
        source: its code.
        names: the namespace, which it may change.
        place: what tracebacks call it.

    Returns:
        Its outputs, in the notebook's format.
    """
    tree = ast.parse(source, place)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    outputs: list[dict[str, Any]] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()), showing(outputs):
        exec(compile(tree, place, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), place, "eval"), names)
        plt.show()
    if text := printed.getvalue():
        outputs.insert(0, {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "metadata": {}, "output_type": "execute_result"})
    return outputs


@contextlib.contextmanager
def showing(outputs: list[dict[str, Any]]) -> Iterator[None]:
    """Within it `plt.show` adds the figures that there are to the outputs, and closes them."""

    def show() -> None:
        for number in plt.get_fignums():
            file = io.BytesIO()
            plt.figure(number).savefig(file, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            data = {"image/png": base64.b64encode(file.getvalue()).decode() + "\n", "text/plain": ["<Figure>"]}
            outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
        plt.close("all")

    real, plt.show = plt.show, show
    try:
        yield
    finally:
        plt.show = real
        plt.close("all")


def run_notebook(
    path: Path, names: dict[str, Any] | None = None, fewer: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a notebook's code cells in its folder.

    Args:
        path: the notebook.
        names: the namespace to run in; None for an empty one.
        fewer: code to replace, by other code.

    Returns:
        The notebook with its outputs.
    """
    notebook = read_notebook(path)
    names = {} if names is None else names
    with contextlib.chdir(path.parent):
        for number, cell in enumerate(code_cells(notebook), 1):
            source = "".join(cell["source"])
            for old, new in (fewer or {}).items():
                source = source.replace(old, new)
            outputs = run_cell(source, names, f"{path.name}, cell {number}")
            for output in outputs:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = number
            cell["execution_count"], cell["outputs"] = number, outputs
    notebook["metadata"][DIGEST] = digest_code(notebook)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(EXAMPLES.glob("*.ipynb")))
    args = parser.parse_args()
    for path in args.notebooks:
        start = time.monotonic()
        notebook = run_notebook(path.resolve())
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"{path}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
