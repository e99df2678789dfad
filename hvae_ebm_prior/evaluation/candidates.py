"""What `compare` and `ablate` train: our prior; baselines, with settings that are fair to each (docs/baselines.md); and
ours with one thing changed.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..backbone.transform import BackboneAdapter
from ..baselines import (
    FlowMatchingPrior,
    GaussianMixturePrior,
    GaussianPrior,
    JointEBMPrior,
    LatentDiffusionPrior,
    MultiStagePrior,
    NCPPrior,
)
from ..baselines.flow_matching import FLOW_TRAINING
from ..chains.schedule import DiffusionSchedule
from ..presets import PRESETS, Preset
from ..prior import DiffusionEBMPrior
from ..training.learned_prior import LearnedPrior
from .comparison import Candidate

OURS = "ours"


def build(preset: Preset, backbone: BackboneAdapter | nn.Module, kind: Any = DiffusionEBMPrior) -> LearnedPrior:
    """A fresh prior with a preset's settings."""
    return kind(backbone, schedule=preset.schedule, langevin=preset.langevin, energy=preset.energy)


def candidates(preset: Preset = PRESETS["default"]) -> dict[str, Candidate]:
    """Ours and all baselines, by the names that `compare` takes.

    Args:
        preset: settings of ours; baselines have their own.

    Returns:
        The candidates.
    """
    plain = PRESETS["joint-recovery"]
    joint, published = PRESETS["joint-ebm"].training, PRESETS["joint-ebm-published"]
    ncp = PRESETS["ncp"].training
    return {
        OURS: Candidate(partial(build, preset), preset.training),
        "joint-recovery": Candidate(partial(build, plain), plain.training),
        "joint-ebm": Candidate(JointEBMPrior, joint),
        "joint-ebm-persistent": Candidate(partial(JointEBMPrior, chains="persistent"), joint),
        "joint-ebm-published": Candidate(
            partial(JointEBMPrior, target="published", langevin=published.langevin), published.training
        ),
        "ncp-sir": Candidate(partial(NCPPrior, sampler="sir"), ncp),
        "ncp-langevin": Candidate(partial(NCPPrior, sampler="langevin"), ncp),
        "nce-stages": Candidate(MultiStagePrior, PRESETS["nce-stages"].training),
        "z-diffusion": Candidate(partial(build, plain, kind=LatentDiffusionPrior), plain.training),
        "flow-matching": Candidate(FlowMatchingPrior, FLOW_TRAINING),
        "mixture": Candidate(GaussianMixturePrior),
        **{f"gaussian-{t:g}": Candidate(partial(GaussianPrior, temperature=t)) for t in (0.9, 0.8, 0.7, 0.6)},
    }


def ablations(preset: Preset = PRESETS["joint-recovery"]) -> dict[str, Candidate]:
    """The preset, and with one change each: K, T (Table 3 of the paper), integrator, space, schedule, batch, averaging.

    Args:
        preset: what to change; one of joint recovery, as chains are what most changes are about.

    Returns:
        The candidates; the preset itself is the first.
    """

    def chains(**changes: Any) -> Preset:
        return replace(preset, langevin=replace(preset.langevin, **changes))

    def training(**changes: Any) -> Preset:
        return replace(preset, training=replace(preset.training, **changes))

    own = preset.langevin.step_rule == "relative"
    if own:
        # T levels from one signal-to-noise ratio to another; each ratio to the next about the same.
        ratios = {1: (200, 0), 2: (200, 6, 0), 4: (200, 25, 6, 1.5, 0), 6: (200, 50, 18, 7, 2.5, 0.7, 0)}
        schedules = {steps: DiffusionSchedule.from_snr(snr) for steps, snr in ratios.items()}
    else:
        schedules = {steps: DiffusionSchedule.ddpm(steps) for steps in (1, 2, 4, 6)}
    changed = {
        OURS: preset,
        **{f"K = {steps}": chains(steps=steps) for steps in (3, 8, 15, 30, 100)},
        **{f"T = {steps}": replace(preset, schedule=schedule) for steps, schedule in schedules.items()},
        **{f"batch of {size}": training(batch_size=size) for size in (32, 128)},
        "no moving average": training(ema_decay=0.0),
        "moving average .999": training(ema_decay=0.999),
    }
    if own:
        # The published step rule is of Euler steps from u_{t+1} alone, and divides by the first level's noise.
        changed |= {
            "euler": chains(integrator="euler"),
            "strang": chains(integrator="strang"),
            "leimkuhler-matthews": chains(integrator="leimkuhler-matthews"),
            "from u_{t+1}": chains(start="next"),
            "cosine schedule": replace(preset, schedule=DiffusionSchedule.cosine(3)),
            "ddpm schedule": replace(preset, schedule=DiffusionSchedule.ddpm(3)),
        }
    found = {name: Candidate(partial(build, each), each.training) for name, each in changed.items()}
    return found | {"z-space": Candidate(partial(build, preset, kind=LatentDiffusionPrior), preset.training)}
