r"""Control: a prior coupled to the ten classes of Fashion-MNIST, on the pretrained HVAE of the quickstart.

    python3 examples/conditional.py

trains it (some fifteen minutes of one core) and writes to examples/output: conditional.png (a row per class),
composed.png (OR, NOT), edited.png (layers of real images held, the others drawn under another class), inpainted.png
(the lower half hidden), and conditional.safetensors, which the command line reads:

    .venv/bin/hvae-ebm-prior sample examples/conditional.py:load_prior examples/output/conditional.safetensors \
        --labels class=sneaker --guidance 4
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bootstrap import run_in_environment

if __name__ == "__main__":
    run_in_environment(__file__)

import torch
from fashion_mnist import CLASSES, load_subset
from quickstart import make_prior
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvae_ebm_prior import NOT, Coupling, DiffusionEBMPrior, Label, LabelSet, LangevinConfig
from hvae_ebm_prior.cli.threads import leave_busy_cores
from hvae_ebm_prior.control import resample
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.saving.grid import save_grid

HERE = Path(__file__).parent
# The class is bound to the top layer, from which it is predicted best; see docs/control.md.
COUPLING = Coupling({"class": LabelSet(CLASSES, layers=(0,))})
GUIDANCE = 4.0
# A sharp observation curves the density: chains take shorter and more steps.
INPAINTING = LangevinConfig(steps=30, step_size=0.1)


def load_prior(path: str | Path | None = None, seed: int = 0, coupling: Coupling = COUPLING) -> DiffusionEBMPrior:
    """The coupled prior: untrained, or with the weights of a file."""
    prior = make_prior(seed=seed)
    prior.couple(coupling)
    if path is not None:
        prior.load_state_dict(load_file(path))
    return prior


def hidden_half(images: Tensor, std: float = 0.1) -> Callable[[Tensor], Tensor]:
    """log p(upper half of `images` | x), with Gaussian noise of the given std: the observation of inpainting."""
    upper = images.shape[2] // 2

    def log_likelihood(x: Tensor) -> Tensor:
        return -((x - images)[:, :, :upper] ** 2).flatten(1).sum(1) / (2 * std**2)

    return log_likelihood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=PRESETS["default"].training.iterations, help="training steps")
    parser.add_argument(
        "--weights", type=Path, help="a conditional.safetensors, to draw the pictures of it without training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=12, help="images in a row of the pictures")
    parser.add_argument("--out", type=Path, default=HERE / "output")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    leave_busy_cores()
    g, n = torch.Generator().manual_seed(args.seed), args.columns

    prior = load_prior(args.weights, args.seed)
    if args.weights is None:
        images, labels = load_subset("train")
        training = dataclasses.replace(PRESETS["default"].training, iterations=args.iterations)
        prior.fit(images, labels={"class": labels}, training=training, generator=g, progress=True)
        save_file(prior.state_dict(), args.out / "conditional.safetensors")

    rows = [prior.sample(n, labels={"class": name}, guidance=GUIDANCE, generator=g) for name in CLASSES]
    save_grid(args.out / "conditional.png", rows, CLASSES)

    wanted = {
        "sandal OR bag": Label("class", "sandal") | Label("class", "bag"),
        "NOT footwear": NOT(Label("class", "sandal") | Label("class", "sneaker") | Label("class", "ankle boot")),
    }
    rows = [prior.sample(n, labels=labels, guidance=GUIDANCE, generator=g) for labels in wanted.values()]
    save_grid(args.out / "composed.png", rows, list(wanted))

    real = load_subset("test")[0][:n]
    with torch.no_grad():
        u = prior.encode(real, generator=g)
        edits = {"real": real}
        for hold in ((0, 1), (0,)):
            edits[f"layers {hold} held"] = prior.decode(resample(prior, u, hold, generator=g))
        edits["made a dress, layers (1, 2) held"] = prior.decode(
            resample(prior, u, (1, 2), labels={"class": "dress"}, guidance=GUIDANCE, generator=g)
        )
    save_grid(args.out / "edited.png", list(edits.values()), list(edits))

    masked = real.clone()
    masked[:, :, real.shape[2] // 2 :] = 0.5
    inpainted = [prior.posterior_sample(hidden_half(real), n, langevin=INPAINTING, generator=g) for _ in range(3)]
    save_grid(args.out / "inpainted.png", [real, masked, *inpainted], ["real", "masked", "inpainted", "", ""])
    print(f"pictures in {args.out}")


if __name__ == "__main__":
    main()
