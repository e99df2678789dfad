"""The main job: learn a diffusion EBM prior for a pretrained hierarchical VAE of Fashion-MNIST, and evaluate it.

    python3 examples/quickstart.py

makes its own environment and writes to examples/output: at once first.png, samples of the prior that comes with the
repository (examples/data/prior); then, after training one with the defaults (twelve minutes of one core), samples.png,
training.png, results.json, and the prior itself in the folder prior. Pictures show real images, reconstructions,
Gaussian samples, and ours. A table says how far the prior closes the gap between the two.

`--cpu` and `--cuda` choose the build of PyTorch that is installed where there is none.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))
from bootstrap import run_in_environment

if __name__ == "__main__":
    run_in_environment(__file__)

import torch
from classifier import load_classifier
from fashion_mnist import load_subset
from torch import Tensor

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, TrainingConfig, TrainingRecord
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter
from hvae_ebm_prior.cli.threads import leave_busy_cores
from hvae_ebm_prior.evaluation import evaluate, table
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.saving.grid import color, drawing, save_grid
from hvae_ebm_prior.training.config import ObjectiveName

HERE = Path(__file__).parent
# The prior that comes with the repository, by `examples/conditional.py` (CONTRIBUTING.md has the command).
SHIPPED = HERE / "data" / "prior"
TRAINING = TrainingConfig()


def load_backbone() -> HVAEAdapter:
    """The committed HVAE."""
    return HVAEAdapter(HVAE.load(HERE / "data" / "hvae.safetensors").to(memory_format=torch.channels_last))


def make_prior(seed: int = 0, preset: str = "default", coupling: Coupling | None = None) -> DiffusionEBMPrior:
    """An untrained prior over the committed HVAE."""
    backbone = load_backbone()
    torch.manual_seed(seed)  # initial weights of the energies
    return DiffusionEBMPrior(backbone, energy=PRESETS[preset].energy, coupling=coupling)


def load_prior(folder: str | Path = SHIPPED) -> DiffusionEBMPrior:
    """A saved prior over the committed HVAE."""
    return DiffusionEBMPrior.from_pretrained(folder, backbone=load_backbone())


def save_samples(
    path: Path, prior: DiffusionEBMPrior, images: Tensor, generator: torch.Generator, columns: int = 12
) -> None:
    """Four rows of images: real, reconstruction, Gaussian prior, ours."""
    real = images[:columns]
    with torch.no_grad():
        rows = {
            "real": real,
            "reconstruction": prior.decode(prior.encode(real, generator=generator)),
            "Gaussian prior": prior.decode(torch.randn(2 * columns, prior.dim, generator=generator)),
            "ours": prior.sample(2 * columns, generator=generator),
        }
    strips = [(name, strip) for name, batch in rows.items() for strip in batch.split(columns)]
    save_grid(path, [strip for _, strip in strips], [name for name, _ in strips])


def save_training(path: Path, history: list[TrainingRecord]) -> None:
    """Score loss over the iterations, and the energy gap of every level where chains are run."""
    with drawing(path, 2, size=(8, 6), sharex=True) as (_, axes):
        above, below = axes[:, 0]
        iterations = [record.iteration for record in history]
        above.plot(iterations, [record.score for record in history], linewidth=0.7, color=color(0))
        above.set(ylabel="score loss less\nan untrained prior's")
        for t in range(len(history[0].gaps)):
            gaps = [record.gaps[t] for record in history]
            below.plot(iterations, gaps, linewidth=0.7, color=color(t), label=f"t = {t}")
        below.set(xlabel="iteration", ylabel="energy gap, nats")
        below.legend()


def peak_memory_gib() -> float:
    """Largest memory this process has held; NaN where the system does not report it."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=TRAINING.iterations, help="training steps")
    parser.add_argument("--learning-rate", type=float, default=TRAINING.learning_rate)
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="held-out images, and samples of each prior, for the table; at most 2000",
    )
    parser.add_argument("--objective", choices=get_args(ObjectiveName), help="what is minimised (the default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "output")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    leave_busy_cores()

    test_images = load_subset("test")[0][: args.images]
    save_samples(args.out / "first.png", load_prior(), test_images, torch.Generator().manual_seed(args.seed))
    first = args.out / "first.png"
    print(f"{first}: samples of the prior that comes along. Now training one ...", flush=True)

    generator = torch.Generator().manual_seed(args.seed)
    train_images, _ = load_subset("train")
    prior = make_prior(args.seed)
    start = time.monotonic()
    history = prior.fit(
        train_images,
        iterations=args.iterations,
        learning_rate=args.learning_rate,
        objective=args.objective,
        generator=generator,
    )
    seconds = time.monotonic() - start
    prior.save_pretrained(args.out / "prior")
    save_training(args.out / "training.png", history)
    save_samples(args.out / "samples.png", prior, test_images, generator)

    rows = evaluate(prior, test_images, train_images, load_classifier().features, generator=generator)
    memory = peak_memory_gib()
    print(
        f"\n{table(rows, 'FD')}\n\n{args.iterations} iterations in {seconds:.0f} s, {memory:.1f} GiB of memory at "
        f"most; pictures in {args.out}"
    )
    results = {
        "seed": args.seed,
        "objective": args.objective,
        "iterations": args.iterations,
        "training_seconds": seconds,
        "memory_gib": memory,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
