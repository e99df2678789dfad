"""The main job over several seeds, with the default objective and with score matching alone.

    python3 benchmarks/main_job.py

prints a Markdown table and writes benchmarks/main_job.json. Each run is a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "examples" / "quickstart.py"


def run(objective: str, seed: int, extra: list[str]) -> dict[str, object]:
    """Results of one run of the main job."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(QUICKSTART), "--objective", objective, "--seed", str(seed), "--out", folder]
        command += extra
        subprocess.run(command, check=True)
        return json.loads((Path(folder) / "results.json").read_text())


def spread(values: list[float], digits: int) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def quality(rows: list[dict]) -> str:
    """Cells of the distance and the closure."""
    return f"{spread([row['distance'] for row in rows], 2)} | {spread([row['closure'] for row in rows], 3)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["score-recovery", "score"])
    args, extra = parser.parse_known_args()
    results: dict[str, list[dict]] = {}
    for seed in args.seeds:
        for objective in args.objectives:
            results.setdefault(objective, []).append(run(objective, seed, extra))
    (HERE / "main_job.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n| prior | FD | closure | training, s | memory, GiB |\n|---|---|---|---|---|")
    first = results[args.objectives[0]]
    for i, row in enumerate(first[0]["rows"][:-1]):
        rows = [result["rows"][i] for result in first]
        name = row["name"].split(",")[0] + (" at its best temperature" if "," in row["name"] else "")
        print(f"| {name} | {quality(rows)} | | |")
    for objective, runs in results.items():
        costs = f"{spread([r['training_seconds'] for r in runs], 0)} | {spread([r['memory_gib'] for r in runs], 2)}"
        print(f"| ours, `{objective}` | {quality([result['rows'][-1] for result in runs])} | {costs} |")


if __name__ == "__main__":
    main()
