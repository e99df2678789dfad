"""Train the 3-layer HVAE of the examples on all of Fashion-MNIST.

    python examples/train_hvae.py --full /usr/share/datasets/fashion-mnist

About 40 minutes on 2 cores; writes examples/data/hvae.safetensors (EMA weights) and the log examples/data/hvae.log.
`train` does the same for any HVAE and images; examples/recipes.py calls it for CIFAR-10.
"""

import argparse
import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from fashion_mnist import load_full
from torch import Tensor

from hvae_ebm_prior.adapters import HVAE
from hvae_ebm_prior.training.optimizer import update_average

OUT = Path(__file__).parent / "data" / "hvae.safetensors"


def train(
    model: HVAE,
    images: Tensor,
    test_images: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    report: Callable[[str], object],
    after_epoch: Callable[[HVAE], object],
    generator: torch.Generator,
) -> HVAE:
    """Maximise the ELBO, with the KL divergence turned up over the first two epochs.

    Args:
        model: the model to train, on its device.
        images: (N, C, H, W) in [0, 1], where they fit.
        test_images: (M, C, H, W), for the log.
        epochs: passes over the images.
        batch_size: images per step.
        learning_rate: the largest, of Adam; it rises over 200 steps and falls as a cosine.
        report: takes lines of the log.
        after_epoch: takes the averaged model after each epoch.
        generator: source of all randomness, on the model's device.

    Returns:
        The averaged model.
    """
    device = model.start.device
    average = deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    per_epoch = max(1, len(images) // batch_size)
    steps = epochs * per_epoch
    warmup = 2 * per_epoch

    def rate(step: int) -> float:
        return min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.time()
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator, device=device).to(images.device)
        for batch in order.split(batch_size)[:per_epoch]:
            weight = min(1.0, (step + 1) / warmup)
            with torch.autocast(device.type, torch.bfloat16):
                nll, divergences = model(images[batch].to(device), generator=generator)
            loss = (nll + weight * divergences.sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 200.0)
            if torch.isfinite(norm):
                optimizer.step()
                update_average(average, model, 0.999, step)
            schedule.step()
            step += 1
            if step % 100 == 0:
                parts = ", ".join(f"{d:.1f}" for d in divergences.mean(0).tolist())
                report(
                    f"step {step}: -log p(x|z) {nll.mean().item():.1f}, KL per layer [{parts}], weight {weight:.2f}, "
                    f"gradient norm {norm.item():.1f}, scale {model.log_scale.exp().item():.4f}, "
                    f"{time.time() - start:.0f} s"
                )
        with torch.no_grad():
            parts = [average(x.to(device), generator=generator) for x in test_images[:2000].split(500)]
        nll = torch.cat([p[0] for p in parts]).mean()
        divergences = torch.cat([p[1] for p in parts]).mean(0)
        kl = ", ".join(f"{d:.1f}" for d in divergences.tolist())
        bound = (nll + divergences.sum()).item()
        count = min(2000, len(test_images))
        report(
            f"epoch {epoch + 1}: EMA on {count:,} test images: -log p(x|z) {nll.item():.1f}, KL per layer [{kl}], "
            f"-ELBO {bound:.1f}"
        )
        after_epoch(average)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", required=True, help="folder of the four IDX files")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, _ = load_full(args.full, "train")
    test_images, _ = load_full(args.full, "test")
    log = args.out.with_suffix(".log").open("w")

    def report(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    report(f"seed {args.seed}, {args.epochs} epochs, batch {args.batch_size}, learning rate {args.learning_rate}")
    train(
        HVAE().to(memory_format=torch.channels_last),
        images,
        test_images,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        report=report,
        after_epoch=lambda model: model.save(args.out),
        generator=generator,
    )


if __name__ == "__main__":
    main()
