"""Does a better prior pay in likelihood? The bound on log p(x) of held-out images, with the Gaussian prior and ours.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/density.py hvae_ebm_prior.adapters:HVAE.load \
        examples/data/hvae.safetensors examples/data/prior

prints, and keeps in benchmarks/density.json under --name, the backbone's own bound in nats and bits a dimension, what
our prior adds to it, log p(u) - log N(u; 0, I) of the posterior draws, in all and by layer, and standard errors over
the images. Both bounds share the draws. The divergence of large layers is estimated, which adds noise and no bias.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.backbone.elbo import backbone_bound
from hvae_ebm_prior.chains.streams import drawing_by
from hvae_ebm_prior.cli.loading import load_function
from hvae_ebm_prior.density.log_prob import log_prob_by_layer
from hvae_ebm_prior.likelihood import bits_per_dimension
from hvae_ebm_prior.training.array_data import load_images

HERE = Path(__file__).parent
RESULTS = Path(__file__).with_suffix(".json")


@torch.no_grad()
def measure(prior: DiffusionEBMPrior, images: Tensor, steps: int, probes: int, chunk: int, seed: int) -> dict[str, Any]:
    """Means and standard errors over the images."""
    bounds, gains = [], []
    with drawing_by(torch.Generator().manual_seed(seed), prior.device):
        for part in images.split(chunk):
            u, bound = backbone_bound(prior.transform, part)
            gaussian = torch.stack([-layer.flatten(1).square().sum(1) / 2 for layer in prior.split(u)], dim=1)
            sizes = torch.tensor([math.prod(shape) for shape in prior.latent_shapes], device="cpu", dtype=torch.float64)
            gaussian = gaussian.double() - sizes * math.log(2 * math.pi) / 2
            gains.append(log_prob_by_layer(prior, u.to(prior.dtype), steps, probes, seed).double() - gaussian)
            bounds.append(bound.double())
    bound, gain = torch.cat(bounds), torch.cat(gains)
    model_images = getattr(prior.backbone, "model_images", lambda x: x)(images)
    rows = {"Gaussian prior": bound, "ours": bound + gain.sum(1), "gain": gain.sum(1)}
    return {
        "images": len(images),
        "steps": steps,
        "probes": probes,
        "nats": {name: spread(values) for name, values in rows.items()},
        "bits a dimension": {name: spread(bits_per_dimension(rows[name], model_images)) for name in list(rows)[:2]},
        "gain by layer": [spread(values) for values in gain.unbind(1)],
    }


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", help="module:function or file.py:function of the backbone's adapter or model")
    parser.add_argument("checkpoint", help="what it is given")
    parser.add_argument("prior", type=Path, help="a folder that save_pretrained wrote")
    parser.add_argument("--images", default=f"{HERE.parent}/examples/data/fashion_mnist.npz:test_images")
    parser.add_argument("--count", type=int, default=100, help="the first images (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="Runge-Kutta steps of a layer's flow (%(default)s)")
    parser.add_argument("--probes", type=int, default=4, help="of a large layer's divergence (%(default)s)")
    parser.add_argument("--chunk", type=int, default=50, help="images at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the run in the results (the prior's folder)")
    args = parser.parse_args()
    prior = DiffusionEBMPrior.from_pretrained(args.prior, backbone=load_function(args.loader)(args.checkpoint))
    images = load_images(args.images)[: args.count]
    start = time.process_time()
    found = measure(prior, images, args.steps, args.probes, args.chunk, args.seed)
    found["processor seconds"] = time.process_time() - start
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[args.name or args.prior.name] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("| prior | backbone's bound | with ours | gain, nats | bits a dimension | with ours | gain by layer |")
    print("|---" * 7 + "|")
    for name, each in results.items():
        nats = [f"{mean:.1f} ± {error:.1f}" for mean, error in each["nats"].values()]
        bits = [f"{mean:.4f}" for mean, _ in each["bits a dimension"].values()]
        layers = ", ".join(f"{mean:.1f}" for mean, _ in each["gain by layer"])
        print(f"| {name} | {' | '.join(nats)} | {' | '.join(bits)} | {layers} |")


if __name__ == "__main__":
    main()
