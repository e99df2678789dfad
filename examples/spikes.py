"""Data that are no images: a neuron's membrane potential, and a prior for a small hierarchical VAE of it.

    python3 examples/spikes.py

cuts a recording that matplotlib ships (12,000 samples: rest, regular spikes, irregular ones, rest) into windows of 64
samples, trains an HVAE of three layers on them, then our prior for it, with three seeds (some three minutes of one
core), and compares samples with windows of parts of the recording that neither has seen. It writes spikes.png and
spikes.json to examples/output. docs/other_data.md goes through it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bootstrap import run_in_environment

if __name__ == "__main__":
    run_in_environment(__file__)

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cbook
from torch import Tensor, nn

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.evaluation.diagnosis import two_sample_accuracy
from hvae_ebm_prior.saving.grid import drawing
from hvae_ebm_prior.testing import check_adapter

HERE = Path(__file__).parent
LENGTH = 64
# The recording is split into blocks of so many samples, of which every third is held out.
BLOCK = 150
WIDTH = 64
LATENTS = (2, 4, 8)


def load_windows() -> tuple[Tensor, Tensor]:
    """Windows to train on and held-out ones, (N, 64) each: all that lie within a block, so that they share no sample.
    The unit is the recording's own.
    """
    samples = np.fromfile(cbook.get_sample_data("membrane.dat", asfileobj=False), np.float32)
    blocks = torch.from_numpy(samples).split(BLOCK)
    windows = [block.unfold(0, LENGTH, 1) for block in blocks]
    held_out = [part for i, part in enumerate(windows) if i % 3 == 1]
    return torch.cat([part for i, part in enumerate(windows) if i % 3 != 1]), torch.cat(held_out)


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, outputs))


def gaussian(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (N, d) of a network's output (N, 2 d)."""
    mean, raw = parameters.chunk(2, dim=1)
    return mean, F.softplus(raw + 0.5) + 1e-3


class SpikesHVAE(nn.Module):
    """Three layers of latents, top to bottom 2, 4 and 8, of windows (N, 64) of the recording."""

    def __init__(self, windows: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", windows.mean())
        self.register_buffer("scale", windows.std())
        self.encoder = perceptron(LENGTH, WIDTH)
        self.start = nn.Parameter(torch.zeros(1, WIDTH))
        self.priors = nn.ModuleList(nn.Linear(WIDTH, 2 * size) for size in LATENTS)
        self.posteriors = nn.ModuleList(perceptron(2 * WIDTH, 2 * size) for size in LATENTS)
        self.merges = nn.ModuleList(perceptron(WIDTH + size, WIDTH) for size in LATENTS)
        self.output = perceptron(WIDTH, LENGTH)
        self.log_noise = nn.Parameter(torch.tensor(-1.0))

    def merge(self, i: int, h: Tensor, z: Tensor) -> Tensor:
        """The features (N, WIDTH) below layer i."""
        return h + self.merges[i](torch.cat((h, z), dim=1))

    def encode(self, windows: Tensor) -> Tensor:
        """Features (N, WIDTH) of windows."""
        return self.encoder((windows - self.centre) / self.scale)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(x | z) and the KL divergence (N,), in nats, of standardised windows."""
        seen, h = self.encode(windows), self.start.expand(len(windows), -1)
        divergence = torch.zeros(len(windows))
        for i in range(len(LATENTS)):
            mean, std = gaussian(self.priors[i](h))
            q_mean, q_std = gaussian(self.posteriors[i](torch.cat((h, seen), dim=1)))
            z = q_mean + q_std * torch.randn_like(q_std)
            terms = (std / q_std).log() + (q_std**2 + (q_mean - mean) ** 2) / (2 * std**2) - 0.5
            divergence = divergence + terms.sum(1)
            h = self.merge(i, h, z)
        error = (windows - self.centre) / self.scale - self.output(h)
        return (error**2 / (2 * (2 * self.log_noise).exp()) + self.log_noise).sum(1), divergence


class SpikesAdapter:
    """The HVAE as the library sees it: tensors (N, 64) of any range, and no images."""

    data_kind = "tensors"

    def __init__(self, model: SpikesHVAE) -> None:
        self.model = model

    def top_down(self, batch_size):
        h = self.model.start.expand(batch_size, -1)
        for i, prior in enumerate(self.model.priors):
            z = yield gaussian(prior(h))
            h = self.model.merge(i, h, z)
        return h

    def infer(self, windows):
        seen, h, drawn = self.model.encode(windows), self.model.start.expand(len(windows), -1), []
        for i, posterior in enumerate(self.model.posteriors):
            mean, std = gaussian(posterior(torch.cat((h, seen), dim=1)))
            drawn.append(mean + std * torch.randn_like(std))
            h = self.model.merge(i, h, drawn[-1])
        return drawn

    def decode(self, features):
        return self.model.output(features) * self.model.scale + self.model.centre


def train_hvae(windows: Tensor, steps: int, seed: int = 0) -> SpikesHVAE:
    """An HVAE trained for so many steps, with the KL divergence turned up over the first fifth of them."""
    torch.manual_seed(seed)
    model = SpikesHVAE(windows)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        nll, divergence = model(windows[torch.randint(len(windows), (128,))])
        loss = (nll + min(1.0, 5 * step / steps) * divergence).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def sliced_distance(a: Tensor, b: Tensor, generator: torch.Generator, directions: int = 200) -> float:
    """Sliced Wasserstein distance of two sets of as many windows (N, 64): the mean distance of their sorted projections
    on random directions, in the windows' unit.
    """
    lines = F.normalize(torch.randn(LENGTH, directions, generator=generator), dim=0)
    return ((a @ lines).sort(0)[0] - (b @ lines).sort(0)[0]).abs().mean().item()


def measure(rows: dict[str, Tensor], held_out: Tensor, seed: int) -> dict[str, dict[str, float]]:
    """Distance to the held-out windows of each row of windows, and how often a classifier tells the two apart."""
    centre, scale = held_out.mean(), held_out.std()
    figures = {}
    for name, windows in rows.items():
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(held_out), generator=g)
        # In one order, so that a window and its reconstruction are both to learn from or both to test with.
        accuracy = two_sample_accuracy((held_out[order] - centre) / scale, (windows[order] - centre) / scale, g)
        figures[name] = {"distance": sliced_distance(windows, held_out, g), "accuracy": accuracy}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the HVAE (%(default)s)")
    parser.add_argument("--iterations", type=int, default=300, help="training steps of the prior (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="priors that are trained (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "output")
    args = parser.parse_args()
    windows, held_out = load_windows()
    print(f"{len(windows):,} windows to train on, {len(held_out):,} held out")
    adapter = SpikesAdapter(train_hvae(windows, args.steps))
    check_adapter(adapter, held_out, generator=torch.Generator().manual_seed(0))

    runs = []
    for seed in range(args.seeds):
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        prior = DiffusionEBMPrior(adapter)
        n = len(held_out)
        with torch.no_grad():
            rows = {
                "other windows of the recording": windows[torch.randperm(len(windows), generator=g)[:n]],
                "reconstructions": prior.decode(prior.encode(held_out, generator=g)),
                "Gaussian prior": prior.sample(n, generator=g),  # that of an untrained one
            }
        prior.fit(windows, iterations=args.iterations, generator=g)
        rows["our prior"] = prior.sample(n, generator=g)
        runs.append(measure(rows, held_out, seed))
        print(f"seed {seed}: {json.dumps(runs[-1])}")

    print("| | distance | told apart |\n|---|---|---|")
    for name in runs[0]:
        distance, accuracy = (torch.tensor([run[name][kind] for run in runs]) for kind in ("distance", "accuracy"))
        cells = [f"{distance.mean():.4f} ± {distance.std(correction=0):.4f}"]
        cells += [f"{accuracy.mean():.3f} ± {accuracy.std(correction=0):.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "spikes.json").write_text(json.dumps({"held_out": len(held_out), "runs": runs}, indent=1) + "\n")
    draw({"held-out windows": held_out} | dict(list(rows.items())[1:]), args.out)
    print(f"picture in {args.out}")


def draw(rows: dict[str, Tensor], folder: Path, columns: int = 10) -> None:
    """A picture with a row of windows for each name."""
    size = 1.1 * columns, 1.2 * len(rows)
    with drawing(folder / "spikes.png", len(rows), columns, size=size, sharex=True, sharey=True) as (figure, axes):
        figure.subplots_adjust(hspace=0.4)
        for line, (name, windows) in zip(axes, rows.items(), strict=True):
            chosen = windows[:: max(1, len(windows) // columns)]
            for axis, window in zip(line, chosen, strict=False):
                axis.plot(window.numpy(), linewidth=1, color="black")
                axis.set(xticks=[], yticks=[])
            line[0].set_title(name, loc="left", fontsize=11)


if __name__ == "__main__":
    main()
