"""What the encoder costs in training, what a posterior cache saves, and what a cache of M draws costs in quality.

    .venv/bin/python benchmarks/posterior_cache.py [--iterations 25] [--rounds 7] [--quality]

prints Markdown tables and writes benchmarks/posterior_cache.json. The model and the settings are those of the example (HVAE of Fashion-MNIST, preset
`fast`). Times want a machine that does nothing else: training from images and from the cache take turns, round by round, in an order that is drawn;
the speed-up is the median over rounds of their ratio, with its range, and the encoder's share is that of `encode` in a step of the same round.
--quality trains the whole run per seed and per number of draws, which takes hours: the Fréchet distance of samples, as in the example.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import make_prior
from torch import Tensor

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig
from hvae_ebm_prior.batches import Batches
from hvae_ebm_prior.evaluation import frechet_distance, in_chunks
from hvae_ebm_prior.posterior_cache import PosteriorCache
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.training import measure_activity

RESULTS = Path(__file__).with_suffix(".json")
# Steps before those that are timed.
WARM = 5


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def seconds_per_step(prior: DiffusionEBMPrior, data: Tensor | PosteriorCache, config: TrainingConfig) -> float:
    """Of the steps of a short run, but for the first few."""
    history = prior.fit(data, training=config, generator=seed(0), progress=False)
    return (history[-1].seconds - history[WARM - 1].seconds) / (len(history) - WARM)


def encoding_seconds(prior: DiffusionEBMPrior, images: Tensor, count: int) -> float:
    """Of a posterior draw of a batch."""
    start = time.perf_counter()
    for i in range(count):
        prior.encode(images, generator=seed(i))
    return (time.perf_counter() - start) / count


def measure_time(images: Tensor, iterations: int, rounds: int, folder: Path) -> dict[str, object]:
    """Seconds per step with and without the cache, round by round."""
    prior, config = make_prior("smooth", 0), replace(PRESETS["fast"].training, iterations=iterations + WARM, activity_images=0)
    start = time.perf_counter()
    cache = PosteriorCache.build(prior, images, folder / "time", draws=4, generator=seed(0))
    built = time.perf_counter() - start
    found: dict[str, list[float]] = {"images": [], "cache": [], "encode": []}
    for i in range(rounds):
        tasks = {
            "images": lambda: seconds_per_step(make_prior("smooth", 0), images, config),
            "cache": lambda: seconds_per_step(make_prior("smooth", 0), cache, config),
            "encode": lambda: encoding_seconds(prior, images[: config.batch_size], iterations),
        }
        for name in random.Random(i).sample(sorted(tasks), len(tasks)):
            found[name].append(tasks[name]())
    size = sum(path.stat().st_size for path in (folder / "time").iterdir())
    return {"seconds": found, "building": built, "bytes": size, "draws": 4, "images": len(images), "batch_size": config.batch_size}


def measure_quality(images: Tensor, seeds: list[int], draws: list[int], iterations: int, folder: Path) -> dict[str, list[float]]:
    """Fréchet distance of as many samples as there are test images, by the number of draws; 0 for no cache."""
    features = load_classifier().features
    reference = in_chunks(features, images)
    found: dict[str, list[float]] = {}
    for number in seeds:
        for m in (0, *draws):
            prior, g = make_prior("smooth", number), seed(number)
            # Activity is measured on images for all, as a cache of one draw cannot tell it.
            measure_activity(prior, Batches(images, 64, g), PRESETS["fast"].training.activity_images, g)
            data = PosteriorCache.build(prior, images, folder / f"{number}_{m}", draws=m, generator=seed(number)) if m else images
            prior.fit(data, training=replace(PRESETS["fast"].training, iterations=iterations), generator=g)
            distance = frechet_distance(in_chunks(features, prior.sample(2000, generator=seed(1000 + number))), reference)
            found.setdefault(str(m), []).append(distance)
            print(f"seed {number}, {m or 'no'} draws: FD {distance:.2f}", file=sys.stderr, flush=True)
    return found


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=25, help="steps that are timed, per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=2000, help="images of the cache whose building is timed")
    parser.add_argument("--quality", action="store_true", help="also train with caches of M draws and without, and compare samples")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16], help="numbers of draws M of --quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --quality")
    parser.add_argument("--training", type=int, default=PRESETS["fast"].training.iterations, help="iterations of --quality")
    args = parser.parse_args()
    train = load_subset("train")[0]
    results: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        timed = measure_time(train[: args.images], args.iterations, args.rounds, Path(folder))
        results["time"], seconds = timed, timed["seconds"]
        share = [encode / step for encode, step in zip(seconds["encode"], seconds["images"], strict=True)]
        gain = [step / cached for step, cached in zip(seconds["images"], seconds["cache"], strict=True)]
        print("| | median (range) over rounds |\n|---|---|")
        for words, values, digits in (
            ("step from images, ms", [1000 * each for each in seconds["images"]], 1),
            ("step from the cache, ms", [1000 * each for each in seconds["cache"]], 1),
            ("encoder's share of a step, %", [100 * each for each in share], 1),
            ("speed-up by the cache", gain, 3),
        ):
            print(f"| {words} | {spread(values, digits)} |")
        print(f"\nBuilding: {timed['building']:.1f} s and {timed['bytes'] / 1e6:.0f} MB for {timed['draws']} draws of {timed['images']} images.")
        if args.quality:
            results["quality"] = found = measure_quality(train, args.seeds, args.draws, args.training, Path(folder))
            passes = args.training * PRESETS["fast"].training.batch_size / len(train)
            print(f"\n{args.training} iterations, {passes:.1f} passes over the data.\n")
            print("| draws per image | FD, median (range) over seeds |\n|---|---|")
            for m, values in found.items():
                print(f"| {'encoder at every step' if m == '0' else m} | {spread(values, 2)} |")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
