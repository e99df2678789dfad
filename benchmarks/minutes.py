"""What the default prior closes of a model's prior hole with all cores of a machine.

    OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 benchmarks/minutes.py benchmarks/deep.py:nvae \
        nvae.safetensors --iterations 1050 --out out/nvae

trains on the example's 10,000 images for so many --iterations, in a process for each core, and prints the minutes that
it took and the closure by the example's classifier and by EfficientNet-lite0. The prior goes to the folder --out.
--learning-rate and --warmup are those of the default prior's training for so many iterations, or others. Without
torchrun it is one process.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from classifier import load_classifier
from fashion_mnist import load_subset
from lite0 import lite0_features

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig, processes
from hvae_ebm_prior.cli.loading import add_loader, load_model
from hvae_ebm_prior.evaluation import evaluate, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_loader(parser, "the backbone's adapter or model")
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--count", type=int, default=500, help="test images, and samples (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the prior and minutes.json")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    prior = DiffusionEBMPrior(load_model(args))
    train, test = load_subset("train")[0], load_subset("test")[0][: args.count]
    generator = torch.Generator().manual_seed(args.seed)
    config = TrainingConfig(
        iterations=args.iterations,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        # Every process encodes its own images alone.
        encode_batch=TrainingConfig().batch_size // processes.world(),
    )
    began = time.monotonic()
    prior.fit(train, training=config, generator=generator)
    minutes = (time.monotonic() - began) / 60
    found: dict[str, object] = {"processes": processes.world(), "iterations": args.iterations, "seed": args.seed}
    assert prior.trained is not None
    found |= {name: prior.trained.settings[name] for name in ("learning_rate", "warmup")} | {"minutes": minutes}
    if processes.rank() == 0:
        prior.save_pretrained(args.out)
    for name, features in {"classifier": load_classifier().features, "lite0": lite0_features()}.items():
        rows = evaluate(prior, test, train, features, temperatures=(), generator=generator)
        found[name] = {row.name: row.distance for row in rows} | {"closure": rows[-1].closure}
        if processes.rank() == 0:
            print(table(rows, name), flush=True)
    if processes.rank() == 0:
        print(f"{minutes:.1f} minutes")
        (args.out / "minutes.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
