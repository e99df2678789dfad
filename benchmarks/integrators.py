"""Which integrator, step and start learn the best prior at an equal number of gradients, training included.

    .venv/bin/python benchmarks/integrators.py [--gradients 2400] [--seeds 0 1 2]

trains priors for the example's HVAE, as the quickstart does but for the Langevin settings below, until their chains
have taken so many gradients of the whole walk (steps per chain times iterations), and prints a Markdown table of
Fréchet distances of 1,000 samples, mean and range over seeds. A run that diverged is counted by the distance of its
last good state. Runs that benchmarks/integrators.json holds are not repeated.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import load_backbone

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig, TrainingDiverged
from hvae_ebm_prior.evaluation import frechet_distance, in_chunks
from hvae_ebm_prior.presets import PRESETS

RESULTS = Path(__file__).with_suffix(".json")
# Changes to the quickstart's LangevinConfig.
VARIANTS = {
    "exponential, K = 8, h = .25": {"steps": 8, "step_size": 0.25},
    "strang, K = 8, h = .25": {"steps": 8, "step_size": 0.25, "integrator": "strang"},
    "leimkuhler-matthews, K = 8, h = .25": {"steps": 8, "step_size": 0.25, "integrator": "leimkuhler-matthews"},
    "exponential, K = 5, h = .4": {"steps": 5, "step_size": 0.4},
    "exponential, K = 5, h = .3": {"steps": 5, "step_size": 0.3},
    "strang, K = 5, h = .4": {"steps": 5, "step_size": 0.4, "integrator": "strang"},
    "leimkuhler-matthews, K = 5, h = .4": {"steps": 5, "step_size": 0.4, "integrator": "leimkuhler-matthews"},
    "euler, K = 5, h = .4": {"steps": 5, "step_size": 0.4, "integrator": "euler"},
    "exponential, K = 5, h = .4, from u_{t+1}": {"steps": 5, "step_size": 0.4, "start": "next"},
    "strang, K = 3, h = .65": {"steps": 3, "step_size": 0.65, "integrator": "strang"},
}


def prepare(variant: str, seed: int, gradients: int) -> tuple[DiffusionEBMPrior, TrainingConfig]:
    """The prior, and its training for so many gradients."""
    preset = PRESETS["joint-recovery"]
    langevin = dataclasses.replace(preset.langevin, **VARIANTS[variant])
    backbone = load_backbone()
    torch.manual_seed(seed)
    prior = DiffusionEBMPrior(backbone, schedule=preset.schedule, langevin=langevin, energy=preset.energy)
    return prior, dataclasses.replace(preset.training, iterations=gradients // langevin.steps)


def run(variant: str, seed: int, gradients: int) -> dict[str, float | bool]:
    """Train one prior and measure it."""
    prior, training = prepare(variant, seed, gradients)
    generator = torch.Generator().manual_seed(seed)
    diverged = False
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # restarts of the guard
        try:
            prior.fit(load_subset("train")[0], training=training, generator=generator, progress=False)
        except TrainingDiverged:
            diverged = True
    seconds = time.monotonic() - start
    features = load_classifier().features
    target = in_chunks(features, load_subset("train")[0])
    distance = frechet_distance(in_chunks(features, prior.sample(1000, generator=generator)), target)
    return {"distance": distance, "seconds": seconds, "iterations": training.iterations, "diverged": diverged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradients", type=int, default=2400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants",
        nargs="*",
        default=[*VARIANTS],
        help="run these alone; none to print the results of the file",
    )
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in args.seeds:
        for variant in args.variants:
            name = f"{variant} | {args.gradients} gradients | seed {seed}"
            if name not in results:
                results[name] = run(variant, seed, args.gradients)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(name, results[name], file=sys.stderr, flush=True)
    print("| integrator | iterations | FD | runs | diverged |\n|---|---|---|---|---|")
    for variant in VARIANTS:
        names = [f"{variant} | {args.gradients} gradients | seed {seed}" for seed in args.seeds]
        runs = [results[name] for name in names if name in results]
        if not runs:
            continue
        values = [run["distance"] for run in runs]
        spread = f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        diverged = sum(run["diverged"] for run in runs)
        print(f"| {variant} | {runs[0]['iterations']} | {spread} | {len(runs)} | {diverged} |")


if __name__ == "__main__":
    main()
