"""The import graph of the package: python docs/draw_imports.py [build/imports.png] (it takes matplotlib).

The picture has the rooms in their order, which is that of tests/test_layout.py. A line goes from a room to the left and
then up, by an arrow, to a room that it imports from; the number at the corner counts pairs of modules. What is printed
are the modules in the same order, with what each imports.
"""

import ast
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hvae_ebm_prior"
LINE, TEXT, ROOM = "#9aa5b1", "#33415c", "#dfe7f2"


def read_order() -> list[str]:
    """Rooms, and modules at the top of the package, each after all that it may import from."""
    for node in ast.parse((ROOT / "tests" / "test_layout.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            names = [each for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
            return [each.value for each in sorted(names, key=lambda each: (each.lineno, each.col_offset))]
    raise SystemExit("tests/test_layout.py: expected a list ORDER")


def read_graph() -> dict[str, list[str]]:
    """What each module imports from the package, wherever in it; names without that of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {}
    for name, path in files.items():
        folder, found = path.relative_to(ROOT).parent.parts, set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = folder[: len(folder) - node.level + 1] if node.level else ()
                module = ".".join(filter(None, [*start, node.module]))
                found |= {each if (each := f"{module}.{alias.name}") in files else module for alias in node.names}
        short = [each.partition(".")[2] or "__init__" for each in (name, *sorted(found & files.keys() - {name}))]
        graph[short[0]] = short[1:]
    return graph


def draw(rooms: list[list[str]], box: dict[str, int], graph: dict[str, list[str]], path: Path) -> None:
    """Write the picture; `box` says which of the rooms a module is in."""
    counts = Counter((box[a], box[b]) for a in graph for b in graph[a] if box[a] != box[b])
    figure, axis = plt.subplots(figsize=(14, 8), layout="constrained")
    axis.set(xlim=(-0.6, len(rooms) + 3.2), ylim=(len(rooms) - 0.4, -0.6))
    axis.axis("off")
    arrow = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0}
    badge = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": LINE}
    middle = {"ha": "center", "va": "center", "color": TEXT}
    for i, room in enumerate(rooms):
        left = [j for j in range(i) if counts[i, j]]
        below = [k for k in range(i, len(rooms)) if counts[k, i]]
        axis.plot([min(left, default=i), i], [i, i], color=LINE, linewidth=1, zorder=0)
        if below:
            axis.annotate("", (i, i + 0.32), (i, below[-1]), arrowprops=arrow, zorder=0)
        for j in left:
            axis.text(j, i, str(counts[i, j]), fontsize=8, bbox=badge, **middle)
        axis.add_patch(plt.Rectangle((i - 0.47, i - 0.32), 0.94, 0.64, facecolor=ROOM, edgecolor=TEXT))
        axis.text(i, i, room[0] if len(room) == 1 else f"{room[0]}, ...", fontsize=9, **middle)
        members = [name.partition(".")[2] or name for name in box if box[name] == i and [name] != room]
        axis.text(i + 0.56, i, fill(", ".join(members), 62), va="center", fontsize=7, color=TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the modules and write the picture."""
    order, graph = read_order(), read_graph()
    modules = sorted(TopologicalSorter(graph).static_order(), key=lambda name: order.index(name.split(".")[0]))
    for name in modules:
        print(fill(f"{name:32}{', '.join(graph[name]) or 'nothing'}", 120, subsequent_indent=" " * 32))
    rooms: list[list[str]] = []
    for name in order:  # a folder is a room; modules at the top that follow each other share one box
        if rooms and not any((PACKAGE / each).is_dir() for each in (name, rooms[-1][0])):
            rooms[-1].append(name)
        else:
            rooms.append([name])
    box = {name: i for name in modules for i, room in enumerate(rooms) if name.split(".")[0] in room}
    draw(rooms, box, graph, Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "imports.png"))


if __name__ == "__main__":
    main()
