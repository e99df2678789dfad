"""Where the prior hole of the example's HVAE is: in which layers, and between which noise levels.

    .venv/bin/python benchmarks/hole.py [--prior examples/output/prior]

prints Markdown tables of Fréchet distances, mean and range over seeds. In the first, the noise of some layers comes
from the posterior, the rest from N(0, I): a layer whose replacement costs much is where the prior has most to learn. In
the second, posterior noise is diffused to a signal-to-noise ratio and drawn back by the Gaussian prior alone,
u ~ p0(u | u_t): what is lost there is what the levels below must learn. In the third, for a prior that the quickstart
saved, some layers are held at posterior noise and the prior draws the others: what the layers below cost.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import load_prior, make_prior

from hvae_ebm_prior.evaluation import frechet_distance, in_chunks

RATIOS = (200, 60, 30, 15, 10, 6, 3, 2, 1, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prior", type=Path, help="the folder of a trained prior, for the third table")
    args = parser.parse_args()
    prior, features = make_prior(), load_classifier().features
    images, layers = load_subset("test")[0], range(len(prior.latent_shapes))
    target = in_chunks(features, load_subset("train")[0])

    # Posterior noise of every seed, and its generator as the encoder leaves it.
    encoded = []
    for seed in args.seeds:
        g = torch.Generator().manual_seed(seed)
        encoded.append((in_chunks(lambda x, g=g: prior.encode(x, generator=g), images), g.get_state()))

    def row(name: str, noise: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        distances = []
        for posterior, state in encoded:
            u = noise(posterior, torch.Generator().set_state(state))
            distances.append(frechet_distance(in_chunks(features, in_chunks(prior.decode, u)), target))
        print(
            f"| {name} | {statistics.mean(distances):.2f} ({min(distances):.2f} to {max(distances):.2f}) |", flush=True
        )

    print("| layers from the posterior | FD |\n|---|---|")
    for kept in itertools.chain.from_iterable(itertools.combinations(layers, k) for k in range(len(layers) + 1)):

        def mixed(u: Tensor, g: torch.Generator, kept: tuple[int, ...] = kept) -> Tensor:
            posterior, gaussian = prior.split(u), prior.split(torch.randn(u.shape, generator=g))
            return prior.join([(posterior if i in kept else gaussian)[i] for i in layers])

        row(", ".join(map(str, kept)) or "none", mixed)

    print("\n| diffused to a signal-to-noise ratio of | FD |\n|---|---|")
    for ratio in RATIOS:

        def diffused_and_back(u: Tensor, g: torch.Generator, ratio: float = ratio) -> Tensor:
            signal, noise = (ratio / (1 + ratio)) ** 0.5, (1 / (1 + ratio)) ** 0.5
            u_t = signal * u + noise * torch.randn(u.shape, generator=g)
            return signal * u_t + noise * torch.randn(u.shape, generator=g)

        row(f"{ratio:g}", diffused_and_back)

    if args.prior is None:
        return
    prior = load_prior(args.prior)
    print("\n| held at the posterior, the others from the trained prior | FD |\n|---|---|")
    for held in ((), (0,), (0, 1)):

        def completed(u: Tensor, g: torch.Generator, held: tuple[int, ...] = held) -> Tensor:
            return prior.sample_noise(len(u), fixed={i: prior.split(u)[i] for i in held}, generator=g)

        row(", ".join(map(str, held)) or "none", completed)


if __name__ == "__main__":
    main()
