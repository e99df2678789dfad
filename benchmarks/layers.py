"""Which layers a prior still loses: samples whose upper layers are the encoder's, and the others the prior's.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/layers.py hvae_ebm_prior.adapters:HVAE.load \
        examples/data/hvae.safetensors examples/output/prior

prints Fréchet distances of --samples images by the example's classifier: for every k (or those of --held), the k upper
layers are posterior draws of training images, and the layers below are drawn given them by the prior, by the Gaussian
prior, or are the encoder's as well. The difference of two rows is what a layer costs.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.cli.loading import load_function
from hvae_ebm_prior.control import resample
from hvae_ebm_prior.evaluation.features import extract
from hvae_ebm_prior.evaluation.metrics import frechet_distance, moments
from hvae_ebm_prior.training.array_data import load_images

HERE = Path(__file__).parent
CHUNK = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", help="module:function or file.py:function of the backbone's adapter or model")
    parser.add_argument("checkpoint", help="what it is given")
    parser.add_argument("prior", type=Path, help="a folder that save_pretrained wrote")
    parser.add_argument("--train", default=f"{HERE.parent}/examples/data/fashion_mnist.npz:train_images")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--held", type=int, nargs="+", help="numbers k of upper layers (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    prior = DiffusionEBMPrior.from_pretrained(args.prior, backbone=load_function(args.loader)(args.checkpoint))
    train = load_images(args.train)[:10_000]
    features, cpu = load_classifier().features, torch.device("cpu")
    target = moments(extract(features, train, cpu)[0])
    generator = torch.Generator().manual_seed(args.seed)

    def distance(u: Tensor) -> float:
        with torch.no_grad():
            images = torch.cat([prior.decode(part) for part in u.split(CHUNK)])
        return frechet_distance(extract(features, images, cpu)[0], target)

    chosen = train[torch.randperm(len(train), generator=generator)[: args.samples]]
    with torch.no_grad():
        posterior = torch.cat([prior.encode(part, generator=generator) for part in chosen.split(CHUNK)])
    gaussian = torch.randn(posterior.shape, generator=generator, device="cpu", dtype=posterior.dtype)
    layers = len(prior.latent_shapes)
    results = {"reconstructions": distance(posterior), "Gaussian prior": distance(gaussian), "held": {}}
    print("| layers of the encoder | below by the prior | below Gaussian |\n|---|---|---|", flush=True)
    for k in args.held or range(layers):
        ours = torch.cat([resample(prior, part, range(k), generator=generator) for part in posterior.split(CHUNK)])
        upper = sum(layer[0].numel() for layer in prior.split(posterior[:1])[:k])
        below = torch.cat((posterior[:, :upper], gaussian[:, upper:]), dim=1)
        results["held"][k] = row = {"ours": distance(ours), "Gaussian": distance(below)}
        print(f"| {k} of {layers} | {row['ours']:.2f} | {row['Gaussian']:.2f} |", flush=True)
    print(f"| {layers} of {layers} | {results['reconstructions']:.2f} | {results['reconstructions']:.2f} |")
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
