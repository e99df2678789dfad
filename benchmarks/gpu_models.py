"""What `gpu_check.py` trains and draws from, and how fast that is: the example's HVAE, and a stand-in for NVAE."""

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_mnist import load_subset
from published import published_chain
from torch import Tensor, nn

from hvae_ebm_prior import DiffusionEBMPrior, ExecutionConfig, TrainingConfig
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter
from hvae_ebm_prior.presets import PRESETS

EXAMPLES = Path(__file__).parent.parent / "examples"


class Enough(Exception):
    """Time is up."""


class Cell(nn.Module):
    """A residual cell of NVAE's decoder, folded: 1x1 to six times the width, 5x5 by channel, 1x1 back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 6 * width
        self.into, self.out = nn.Conv2d(width, wide, 1), nn.Conv2d(wide, width, 1)
        self.spatial = nn.Conv2d(wide, wide, 5, padding=2, groups=wide)

    def forward(self, h: Tensor) -> Tensor:
        return h + 0.1 * self.out(F.silu(self.spatial(F.silu(self.into(h)))))


class StandIn:
    """A backbone of NVAE's shape for CIFAR-10 with random weights: groups of C x S x S latents at one resolution, two
    cells each. Its posterior is the prior, moved by a projection of the images.

    Args:
        groups: number of latents.
        shape: of each.
        width: channels of the features.
        device: where it is.
    """

    def __init__(self, groups: int, shape: tuple[int, int, int], width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        channels, side, _ = shape
        self.channels, self.width, self.side = channels, width, side
        self.model = nn.ModuleDict(
            {
                "heads": nn.ModuleList(nn.Conv2d(width, 2 * channels, 1) for _ in range(groups)),
                "inputs": nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in range(groups)),
                "cells": nn.ModuleList(nn.Sequential(Cell(width), Cell(width)) for _ in range(groups)),
                "image": nn.Conv2d(width, 12, 3, padding=1),
                "encoder": nn.Conv2d(12, channels, 1),
            }
        )
        self.model.to(device, memory_format=torch.channels_last)
        self.start = torch.randn(1, width, side, side, generator=torch.Generator().manual_seed(0)).to(device)

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
        h = self.start.expand(batch_size, -1, -1, -1)
        for head, project, cells in zip(*(self.model[name] for name in ("heads", "inputs", "cells")), strict=True):
            mean, log_std = head(h).chunk(2, dim=1)
            z = yield mean, (0.2 * log_std.tanh()).exp()
            h = cells(h + 0.3 * project(z))
        return h

    def infer(self, images: Tensor) -> list[Tensor]:
        shift = self.model["encoder"](F.pixel_unshuffle(images, 2)).tanh()
        walk, latents = self.top_down(len(images)), []
        mean, std = next(walk)
        while True:
            latents.append(mean + std * (0.8 * torch.randn_like(mean) + 0.5 * shift))
            try:
                mean, std = walk.send(latents[-1])
            except StopIteration:
                return latents

    def decode(self, features: Tensor) -> Tensor:
        return torch.sigmoid(F.pixel_shuffle(self.model["image"](features), 2))


@dataclass(frozen=True)
class Job:
    """A backbone, its images and the batch.

    Attributes:
        name: for the table.
        make: makes the backbone.
        images: (M, C, H, W).
        batch: images of a training step.
        samples: samples drawn at once.
    """

    name: str
    make: Callable[[], Any]
    images: Tensor
    batch: int
    samples: int


def make_jobs(device: torch.device, quick: bool) -> list[Job]:
    """The example's HVAE, and the stand-in: 30 groups of 20x16x16, or a tiny one."""

    def hvae() -> HVAEAdapter:
        return HVAEAdapter(
            HVAE.load(EXAMPLES / "data" / "hvae.safetensors").to(device, memory_format=torch.channels_last)
        )

    groups, shape, width = (2, (2, 4, 4), 4) if quick else (30, (20, 16, 16), 256)
    images = torch.rand(8 if quick else 64, 3, 2 * shape[1], 2 * shape[1], generator=torch.Generator().manual_seed(0))
    small = load_subset("train")[0][: 8 if quick else 10_000]
    return [
        Job("HVAE", hvae, small, 4 if quick else 32, 2 if quick else 512),
        Job("stand-in", lambda: StandIn(groups, shape, width, device), images, 2 if quick else 32, 1 if quick else 32),
    ]


def make_prior(job: Job, preset: str, execution: ExecutionConfig, quick: bool = False) -> DiffusionEBMPrior:
    """An untrained prior with a preset's settings; in a quick check of the code, small networks and short chains."""
    settings = PRESETS[preset]
    langevin, energy = settings.langevin, settings.energy
    if quick:
        langevin, energy = replace(langevin, steps=3), replace(energy, width=8, vector_width=8)
    torch.manual_seed(0)
    arguments = {"schedule": settings.schedule, "langevin": langevin, "energy": energy, "execution": execution}
    return DiffusionEBMPrior(job.make(), **arguments)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def training_config(job: Job, preset: str) -> TrainingConfig:
    """Of a preset, with the job's batch, for a run that is ended from outside."""
    return replace(PRESETS[preset].training, batch_size=job.batch, activity_images=0, iterations=10**6)


class Clock:
    """A callback of `fit` that notes when it is called, and ends the run when that was often or long enough.

    Args:
        seconds: to measure.
        quick: end as soon as there is anything.
    """

    def __init__(self, seconds: float, quick: bool) -> None:
        self.seconds, self.quick = seconds, quick
        self.moments: list[float] = []

    def __call__(self, *_: object) -> None:
        self.moments.append(time.monotonic())
        count, whole = len(self.moments), self.moments[-1] - self.moments[0]
        # The first iteration captures graphs and tunes convolutions.
        enough = count > 3 and self.moments[-1] - self.moments[2] > self.seconds
        if enough or (count > 1 and whole > 2 * self.seconds) or (self.quick and count > 2):
            raise Enough

    @property
    def rate(self) -> float:
        """Calls per second, where there were many without the first ones."""
        warm = 2 if len(self.moments) > 3 else 0
        return (len(self.moments) - 1 - warm) / max(self.moments[-1] - self.moments[warm], 1e-9)


def training_rate(
    prior: DiffusionEBMPrior, job: Job, preset: str, objective: str | None, seconds: float, quick: bool
) -> float:
    """Iterations per second of training."""
    clock = Clock(seconds, quick)
    with suppress(Enough):
        prior.fit(
            job.images,
            training=training_config(job, preset),
            objective=objective,
            callback=clock,
            progress=False,
            generator=torch.Generator().manual_seed(0),
        )
    return clock.rate


def published_rate(job: Job, seconds: float, quick: bool) -> float:
    """Iterations per second of the published training, restated: its chain, both energies by networks under live
    spectral normalisation, Adam.
    """
    prior = make_prior(job, "paper-cifar10", ExecutionConfig(backend="torch"), quick)
    energies, schedule = prior.energies.train(), prior.schedule
    optimizer = torch.optim.Adam(prior.parameters(), lr=4e-5)
    g = torch.Generator().manual_seed(0)
    clock = Clock(seconds, quick)
    with suppress(Enough):
        while True:
            images = job.images[torch.randint(len(job.images), (job.batch,), generator=g)].to(prior.device)
            u = prior.encode(images, generator=g)
            t = torch.randint(schedule.steps, (job.batch,), generator=g).to(u.device)
            alpha, sigma, alpha_bar, sigma_bar, _ = (level[:, None] for level in schedule.on(u.device, u.dtype))
            u_t = alpha_bar[t] * u + sigma_bar[t] * torch.randn_like(u)
            u_next = alpha[t + 1] * u_t + sigma[t + 1] * torch.randn_like(u)
            steps = prior.langevin.steps
            negative = published_chain(prior.backbone, list(energies), list(prior.split(u_next)), t, steps)
            with torch.no_grad():
                both = prior.to_latents(torch.cat((prior.join(negative), u_t)))
            f = torch.stack([network(z, t.repeat(2)) for network, z in zip(energies, both, strict=True)]).sum(0)
            from_chain, from_data = f.chunk(2)
            optimizer.zero_grad()
            (from_chain - from_data).mean().backward()
            optimizer.step()
            synchronize(prior.device)
            clock()
    return clock.rate


def sampling_rate(prior: DiffusionEBMPrior, job: Job, seconds: float, quick: bool) -> float:
    """Samples per second."""
    clock = Clock(seconds, quick)
    with suppress(Enough):
        while True:
            prior.sample(job.samples, chunk_size=job.samples, generator=torch.Generator().manual_seed(0))
            synchronize(prior.device)
            clock()
    return job.samples * clock.rate
