r"""What trained priors of the example's HVAE gain in nats, and how many temperatures their normalisers need.

    .venv/bin/python benchmarks/likelihood.py [examples/output/conditional ...] \
        [--images 48] [--steps 1 4 16 48]

prints two Markdown tables for priors that examples/conditional.py saved, over the first held-out images, and writes
benchmarks/likelihood.json. The first has the backbone's bound and what the prior adds to it: below (`lower`) and above
(`optimistic`) the value with exact normalisers, mean and standard error over images. The second has the normaliser of
every level: its forward estimate, how far the reverse one lies above it, the effective sample size and the acceptance.
All rows of a prior share posterior draws, and those of a model the diffusion. "With a last step" is the model that
takes the noise of level 0 away before it decodes; `prior.sample` does not. The HVAE's likelihood is a density over [0,
1] of pixels that are not dequantised: bits per dimension are negative, and comparable among its priors alone.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from fashion_mnist import load_subset
from quickstart import HERE, load_prior

from hvae_ebm_prior.likelihood import AnnealingConfig, LikelihoodBound, bits_per_dimension, log_likelihood_bound

MODELS = {"as sampled": False, "with a last step": True}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over images, and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def figures(bound: LikelihoodBound, images: Tensor) -> dict[str, object]:
    """Means over images, in nats unless named otherwise."""
    normalizers = bound.normalizers
    levels = {
        "log_z": normalizers.forward,
        "gap": normalizers.reverse - normalizers.forward,
        "gain": bound.gains,
        "effective_sample_size": normalizers.effective_sample_size,
        "acceptance": normalizers.acceptance,
    }
    return {
        "elbo": mean_and_error(bound.elbo),
        "gain": mean_and_error(bound.lower - bound.elbo),
        "optimistic_gain": mean_and_error(bound.optimistic - bound.elbo),
        "bits_elbo": bits_per_dimension(bound.elbo, images).mean().item(),
        "bits_lower": bits_per_dimension(bound.lower, images).mean().item(),
        "levels": {name: value.mean(0).tolist() for name, value in levels.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "priors",
        type=Path,
        nargs="*",
        default=[HERE / "output" / "conditional"],
        help="folders of trained priors",
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16, 48], help="temperatures K")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--step-size", type=float, default=AnnealingConfig.step_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    images = load_subset("test")[0][: args.images]
    results = []
    for path in args.priors:
        prior = load_prior(path)
        for (model, last_step), steps in itertools.product(MODELS.items(), args.steps):
            if last_step and prior.schedule.sigma_bar[0] == 0:
                continue
            start = time.monotonic()
            annealing = AnnealingConfig(steps, args.particles, args.step_size)
            generator = torch.Generator().manual_seed(args.seed)
            bound = log_likelihood_bound(prior, images, last_step=last_step, annealing=annealing, generator=generator)
            row = {
                "name": f"{path.stem}, {model}",
                "images": len(images),
                "seed": args.seed,
                "seconds": time.monotonic() - start,
            }
            results.append({**row, **dataclasses.asdict(annealing), **figures(bound, images)})
            print(f"{row['name']}, {steps} temperatures: {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    args.out.write_text(json.dumps(results, indent=1).replace("NaN", "null") + "\n")

    print(
        "| prior | temperatures | backbone's bound | gain, lower | gain, optimistic | bits/dim, backbone "
        "| bits/dim, lower | s |"
    )
    print("|---" * 8 + "|")
    for row in results:
        gaps = " | ".join(f"{mean:+.2f} ± {error:.2f}" for mean, error in (row["gain"], row["optimistic_gain"]))
        elbo = f"{row['elbo'][0]:.1f} ± {row['elbo'][1]:.1f}"
        bits = f"{row['bits_elbo']:.4f} | {row['bits_lower']:.4f}"
        print(f"| {row['name']} | {row['steps']} | {elbo} | {gaps} | {bits} | {row['seconds']:.0f} |")
    print("\n| prior | temperatures | level | log Z, forward | reverse - forward | gain, lower | ESS | acceptance |")
    print("|---" * 8 + "|")
    for row in results:
        for t, (log_z, gap, gain, size, acceptance) in enumerate(zip(*row["levels"].values(), strict=True)):
            cells = f"{log_z:.2f} | {gap:.2f} | {gain:+.2f} | {size:.1f} of {row['particles']} | {acceptance:.2f}"
            print(f"| {row['name']} | {row['steps']} | {t} | {cells} |")


if __name__ == "__main__":
    main()
