"""Joint-EBM (Cui, Wu & Han, CVPR and ICCV 2023): one marginal energy-based model over all layers.

It is learned by maximum likelihood:

    log p(u) = F(T(u)) - |u|^2 / 2 + const        (Eq. 8 of Cui & Han, 2024)
    loss = F(T(u^-)) - F(T(u)),                   u^- by Langevin steps

This is our prior with one noise level (`DiffusionSchedule.marginal`), and the target is right in u. The published
two-stage code follows another one: its chains in u climb F(T(u)) + log p0(T(u)), the density of z without the Jacobian
of T, so what they draw from is

    log p(u) = F(T(u)) - |u|^2 / 2 - log|det J_T(u)| + const,      log|det J_T| = sum_i sum log std_i(z_<i),

while learning contrasts F alone. Layers whose Gaussians have a small std then weigh more than they should.

Chains start from N(0, I), or persist (Tieleman, 2008): states are kept from one training step to the next, and few of
them start anew each time (Du & Mordatch, 2019). Sampling starts from N(0, I) in both cases, so its chains are longer
after persistent ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..backbone.posterior import Posterior
from ..backbone.transform import BackboneAdapter, LayerState
from ..backbone.validation import check_count
from ..chains.execution import ExecutionConfig
from ..chains.langevin import LangevinConfig
from ..chains.schedule import DiffusionSchedule
from ..chains.streams import draw_key, open_streams
from ..density.conditional import draw_conditional
from ..energies.build import without_context
from ..energies.coupling import Coupling, Labels
from ..energies.networks import EnergyConfig
from ..presets import PRESETS
from ..prior import DiffusionEBMPrior
from ..training.objective import BatchLoss, Objective
from ..training.recovery import add_chain_figures, contrast, recovery_loss

Chains = Literal["noise", "persistent"]
Target = Literal["u", "published"]
# Factor on the chains' length in sampling where those of training persist.
LONGER = 10


class JointEBMPrior(DiffusionEBMPrior):
    """One marginal energy-based model over the noise of a hierarchical VAE.

    Args:
        backbone: as of `LatentPrior`.
        chains: where training's chains start: "noise" at N(0, I), "persistent" where they ended before.
        target: "u" for Eq. 8, "published" for the target of the published code, without the Jacobian.
        langevin: the chains; None takes those of PRESETS["joint-ebm"], ten times as long in sampling where training's
            persist.
        energy: as of `EnergyModel`.
        coupling: as of `DiffusionEBMPrior`.
        execution: as of `EnergyModel`.
        kept: number of persistent chains, each D numbers on the prior's device; no fewer than a batch.
        renewal: probability with which a persistent chain starts anew from N(0, I).

    Raises:
        TypeError, ValueError: as of `EnergyModel`, or an unknown kind of chains or target, a wrong number of chains, or
            no probability.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {
        "chains": Chains,
        "target": Target,
        "langevin": LangevinConfig,
        "kept": int,
        "renewal": float,
    }

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        chains: Chains = "noise",
        target: Target = "u",
        langevin: LangevinConfig | None = None,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(context=False),  # noqa: B008
        coupling: Coupling | None = None,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
        kept: int = 1000,
        renewal: float = 0.05,
    ) -> None:
        for name, value, kind in (("chains", chains, Chains), ("target", target, Target)):
            if value not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
        kept = check_count(kept, "kept")
        if not 0 <= renewal <= 1:
            raise ValueError(f"renewal: expected a probability from 0 to 1, got {renewal}")
        if langevin is None:
            langevin = PRESETS["joint-ebm"].langevin
            langevin = replace(langevin, sampling_steps=LONGER * langevin.steps if chains == "persistent" else None)
        super().__init__(
            backbone,
            schedule=DiffusionSchedule.marginal(),
            langevin=langevin,
            energy=without_context(energy, "JointEBMPrior"),
            coupling=coupling,
            execution=execution,
        )
        self.chains = chains
        self.target = target
        self.kept = kept
        self.renewal = renewal
        # States (M, D) of persistent chains. They are of training alone, so no part of the state dict; a checkpoint of
        # training saves them, as it saves all tensor attributes.
        self.states: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        names = ("chains", "target", "langevin", "execution", "kept", "renewal")
        return {name: getattr(self, name) for name in names}

    def analytic_corrections(self, states: Sequence[LayerState]) -> Tensor | None:
        """-log|det J_T| by layer on the published target."""
        if self.target == "u":
            return None
        return -torch.stack([state.std.log().flatten(1).sum(1) for state in states], dim=1)

    def batch_loss(
        self,
        u: Tensor,
        labels: Tensor | Labels | None,
        generator: torch.Generator | None,
        rows: range | None = None,
        objective: Objective | None = None,
        posterior: Posterior | None = None,
    ) -> BatchLoss:
        """The loss that `fit` learns from; see `recovery_loss`, and for persistent chains `persistent_loss`."""
        if self.chains == "noise":
            return recovery_loss(self, u, labels, generator, rows)
        if rows is not None:
            raise ValueError(
                "persistent chains are those of whole batches, which cannot be divided: train in one process without "
                'micro_batch, with a smaller batch_size if memory ran out, or with chains="noise"'
            )
        return self.persistent_loss(u, labels, generator)

    def persistent_loss(
        self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None
    ) -> BatchLoss:
        """The loss against chains that go on where they ended before; they move on.

        Args:
            u: posterior noise of the data (N, D).
            labels: of the images; None for none.
            generator: source of all noise.

        Returns:
            The loss of every sample.
        """
        n = len(u)
        key = draw_key(generator)
        choice = torch.Generator().manual_seed(draw_key(generator))
        streams = open_streams(key, range(n), u.device, u.dtype, self.execution.backend)
        fresh = streams.normal(self.dim)
        if self.states is None or len(self.states) < n:
            samples = range(max(self.kept, n))
            self.states = open_streams(draw_key(choice), samples, u.device, u.dtype).normal(self.dim)
        chosen = torch.randperm(len(self.states), generator=choice, device="cpu")[:n].to(u.device)
        anew = (torch.rand(n, 1, generator=choice, device="cpu", dtype=torch.float32) < self.renewal).to(u.device)
        t = torch.zeros(n, dtype=torch.long, device=u.device)
        # At the only level nothing pulls towards u_{t+1}, so "next" only sets where the chain starts.
        start = torch.where(anew, fresh, self.states[chosen])
        acceptance: list[Tensor] = []
        negative = draw_conditional(
            self, start, t, streams, langevin=replace(self.langevin, start="next"), report=acceptance.append
        )
        self.states[chosen] = negative
        return add_chain_figures(contrast(self, negative, u, t, labels), start, negative, acceptance)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; persistent chains belong to the energies that drew them, so new ones begin."""
        self.states = None
        return super().load_state_dict(state_dict, strict, assign)
