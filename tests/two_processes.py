"""What tests run in several processes: `run(function, *arguments)` gives what the function returns in each, by a group
of gloo on one machine.
"""

import faulthandler
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(work: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """What `work(rank, *arguments)` returns in every process, or the exception that it raises there.

    Processes are forks, which begin at once; the environment is that of `torchrun`, and the library makes the group
    itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of a pool do not survive a fork
    children: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(processes):
                child = os.fork()
                if child == 0:
                    begin(work, rank, processes, Path(folder), arguments)
                children.append(child)
            for child in children:
                os.waitpid(child, 0)
        finally:
            torch.set_num_threads(threads)
        results = [Path(folder) / f"{rank}.pt" for rank in range(processes)]
        if not all(path.exists() for path in results):
            raise RuntimeError(f"a process ended early, or waited for longer than {LIMIT} s: its output says where")
        return [torch.load(path, weights_only=False) for path in results]


# Seconds that a process may take.
LIMIT = 240


def begin(work: Callable[..., Any], rank: int, processes: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    # A lock that some thread held at the fork stays held: what waits for it says where, instead of waiting for ever.
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            # Which must be there; nobody connects to it.
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        os.environ["LOCAL_RANK"] = str(rank)
        import hvae_ebm_prior.processes as library

        # They meet in a file: a free port may be another test's by the time that it is used.
        library.dist.init_process_group = partial(
            dist.init_process_group,
            init_method=(folder / "group").as_uri(),
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=60),
        )
        try:
            found = work(rank, *arguments)
        except Exception as error:
            traceback.print_exc()
            found = error
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
