"""What the encoder costs in training, what a posterior cache saves, and what a cache of M draws costs in quality.

    .venv/bin/python benchmarks/posterior_cache.py [--pairs 20] [--clock wall] [--quality]

prints Markdown tables and writes benchmarks/posterior_cache.json. The model and the settings are those of the example
(HVAE of Fashion-MNIST, preset `fast`). A step from images and one from the cache make a pair, in an order that is
drawn; the speed-up is the ratio within a pair, and the encoder's share that of the posterior draw in the step from
images; medians and ranges over pairs. Times on the wall want a machine that does nothing else; --clock cpu counts the
processor's time instead. --quality trains the whole run per seed and number of draws, which takes hours: the Fréchet
distance of samples, as in the example.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import make_prior
from torch import Tensor, nn

from hvae_ebm_prior import TrainingConfig
from hvae_ebm_prior.evaluation import frechet_distance, in_chunks
from hvae_ebm_prior.posterior_cache import PosteriorCache
from hvae_ebm_prior.training.activity import measure_activity
from hvae_ebm_prior.training.batches import Batches
from hvae_ebm_prior.training.optimizer import make_optimizer, update_average

RESULTS = Path(__file__).with_suffix(".json")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


class Steps:
    """Steps of training, as `fit` takes them, one at a time.

    Args:
        data: images or a cache.
        clock: returns the time in seconds.
    """

    def __init__(self, data: Tensor | PosteriorCache, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.config = TrainingConfig()
        self.prior = make_prior().train()
        self.average = make_prior()
        self.optimizer = make_optimizer(self.prior, self.config)
        self.batches = Batches(data, self.config.batch_size, seed(0))
        self.generator = seed(1)

    def take(self) -> tuple[float, float]:
        """Seconds of a step, and of its posterior noise."""
        start = self.clock()
        images, _, epoch = next(self.batches)
        u = self.batches.noise(self.prior, images, epoch, self.generator)
        noise = self.clock() - start
        self.optimizer.zero_grad()
        self.prior.batch_loss(u, None, self.generator).total.mean().backward()
        nn.utils.clip_grad_norm_(self.prior.parameters(), self.config.clip_norm)
        update_average(self.average, self.prior, self.config.ema_decay, self.batches.index)
        self.optimizer.step()
        return self.clock() - start, noise


def measure_time(images: Tensor, pairs: int, clock: str, folder: Path) -> dict[str, object]:
    """Seconds of steps from images and from the cache, and of the encoder, pair by pair."""
    prior = make_prior()
    start = CLOCKS[clock]()
    cache = PosteriorCache.build(prior, images, folder / "time", draws=4, generator=seed(0))
    built = CLOCKS[clock]() - start
    steps = {"images": Steps(images, CLOCKS[clock]), "cache": Steps(cache, CLOCKS[clock])}
    found: dict[str, list[float]] = {"images": [], "cache": [], "encode": []}
    for i in range(-1, pairs):
        taken = {name: steps[name].take() for name in random.Random(i).sample(sorted(steps), 2)}
        if i >= 0:  # the first pair warms up
            found["images"].append(taken["images"][0])
            found["encode"].append(taken["images"][1])
            found["cache"].append(taken["cache"][0])
    size = sum(path.stat().st_size for path in (folder / "time").iterdir())
    return {"clock": clock, "seconds": found, "building": built, "bytes": size, "draws": 4, "images": len(images)}


def measure_quality(
    images: Tensor, seeds: list[int], draws: list[int], iterations: int, folder: Path
) -> dict[str, list[float]]:
    """Fréchet distance of as many samples as there are test images, by the number of draws; 0 for no cache."""
    features = load_classifier().features
    reference = in_chunks(features, images)
    found: dict[str, list[float]] = {}
    for number in seeds:
        for m in (0, *draws):
            prior, g = make_prior(number), seed(number)
            # Activity is measured on images for all, as it takes two draws of an image.
            measure_activity(prior, Batches(images, 64, g), TrainingConfig().activity_images, g)
            data = images
            if m:
                data = PosteriorCache.build(prior, images, folder / f"{number}_{m}", draws=m, generator=seed(number))
            prior.fit(data, training=replace(TrainingConfig(), iterations=iterations), generator=g)
            samples = prior.sample(2000, generator=seed(1000 + number))
            distance = frechet_distance(in_chunks(features, samples), reference)
            found.setdefault(str(m), []).append(distance)
            print(f"seed {number}, {m or 'no'} draws: FD {distance:.2f}", file=sys.stderr, flush=True)
    return found


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--images", type=int, default=2000, help="images of the cache whose building is timed")
    parser.add_argument(
        "--quality", action="store_true", help="also train with caches of M draws and without, and compare samples"
    )
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16], help="numbers of draws M of --quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --quality")
    parser.add_argument("--training", type=int, default=TrainingConfig().iterations, help="iterations of --quality")
    args = parser.parse_args()
    train = load_subset("train")[0]
    results: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        timed = measure_time(train[: args.images], args.pairs, args.clock, Path(folder))
        results["time"] = timed
        seconds = timed["seconds"]
        share = [encode / step for encode, step in zip(seconds["encode"], seconds["images"], strict=True)]
        gain = [step / cached for step, cached in zip(seconds["images"], seconds["cache"], strict=True)]
        print("| | median (range) over pairs |\n|---|---|")
        for words, values, digits in (
            ("step from images, ms", [1000 * each for each in seconds["images"]], 1),
            ("step from the cache, ms", [1000 * each for each in seconds["cache"]], 1),
            ("encoder's share of a step, %", [100 * each for each in share], 1),
            ("speed-up by the cache", gain, 3),
        ):
            print(f"| {words} | {spread(values, digits)} |")
        print(
            f"\nBuilding: {timed['building']:.1f} s and {timed['bytes'] / 1e6:.0f} MB for {timed['draws']} draws of "
            f"{timed['images']} images."
        )
        if args.quality:
            results["quality"] = found = measure_quality(train, args.seeds, args.draws, args.training, Path(folder))
            passes = args.training * TrainingConfig().batch_size / len(train)
            print(f"\n{args.training} iterations, {passes:.1f} passes over the data.\n")
            print("| draws per image | FD, median (range) over seeds |\n|---|---|")
            for m, values in found.items():
                print(f"| {'encoder at every step' if m == '0' else m} | {spread(values, 2)} |")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
