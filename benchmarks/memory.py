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

from hvae_ebm_prior.cli.loading import add_loader, load_model
from hvae_ebm_prior.evaluation.candidates import candidates

PRIORS = ("ours", "flow-matching", "ncp-sir", "joint-ebm", "joint-recovery")


def peak(name: str | None, args: argparse.Namespace) -> float:
    """Peak memory in GiB of this process, which trains a prior and samples from it; of no name, which does neither."""
    images, model = load_subset("train")[0], load_model(args)
    if name is not None:
        torch.manual_seed(args.seed)
        candidate = candidates()[name]
        prior = candidate.make(model)
        generator = torch.Generator().manual_seed(args.seed)
        options = {}
        if candidate.training is not None:
            options = {"training": replace(candidate.training, iterations=args.iterations), "progress": False}
        prior.fit(images, generator=generator, **options)
        prior.sample(args.samples, generator=generator)
    return peak_memory_gib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_loader(parser, "the backbone's adapter or model")
    parser.add_argument("--only", nargs="+", choices=candidates(), default=PRIORS, metavar="PRIOR")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    print("| prior | GiB |\n|---|---|", flush=True)
    for name in (None, *args.only):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            print(f"| {name or 'none'} | {pool.submit(peak, name, args).result():.2f} |", flush=True)


if __name__ == "__main__":
    main()
