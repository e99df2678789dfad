"""What a busy machine costs: seconds of an iteration of the quickstart, alone and beside a process that keeps one core
busy, under several settings of OpenMP.

    .venv/bin/python benchmarks/busy.py

Every cell is a process of its own that trains for --iterations steps and reports the median of their times; the
Markdown table is printed, and results go to benchmarks/busy.json. Linux and GNU OpenMP, which PyTorch's builds have.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = Path(__file__).with_suffix(".json")
CORES = os.cpu_count() or 1
SETTINGS = {
    "as PyTorch comes": {},
    "as the commands do it": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "one thread fewer than cores": {"OMP_NUM_THREADS": str(max(1, CORES - 1))},
}


def time_iterations(iterations: int, leave: bool) -> float:
    """Median seconds of the quickstart's iterations in this process, after the first three."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    import torch
    from fashion_mnist import load_subset
    from quickstart import make_prior

    from hvae_ebm_prior.cli.threads import leave_busy_cores

    if leave:
        leave_busy_cores()
    ends: list[float] = []
    make_prior(0).fit(
        load_subset("train")[0],
        iterations=iterations + 4,
        progress=False,
        generator=torch.Generator().manual_seed(0),
        callback=lambda *_: ends.append(time.monotonic()),
    )
    return statistics.median(b - a for a, b in itertools.pairwise(ends[3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--child", action="store_true", help="print the time in this process alone")
    parser.add_argument("--leave", action="store_true", help="in the child, leave busy cores alone")
    args = parser.parse_args()
    if args.child:
        print(time_iterations(args.iterations, args.leave))
        return
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, "--child", "--iterations", str(args.iterations)]
    results: dict[str, dict[str, float]] = {}
    for name, setting in SETTINGS.items():
        results[name] = {}
        for where in ("idle", "busy"):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if where == "busy" else None
            try:
                environment = plain | setting
                leave = ["--leave"] if name == "as the commands do it" else []
                done = subprocess.run(command + leave, env=environment, capture_output=True, text=True, check=True)
            finally:
                if neighbour is not None:
                    neighbour.kill()
                    neighbour.wait()
            results[name][where] = float(done.stdout.split()[-1])
    RESULTS.write_text(json.dumps({"cores": CORES, "seconds": results}, indent=2) + "\n")
    print(f"| {CORES} cores | alone, s | beside a busy process, s |\n|---|---|---|")
    for name, seconds in results.items():
        print(f"| {name} | {seconds['idle']:.2f} | {seconds['busy']:.2f} |")


if __name__ == "__main__":
    main()
