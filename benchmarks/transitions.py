r"""Do chains stay where the data are when they run on? Langevin transitions of the example's trained priors.

    .venv/bin/python benchmarks/transitions.py [examples/output/conditional ...] \
        [--factors 1 2 5 20] [--samples 1000]

takes priors that examples/conditional.py saved, one per seed of training, and samples from each with so many times
its steps K per level. It prints Markdown tables, mean and range over the priors: the Fréchet distance to the training
images, the share of saturated pixels and the std of pixels beside those of real images and reconstructions, the
acceptance probability of the matching Metropolis test (that of a plain step, see `hvae_ebm_prior.transitions`), and the
relaxation time of each layer's energy in the longest run, after a quarter of its steps. Pictures of the first prior go
to --out, figures to benchmarks/transitions.json. About 10 minutes of one core per prior; with 200 samples 2, but
distances of equal runs then differ by a third.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import load_prior

from hvae_ebm_prior import ChainDiverged, DiffusionEBMPrior
from hvae_ebm_prior.evaluation import frechet_distance, in_chunks
from hvae_ebm_prior.evaluation.pictures import save_energies, save_pixels, save_strips
from hvae_ebm_prior.transitions import (
    Transitions,
    langevin_transitions,
    oversaturation,
    pixel_statistics,
    relaxation_time,
)

OUTPUT = Path(__file__).parent.parent / "examples" / "output"
# Records of pixels and acceptance per level.
RECORDS = 10


def measure(
    prior: DiffusionEBMPrior, steps: int, n: int, target: Tensor, reference: Tensor, seed: int
) -> tuple[dict[str, Any], Transitions | None]:
    """Figures of one run, and the run."""
    start = time.monotonic()
    try:
        run = langevin_transitions(
            prior, n, steps=steps, every=max(1, steps // RECORDS), generator=torch.Generator().manual_seed(seed)
        )
    except ChainDiverged as error:
        print(f"{steps} steps per level: {error}", file=sys.stderr)
        return {"steps": steps, "diverged": str(error)}, None
    images = in_chunks(prior.decode, run.samples)
    saturation = oversaturation(run, reference)
    figures = {
        "steps": steps,
        "distance": frechet_distance(in_chunks(load_classifier().features, images), target),
        "acceptance": run.acceptance.mean((1, 2)).tolist(),
        "pixels": saturation.run[0, -1].tolist(),
        "oversaturated": saturation.oversaturated,
        "energies": run.energies[0, -1].mean(0).tolist(),
        "relaxation": [relaxation_time(level[steps // 4 :]).tolist() for level in run.energies] if steps >= 8 else None,
        "seconds": time.monotonic() - start,
    }
    return figures, run


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and range where there are several."""
    if not values or any(math.isinf(value) or math.isnan(value) for value in values):
        return "too long to measure" if values else ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_tables(results: list[list[dict[str, Any]]], factors: list[int], images: dict[str, list[float]]) -> None:
    """Tables of the runs of all priors, `results[prior][factor]`."""
    levels = len(next(run for runs in results for run in runs if "distance" in run)["acceptance"])
    acceptances = " | ".join(f"acceptance, t = {t}" for t in reversed(range(levels)))
    print(f"| steps per level | FD | over that at the first | saturated | std | {acceptances} | oversaturated |")
    print("|---|---|---|---|---|" + "---|" * (levels + 1))
    for name, (_, std, saturated) in images.items():
        print(f"| {name} | | | {saturated:.3f} | {std:.3f} |{' |' * (levels + 1)}")
    for i, factor in enumerate(factors):
        runs = [runs[i] for runs in results if "distance" in runs[i]]
        pairs = [(runs[i], runs[0]) for runs in results if "distance" in runs[i] and "distance" in runs[0]]
        columns = [
            spread([run["distance"] for run in runs]),
            spread([run["distance"] / first["distance"] for run, first in pairs]),
            spread([run["pixels"][2] for run in runs], 3),
            spread([run["pixels"][1] for run in runs], 3),
            *(spread([run["acceptance"][t] for run in runs]) for t in reversed(range(levels))),
            f"{sum(run['oversaturated'] for run in runs)} of {len(runs)}",
        ]
        lost = f", {len(results) - len(runs)} of {len(results)} diverged" if len(runs) < len(results) else ""
        print(f"| {factor} K = {results[0][i]['steps']}{lost} | {' | '.join(columns)} |")
    longest = [runs[-1]["relaxation"] for runs in results if runs[-1].get("relaxation")]
    if longest:
        layers = range(len(longest[0][0]))
        print(f"\n| relaxation time, steps | {' | '.join(f'layer {i}' for i in layers)} |")
        print("|---" * (len(layers) + 1) + "|")
        for t in reversed(range(levels)):
            print(f"| t = {t} | {' | '.join(spread([run[t][i] for run in longest], 1) for i in layers)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "priors", type=Path, nargs="*", default=[OUTPUT / "conditional"], help="folders of priors, one per seed"
    )
    parser.add_argument(
        "--factors", type=int, nargs="+", default=[1, 2, 5, 20], help="multiples of K, the first one to compare with"
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of the pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    test_images = load_subset("test")[0][: args.samples]
    target = in_chunks(load_classifier().features, load_subset("train")[0])
    g, prior = torch.Generator().manual_seed(0), load_prior(args.priors[0])
    reconstructions = in_chunks(lambda x: prior.decode(prior.encode(x, generator=g)), test_images)
    images = {"real images": test_images, "reconstructions": reconstructions}
    statistic = {name: pixel_statistics(batch).mean(0).tolist() for name, batch in images.items()}

    results = []
    for seed, path in enumerate(args.priors):
        prior = load_prior(path)
        k = prior.langevin.sampling_steps or prior.langevin.steps
        runs = []
        for factor in args.factors:
            figures, run = measure(prior, factor * k, args.samples, target, reconstructions, seed)
            print(path.name, figures, file=sys.stderr, flush=True)
            runs.append(figures)
            if seed == 0 and run is not None:
                save_strips(args.out / f"transitions-{factor}.png", prior, run)
                save_energies(args.out / f"transitions-energies-{factor}.png", run)
                save_pixels(args.out / f"transitions-pixels-{factor}.png", run, reference=reconstructions)
        results.append(runs)
    print_tables(results, args.factors, statistic)
    report = {
        "samples": args.samples,
        "langevin": dataclasses.asdict(prior.langevin),
        "images": statistic,
        "torch": torch.__version__,
    }
    text = json.dumps({**report, "priors": results}, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
