"""What a Langevin chain costs beyond its gradients, and beside the published loop.

    [NVAE_REPO=.../NVAE] .venv/bin/python benchmarks/chain.py [--rounds 15] [--device cpu] [--threads 1]

prints a Markdown table and writes benchmarks/chain.json. In every round, in rotating order, run

- the bare gradients: K times the gradient of F through the frozen backbone, with the energies' weights fixed: the
  floor;
- ours: a chain of K steps as training and sampling run it, through the public settings;
- published: the same chain as in the published code, restated here in plain PyTorch: one tensor per layer, the
  Gaussian terms by autograd in a second backward pass, step sizes read back as Python numbers, live spectral
  normalisation, the backbone as it is, and its decoder run to the image.

rho is ours over the bare gradients, gain is published over ours: medians and quartiles of the ratio within each round.
Launches are PyTorch's operations per step that compute something (views are not counted), exactly. If torchebm is
installed, the time of one update alone is compared with its sampler's.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from published import LANGEVIN, SCHEDULE, Count, published_chain
from quickstart import HERE as EXAMPLES
from walk import make_model

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, EnergyConfig, LangevinConfig
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, NVAEAdapter, freeze
from hvae_ebm_prior.chains.autograd import walk_gradient
from hvae_ebm_prior.chains.kernels import langevin_update
from hvae_ebm_prior.chains.langevin import langevin_coefficients
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.density.conditional import draw_conditional


def per_step(chain: Callable[[int], Any]) -> int:
    """Operations of one step: those of a chain of three less those of a chain of two."""
    counts = []
    for steps in (2, 3):
        with Count() as count:
            chain(steps)
        counts.append(count.calls)
    return counts[1] - counts[0]


def prepare(name: str, device: torch.device) -> tuple[dict[str, Callable[[int], Any]], int]:
    """The three ways to run a chain of so many steps, and the number of samples."""
    torch.manual_seed(0)
    if name.startswith("HVAE"):
        model, adapter, n = HVAE.load(EXAMPLES / "data" / "hvae.safetensors").to(device), HVAEAdapter, 32
        fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    else:
        model, adapter, n = make_model("NVAE").to(device).eval(), NVAEAdapter, 2
        fast = freeze(model)
    settings = {"schedule": SCHEDULE, "langevin": LANGEVIN, "energy": EnergyConfig(context=False, spectral_norm=True)}
    original = DiffusionEBMPrior(adapter(model), **settings).to(device)
    prior = DiffusionEBMPrior(adapter(fast), **settings).to(device)
    g = torch.Generator().manual_seed(0)
    u_next = torch.randn(n, prior.dim, generator=g).to(device)
    t = (torch.arange(n) % 3).to(device)
    parts, energies = list(prior.split(u_next)), list(original.energies.train())
    terms = prior.terms_at(t)

    def total(u: Tensor, t: Tensor) -> Tensor:
        return terms(prior.transform.to_latents(u), t)[0].sum()

    def bare(steps: int) -> None:
        with parametrize.cached():
            for _ in range(steps):
                walk_gradient(total, u_next, t)

    def ours(steps: int) -> None:
        streams = open_streams(0, range(n), device, torch.float32)
        draw_conditional(prior, u_next, t, streams, langevin=dataclasses.replace(prior.langevin, steps=steps))

    def published(steps: int) -> None:
        published_chain(original.backbone, energies, parts, t, steps)

    return {"bare": bare, "ours": ours, "published": published}, n


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> str:
    """Median, and the quartiles about it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def time_in_turn(ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds of every way in every round, in rotating order, after one round that is not counted."""
    names, results = list(ways), []
    for i in range(rounds + 1):
        order = names[i % len(names) :] + names[: i % len(names)]
        results.append({name: seconds(ways[name], device) for name in order})
    return results[1:]


def updates(rounds: int, device: torch.device) -> dict[str, Any] | None:
    """One update of (64, 16,384) alone, ours and torchebm's, where it is installed."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError:
        return None
    n, dim, steps = 64, 2**14, 20
    g = torch.Generator().manual_seed(0)
    u, u_next, gradient = (torch.randn(n, dim, generator=g).to(device) for _ in range(3))
    coefficients = langevin_coefficients(
        torch.zeros(n, dtype=torch.long, device=device), DiffusionSchedule.cosine(3), LangevinConfig(), torch.float32
    )

    class Linear(BaseModel):
        """Its gradient is given, as ours is."""

        def forward(self, x: Tensor) -> Tensor:
            return (x * gradient).sum(1)

        def gradient(self, x: Tensor, **_: Any) -> Tensor:
            return gradient

    sampler = LangevinDynamics(Linear(), step_size=0.01)

    def ours() -> None:
        x = u
        for _ in range(steps):
            x = langevin_update(x, u_next, gradient, coefficients, noise=torch.randn_like(x))

    results = time_in_turn({"ours": ours, "torchebm": lambda: sampler.sample(x=u, n_steps=steps)}, rounds, device)
    return {"size": [n, dim], "rounds": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["HVAE", "NVAE"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": str(device),
        "threads": args.threads,
        "steps": LANGEVIN.steps,
    }
    print("| model | rho | gain | launches per step, ours | published |\n|---|---|---|---|---|")
    for name in args.models:
        chains, n = prepare(name, device)
        launches = {way: per_step(chains[way]) for way in ("ours", "published")}
        steps = LANGEVIN.steps if name == "HVAE" else 3
        rounds = time_in_turn({way: partial(chain, steps) for way, chain in chains.items()}, args.rounds, device)
        rho = [result["ours"] / result["bare"] for result in rounds]
        gain = [result["published"] / result["ours"] for result in rounds]
        report[name] = {
            "samples": n,
            "launches": launches,
            "rounds": rounds,
            "rho": statistics.median(rho),
            "gain": statistics.median(gain),
        }
        cells = [quartiles(rho), quartiles(gain), f"{launches['ours']:,}", f"{launches['published']:,}"]
        print(f"| {name}, N = {n} | {' | '.join(cells)} |", flush=True)
    update = updates(args.rounds, device)
    if update is not None:
        report["update"] = update
        ratio = [result["torchebm"] / result["ours"] for result in update["rounds"]]
        print(f"\ntorchebm's step over ours, (64, 16384): {quartiles(ratio)}")
    else:
        print("\ntorchebm is not installed; its step is not compared", file=sys.stderr)
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
