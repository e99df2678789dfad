"""How much memory priors take to train and to sample, on any model: the peak of a process for each.

    VDVAE_REPO=.../vdvae OMP_NUM_THREADS=1 .venv/bin/python benchmarks/memory.py benchmarks/deep.py:vdvae

trains every prior for --iterations on the example's training images and draws --samples, in a process of its own, and
prints a Markdown table. The first row is a process that has the model and the images and trains nothing.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from fashion_mnist import load_subset
from quickstart import peak_memory_gib

from hvae_ebm_prior.cli.loading import load_function
from hvae_ebm_prior.evaluation.candidates import candidates

PRIORS = ("ours", "flow-matching", "ncp-sir", "joint-ebm", "joint-recovery")


def peaks(name: str | None, loader: str, given: list[str], iterations: int, samples: int) -> tuple[float, float]:
    """Peak memory in GiB after training, and after sampling, of one prior; of none, of what all of them need."""
    images = load_subset("train")[0]
    adapter = load_function(loader)(*given)
    if name is None:
        return peak_memory_gib(), peak_memory_gib()
    torch.manual_seed(0)
    candidate = candidates()[name]
    prior = candidate.make(adapter)
    generator = torch.Generator().manual_seed(0)
    options = {"training": replace(candidate.training, iterations=iterations), "progress": False}
    prior.fit(images, generator=generator, **(options if candidate.training else {}))
    trained = peak_memory_gib()
    prior.sample(samples, generator=generator)
    return trained, peak_memory_gib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", help="module:function or file.py:function of the backbone's adapter or model")
    parser.add_argument("checkpoint", nargs="?", help="what it is given")
    parser.add_argument("--only", nargs="+", choices=candidates(), default=PRIORS, metavar="PRIOR")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    given = [] if args.checkpoint is None else [args.checkpoint]
    print("| prior | trained, GiB | and sampled, GiB |\n|---|---|---|", flush=True)
    for name in (None, *args.only):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            trained, sampled = pool.submit(peaks, name, args.loader, given, args.iterations, args.samples).result()
        print(f"| {name or 'none'} | {trained:.2f} | {sampled:.2f} |", flush=True)


if __name__ == "__main__":
    main()
