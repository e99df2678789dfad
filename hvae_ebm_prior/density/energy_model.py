"""The unnormalised conditional densities: a frozen backbone, noise levels, energies and label networks.

    log p(u_t | u_{t+1}) = F(T(u_t), t) - |u_t|^2 / 2 - |u_{t+1} - alpha u_t|^2 / (2 sigma^2) + const        (Eq. 9)

They are drawn from in `hvae_ebm_prior.density.sampling`, and learned in `hvae_ebm_prior.training`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter, LayerState
from ..backbone.validation import check_levels, check_noise
from ..chains.autograd import walk_gradient
from ..chains.execution import (
    ChainEnergies,
    CompiledTotal,
    Corrections,
    ExecutionConfig,
    frozen,
    group_networks,
    one_by_one,
)
from ..chains.graphs import Graphs
from ..chains.langevin import ChainDiverged, LangevinConfig, gaussian_part, published_step
from ..chains.schedule import DiffusionSchedule
from ..energies.build import build_energies
from ..energies.context import takes_context
from ..energies.coupling import Coupling, Heads, evidence, label_logits
from ..energies.networks import EnergyConfig
from .latent_prior import LatentPrior

# A little noise is left at level 0, as posteriors without can be too sharp for chains to follow.
DEFAULT_SCHEDULE = DiffusionSchedule.from_snr([200, 15, 3, 0])
KINDS = {"schedule": DiffusionSchedule, "langevin": LangevinConfig, "execution": ExecutionConfig}
Shapes = tuple[tuple[int, ...], ...]
# F (N,), and log p(y | u_t) (N, K) of every label set.
Terms = tuple[Tensor, dict[str, Tensor]]
# The terms of the states of all layers, or of the first ones, at levels t (N,).
TermsAt = Callable[[Sequence[LayerState], Tensor], Terms]


class EnergyModel(LatentPrior):
    """Energies over the latents of a frozen hierarchical VAE. The parameters and state dict are the energies and label
    networks alone.

    Args:
        backbone: as of `LatentPrior`.
        schedule: noise levels of the diffusion.
        langevin: how each conditional prior is sampled.
        energy: settings of the default energy networks, or the user's own, one per layer; see `build_energies`.
        execution: how chains are computed: choices of speed.

    Attributes:
        graphs: what was captured of this model's chains, for `ExecutionConfig.graph`.
        coupling: label sets bound to layers; None without labels.
        heads: their networks, by set and layer.

    Raises:
        TypeError: `backbone` is no adapter and none fits it, or an argument is of the wrong type.
        ValueError: the backbone or an energy network breaks its contract, or the published step rule meets a noise-free
            first level.
    """

    # Type by name of the settings in a saved prior of this class; None where it cannot be saved.
    saved_settings: ClassVar[Mapping[str, Any] | None] = None

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = DEFAULT_SCHEDULE,
        langevin: LangevinConfig = LangevinConfig(),  # noqa: B008
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        super().__init__(backbone)
        self.schedule = schedule
        self.langevin = langevin
        self.execution = execution
        self.graphs = Graphs()
        self._chain_energies: dict[tuple[tuple[int, ...], ...], ChainEnergies] = {}
        self.coupling: Coupling | None = None
        self.heads = nn.ModuleDict()
        try:
            for name, kind in KINDS.items():
                if not isinstance(getattr(self, name), kind):
                    raise TypeError(f"{name}: expected a {kind.__name__}, got {type(getattr(self, name)).__name__}")
            if langevin.step_rule == "published" and schedule.sigma_bar[0] == 0:
                raise ValueError(
                    "the published step rule divides by sigma_bar_0, which is 0 here; use DiffusionSchedule.ddpm"
                )
            with torch.inference_mode(False):
                self.energies = build_energies(energy, self.input_shapes, schedule.steps, self.transform.device)
            if langevin.step_rule == "published" and self.has_context:
                raise ValueError(
                    "the published step rule scales energies of the published kind; set EnergyConfig(context=False)"
                )
        except BaseException:
            self.release()
            raise
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A prior with its own copy of the energies over the same backbone."""
        new = type(self)(self.backbone, energy=list(copy.deepcopy(self.energies, memo)), **self.settings())
        new.coupling = self.coupling
        new.heads = copy.deepcopy(self.heads, memo)
        return new.train(self.training)

    def settings(self) -> dict[str, Any]:
        """The arguments that this prior was made with, but for the backbone, the energies and the coupling."""
        return {"schedule": self.schedule, "langevin": self.langevin, "execution": self.execution}

    @staticmethod
    def network_shapes(latent_shapes: Shapes) -> Shapes:
        """Shapes of the energies' inputs for latents of the given shapes: here the latents' own."""
        return latent_shapes

    @property
    def input_shapes(self) -> Shapes:
        """Shapes of the energies' inputs without batch, top to bottom."""
        return self.network_shapes(self.latent_shapes)

    @property
    def has_context(self) -> bool:
        """Whether the energies see their context, as f_i(u_i, phi; c_i), rather than f_i(z_i, t)."""
        return all(takes_context(network) for network in self.energies)

    @property
    def angle_dtype(self) -> torch.dtype:
        """The precision of angles, which half precision would round past a quarter turn near pure noise."""
        return torch.promote_types(self.dtype, torch.float32)

    def inputs(self, states: Sequence[LayerState]) -> Sequence[Tensor | LayerState]:
        """The energies' inputs for the states of all layers, or of the first ones: with context the states themselves,
        without it the latents.
        """
        if self.has_context:
            return [state.to(self.dtype) for state in states]
        return [state.z.to(self.dtype) for state in states]

    def network_levels(self, t: Tensor) -> Tensor:
        """Levels `t` (N,) as the energies take them: without context as they are; with it the angles of the noise in a
        layer and in those above, which are equal here, (N, 2).
        """
        if not self.has_context:
            return t
        return self.schedule.on(t.device, self.angle_dtype).angle[t][:, None].expand(-1, 2)

    def layer_energies(self, u: Tensor, t: int | Tensor) -> Tensor:
        """Energies -f_i(z_i, t) in nats, (N, L), low where the data are.

        Args:
            u: noise (N, D).
            t: level, an int or (N,) long in 0..T-1.

        Returns:
            One energy per sample and layer.

        Raises:
            TypeError, ValueError: noise of a wrong type or shape, or not finite, or no such level.
            ChainDiverged: the energies are not finite.
        """
        check_noise(u, self.dim, self.device)
        levels = check_levels(t, len(u), self.schedule.steps, u.device)
        return check_finite(-self.corrections(self.transform.states(u), levels)[0], "energies")

    def energy(self, u: Tensor, t: int | Tensor) -> Tensor:
        """Energy -F(T(u), t) in nats, (N,): the sum of `layer_energies`."""
        return self.layer_energies(u, t).sum(1)

    def score(self, u: Tensor, t: int | Tensor) -> Tensor:
        """grad_u [F(T(u), t) - |u|^2 / 2], (N, D), that of the marginal density (Eq. 8), of noise `u` (N, D) at level
        `t`, an int or (N,) long in 0..T-1.
        """
        check_noise(u, self.dim, self.device)
        levels = check_levels(t, len(u), self.schedule.steps, u.device)
        return check_finite(walk_gradient(self._total, u, levels) - u, "gradients")

    def conditional_score(self, u: Tensor, u_next: Tensor, t: int | Tensor) -> Tensor:
        """grad_u log p(u_t | u_{t+1}), what Langevin steps climb (Eq. 13): the gradients of F, of the Gaussian prior
        and of the kernel N(u_{t+1}; alpha u_t, sigma^2).

        Args:
            u: noise u_t (N, D).
            u_next: noise u_{t+1} of the noisier level (N, D).
            t: level, an int or (N,) long in 0..T-1.

        Returns:
            (N, D).

        Raises:
            TypeError, ValueError: noise of a wrong type or shape, or not finite, or no such level.
        """
        check_noise(u, self.dim, self.device)
        check_noise(u_next, self.dim, self.device)
        levels = check_levels(t, len(u), self.schedule.steps, u.device)
        weight, precision = gaussian_part(levels, self.schedule, self.langevin, u.dtype)
        return walk_gradient(self._total, u, levels) + precision[:, None] * (weight[:, None] * u_next - u)

    def corrections(
        self, states: Sequence[LayerState], t: Tensor, energies: Corrections | None = None, heads: Heads | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of F, learned and analytic, (N, L), and the logits of every label set.

        Args:
            states: of all layers, or of the first ones.
            t: levels (N,) long.
            energies: computes f_i, (N, L), from `inputs` and `network_levels`; None for one network after the other.
            heads: the label networks by set and layer; None for the prior's own.

        Returns:
            One term of F per sample and layer, and logits (N, K) by label set.
        """
        f, logits = self.learned_corrections(states, t, energies, heads)
        analytic = self.analytic_corrections(states)
        return f if analytic is None else f + analytic.to(f), logits

    def analytic_corrections(self, states: Sequence[LayerState]) -> Tensor | None:
        """The terms of F without parameters, (N, L); None if there are none, as here."""
        return None

    def learned_corrections(
        self, states: Sequence[LayerState], t: Tensor, energies: Corrections | None = None, heads: Heads | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of F with parameters, f_i and the label sets' evidence; as `corrections`.

        A set's evidence counts to the lowest of its layers. The published step rule's networks stand for F = f / s_t.
        """
        energies = energies or partial(one_by_one, list(self.energies))
        inputs, levels = self.inputs(states), self.network_levels(t)
        f = energies(inputs, levels)
        if self.langevin.step_rule == "published":
            f = f / published_step(t, self.schedule, self.langevin, f.dtype)[:, None]
        if self.coupling is None:
            return f, {}
        logits = label_logits(self.heads if heads is None else heads, self.coupling, inputs, levels, t)  # type: ignore[arg-type]
        parts = list(f.unbind(1))
        for name, values in logits.items():
            bound = [i for i in self.coupling.layers(name, len(self.energies)) if i < len(states)]
            if bound:
                parts[bound[-1]] = parts[bound[-1]] + evidence(values)
        return torch.stack(parts, dim=1), logits

    def chain_energies(self, n: int) -> ChainEnergies:
        """The energies as one function for chains of `n` samples, with their present weights. It is the same object as
        for the chain before while the networks are the same ones, in the same memory.
        """
        groups = group_networks(list(self.energies), self.input_shapes, n, self.device)
        kept = self._chain_energies.get(groups)
        if kept is None or not kept.is_of(self.energies):
            kept = self._chain_energies[groups] = ChainEnergies(list(self.energies), groups)
        else:
            kept.refresh()
        return kept

    def terms_at(self, t: Tensor) -> TermsAt:
        """F (N,) and log p(y | u_t) by label set, as a function of states for one chain at levels `t` (N,)."""
        energies = self.chain_energies(len(t))
        uncoupled = self.coupling is not None and not bool(self.coupling.coupled(t).any())
        heads: Heads = {}
        if not uncoupled:
            heads = {name: frozen_heads(networks) for name, networks in self.heads.items()}  # type: ignore[arg-type]

        def terms(states: Sequence[LayerState], t: Tensor) -> Terms:
            f, logits = self.corrections(states, t, energies, heads)
            return f.sum(1), {name: values.log_softmax(1) for name, values in logits.items()}

        return terms

    def _total(self, u: Tensor, t: Tensor) -> Tensor:
        """Sum of F(T(u), t) over samples."""
        return self.corrections(self.transform.states(u), t)[0].sum()

    @cached_property
    def compiled_total(self) -> CompiledTotal:
        """Sum of F(T(u), t) over samples, compiled when first called."""
        return CompiledTotal(self._total, self.device)


def check_finite(values: Tensor, what: str) -> Tensor:
    """The values, if they are finite; ChainDiverged, naming `what` they are, if not."""
    if not bool(torch.isfinite(values.detach()).all()):
        raise ChainDiverged(
            f"the {what} are not finite; check the backbone's precision, and that the noise is like noise"
        )
    return values


def frozen_heads(networks: nn.ModuleDict) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """One set's label networks by layer, with weights that ask for no gradients."""
    return {layer: frozen(network) for layer, network in networks.items()}
