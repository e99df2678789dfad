"""What a seed gives, of every prior and use, by public names alone: it must not change unless we mean it to.

python tests/golden.py        # writes tests/data/golden.safetensors and tests/data/checkpoint_format_2 anew
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from backbones import RandomBackbone
from helpers import seed
from safetensors.torch import save_file
from torch import Tensor

from hvae_ebm_prior import (
    NOT,
    Coupling,
    DiffusionEBMPrior,
    DiffusionSchedule,
    EnergyConfig,
    Expert,
    Label,
    LabelSet,
    LangevinConfig,
)
from hvae_ebm_prior.baselines import JointEBMPrior, LatentDiffusionPrior, NCPPrior
from hvae_ebm_prior.control import edit, sample_in_turn
from hvae_ebm_prior.evaluation.likelihood import AnnealingConfig, log_normalizer
from hvae_ebm_prior.evaluation.transitions import langevin_transitions
from hvae_ebm_prior.ood import conditional_diffusion_scores, diffusion_scores, inference_scores, typicality_scores
from hvae_ebm_prior.presets import PRESETS

DATA = Path(__file__).parent / "data"
FILE, CHECKPOINT = DATA / "golden.safetensors", DATA / "checkpoint_format_2"
COSINE = DiffusionSchedule.cosine(3)
SHAPES = [(3, 4, 4), (2, 4, 4), (5,)]
SMALL = EnergyConfig(context=False, width=8, blocks=1, vector_width=8)
CHAINS = LangevinConfig(steps=3, step_size=0.2, start="next")
TRAINING = replace(
    PRESETS["joint-recovery"].training,
    iterations=3,
    batch_size=6,
    activity_images=8,
    learning_rate=3e-3,
    ema_decay=0.99,
    gap_limit=float("inf"),
)
IMAGES = torch.rand(18, 1, 2, 2, generator=seed(7))
LABELS = torch.arange(18) % 3


class Seen(RandomBackbone):
    """Posteriors that depend on the images."""

    def infer(self, images: Tensor) -> list[Tensor]:
        shift = images.flatten(1).mean(1) - 0.5
        return [z + shift.reshape(-1, *[1] * (z.ndim - 1)) for z in super().infer(images)]


def build(kind: type = DiffusionEBMPrior, backbone: object = None, **settings: object) -> DiffusionEBMPrior:
    """A prior whose networks start from known weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        prior = kind(backbone or Seen(SHAPES), **{"energy": SMALL, **settings})
        for parameter in prior.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return prior


COUPLING = Coupling({"class": LabelSet(("a", "b", "c"), layers=(0,))}, networks=SMALL)
PRIORS = {
    "context": lambda: build(energy=replace(SMALL, context=True)),
    "plain": lambda: build(schedule=COSINE, langevin=CHAINS),
    "fast": lambda: build(langevin=PRESETS["joint-recovery"].langevin),
    "published": lambda: build(
        schedule=DiffusionSchedule.ddpm(3), langevin=replace(PRESETS["paper-cifar10"].langevin, steps=4, step_size=1e-4)
    ),
    "corrected": lambda: build(
        schedule=COSINE, langevin=replace(CHAINS, corrector_steps=2, integrator="leimkuhler-matthews")
    ),
    "strang": lambda: build(
        schedule=COSINE, langevin=replace(CHAINS, integrator="strang", start="gaussian", top_steps=2)
    ),
    "coupled": lambda: build(schedule=COSINE, langevin=CHAINS, coupling=COUPLING),
    "ncp": lambda: build(NCPPrior, proposals=4),
    "ncp langevin": lambda: build(NCPPrior, sampler="langevin"),
    "joint": lambda: build(JointEBMPrior, chains="persistent", target="published", kept=20),
    "z": lambda: build(LatentDiffusionPrior, schedule=COSINE, langevin=CHAINS),
}


def train(prior: DiffusionEBMPrior, **options: object) -> dict[str, Tensor]:
    """History and weights of a short run."""
    labels = {"class": LABELS} if prior.coupling else None
    history = prior.fit(IMAGES, labels=labels, training=TRAINING, generator=seed(5), progress=False, **options)
    weights = torch.cat([parameter.detach().flatten() for parameter in prior.parameters()])
    return {
        "loss": torch.tensor([record.loss for record in history]),
        "weights": weights[:: max(1, len(weights) // 500)].clone(),
    }


def numbers() -> dict[str, Tensor]:
    """What every prior draws, before and after a short training, and what is computed with one."""
    found: dict[str, Tensor] = {}
    for name, make in PRIORS.items():
        prior = make()
        found[f"{name}/noise"] = prior.sample_noise(4, generator=seed(1))
        found[f"{name}/images"] = prior.sample(5, chunk_size=2, generator=seed(2))
        found[f"{name}/energies"] = prior.layer_energies(torch.randn(4, prior.dim, generator=seed(3)), 0).detach()
        found |= {f"{name}/trained/{key}": value for key, value in train(prior).items()}
        found[f"{name}/trained/noise"] = prior.sample_noise(4, generator=seed(1))
    prior, images = build(schedule=COSINE, langevin=CHAINS, coupling=COUPLING), IMAGES[:3]
    other = build(schedule=COSINE, langevin=CHAINS, backbone=prior.backbone)
    found["trajectory"] = prior.sample_noise(3, temperature=0.8, tempering="before", trajectory=True, generator=seed(1))
    found["held"] = prior.sample_noise(3, fixed={1: torch.ones(1, *SHAPES[1])}, generator=seed(1))
    found["labels"] = prior.sample_noise(3, labels={"class": "b"}, guidance=2.0, generator=seed(1))
    found["not"] = prior.sample_noise(3, labels=NOT(Label("class", 0) | Label("class", 1)), generator=seed(1))
    found["experts"] = prior.sample_noise(3, labels=Expert(other, 0.5) & ~Expert(prior), generator=seed(1))
    found["observed"] = prior.posterior_sample(lambda x: -(x**2).flatten(1).sum(1), 3, generator=seed(1))
    found["classify"] = prior.classify(images, generator=seed(1))["class"]
    found["loss"] = prior.loss(images, generator=seed(1)).detach()
    found["score"] = prior.score(torch.randn(3, prior.dim, generator=seed(2)), 1)
    found["edit"] = edit(prior, images, (0,), labels={"class": 1}, generator=seed(1))
    found["in turn"] = sample_in_turn(prior, 3, [({"class": 1}, (0,)), (None, (1, 2))], generator=seed(1))[-1]
    found["inference scores"] = inference_scores(prior, images, generator=seed(1))
    found["diffusion scores"] = diffusion_scores(prior, images, generator=seed(1))
    found["conditional diffusion scores"] = conditional_diffusion_scores(prior, images, generator=seed(1))
    found["typicality scores"] = typicality_scores(prior, images, reference=IMAGES, generator=seed(1))
    u, levels = torch.randn(2, prior.dim, generator=seed(2)), torch.zeros(2, dtype=torch.long)
    found["normaliser"] = log_normalizer(prior, u, levels, annealing=AnnealingConfig(2, 2), generator=seed(1)).forward
    found["transitions"] = langevin_transitions(prior, 2, steps=4, generator=seed(1)).energies
    return {name: value.detach().contiguous() for name, value in found.items()}


def resumed(folder: Path) -> dict[str, Tensor]:
    """Weights and losses of a run that goes on from the checkpoint in a folder."""
    return train(
        build(schedule=COSINE, langevin=CHAINS, coupling=COUPLING),
        checkpoint_dir=folder,
        checkpoint_every=1,
        resume=True,
    )


def interrupt(folder: Path) -> None:
    """Leave the checkpoints of two steps of three in a folder."""

    def stop(prior: object, record: object) -> None:
        if record.iteration == 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(
            build(schedule=COSINE, langevin=CHAINS, coupling=COUPLING),
            checkpoint_dir=folder,
            checkpoint_every=1,
            callback=stop,
        )


if __name__ == "__main__":
    interrupt(CHECKPOINT)
    found = numbers()
    # Kept apart: a checkpoint of before goes on as it did, whatever a training gives that begins now.
    later = {f"resumed/{name}": found[f"coupled/trained/{name}"].clone() for name in ("loss", "weights")}
    save_file(found | later, FILE)
