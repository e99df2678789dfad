"""Time and memory of one gradient for the backbones of CIFAR-10, as they are, frozen, and with checkpointing.

    NVAE_REPO=.../NVAE VDVAE_REPO=.../vdvae .venv/bin/python benchmarks/walk.py [--batch 2] [--rounds 3] [--device cpu]

prints a Markdown table. The models are the published configurations with random weights: NVAE with 30 groups of
20x16x16 (D = 153,600) and VDVAE with 43 layers (D = 412 thousand). "Walk" is the gradient of a weighted sum of all
latents in u, "whole" the prior's score with its default energies. Every variant runs in a process of its own, whose
peak memory above that before the first gradient is given; variants take turns, round by round, and times are medians
over rounds, with the ratio to the model as it is in the same round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import torch
from recipe_backbones import NVAE_CIFAR10, modules_of, official_nvae
from recipe_estimate import memory_in_use, peak_memory
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.adapters import NVAEAdapter, VDVAEAdapter, freeze

MODELS = {"NVAE": NVAEAdapter, "VDVAE": VDVAEAdapter}
VARIANTS = {
    "as it is": (False, False),
    "frozen": (True, False),
    "checkpointed": (False, True),
    "frozen, checkpointed": (True, True),
}


def clone(variable: str, *names: str) -> list[ModuleType]:
    """Modules of the clone that an environment variable points to."""
    if variable not in os.environ:
        raise SystemExit(f"set {variable} to a clone; see the text of this file")
    return modules_of(os.environ[variable], *names)


def make_model(name: str) -> nn.Module:
    """The published configuration with random weights."""
    torch.manual_seed(0)
    if name == "NVAE":
        return official_nvae(os.environ.get("NVAE_REPO"), NVAE_CIFAR10)
    hps, vae = clone("VDVAE_REPO", "hps", "vae")
    defaults = {
        "bottleneck_multiple": 0.25,
        "custom_width_str": "",
        "no_bias_above": 64,
        "num_mixtures": 10,
        "image_size": 32,
        "image_channels": 3,
    }
    return vae.VAE(hps.Hyperparams(**{**defaults, **hps.HPARAMS_REGISTRY["cifar10"]}))


def measure(name: str, variant: str, batch: int, device: torch.device) -> dict[str, float]:
    """Seconds and GiB of one gradient of the walk and of the whole score."""
    freeze_it, checkpoint = VARIANTS[variant]
    model = make_model(name).to(device).eval()
    adapter = MODELS[name](freeze(model) if freeze_it else model, checkpoint=checkpoint)
    del model
    prior = DiffusionEBMPrior(adapter).to(device)
    u = torch.randn(batch, prior.dim, generator=torch.Generator().manual_seed(0)).to(device)
    weights = torch.randn(prior.dim, generator=torch.Generator().manual_seed(1)).to(device)

    def walk() -> None:
        noise = u.clone().requires_grad_()
        torch.autograd.grad((prior.join(prior.to_latents(noise)) * weights).sum(), noise)

    results: dict[str, float] = {"dim": prior.dim, "layers": len(prior.latent_shapes)}
    for what, gradient in (("walk", walk), ("whole", lambda: prior.score(u, 0))):
        before = memory_in_use(device)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            gradient()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        results[what] = min(seconds[1:])
        results[f"{what} memory"] = (peak_memory(device) - before) / 2**30
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "VARIANT"), help="measure one and print it as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(*args.only, args.batch, torch.device(args.device))))
        return
    print("| model | variant | walk, s | ratio | memory, GiB | whole, s | ratio | memory, GiB |")
    print("|---" * 8 + "|")
    for name in MODELS:
        rounds = []
        for _ in range(args.rounds):
            command = [sys.executable, __file__, "--batch", str(args.batch), "--device", args.device, "--only", name]
            outputs = {
                variant: subprocess.run([*command, variant], check=True, capture_output=True, text=True).stdout
                for variant in VARIANTS
            }
            rounds.append({variant: json.loads(output.splitlines()[-1]) for variant, output in outputs.items()})
        for variant in VARIANTS:
            cells = []
            for what in ("walk", "whole"):
                ratios = [results[variant][what] / results["as it is"][what] for results in rounds]
                cells += [f"{statistics.median(results[variant][what] for results in rounds):.2f}"]
                cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
                cells += [f"{statistics.median(results[variant][f'{what} memory'] for results in rounds):.2f}"]
            size = f"D = {rounds[0][variant]['dim']:,}, L = {rounds[0][variant]['layers']}"
            print(f"| {name}, {size} | {variant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
