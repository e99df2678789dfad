"""Attributes in turn (Figure 4 of the paper): the kind of garment in the top layer, then its texture in those below.

    python3 examples/in_turn.py

couples a prior to four kinds, from Fashion-MNIST's labels, bound to the top layer, and to plain or patterned, from the
pixels, bound to the layers below; trains it (some fifteen minutes of one core), draws samples under a kind, holds their
top layer, and draws the rest under a texture. It prints how often the texture is what was asked for and the kind is
what it was, by the example's classifier, which is no part of the prior; and how much of the texture the top layer
decides by itself. It writes in_turn.png and in_turn.json to examples/output, and the prior to its folder in_turn.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bootstrap import run_in_environment

if __name__ == "__main__":
    run_in_environment(__file__)

import torch
from classifier import load_classifier
from fashion_mnist import load_subset
from quickstart import TRAINING, load_prior, make_prior
from torch import Tensor

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, LabelSet
from hvae_ebm_prior.cli.threads import leave_busy_cores
from hvae_ebm_prior.control import sample_in_turn
from hvae_ebm_prior.evaluation import in_chunks
from hvae_ebm_prior.saving.grid import save_grid

HERE = Path(__file__).parent
# Classes of Fashion-MNIST by kind; dresses are of none.
KINDS = {"footwear": (5, 7, 9), "upper body": (0, 2, 4, 6), "trousers": (1,), "bag": (8,)}
TEXTURES = ("plain", "patterned")
COUPLING = Coupling({"kind": LabelSet(tuple(KINDS), layers=(0,)), "texture": LabelSet(TEXTURES, layers=(1, 2))})
# Below this a pixel is ground, not garment.
GROUND = 0.1


def kinds_of(classes: Tensor) -> Tensor:
    """The kind (N,) of Fashion-MNIST's classes (N,), -1 for none."""
    kinds = torch.full_like(classes, -1)
    for kind, members in enumerate(KINDS.values()):
        kinds[torch.isin(classes, torch.tensor(members))] = kind
    return kinds


def roughness(images: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels within the garment over its brightness, (N,), of images (N, 1, H, W)."""
    garment = images > GROUND
    across = (images[..., 1:] - images[..., :-1]).abs() * (garment[..., 1:] & garment[..., :-1])
    down = (images[..., 1:, :] - images[..., :-1, :]).abs() * (garment[..., 1:, :] & garment[..., :-1, :])
    return (across.flatten(1).sum(1) + down.flatten(1).sum(1)) / (images * garment).flatten(1).sum(1).clamp(min=1e-6)


def textures_of(images: Tensor, kinds: Tensor, thresholds: Tensor) -> Tensor:
    """Plain 0 or patterned 1, (N,), by the median of the images' own kind, (len(KINDS),); -1 for no kind."""
    found = (roughness(images) > thresholds[kinds.clamp(min=0)]).long()
    return torch.where(kinds < 0, -1, found)


def decided_above(prior: DiffusionEBMPrior, images: Tensor, seed: int) -> float:
    """Correlation of the roughness of two samples that have the top layer of one image in common."""
    top = prior.split(prior.encode(images, generator=torch.Generator().manual_seed(seed)))[0]
    draws = [
        roughness(prior.sample(len(images), fixed={0: top}, generator=torch.Generator().manual_seed(seed + number)))
        for number in (1, 2)
    ]
    return torch.corrcoef(torch.stack(draws))[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, help="a folder with a trained prior, to draw from it without training")
    parser.add_argument("--iterations", type=int, default=TRAINING.iterations, help="training steps")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--samples", type=int, default=250, help="samples of every kind and texture that are counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "output")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    leave_busy_cores()
    g = torch.Generator().manual_seed(args.seed)

    images, classes = load_subset("train")
    kinds = kinds_of(classes)
    thresholds = torch.stack([roughness(images[kinds == kind]).median() for kind in range(len(KINDS))])
    if args.prior is None:
        labels = {"kind": kinds, "texture": textures_of(images, kinds, thresholds)}
        prior = make_prior(args.seed, coupling=COUPLING)
        prior.fit(images, labels=labels, iterations=args.iterations, generator=g)
        prior.save_pretrained(args.out / "in_turn")
    else:
        prior = load_prior(args.prior)

    classifier = load_classifier()
    rows, figures = {}, {}
    for index, kind in enumerate(KINDS):
        seed = int(torch.randint(2**31, (), generator=g))
        for number, texture in enumerate(TEXTURES):
            # The same first stage for both textures.
            stages = [({"kind": kind}, (0,)), ({"texture": texture}, (1, 2))]
            noise = torch.Generator().manual_seed(seed)
            first, second = (
                in_chunks(prior.decode, u)
                for u in sample_in_turn(prior, args.samples, stages, guidance=args.guidance, generator=noise)
            )
            rows.setdefault(kind, first[:12])
            rows[f"{kind}, {texture}"] = second[:12]
            before, after = (kinds_of(in_chunks(classifier, some).argmax(1)) for some in (first, second))
            asked = torch.full((args.samples,), index)
            figures[f"{kind}, {texture}"] = {
                "of the kind at first": (before == index).float().mean().item(),
                "kept their kind": (after[before == index] == index).float().mean().item(),
                "have the texture": (textures_of(second, asked, thresholds) == number).float().mean().item(),
            }
    save_grid(args.out / "in_turn.png", list(rows.values()), list(rows))
    shared = decided_above(prior, load_subset("test")[0][: args.samples], args.seed)
    results = {"samples": args.samples, "guidance": args.guidance, "figures": figures, "decided above": shared}
    (args.out / "in_turn.json").write_text(json.dumps(results, indent=1) + "\n")
    columns = list(next(iter(figures.values())))
    print(f"| in turn | {' | '.join(columns)} |\n|---|---|---|---|")
    for name, found in figures.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in found.values())} |")
    print(f"\ncorrelation of the roughness of two samples with one top layer: {shared:.2f}; pictures in {args.out}")


if __name__ == "__main__":
    main()
