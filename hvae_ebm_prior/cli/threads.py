"""Threads on a busy machine: those of OpenMP wait for each other by spinning, and where another process has a core that
one of them needs, an iteration takes several times as long (FAQ, "Training is slow"; benchmarks/busy.py).
"""

import os
import sys
import time
from pathlib import Path

import torch

# Linux's count of processes that run or would run now, of the whole machine.
RUNNING = Path("/proc/loadavg")
# How often it is looked at, and seconds between.
LOOKS, PAUSE = 5, 0.04


def leave_busy_cores() -> None:
    """Take no more threads than there are cores that no other process keeps busy, and say so; as many as PyTorch takes
    by itself where OMP_NUM_THREADS is set, or where the system does not tell.
    """
    if torch.get_num_threads() == 1 or "OMP_NUM_THREADS" in os.environ or not RUNNING.exists():
        return
    others = count_busy()
    threads = min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) - others))
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
        print(
            f"{others} other {'process keeps' if others == 1 else 'processes keep'} this machine busy: going on with "
            f"{threads} thread{'s' if threads > 1 else ''}; OMP_NUM_THREADS sets another number",
            file=sys.stderr,
        )


def count_busy() -> int:
    """How many other processes run, all the time for a moment; where none does at a look, that is known at once."""
    found = running_now()
    for _ in range(LOOKS - 1):
        if found == 0:
            break
        time.sleep(PAUSE)
        found = min(found, running_now())
    return found


def running_now() -> int:
    """How many other processes run at this look."""
    return int(RUNNING.read_text().split()[3].split("/")[0]) - 1
