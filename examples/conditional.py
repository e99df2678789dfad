r"""Control: a prior coupled to the ten classes of Fashion-MNIST, on the pretrained HVAE of the quickstart.

    python3 examples/conditional.py

trains it (some fifteen minutes of one core) and writes to examples/output: conditional.png (a row per class),
composed.png (OR, NOT), edited.png (layers of real images held, the others drawn under another class), inpainted.png
(the lower half hidden), and the prior itself in the folder conditional, which the command line reads:

    .venv/bin/hvae-ebm-prior sample hvae_ebm_prior.adapters:HVAE.load examples/data/hvae.safetensors \
        --prior examples/output/conditional --labels class=sneaker --guidance 4

With `--prior examples/data/prior` it draws the pictures of the prior that comes with the repository, without training.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))
from bootstrap import run_in_environment

if __name__ == "__main__":
    run_in_environment(__file__)

import torch
from fashion_mnist import CLASSES, load_subset
from quickstart import TRAINING, load_prior, make_prior
from torch import Tensor

from hvae_ebm_prior import NOT, Coupling, DiffusionEBMPrior, Label, LabelSet, LangevinConfig
from hvae_ebm_prior.cli.threads import leave_busy_cores
from hvae_ebm_prior.control import resample
from hvae_ebm_prior.saving.grid import save_grid
from hvae_ebm_prior.training.config import ObjectiveName

HERE = Path(__file__).parent
# The class is bound to the top layer, from which it is predicted best; see docs/control.md.
COUPLING = Coupling({"class": LabelSet(CLASSES, layers=(0,))})
GUIDANCE = 4.0
# A sharp observation curves the density: chains take shorter and more steps. What they miss of the half that is seen is
# mostly their step, not the observation's std: benchmarks/control.py measures both halves.
INPAINTING = LangevinConfig(steps=60, step_size=0.03)


def hidden_half(images: Tensor, std: float = 0.05) -> Callable[[Tensor], Tensor]:
    """log p(upper half of `images` | x), with Gaussian noise of the given std: the observation of inpainting."""
    upper = images.shape[2] // 2

    def log_likelihood(x: Tensor) -> Tensor:
        return -((x - images)[:, :, :upper] ** 2).flatten(1).sum(1) / (2 * std**2)

    return log_likelihood


def draw_classes(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """A row of `n` samples for every class."""
    rows = [prior.sample(n, labels={"class": name}, guidance=GUIDANCE, generator=g) for name in CLASSES]
    save_grid(path, rows, CLASSES)


def draw_composed(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """One class or another, and none of three."""
    wanted = {
        "sandal OR bag": Label("class", "sandal") | Label("class", "bag"),
        "NOT footwear": NOT(Label("class", "sandal") | Label("class", "sneaker") | Label("class", "ankle boot")),
    }
    rows = [prior.sample(n, labels=labels, guidance=2, generator=g) for labels in wanted.values()]
    save_grid(path, rows, list(wanted))


def draw_edited(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Real images, with some of their layers held and the others drawn anew."""
    real = load_subset("test")[0][:n]
    u = prior.encode(real, generator=g)
    edits = {
        "top two layers held": resample(prior, u, (0, 1), generator=g),
        "top layer held": resample(prior, u, (0,), generator=g),
        "top layer anew, as a dress": resample(
            prior, u, (1, 2), labels={"class": "dress"}, guidance=GUIDANCE, generator=g
        ),
    }
    with torch.no_grad():
        save_grid(path, [real, *map(prior.decode, edits.values())], ["real", *edits])


def draw_inpainted(path: Path, prior: DiffusionEBMPrior, n: int, g: torch.Generator) -> None:
    """Real images whose lower halves are hidden, and three ways to complete each."""
    real = load_subset("test")[0][:n]
    seen = real.clone()
    seen[:, :, real.shape[2] // 2 :] = 0.5
    inpainted = [prior.posterior_sample(hidden_half(real), n, langevin=INPAINTING, generator=g) for _ in range(3)]
    save_grid(path, [real, seen, *inpainted], ["real", "what is seen", *[f"completed, {i}" for i in (1, 2, 3)]])


PICTURES = {
    "conditional": draw_classes,
    "composed": draw_composed,
    "edited": draw_edited,
    "inpainted": draw_inpainted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, help="a folder with a trained prior, to draw its pictures")
    parser.add_argument("--preset", choices=("default", "small"), default="default", help="size of the networks")
    parser.add_argument("--iterations", type=int, default=TRAINING.iterations, help="training steps")
    parser.add_argument("--objective", choices=get_args(ObjectiveName), help="what is minimised (the default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=12, help="images in a row of the pictures")
    parser.add_argument("--out", type=Path, default=HERE / "output")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    leave_busy_cores()
    g = torch.Generator().manual_seed(args.seed)

    if args.prior is None:
        images, labels = load_subset("train")
        prior = make_prior(args.seed, args.preset, COUPLING)
        prior.fit(
            images,
            labels={"class": labels},
            iterations=args.iterations,
            objective=args.objective,
            generator=g,
        )
        prior.save_pretrained(args.out / "conditional")
    else:
        prior = load_prior(args.prior)

    for name, draw_picture in PICTURES.items():
        draw_picture(args.out / f"{name}.png", prior, args.columns, g)
    print(f"pictures in {args.out}")


if __name__ == "__main__":
    main()
