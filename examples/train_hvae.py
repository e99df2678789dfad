"""Train the 3-layer HVAE of the examples on all of Fashion-MNIST.

    python examples/train_hvae.py --full /usr/share/datasets/fashion-mnist

About 40 minutes on 2 cores; writes examples/data/hvae.safetensors (EMA weights) and the log examples/data/hvae.log.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from fashion_mnist import load_full
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hvae_ebm_prior.adapters import HVAE

OUT = Path(__file__).parent / "data" / "hvae.safetensors"


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
    model = HVAE().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    per_epoch = len(images) // args.batch_size
    steps, warmup = args.epochs * per_epoch, 2 * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    log = args.out.with_suffix(".log").open("w")

    def report(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    report(f"seed {args.seed}, {args.epochs} epochs, batch {args.batch_size}, learning rate {args.learning_rate}")
    start, step = time.time(), 0
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(images), generator=generator).split(args.batch_size)[:per_epoch]:
            weight = min(1.0, (step + 1) / warmup)
            with torch.autocast("cpu", torch.bfloat16):
                nll, divergences = model(images[batch], generator=generator)
            loss = (nll + weight * divergences.sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 200.0)
            if torch.isfinite(norm):
                optimizer.step()
                average.update_parameters(model)
            schedule.step()
            step += 1
            if step % 100 == 0:
                parts = ", ".join(f"{d:.1f}" for d in divergences.mean(0).tolist())
                report(
                    f"step {step}: -log p(x|z) {nll.mean().item():.1f}, KL per layer [{parts}], weight {weight:.2f}, "
                    f"gradient norm {norm.item():.1f}, scale {model.log_scale.exp().item():.4f}, {time.time() - start:.0f} s"
                )
        with torch.no_grad():
            parts = [average.module(x, generator=generator) for x in test_images[:2000].split(500)]
        nll, divergences = torch.cat([p[0] for p in parts]).mean(), torch.cat([p[1] for p in parts]).mean(0)
        kl = ", ".join(f"{d:.1f}" for d in divergences.tolist())
        bound = (nll + divergences.sum()).item()
        report(f"epoch {epoch + 1}: EMA on 2,000 test images: -log p(x|z) {nll.item():.1f}, KL per layer [{kl}], -ELBO {bound:.1f}")
        average.module.save(args.out)


if __name__ == "__main__":
    main()
