"""The diffusion energy-based prior: backbone + schedule + energies.

On top of a frozen hierarchical VAE, T conditional energy-based priors p(u_t | u_{t+1}) in the noise space u are learned
by recovery likelihood (Alg. 1 of Cui & Han, 2024) and sampled one after the other from u_T ~ N(0, I) (Alg. 2):

    loss(u_t, u_{t+1}) = F(T(u_t^-), t) - F(T(u_t), t),     u_t^- by Langevin steps on p(. | u_{t+1})
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .chains.langevin import LangevinConfig
from .chains.schedule import DiffusionSchedule
from .chains.streams import draw_key
from .density.composition import Expression
from .density.sampling import SamplingRequest, make_request, sample_levels
from .energies.coupling import Labels
from .processes import agree
from .training.learned_prior import LearnedPrior
from .training.recovery import RecoveryLoss, recovery_loss


class DiffusionEBMPrior(LearnedPrior):
    """A learned prior for a hierarchical VAE; its arguments, densities and label sets are those of `EnergyModel`."""

    saved_settings: ClassVar[Mapping[str, Any] | None] = {"schedule": DiffusionSchedule, "langevin": LangevinConfig}

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
        states = self._sample_levels(request, draw_key(generator), range(n))
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
        key = agree(draw_key(generator))

        def draw(chunk: slice) -> Tensor:
            return self._sample_levels(request.rows(chunk), key, range(n)[chunk])[0]

        return self._decode_in_chunks(n, draw, chunk_size)

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
        return self._decode_finite(self._sample_levels(request, draw_key(generator), range(n))[0])

    def _sample_levels(self, request: SamplingRequest, key: int, samples: range) -> list[Tensor]:
        """States u_0..u_T of the given samples of a call; baselines draw in ways of their own."""
        return sample_levels(self, request, key, samples)

    def _draw(self, key: int, samples: range) -> Tensor:
        return self._sample_levels(SamplingRequest(), key, samples)[0]

    @property
    def gradients_per_step(self) -> int:
        """Gradients of the networks for a batch in one step of `fit`: one per step of the chain, one to learn from."""
        corrector_steps = self.langevin.corrector_steps
        # Metropolis steps compare the gradients at both ends, so they need one more than there are steps.
        return self.langevin.steps + 1 + (corrector_steps + 1 if corrector_steps else 0)

    def batch_loss(
        self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None, rows: range | None = None
    ) -> RecoveryLoss:
        """The loss that `fit` learns from; see `recovery_loss`."""
        return recovery_loss(self, u, labels, generator, rows)
