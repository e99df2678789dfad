"""The diffusion energy-based prior: backbone + schedule + energies.

On top of a frozen hierarchical VAE, T conditional energy-based priors p(u_t | u_{t+1}) in the noise space u are learned
by recovery likelihood (Alg. 1 of Cui & Han, 2024) and sampled one after the other from u_T ~ N(0, I) (Alg. 2):

    loss(u_t, u_{t+1}) = F(T(u_t^-), t) - F(T(u_t), t),     u_t^- by Langevin steps on p(. | u_{t+1})
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .backbone.transform import BackboneAdapter
from .backbone.validation import check_count
from .chains.execution import ExecutionConfig
from .chains.langevin import LangevinConfig
from .chains.schedule import DiffusionSchedule
from .chains.streams import draw_key
from .density.composition import Expression
from .density.energy_model import DEFAULT_SCHEDULE
from .density.sampling import make_request, sample_levels
from .energies.coupling import Coupling, Labels, build_heads
from .energies.networks import EnergyConfig
from .training.learned_prior import LearnedPrior
from .training.recovery import RecoveryLoss, gradients_of_recovery, recovery_loss


class DiffusionEBMPrior(LearnedPrior):
    """A learned prior for a hierarchical VAE, with labels if asked; its densities are those of `EnergyModel`.

    Args:
        backbone: as of `LatentPrior`.
        schedule: as of `EnergyModel`.
        langevin: as of `EnergyModel`.
        energy: as of `EnergyModel`.
        coupling: label sets bound to layers; see `couple`.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel` and `couple`.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {"schedule": DiffusionSchedule, "langevin": LangevinConfig}

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
        super().__init__(backbone, schedule=schedule, langevin=langevin, energy=energy, execution=execution)
        if coupling is not None:
            try:
                self.couple(coupling)
            except BaseException:
                self.release()
                raise

    def couple(self, coupling: Coupling) -> None:
        """Bind label sets to layers, instead of former ones. F and samples stay as they are until `fit` gets labels.

        Args:
            coupling: the label sets.

        Raises:
            TypeError: `coupling` is no Coupling.
            ValueError: a layer or level does not exist.
        """
        if not isinstance(coupling, Coupling):
            raise TypeError(f"coupling: expected a Coupling, got {type(coupling).__name__}")
        heads = build_heads(coupling, self.latent_shapes, list(self.energies), self.schedule.steps, self.device)
        self.heads = heads.to(self.dtype).train(self.training)
        self.coupling = coupling

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
        probabilities: dict[str, list[Tensor]] = {name: [] for name in self.coupling.sets}
        levels = torch.zeros(len(images), dtype=torch.long, device=self.device)
        for _ in range(draws):
            u = self.encode(images, generator=generator)
            for name, logits in self.corrections(self.transform.to_latents(u), levels)[1].items():
                probabilities[name].append(logits.softmax(1))
        return {name: torch.stack(values).mean(0) for name, values in probabilities.items()}

    def sample_noise(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: Mapping[str, Any] | Expression | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        trajectory: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw u_0 from the prior, through all noise levels (Alg. 2).

        Args:
            n: number of samples N.
            fixed: layer index -> noise u_i (N, *latent_shapes[i]) or (1, ...) to hold; at level t the layer is held at
                its own diffusion.
            labels: label set -> category, as an index, a name or a tensor (N,) of indices with -1 for any; or an
                expression of labels and priors, see `hvae_ebm_prior.density.composition`.
            guidance: strength of the labels, a factor on their log-probability; 1 for the conditional distribution.
            temperature: multiplies the std of the backbone's Gaussian layers.
            trajectory: return every level's state.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Noise (N, D), or (T + 1, N, D) with entry t the state u_t.

        Raises:
            TypeError, ValueError: a wrong type, count, layer index, shape, temperature or label.
            ChainDiverged: a chain left the finite numbers.
        """
        request = make_request(self, n, fixed=fixed, labels=labels, guidance=guidance, temperature=temperature)
        states = sample_levels(self, request, draw_key(generator), range(n))
        return torch.stack(states) if trajectory else states[0]

    def sample(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: Mapping[str, Any] | Expression | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the prior.

        Args:
            n: number of images N.
            fixed: as in `sample_noise`.
            labels: as in `sample_noise`.
            guidance: as in `sample_noise`.
            temperature: as in `sample_noise`.
            chunk_size: images computed at a time; the result does not depend on it. None bounds the memory by the
                latents' size.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        request = make_request(self, n, fixed=fixed, labels=labels, guidance=guidance, temperature=temperature)
        return self._draw_images(n, request, chunk_size, generator)

    def posterior_sample(
        self,
        log_likelihood: Callable[[Tensor], Tensor],
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: Mapping[str, Any] | Expression | None = None,
        guidance: float = 1.0,
        langevin: LangevinConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the prior given an observation y: log p(y | decode(u_t)) joins the drift at every level t.

        Args:
            log_likelihood: log p(y | x) in nats, (N,), of images x (N, C, H, W) in [0, 1], differentiable; it is given
                all N images at a time.
            n: number of images N.
            fixed: as in `sample_noise`.
            labels: as in `sample_noise`.
            guidance: as in `sample_noise`.
            langevin: the chains; None as in sampling. A sharp observation makes the density curved: it wants shorter
                steps, and more of them.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`, or `log_likelihood` does not return (N,) numbers that depend on
                the images.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        request = make_request(
            self, n, fixed=fixed, labels=labels, guidance=guidance, log_likelihood=log_likelihood, langevin=langevin
        )
        return self._decode_finite(self._draw(draw_key(generator), range(n), request))

    @property
    def gradients_per_step(self) -> int:
        """Gradients of the networks for a batch in one step of `fit`: one per step of the chain, one to learn from."""
        return gradients_of_recovery(self.langevin)

    def batch_loss(
        self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None, rows: range | None = None
    ) -> RecoveryLoss:
        """The loss that `fit` learns from; see `recovery_loss`."""
        return recovery_loss(self, u, labels, generator, rows)
