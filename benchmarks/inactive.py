"""What layers that say nothing of images would cost, were their networks run: in training and in sampling.

    VDVAE_REPO=.../vdvae OMP_NUM_THREADS=1 .venv/bin/python benchmarks/inactive.py benchmarks/deep.py:vdvae

prints the layers that `fit` finds inactive, and a Markdown table of processor seconds: medians of --rounds in which
both take turns, with the ratio within each round. Iterations are of the score alone, by the default batch.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig
from hvae_ebm_prior.cli.loading import load_function
from hvae_ebm_prior.training.array_data import load_images

HERE = Path(__file__).parent
ITERATIONS, SAMPLES = 4, 32


def seconds(prior: DiffusionEBMPrior, images: torch.Tensor) -> tuple[float, float]:
    """Processor seconds of an iteration, and of drawing the samples."""
    start = time.process_time()
    training = TrainingConfig(iterations=ITERATIONS, objective="score", activity_images=0)
    prior.fit(images, training=training, generator=torch.Generator().manual_seed(0), progress=False)
    trained = time.process_time()
    prior.sample(SAMPLES, generator=torch.Generator().manual_seed(0))
    return (trained - start) / ITERATIONS, time.process_time() - trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", help="module:function or file.py:function of the backbone's adapter or model")
    parser.add_argument("checkpoint", nargs="?", help="what it is given")
    parser.add_argument("--train", default=f"{HERE.parent}/examples/data/fashion_mnist.npz:train_images")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    given = [] if args.checkpoint is None else [args.checkpoint]
    prior = DiffusionEBMPrior(load_function(args.loader)(*given))
    images = load_images(args.train)
    training = TrainingConfig(iterations=1, objective="score")
    prior.fit(images, training=training, generator=torch.Generator().manual_seed(0), progress=False)
    inactive = [i for i, network in enumerate(prior.energies) if network.inactive]
    print(f"inactive: {', '.join(map(str, inactive)) or 'none'} of {len(prior.energies)} layers\n", flush=True)
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(args.rounds):
        for left_out in times:
            for i in inactive:
                prior.energies[i].inactive = left_out
            times[left_out].append(seconds(prior, images))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    print("| | all networks, s | without, s | ratio |\n|---|---|---|---|")
    for number, name in enumerate(("an iteration", f"{SAMPLES} samples")):
        run, left_out = ([each[number] for each in times[flag]] for flag in (False, True))
        ratios = [a / b for a, b in zip(left_out, run, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(run):.2f} | {statistics.median(left_out):.2f} | {ratio} |")


if __name__ == "__main__":
    main()
