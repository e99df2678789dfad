"""Where the prior hole of the example's HVAE is: Fréchet distance when some layers' noise comes from the posterior and the rest from N(0, I).

    .venv/bin/python benchmarks/hole_by_layer.py

prints a Markdown table, mean and range over seeds. A layer whose replacement by Gaussian noise costs much is where the prior has most to learn.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import make_prior

from hvae_ebm_prior.evaluation import frechet_distance, in_chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    prior, features = make_prior(), load_classifier().features
    images, layers = load_subset("test")[0], range(len(prior.latent_shapes))
    target = in_chunks(features, load_subset("train")[0])
    print("| layers from the posterior | FD |\n|---|---|")
    for kept in itertools.chain.from_iterable(itertools.combinations(layers, k) for k in range(len(layers) + 1)):
        distances = []
        for seed in args.seeds:
            g = torch.Generator().manual_seed(seed)
            posterior = prior.split(in_chunks(lambda x, g=g: prior.encode(x, generator=g), images))
            gaussian = prior.split(torch.randn(len(images), prior.dim, generator=g))
            u = prior.join([(posterior if i in kept else gaussian)[i] for i in layers])
            distances.append(frechet_distance(in_chunks(features, in_chunks(prior.decode, u)), target))
        name = ", ".join(map(str, kept)) or "none"
        print(f"| {name} | {statistics.mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f}) |", flush=True)


if __name__ == "__main__":
    main()
