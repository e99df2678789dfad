"""How well training scales from one process on one core to two on two.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/processes.py [--rounds 7] [--steps 20] [--batch 64]

prints a Markdown table and writes benchmarks/processes.json; wants an idle machine. In every round, in alternating
order, the example's HVAE is given the preset `fast` and trained on Fashion-MNIST by

- one: one process on one core;
- two: two processes on a core each, on the same batches, which both encode whole;
- two, encoder divided: the same with `encode_batch` at half a batch, so that each encodes its own half.

Every run is fresh processes, timed from the end of its third step. Efficiency is seconds of one over twice those of
two, in pairs of a round; medians and quartiles over pairs are printed. With --weak two processes have twice the batch,
and efficiency is seconds of one over those of two.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WARMUP = 3
WAYS = {"one": (1, False), "two": (2, False), "two, encoder divided": (2, True)}


def train(steps: int, batch: int, encode_batch: int | None) -> float:
    """Seconds per step, in the process that it is called in and those beside it."""
    import torch

    sys.path.insert(0, str(HERE.parent / "examples"))
    from fashion_mnist import load_subset
    from quickstart import TRAINING, make_prior

    torch.set_num_threads(1)
    images, _ = load_subset("train")
    training = dataclasses.replace(
        TRAINING, iterations=WARMUP + steps, batch_size=batch, encode_batch=encode_batch, activity_images=0
    )
    generator = torch.Generator().manual_seed(0)
    history = make_prior().fit(images, training=training, generator=generator, progress=False)
    return (history[-1].seconds - history[WARMUP - 1].seconds) / steps


def worker(args: argparse.Namespace) -> None:
    """One process of a run: on a core of its own, where that can be asked for."""
    rank = int(os.environ.get("RANK", 0))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    seconds = train(args.steps, args.batch, args.encode_batch)
    if rank == 0:
        print(json.dumps(seconds))


def run(processes: int, steps: int, batch: int, encode_batch: int | None) -> float:
    """Seconds per step of fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", "--steps", str(steps), "--batch", str(batch)]
    command += ["--encode-batch", str(encode_batch)] if encode_batch else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in range(processes):
        own = environment | ({"RANK": str(rank)} if processes > 1 else {})
        running.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a process failed; see above")
    return json.loads(outputs[0].splitlines()[-1])


def quartiles(values: list[float]) -> str:
    """Median, and the quartiles about it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--encode-batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--weak", action="store_true", help="twice the batch for two processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if args.rounds < 2:
        parser.error(f"--rounds: quartiles need at least 2, got {args.rounds}")
    names, rounds = list(WAYS), []
    for i in range(args.rounds):
        seconds = {}
        for name in names if i % 2 == 0 else names[::-1]:
            processes, divided = WAYS[name]
            batch = args.batch * processes if args.weak else args.batch
            seconds[name] = run(processes, args.steps, batch, batch // processes if divided else None)
        rounds.append(seconds)
    print("| processes | ms per step | efficiency |\n|---|---|---|")
    report = {"batch": args.batch, "steps": args.steps, "weak": args.weak, "rounds": rounds}
    for name, (processes, _) in WAYS.items():
        efficiency = [each["one"] / each[name] / (1 if args.weak else processes) for each in rounds]
        shown = "1" if name == "one" else quartiles(efficiency)
        print(f"| {name} | {1000 * statistics.median(each[name] for each in rounds):.0f} | {shown} |")
        report[name] = statistics.median(efficiency)
    path = HERE / "processes.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {"weak" if args.weak else "strong": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
