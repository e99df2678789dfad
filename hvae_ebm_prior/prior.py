"""The diffusion energy-based prior: backbone + schedule + energies.

On top of a frozen hierarchical VAE, T conditional energy-based priors p(u_t | u_{t+1}) in the noise space u are learned by recovery likelihood
(Alg. 1 of Cui & Han, 2024) and sampled one after the other from u_T ~ N(0, I) (Alg. 2):

    loss(u_t, u_{t+1}) = F(T(u_t^-), t) - F(T(u_t), t),     u_t^- by Langevin steps on p(. | u_{t+1})
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .chain import draw_conditional
from .coupling import Labels
from .density import EnergyModel
from .langevin import LangevinConfig
from .processes import agree
from .recovery import RecoveryLoss, recovery_loss
from .sampling import held_rows, held_states, images_in_chunks, sample_levels
from .sharing import Shareable
from .streams import draw_key, open_streams
from .validation import check_count, check_fixed, check_temperature

if TYPE_CHECKING:
    from .composition import Condition, Expression
    from .memory import MemoryEstimate
    from .training import Callback, TrainingConfig, TrainingRecord


class DiffusionEBMPrior(Shareable, EnergyModel):
    """A learned prior for a hierarchical VAE; its arguments, densities and label sets are those of `EnergyModel`."""

    def sample_noise(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: "Mapping[str, Any] | Expression | None" = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        trajectory: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw u_0 from the prior, through all noise levels (Alg. 2).

        Args:
            n: number of samples N.
            fixed: layer index -> noise u_i (N, *latent_shapes[i]) or (1, ...) to hold; at level t the layer is held at its own diffusion.
            labels: label set -> category, as an index, a name or a tensor (N,) of indices with -1 for any; or an expression of labels and priors,
                see `hvae_ebm_prior.composition`.
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
        condition = self._check_request(n, fixed, labels, guidance, temperature)
        states = self._sample_levels(draw_key(generator), range(n), fixed or {}, temperature, condition)
        return torch.stack(states) if trajectory else states[0]

    def sample(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: "Mapping[str, Any] | Expression | None" = None,
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
            chunk_size: images computed at a time; the result does not depend on it. None bounds the memory by the latents' size.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        condition = self._check_request(n, fixed, labels, guidance, temperature)
        key = agree(draw_key(generator))

        def draw(chunk: slice) -> Tensor:
            return self._sample_levels(key, range(n)[chunk], held_rows(fixed or {}, chunk), temperature, condition and condition.rows(chunk))[0]

        return images_in_chunks(self, n, draw, chunk_size)

    def posterior_sample(
        self,
        log_likelihood: Callable[[Tensor], Tensor],
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: "Mapping[str, Any] | Expression | None" = None,
        guidance: float = 1.0,
        langevin: LangevinConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the prior given an observation y: log p(y | decode(u_t)) joins the drift at every level t.

        Args:
            log_likelihood: log p(y | x) in nats, (N,), of images x (N, C, H, W) in [0, 1], differentiable; it is given all N images at a time.
            n: number of images N.
            fixed: as in `sample_noise`.
            labels: as in `sample_noise`.
            guidance: as in `sample_noise`.
            langevin: the chains; None as in sampling. A sharp observation makes the density curved: it wants shorter steps, and more of them.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`, or `log_likelihood` does not return (N,) numbers that depend on the images.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        condition = self._check_request(n, fixed, labels, guidance, 1.0, log_likelihood)
        return self._decode_finite(self._sample_levels(draw_key(generator), range(n), fixed or {}, 1.0, condition, langevin)[0])

    def _check_request(
        self,
        n: int,
        fixed: Mapping[int, Tensor] | None,
        labels: "Mapping[str, Any] | Expression | None",
        guidance: float,
        temperature: float,
        log_likelihood: Callable[[Tensor], Tensor] | None = None,
    ) -> "Condition | None":
        """Raise TypeError or ValueError for what cannot be sampled; what to sample instead of the prior, if anything was asked for."""
        from .composition import make_condition

        check_count(n)
        check_temperature(temperature)
        check_fixed(fixed or {}, self.latent_shapes, n)
        return make_condition(self, n, labels, guidance, log_likelihood)

    def _sample_levels(
        self,
        key: int,
        samples: range,
        fixed: Mapping[int, Tensor],
        temperature: float,
        condition: "Condition | None",
        langevin: LangevinConfig | None = None,
    ) -> list[Tensor]:
        """States u_0..u_T of Alg. 2 of the given samples of a call."""
        streams = open_streams(key, samples, self.device, self.dtype, self.execution.backend)
        langevin = langevin or self.langevin
        langevin = replace(langevin, steps=langevin.sampling_steps or langevin.steps)
        chain = partial(draw_conditional, self, streams=streams, langevin=langevin, temperature=temperature, condition=condition)
        held = held_states(fixed, self.transform, self.schedule, streams, temperature) if fixed else None
        return sample_levels(chain, self.schedule.steps, streams.normal(self.dim), held=held, temperature=temperature)

    def _draw(self, key: int, samples: range) -> Tensor:
        return self._sample_levels(key, samples, {}, 1.0, None)[0]

    def loss(self, images: Tensor, *, labels: "Tensor | Labels | None" = None, generator: torch.Generator | None = None) -> Tensor:
        """Recovery-likelihood loss of every image at a random level (Alg. 1, Eq. 11-12); its gradient is the learning gradient.

        Args:
            images: (N, C, H, W) in [0, 1].
            labels: of a coupled prior, as in `fit`; adds the weighted cross-entropy.
            generator: source of the posterior draw, the levels and the chains' noise; None takes torch's global generators.

        Returns:
            F(T(u_t^-), t) - F(T(u_t), t) in nats, (N,). Its value is no measure of quality; near 0 is where data and chain agree.

        Raises:
            TypeError, ValueError: images of a wrong type, shape or range, or wrong labels.
            ChainDiverged: a chain left the finite numbers.
        """
        return self.batch_loss(self.encode(images, generator=generator), labels, generator).total

    @property
    def gradients_per_step(self) -> int:
        """Gradients of the networks for a batch in one step of `fit`: one per step of the chain, one to learn from."""
        return self.langevin.steps + 1 + (self.langevin.corrector_steps and self.langevin.corrector_steps + 1)

    def batch_loss(self, u: Tensor, labels: "Tensor | Labels | None", generator: torch.Generator | None, rows: range | None = None) -> RecoveryLoss:
        """What `fit` learns from at every step, of posterior noise `u` (N, D) of images, the given rows of a batch if any; see `recovery_loss`."""
        return recovery_loss(self, u, labels, generator, rows)

    def estimate(self, batch_size: int) -> "MemoryEstimate":
        """Memory that `fit` will take with so many images at a time (in a step, or as `micro_batch`), measured on one and on two."""
        from .memory import estimate

        return estimate(self, batch_size)

    def fit(
        self,
        data: "Tensor | Dataset[Any] | Iterable[Any]",
        *,
        labels: "Tensor | Labels | None" = None,
        iterations: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        training: "TrainingConfig | None" = None,
        callback: "Callback | Sequence[Callback] | None" = None,
        progress: bool | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
        generator: torch.Generator | None = None,
    ) -> "list[TrainingRecord]":
        """Learn the energies from images; the prior holds their moving average at every moment, also after Ctrl-C.

        Args:
            data: images (N, C, H, W) in [0, 1], a dataset, posterior cache or loader of batches; of tuples the first entry, the second as labels.
            labels: of the images of a tensor, by label set (or those of the only one): (N,) indices, -1 or NaN where unknown.
            iterations: optimiser steps; None as in `training`.
            batch_size: images per step; None as in `training`; not to be given with a loader, which has its own.
            learning_rate: largest learning rate; None as in `training`.
            training: all other settings; None takes the defaults of `TrainingConfig`.
            callback: called as callback(prior, record) after every step; or several; see `hvae_ebm_prior.callbacks`.
            progress: show a progress bar; None shows one on a terminal only.
            checkpoint_dir: a folder for checkpoints, each the whole state of the run, also one of the last step; None for none.
            checkpoint_every: steps between checkpoints.
            resume: go on from the newest checkpoint there, if any, as if never interrupted; see "Long runs" in the guide.
            generator: source of all randomness; None takes torch's global generators.

        Returns:
            One record per step.

        Raises:
            TypeError, ValueError, OSError: bad data or settings, or checkpoints that are broken, of another run, or there though not to be resumed.
            TrainingDiverged: training blew up again and again; the prior is at its last good state.
        """
        from .training import fit

        given = {"iterations": iterations, "batch_size": batch_size, "learning_rate": learning_rate}
        return fit(self, data, labels, training, given, callback, progress, checkpoint_dir, checkpoint_every, resume, generator)
