"""What it costs to measure what training shows: gradient norms per layer and the chains' displacement, as shares of a
training step.

    .venv/bin/python benchmarks/observation.py [--rounds 15]

prints a Markdown table; the example's model and the preset `fast`. Every round times a step and both measurements;
medians and ranges over rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from quickstart import make_prior

from hvae_ebm_prior import TrainingConfig
from hvae_ebm_prior.training.recovery import add_chain_figures, recovery_loss
from hvae_ebm_prior.training.step import gradient_norms, parameters_by_layer


def milliseconds(function: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    return 1000 * (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    prior, n = make_prior().train(), TrainingConfig().batch_size
    u, end = (torch.randn(n, prior.dim, generator=torch.Generator().manual_seed(i)) for i in range(2))
    layers = parameters_by_layer(prior)
    loss = recovery_loss(prior, u, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        prior.zero_grad()
        recovery_loss(prior, u, generator=torch.Generator().manual_seed(0)).total.mean().backward()

    step()

    def displacement() -> float:
        return add_chain_figures(loss, u, end, []).displacement.mean().item()

    parts = {"step": [], "gradient norms": [], "displacement": []}
    for _ in range(args.rounds):
        parts["step"].append(milliseconds(step))
        parts["gradient norms"].append(milliseconds(lambda: gradient_norms(layers), 20))
        parts["displacement"].append(milliseconds(displacement, 20))
    print("| | ms, median (range) | % of a step |\n|---|---|---|")
    for name, values in parts.items():
        share = statistics.median(100 * value / whole for value, whole in zip(values, parts["step"], strict=True))
        print(f"| {name} | {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}) | {share:.2f} |")


if __name__ == "__main__":
    main()
