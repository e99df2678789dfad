"""What a trained prior of the main job is worth: against held-out images, by every way of drawing, and as a density.

    python3 examples/quickstart.py --seed 0 --out examples/output/0      # likewise 1, 2
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/prior.py examples/output/*/prior

prints Markdown tables, mean and range over the priors, and writes benchmarks/prior.json. FD is the Fréchet distance
over the example classifier's features, of --images samples against the training images and against the test images. The
density's gain is what log p(u) of the prior adds to the backbone's bound of log p(x).
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import load_prior
from transitions import spread

from hvae_ebm_prior import DiffusionEBMPrior, DrawingConfig, LangevinConfig
from hvae_ebm_prior.evaluation import frechet_distance, in_chunks
from hvae_ebm_prior.evaluation.early_stopping import held_out_accuracy

RESULTS = Path(__file__).with_suffix(".json")
# How samples are drawn: settings of drawing, and of chains.
WAYS = {
    "flow, 12 steps": (DrawingConfig(), {}),
    "flow, 8 steps": (DrawingConfig(flow_steps=8), {}),
    "flow, 24 steps": (DrawingConfig(flow_steps=24), {}),
    "chains by layer, 5 steps a level": (DrawingConfig(flow_steps=0), {}),
    "chains by layer, 20 steps a level": (DrawingConfig(flow_steps=0), {"steps": 20}),
    "flow, 5 Metropolis steps": (DrawingConfig(), {"corrector_steps": 5}),
    "joint chains (Alg. 2), 5 steps a level": (DrawingConfig(ancestral=False), {}),
    "joint chains (Alg. 2), 20 steps a level": (DrawingConfig(ancestral=False), {"steps": 20}),
}


def density(prior: DiffusionEBMPrior, images: Tensor) -> dict[str, float]:
    """Gain of the density over the Gaussian one on held-out images, in nats, and accuracy of a classifier in u."""
    g = torch.Generator().manual_seed(0)
    u = torch.cat([prior.encode(part, generator=g) for part in images.split(250)])
    gaussian = -(u.square().sum(1) + prior.dim * math.log(2 * math.pi)) / 2
    noise = torch.randn(u.shape, generator=g)
    return {
        "gain": (prior.log_prob(u) - gaussian).mean().item(),
        "gain on noise": (prior.log_prob(noise) + (noise.square().sum(1) + prior.dim * math.log(2 * math.pi)) / 2)
        .mean()
        .item(),
        "accuracy": held_out_accuracy(prior, images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("priors", type=Path, nargs="+", help="folders of trained priors")
    parser.add_argument("--images", type=int, default=2000, help="samples of every way, at most 2000")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--density", type=int, default=200, help="held-out images for the density; 0 for none")
    args = parser.parse_args()
    features = load_classifier().features
    train, test = load_subset("train")[0], load_subset("test")[0]
    targets = {"training": in_chunks(features, train), "test": in_chunks(features, test)}
    results: dict[str, list[dict[str, float]]] = {}
    for folder in args.priors:
        prior = load_prior(folder)
        chains = prior.langevin
        for name in args.ways:
            drawing, changes = WAYS[name]
            prior.drawing = drawing
            prior.langevin = LangevinConfig(**{**vars(chains), **changes})
            start = time.process_time()
            images = prior.sample(args.images, generator=torch.Generator().manual_seed(5))
            seconds = (time.process_time() - start) * 1000 / args.images
            found = in_chunks(features, images)
            figures = {target: frechet_distance(found, values) for target, values in targets.items()}
            results.setdefault(name, []).append({**figures, "seconds": seconds})
            print(f"{folder} {name} {figures} {seconds:.1f}", file=sys.stderr, flush=True)
        prior.drawing, prior.langevin = DrawingConfig(), chains
        if args.density:
            results.setdefault("density", []).append(density(prior, test[: args.density]))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print("| drawn by | FD, training images | FD, test images | 1,000 samples, s of one core |\n|---|---|---|---|")
    for name in args.ways:
        cells = [spread([run[key] for run in results[name]]) for key in ("training", "test")]
        print(f"| {name} | {' | '.join(cells)} | {spread([run['seconds'] for run in results[name]], 1)} |")
    if args.density:
        gain, noise, accuracy = (
            [run[key] for run in results["density"]] for key in ("gain", "gain on noise", "accuracy")
        )
        print(f"\nlog p(u) - log N(u; 0, I): {spread(gain, 1)} nats on test images, {spread(noise, 1)} on pure noise;")
        print(f"a classifier tells samples from test images' noise at {spread(accuracy, 3)}")


if __name__ == "__main__":
    main()
