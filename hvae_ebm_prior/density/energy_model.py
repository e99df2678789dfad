"""The unnormalised conditional densities: a frozen backbone, noise levels, energies, and what they know of labels.

    log p(u_t | u_{t+1}) = F(T(u_t), t) - |u_t|^2 / 2 - |u_{t+1} - alpha u_t|^2 / (2 sigma^2) + const        (Eq. 9)

Nothing here draws from them or learns them; see `hvae_ebm_prior.prior`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import check_count, check_levels, check_noise
from ..chains.execution import (
    CompiledTotal,
    Corrections,
    ExecutionConfig,
    batched_energies,
    frozen,
    one_by_one,
    walk_gradient,
)
from ..chains.langevin import LangevinConfig, published_step
from ..chains.schedule import DiffusionSchedule
from ..energies.coupling import Coupling, Heads, build_heads, evidence, label_logits
from ..energies.networks import EnergyConfig, build_energies
from .latent_prior import LatentPrior

DEFAULT_SCHEDULE = DiffusionSchedule.cosine(3)
KINDS = (DiffusionSchedule, LangevinConfig, ExecutionConfig)
Shapes = tuple[tuple[int, ...], ...]
# What a prior says of latents: F (N,), and log p(y | u_t) (N, K) of its label sets.
Terms = tuple[Tensor, dict[str, Tensor]]
TermsAt = Callable[[Sequence[Tensor], Tensor], Terms]


class EnergyModel(LatentPrior):
    """Energies over the latents of a frozen hierarchical VAE. The parameters and state dict are the energies and label
    networks alone.

    Args:
        backbone: as of `LatentPrior`.
        schedule: noise levels of the diffusion.
        langevin: how each conditional prior is sampled.
        energy: settings of the default energy networks, or the user's own, one per layer; see `build_energies`.
        coupling: label sets bound to layers; see `couple`.
        execution: how chains are computed: choices of speed.

    Raises:
        TypeError: `backbone` is no adapter and none fits it, or an argument is of the wrong type.
        ValueError: the backbone or an energy network breaks its contract, or the published step rule meets a noise-free
            first level.
    """

    # Type by name of the settings that a saved prior of this class holds; None where it cannot be saved.
    saved_settings: ClassVar[Mapping[str, Any] | None] = None
    # Whether energies of different samples can be compared, so that they are a density of all layers together.
    comparable: ClassVar[bool] = True

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = DEFAULT_SCHEDULE,
        langevin: LangevinConfig = LangevinConfig(),  # noqa: B008
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        coupling: Coupling | None = None,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        super().__init__(backbone)
        self.schedule, self.langevin, self.execution, self.heads = schedule, langevin, execution, nn.ModuleDict()
        self.coupling: Coupling | None = None
        try:
            for name, value, kind in zip(
                ("schedule", "langevin", "execution"), (schedule, langevin, execution), KINDS, strict=True
            ):
                if not isinstance(value, kind):
                    raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
            if langevin.step_rule == "published" and schedule.sigma_bar[0] == 0:
                raise ValueError(
                    "the published step rule divides by sigma_bar_0, which is 0 here; use DiffusionSchedule.ddpm"
                )
            self.energies = build_energies(energy, self.input_shapes, schedule.steps, self.transform.device)
            if coupling is not None:
                self.couple(coupling)
        except BaseException:
            self.release()
            raise
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A prior with its own copy of the energies over the same backbone."""
        new = type(self)(self.backbone, energy=list(copy.deepcopy(self.energies, memo)), **self.settings())
        new.coupling, new.heads = self.coupling, copy.deepcopy(self.heads, memo)
        return new.train(self.training)

    def settings(self) -> dict[str, Any]:
        """The arguments that this prior was made with, but for the backbone, the energies and the coupling."""
        return {"schedule": self.schedule, "langevin": self.langevin, "execution": self.execution}

    @staticmethod
    def network_shapes(latent_shapes: Shapes) -> Shapes:
        """Shapes of what the energies are given, without batch, top to bottom, of latents of the given shapes: here the
        same.
        """
        return latent_shapes

    @property
    def input_shapes(self) -> Shapes:
        """Shapes of what the energies are given, without batch, top to bottom."""
        return self.network_shapes(self.latent_shapes)

    def inputs(self, z: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the energies are given of latents `z` of all layers or of the first ones: the latents, as here."""
        return z

    def couple(self, coupling: Coupling) -> None:
        """Bind label sets to layers, instead of those there were. Until `fit` has seen labels, F and samples are as
        before.

        Args:
            coupling: the label sets.

        Raises:
            TypeError: `coupling` is no Coupling.
            ValueError: a layer or level does not exist.
        """
        if not isinstance(coupling, Coupling):
            raise TypeError(f"coupling: expected a Coupling, got {type(coupling).__name__}")
        self.heads = (
            build_heads(coupling, self.latent_shapes, list(self.energies), self.schedule.steps, self.device)
            .to(self.dtype)
            .train(self.training)
        )
        self.coupling = coupling

    def layer_energies(self, u: Tensor, t: int | Tensor) -> Tensor:
        """Energies -f_i(z_i, t) in nats, (N, L), of noise `u` (N, D) at level `t`, an int or (N,) long in 0..T-1. Low
        where the data are.
        """
        check_noise(u, self.dim, self.device)
        return -self.corrections(self.transform.to_latents(u), check_levels(t, len(u), self.schedule.steps, u.device))[
            0
        ]

    def energy(self, u: Tensor, t: int | Tensor) -> Tensor:
        """Energy -F(T(u), t) in nats, (N,): the sum of `layer_energies`."""
        return self.layer_energies(u, t).sum(1)

    def score(self, u: Tensor, t: int | Tensor) -> Tensor:
        """grad_u [F(T(u), t) - |u|^2 / 2], (N, D), of noise `u` (N, D) at level `t`, an int or (N,) long in 0..T-1."""
        check_noise(u, self.dim, self.device)
        return walk_gradient(self._total, u, check_levels(t, len(u), self.schedule.steps, u.device)) - u

    def corrections(
        self, z: Sequence[Tensor], t: Tensor, energies: Corrections | None = None, heads: Heads | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """F by layer (N, L), of all layers or of the first ones, and the logits of every label set."""
        f, logits = self.learned_corrections(z, t, energies, heads)
        fixed = self.fixed_corrections(z)
        return f if fixed is None else f + fixed.to(f), logits

    def fixed_corrections(self, z: Sequence[Tensor]) -> Tensor | None:
        """What of F is not learned, (N, L); None, as here, for nothing."""
        return None

    def learned_corrections(
        self, z: Sequence[Tensor], t: Tensor, energies: Corrections | None = None, heads: Heads | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f_i(z_i, t), (N, L), of all layers or of the first ones, and the logits of every label set.

        A set's part of F counts to the lowest of its layers. The published step rule's networks stand for F = f / s_t.
        """
        f = (energies or partial(one_by_one, list(self.energies)))([x.to(self.dtype) for x in self.inputs(z)], t)
        if self.langevin.step_rule == "published":
            f = f / published_step(t, self.schedule, self.langevin, f.dtype)[:, None]
        if self.coupling is None:
            return f, {}
        z = [z_i.to(self.dtype) for z_i in z]
        logits = label_logits(self.heads if heads is None else heads, self.coupling, z, t)  # type: ignore[arg-type]
        parts = list(f.unbind(1))
        for name, values in logits.items():
            bound = [i for i in self.coupling.layers(name, len(self.energies)) if i < len(z)]
            if bound:
                parts[bound[-1]] = parts[bound[-1]] + evidence(values)
        return torch.stack(parts, dim=1), logits

    def terms_at(self, t: Tensor) -> TermsAt:
        """What this prior says of latents at levels `t` (N,), as a function for one chain: F (N,) and log p(y | u_t) by
        label set.
        """
        energies = batched_energies(list(self.energies), self.input_shapes, len(t), t.device)
        uncoupled = self.coupling is not None and not bool(self.coupling.coupled(t).any())
        heads = {
            name: {i: frozen(network) for i, network in networks.items()}
            for name, networks in self.heads.items()
            if not uncoupled
        }  # type: ignore[operator]

        def terms(z: Sequence[Tensor], t: Tensor) -> Terms:
            f, logits = self.corrections(z, t, energies, heads)
            return f.sum(1), {name: values.log_softmax(1) for name, values in logits.items()}

        return terms

    def _total(self, u: Tensor, t: Tensor) -> Tensor:
        """Sum of F(T(u), t) over samples."""
        return self.corrections(self.transform.to_latents(u), t)[0].sum()

    @cached_property
    def compiled_total(self) -> CompiledTotal:
        """Sum of F(T(u), t) over samples, compiled when first called."""
        return CompiledTotal(self._total, self.device)

    @torch.no_grad()
    def classify(
        self, images: Tensor, *, draws: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """p(y | x) of every label set from the energies: the mean of p(y | u_0) over posterior draws.

        Args:
            images: (N, C, H, W) in [0, 1].
            draws: posterior draws per image.
            generator: source of the posterior noise.

        Returns:
            Probabilities (N, K) by label set.

        Raises:
            TypeError, ValueError: images of a wrong type, shape or range, or the prior is not coupled at t = 0.
        """
        check_count(draws, "draws")
        if self.coupling is None or (self.coupling.levels is not None and 0 not in self.coupling.levels):
            raise ValueError("classify: this prior is not coupled to labels at t = 0; see DiffusionEBMPrior.couple")
        found, levels = (
            {name: list[Tensor]() for name in self.coupling.sets},
            torch.zeros(len(images), dtype=torch.long, device=self.device),
        )
        for _ in range(draws):
            u = self.encode(images, generator=generator)
            for name, logits in self.corrections(self.transform.to_latents(u), levels)[1].items():
                found[name].append(logits.softmax(1))
        return {name: torch.stack(values).mean(0) for name, values in found.items()}
