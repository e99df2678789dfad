"""Deep backbones on Fashion-MNIST: a small VDVAE of 13 layers and a small NVAE of 10, of the official code, on the CPU.

    VDVAE_REPO=.../vdvae .venv/bin/python benchmarks/deep.py vdvae --train fashion60k.npz:train_images
    NVAE_REPO=.../NVAE .venv/bin/python benchmarks/deep.py nvae --train fashion60k.npz:train_images

trains one on the images of a file (all 60,000 are in Debian's package dataset-fashion-mnist) for so many --minutes of
processor time, and prints the Fréchet distances of its reconstructions and of its own samples. Weights go to --out,
every few minutes too, and an interrupted run goes on from them with what is left of its time. With --initial it begins
with weights, and with --kl-weight below 1 it reconstructs better and samples worse. Of the VDVAE, after 80 minutes and
35 more at a weight of .3, they are benchmarks/vdvae.safetensors (MIT licence, as its code and the images).

The models are for colour: grey images of 28x28 are padded to 32x32 and go in three times, and what comes out is
averaged and cut. Where a command asks for a loader, give `benchmarks/deep.py:vdvae`, with other weights if you like, or
`benchmarks/deep.py:nvae` and its weights.
"""

import argparse
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
import torch.nn.functional as F
from hvae_ebm_prior_adapters.nvae import make_portable
from recipe_backbones import NVAE_CIFAR10, modules_of, official_nvae
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from hvae_ebm_prior.adapters import NVAEAdapter, VDVAEAdapter
from hvae_ebm_prior.baselines import GaussianPrior
from hvae_ebm_prior.evaluation import in_chunks
from hvae_ebm_prior.evaluation.features import extract
from hvae_ebm_prior.evaluation.metrics import frechet_distance, moments
from hvae_ebm_prior.training.array_data import load_images
from hvae_ebm_prior.training.optimizer import update_average

HERE = Path(__file__).parent
# Pixels around a 28x28 image.
PADDING = 2
VDVAE_SETTINGS = {
    "image_size": 32,
    "image_channels": 3,
    "width": 64,
    "zdim": 8,
    "bottleneck_multiple": 0.5,
    "custom_width_str": "",
    "no_bias_above": 64,
    "num_mixtures": 3,
    "enc_blocks": "32x2,32d2,16x2,16d2,8x2,8d2,4x2,4d4,1x1",
    "dec_blocks": "1x1,4m1,4x2,8m4,8x3,16m8,16x3,32m16",
}
# (x + shift) * scale of pixels 0..255.
SHIFT, SCALE = -73.0, 1 / 90.0
NVAE_SETTINGS = NVAE_CIFAR10 | {
    "num_latent_scales": 2,
    "num_groups_per_scale": 5,
    "num_latent_per_group": 8,
    "num_channels_enc": 16,
    "num_channels_dec": 16,
    "num_preprocess_blocks": 2,
    "num_postprocess_blocks": 2,
    "num_preprocess_cells": 1,
    "num_postprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 3,
}


class GreyAdapter:
    """An adapter of a model of 32x32 colour images, for grey ones of 28x28."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Any]:
        return self.adapter.top_down(batch_size)

    def infer(self, images: Tensor) -> Sequence[Tensor]:
        return self.adapter.infer(as_colour(images))

    def infer_with_density(self, images: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return self.adapter.infer_with_density(as_colour(images))

    def infer_with_posterior(self, images: Tensor) -> Sequence[tuple[Tensor, Tensor, Tensor]] | None:
        return self.adapter.infer_with_posterior(as_colour(images))

    def log_likelihood(self, features: Any, images: Tensor) -> Tensor:
        """Of the images as the model sees them."""
        return self.adapter.log_likelihood(features, as_colour(images))

    def model_images(self, images: Tensor) -> Tensor:
        """Images as the model sees them, whose dimensions bits are of."""
        return as_colour(images)

    def decode(self, features: Any) -> Tensor:
        images = self.adapter.decode(features).mean(1, keepdim=True)
        return images[..., PADDING:-PADDING, PADDING:-PADDING]


def as_colour(images: Tensor) -> Tensor:
    """Grey images (N, 1, 28, 28) as (N, 3, 32, 32)."""
    return F.pad(images, [PADDING] * 4).expand(-1, 3, -1, -1)


def make_vdvae() -> nn.Module:
    """The small VDVAE with random weights, of the clone that VDVAE_REPO names."""
    hps, vae = modules_of(os.environ["VDVAE_REPO"], "hps", "vae")
    # A tenth off the time of its convolutions on a CPU.
    return vae.VAE(hps.Hyperparams(**VDVAE_SETTINGS)).to(memory_format=torch.channels_last)


def make_nvae() -> nn.Module:
    """The small NVAE with random weights, of the clone that NVAE_REPO names."""
    model = make_portable(official_nvae(os.environ["NVAE_REPO"], NVAE_SETTINGS))
    # A quarter off the time of its depthwise convolutions on a CPU.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def vdvae_loss(model: nn.Module, images: Tensor, kl_weight: float) -> Tensor:
    """The negative bound in nats a dimension, as the official training minimises it, its KL divergence weighted."""
    pixels = as_colour(images).permute(0, 2, 3, 1)
    terms = model((255 * pixels + SHIFT) * SCALE, 2 * pixels - 1)
    return terms["distortion"] + kl_weight * terms["rate"]


def nvae_loss(model: nn.Module, images: Tensor, kl_weight: float) -> Tensor:
    """The negative bound in nats a dimension, its KL divergence weighted, and the regularisation of batch norm."""
    (utils,) = modules_of(os.environ["NVAE_REPO"], "utils")
    x = as_colour(images)
    logits, _, _, divergences, _ = model(x)
    distortion = utils.reconstruction_loss(model.decoder_output(logits), x, crop=model.crop_output)
    bound = distortion + kl_weight * torch.stack(divergences, dim=1).sum(1)
    return bound.mean() / x[0].numel() + 1e-3 * model.batchnorm_loss() / x[0].numel()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """As in the official training, at a larger rate."""
    return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))


def adamax(model: nn.Module) -> torch.optim.Optimizer:
    """The official training's."""
    return torch.optim.Adamax(model.parameters(), lr=1e-2)


class Model(NamedTuple):
    """How a model is made, adapted and trained."""

    make: Callable[[], nn.Module]
    adapt: Callable[[nn.Module], Any]
    loss: Callable[[nn.Module, Tensor, float], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    # Share of the training over which the KL divergence is turned up.
    warm_up: float


MODELS = {
    "vdvae": Model(make_vdvae, partial(VDVAEAdapter, shift=SHIFT, scale=SCALE), vdvae_loss, adam, 0.0),
    "nvae": Model(make_nvae, NVAEAdapter, nvae_loss, adamax, 0.3),
}


def load(name: str, weights: str) -> GreyAdapter:
    """The adapter of a trained model."""
    model = MODELS[name].make()
    load_model(model, weights)
    return GreyAdapter(MODELS[name].adapt(model.eval()))


def vdvae(weights: str = f"{HERE}/vdvae.safetensors") -> GreyAdapter:
    """The trained VDVAE, for commands."""
    return load("vdvae", weights)


def nvae(weights: str) -> GreyAdapter:
    """The trained NVAE, for commands."""
    return load("nvae", weights)


def train(args: Namespace, images: Tensor) -> nn.Module:
    """Train for so many minutes; the averaged model. State is kept beside --out."""
    recipe = MODELS[args.model]
    torch.manual_seed(args.seed)
    model = recipe.make()
    if args.initial:
        load_model(model, args.initial)
    model.train()
    average = recipe.make().eval()
    average.load_state_dict(model.state_dict())
    optimizer = recipe.optimizer(model)
    rate = optimizer.param_groups[0]["lr"]
    state = args.out.with_suffix(".training.pt")
    step, spent = 0, 0.0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        for part, name in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(kept[name])
        step, spent = kept["step"], kept["spent"]
    generator = torch.Generator().manual_seed(args.seed + step)
    torch.manual_seed(args.seed + step)
    budget = 60 * args.minutes
    last, saved = time.process_time(), time.monotonic()
    while spent < budget:
        progress = spent / budget
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        batch = images[torch.randint(len(images), (args.batch_size,), generator=generator)]
        weight = args.kl_weight * (min(1.0, progress / recipe.warm_up) if recipe.warm_up else 1.0)
        loss = recipe.loss(model, batch, weight)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        if torch.isfinite(norm):
            optimizer.step()
            update_average(average, model, 0.999, step)
        step += 1
        now = time.process_time()
        spent, last = spent + now - last, now
        if step % 100 == 0:
            print(f"step {step}, {spent:.0f} s: {loss.item():.4f} nats a dimension, gradient {norm:.2f}", flush=True)
        if time.monotonic() - saved > 300 or spent >= budget:
            saved = time.monotonic()
            parts = {"model": model, "average": average, "optimizer": optimizer}
            kept = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "spent": spent}
            scratch = state.with_suffix(".part")
            torch.save(kept, scratch)
            scratch.replace(state)
            save_model(average, str(args.out))
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--train", required=True, help="file.npz:name of grey images, 28x28")
    parser.add_argument("--test", default=f"{HERE.parent}/examples/data/fashion_mnist.npz:test_images")
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--kl-weight", type=float, default=1.0, help="below 1: better reconstructions, worse samples")
    parser.add_argument("--initial", help="weights to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="weights (examples/output/MODEL.safetensors)")
    args = parser.parse_args()
    args.out = args.out or HERE.parent / "examples" / "output" / f"{args.model}.safetensors"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images = load_images(args.train)
    train(args, images)

    from classifier import load_classifier

    features, cpu = load_classifier().features, torch.device("cpu")
    test = load_images(args.test)[:2000]
    target = moments(extract(features, images[:10_000], cpu)[0])
    prior = GaussianPrior(load(args.model, str(args.out)))
    generator = torch.Generator().manual_seed(args.seed)
    pictures = {
        "real": test,
        "reconstructions": in_chunks(lambda x: prior.decode(prior.encode(x, generator=generator)), test),
        "Gaussian prior": prior.sample(len(test), generator=generator),
    }
    distances = {name: frechet_distance(extract(features, x, cpu)[0], target) for name, x in pictures.items()}
    about = {"layers": len(prior.latent_shapes), "dimensions": prior.dim, "minutes": args.minutes}
    print(json.dumps(about | distances, indent=2))
    args.out.with_suffix(".json").write_text(json.dumps(about | distances, indent=2) + "\n")


if __name__ == "__main__":
    main()
