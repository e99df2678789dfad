"""How long drawing takes: layer by layer by the flow, and jointly by short chains, of the example and of a large NVAE.

    NVAE_REPO=.../NVAE OMP_NUM_THREADS=1 .venv/bin/python benchmarks/drawing.py

prints a Markdown table. NVAE is the published CIFAR-10 configuration with random weights, 30 groups of 20x16x16 (see
benchmarks/walk.py); without NVAE_REPO it is left out. Priors are untrained, which takes as long. Joint chains are those
of PRESETS["joint-recovery"], five steps at each of three levels. All take turns; times are processor seconds, the
median of --rounds, with the ratio within each round.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from quickstart import load_backbone
from walk import make_model

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.adapters import NVAEAdapter
from hvae_ebm_prior.evaluation.candidates import build
from hvae_ebm_prior.presets import PRESETS

WAYS = {
    "layer by layer, 12 steps of the flow": "default",
    "the same, small networks": "small",
    "jointly, 15 gradients with walk": "joint-recovery",
}
MODELS = {"example, L = 3": load_backbone, "NVAE, L = 30": lambda: NVAEAdapter(make_model("NVAE").eval())}


def seconds(prior: DiffusionEBMPrior, count: int) -> float:
    """Processor seconds of a call of `sample`."""
    start = time.process_time()
    prior.sample(count, generator=torch.Generator().manual_seed(0))
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs=2, default=[1000, 8], help="of the example, and of NVAE")
    args = parser.parse_args()
    print("| model | drawn | samples | s | joint chains take, times |\n|---|---|---|---|---|")
    for (name, make), count in zip(MODELS.items(), args.samples, strict=True):
        if name.startswith("NVAE") and "NVAE_REPO" not in os.environ:
            continue
        backbone = make()
        priors = {way: build(PRESETS[preset], backbone) for way, preset in WAYS.items()}
        for prior in priors.values():
            seconds(prior, 2)
        rounds = [{way: seconds(prior, count) for way, prior in priors.items()} for _ in range(args.rounds)]
        for way in WAYS:
            ratios = [each["jointly, 15 gradients with walk"] / each[way] for each in rounds]
            ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            print(f"| {name} | {way} | {count} | {statistics.median(each[way] for each in rounds):.1f} | {ratio} |")


if __name__ == "__main__":
    main()
