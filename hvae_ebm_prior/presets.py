"""Settings by name: ours, the published code's for its two NVAE benchmarks, and two in their manner.

    preset = PRESETS["paper-cifar10"]
    prior = DiffusionEBMPrior(backbone, schedule=preset.schedule, langevin=preset.langevin, energy=preset.energy)
    prior.fit(images, training=preset.training)

The published settings have T = 3, Euler steps s_t = b^2 (sigma_bar_t/sigma_bar_0) sigma_{t+1}^2 from u_{t+1}, networks
of their own (`energies/published.py`) that stand for F = f/s_t (so the loss is divided by s_t), no kernel term at t =
T-1, no moving average and no clipping.
"""

import math
from dataclasses import dataclass, replace

from .chains.langevin import LangevinConfig
from .chains.schedule import DiffusionSchedule
from .density.energy_model import DEFAULT_SCHEDULE
from .energies.networks import Architecture, EnergyConfig
from .training.config import TrainingConfig


@dataclass(frozen=True)
class Preset:
    """All settings of a prior and its training.

    Attributes:
        schedule: noise levels.
        langevin: the chains.
        energy: the networks.
        training: the optimiser.
    """

    schedule: DiffusionSchedule
    langevin: LangevinConfig
    energy: EnergyConfig
    training: TrainingConfig


# What the authors' codes have in common.
PUBLISHED_TRAINING = TrainingConfig(
    learning_rate=4e-5,
    betas=(0.99, 0.999),
    weight_decay=3e-5,
    warmup=0,
    final_learning_rate=1.0,
    clip_norm=math.inf,
    ema_decay=0.0,
    gap_limit=math.inf,
    activity_images=0,
)


def published(
    steps: int,
    step_size: float,
    width: int,
    batch_size: int,
    epoch_decay: float,
    architecture: Architecture = "published-cifar10",
) -> Preset:
    """Settings of the published code, which differ between its benchmarks in the arguments only."""
    return Preset(
        schedule=DiffusionSchedule.ddpm(3),
        langevin=LangevinConfig(
            steps,
            step_size,
            integrator="euler",
            start="next",
            step_rule="published",
            drift_limit=math.inf,
            kernel_at_top=False,
        ),
        energy=EnergyConfig(
            context=False, width=width, spectral_norm=architecture == "published-cifar10", architecture=architecture
        ),
        training=replace(PUBLISHED_TRAINING, batch_size=batch_size, epoch_decay=epoch_decay),
    )


# Of energies without context, found on the example's HVAE (docs/benchmarks.md, "Integrators"; docs/baselines.md).
PLAIN = EnergyConfig(context=False)
PLAIN_TRAINING = TrainingConfig(
    batch_size=64,
    betas=(0.5, 0.99),
    warmup=50,
    final_learning_rate=0.1,
    clip_norm=10.0,
    ema_decay=0.99,
)

PRESETS = {
    # What every class has without settings.
    "default": Preset(DEFAULT_SCHEDULE, LangevinConfig(), EnergyConfig(), TrainingConfig()),
    # The same with narrower networks, of less than half the size (docs/presets.md).
    "small": Preset(DEFAULT_SCHEDULE, LangevinConfig(), EnergyConfig(width=48, vector_width=128), TrainingConfig()),
    # The paper's energies and objective, with few steps, which learn the most per gradient; the top layer, whose energy
    # is the most curved, takes shorter steps.
    "joint-recovery": Preset(
        DEFAULT_SCHEDULE,
        LangevinConfig(top_steps=6),
        PLAIN,
        replace(PLAIN_TRAINING, iterations=1150, learning_rate=3.5e-3, ema_decay=0.995),
    ),
    "joint-ebm": Preset(
        DiffusionSchedule.marginal(),
        LangevinConfig(top_steps=6),
        PLAIN,
        replace(PLAIN_TRAINING, iterations=480, learning_rate=5e-4),
    ),
    # The two-stage code of Joint-EBM (github.com/jcui1224/hierarchical-joint-ebm), whose steps of 1e-5 are twice those
    # of Eq. 3; networks and batch are those of the other baselines.
    "joint-ebm-published": Preset(
        DiffusionSchedule.marginal(),
        LangevinConfig(steps=10, step_size=5e-6, integrator="euler", start="next", drift_limit=math.inf),
        PLAIN,
        replace(PUBLISHED_TRAINING, batch_size=64, learning_rate=2e-5),
    ),
    "ncp": Preset(
        DiffusionSchedule.marginal(),
        LangevinConfig(steps=15, step_size=0.1, start="next", top_steps=6),
        PLAIN,
        replace(PLAIN_TRAINING, iterations=1000, learning_rate=3e-3),
    ),
    "nce-stages": Preset(
        DiffusionSchedule.marginal(),
        LangevinConfig(steps=20, start="next", top_steps=6),
        PLAIN,
        replace(PLAIN_TRAINING, iterations=1000, learning_rate=3e-3),
    ),
    "paper-cifar10": published(steps=50, step_size=3e-5, width=128, batch_size=50, epoch_decay=0.9),
    "paper-celebahq256": published(30, 2e-5, 64, 4, 0.98, "published-celebahq256"),
    # No settings are published for these two. The chains are those of CIFAR-10; the churches' width and batch are of
    # the same authors' marginal EBM prior on the same backbone (github.com/jcui1224/hierarchical-joint-ebm), which
    # gives both data sets one step size.
    "lsun-church64": published(steps=50, step_size=3e-5, width=64, batch_size=32, epoch_decay=0.9),
    "cifar10-hvae": published(steps=50, step_size=3e-5, width=64, batch_size=50, epoch_decay=0.9),
}
