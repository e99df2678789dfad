"""The diffusion energy-based prior: backbone + schedule + energies.

On top of a frozen hierarchical VAE, T conditional energy-based priors p(u_t | u_{t+1}) in the noise space u are learned by recovery likelihood
(Alg. 1 of Cui & Han, 2024) and sampled one after the other from u_T ~ N(0, I) (Alg. 2):

    loss(u_t, u_{t+1}) = F(T(u_t^-), t) - F(T(u_t), t),     u_t^- by Langevin steps on p(. | u_{t+1})
"""

import contextlib
import copy
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import Dataset

from .backbone import BackboneAdapter, NoiseTransform, lock
from .energy import EnergyConfig, build_energies
from .execution import CompiledTotal, Corrections, ExecutionConfig, batched_energies, chain_gradient, one_by_one, repeat, walk_gradient
from .langevin import ChainDiverged, LangevinConfig, langevin_chain, published_step
from .registry import find_adapter
from .sampling import Held, held_states, sample_levels
from .schedule import DiffusionSchedule
from .streams import Streams, draw_key, draw_seeds, open_streams, seeded
from .validation import check_count, check_fixed, check_images, check_levels, check_noise, check_temperature

if TYPE_CHECKING:
    from .training import Callback, TrainingConfig, TrainingRecord

DEFAULT_SCHEDULE = DiffusionSchedule.cosine(3)
# Latent dimensions that one chunk of samples may hold, so that a chain's memory stays bounded.
CHUNK_DIMENSIONS = 2**18
KINDS = (DiffusionSchedule, LangevinConfig, ExecutionConfig)


class DiffusionEBMPrior(nn.Module):
    """A learned prior for a hierarchical VAE. Its parameters and state dict are the energies alone.

    Args:
        backbone: the trained model's adapter, or a model of a family that `find_adapter` recognises; its modules are put in eval mode without
            gradients until `release` is called or the prior is garbage collected.
        schedule: noise levels of the diffusion.
        langevin: how each conditional prior is sampled.
        energy: settings of the default energy networks, or the user's own, one per layer; see `build_energies`.
        execution: how chains are computed: choices of speed.

    Raises:
        TypeError: `backbone` is no adapter and none fits it, or an argument is of the wrong type.
        ValueError: the backbone or an energy network breaks its contract, or the published step rule meets a noise-free first level.
    """

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = DEFAULT_SCHEDULE,
        langevin: LangevinConfig = LangevinConfig(),  # noqa: B008
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        super().__init__()
        for name, value, kind in zip(("schedule", "langevin", "execution"), (schedule, langevin, execution), KINDS, strict=True):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
        if langevin.step_rule == "published" and schedule.sigma_bar[0] == 0:
            raise ValueError("the published step rule divides by sigma_bar_0, which is 0 here; use DiffusionSchedule.ddpm")
        adapter = find_adapter(backbone)
        release = lock(adapter)
        try:
            self._transform = NoiseTransform(adapter)
            self.energies = build_energies(energy, self._transform.latent_shapes, schedule.steps, self._transform.device)
        except BaseException:
            release()
            raise
        self.schedule = schedule
        self.langevin = langevin
        self.execution = execution
        self._release = weakref.finalize(self, release)
        self._release.atexit = False
        self.eval()

    @property
    def transform(self) -> NoiseTransform:
        """T: u -> z of the backbone."""
        if not torch.compiler.is_compiling() and not self._release.alive:
            raise RuntimeError("this prior has released its backbone; make a new DiffusionEBMPrior and load the state dict into it")
        return self._transform

    @property
    def backbone(self) -> BackboneAdapter:
        """The adapter this prior was made with."""
        return self.transform.adapter

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiffusionEBMPrior":
        """A prior with its own copy of the energies over the same backbone."""
        energies = list(copy.deepcopy(self.energies, memo))
        return DiffusionEBMPrior(self.backbone, schedule=self.schedule, langevin=self.langevin, energy=energies, execution=self.execution).train(
            self.training
        )

    def __reduce__(self) -> str:
        raise TypeError("a prior cannot be pickled, as it does not own its backbone; save prior.state_dict()")

    def release(self) -> None:
        """Let the backbone go: its training flags and requires_grad are as they were before. The prior cannot be used afterwards."""
        self._release()

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the latents without batch, top to bottom."""
        return self._transform.latent_shapes

    @property
    def dim(self) -> int:
        """Total number of latent dimensions D."""
        return self._transform.dim

    @property
    def device(self) -> torch.device:
        """Device of the energies, where noise is drawn; the backbone's own where they have no parameters."""
        return next((parameter.device for parameter in self.parameters()), self._transform.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the energies, in which u is kept; the backbone's own where they have no parameters."""
        return next((parameter.dtype for parameter in self.parameters()), self._transform.dtype)

    def to_latents(self, u: Tensor) -> tuple[Tensor, ...]:
        """T: latents z, one tensor (N, *latent_shapes[i]) per layer, of noise `u` (N, D)."""
        check_noise(u, self.dim, self.device)
        return self.transform.to_latents(u)

    def to_noise(self, z: Sequence[Tensor]) -> Tensor:
        """T⁻¹: noise (N, D) of the latents `z`, one tensor (N, *latent_shapes[i]) per layer."""
        return self.transform.to_noise(z)

    def log_abs_det(self, u: Tensor) -> Tensor:
        """log|det dT/du| in nats, (N,), at noise `u` (N, D)."""
        check_noise(u, self.dim, self.device)
        return self.transform.log_abs_det(u)

    def split(self, u: Tensor) -> tuple[Tensor, ...]:
        """Per-layer views (N, *latent_shapes[i]) of noise `u` (N, D)."""
        check_noise(u, self.dim)
        return self.transform.split(u)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Pack per-layer tensors (N, *latent_shapes[i]) into one (N, D); the inverse of `split`."""
        return self.transform.join(parts)

    @torch.no_grad()
    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A posterior draw z ~ q(z|x) as noise u = T⁻¹(z).

        Args:
            images: (N, C, H, W) in [0, 1].
            generator: source of the posterior noise; None takes torch's global generators.

        Returns:
            Noise (N, D).

        Raises:
            TypeError, ValueError: images or the backbone's latents have a wrong type, shape or range, or are not finite.
        """
        check_images(images)
        if images.dtype == torch.float64:  # what NumPy gives; backbones are rarely in double
            images = images.to(self.transform.dtype)
        randomness = contextlib.nullcontext() if generator is None else seeded(draw_seeds(1, generator)[0], images.device)
        with randomness:
            z = self.transform.adapter.infer(images)
        u = self.transform.to_noise(z).to(self.dtype)
        if not bool(torch.isfinite(u).all()):
            raise ValueError("the backbone's posterior draws are not finite; check its weights and that images suit it")
        return u

    def decode(self, u: Tensor) -> Tensor:
        """The backbone's images (N, C, H, W) of noise `u` (N, D), differentiable in u."""
        check_noise(u, self.dim, self.device)
        return self.transform.decode(u)

    def layer_energies(self, u: Tensor, t: int | Tensor) -> Tensor:
        """Energies -f_i(z_i, t) in nats, (N, L), of noise `u` (N, D) at level `t`, an int or (N,) long in 0..T-1. Low where the data are."""
        check_noise(u, self.dim, self.device)
        return -self._corrections(self.transform.to_latents(u), check_levels(t, len(u), self.schedule.steps, u.device))

    def energy(self, u: Tensor, t: int | Tensor) -> Tensor:
        """Energy -F(T(u), t) in nats, (N,): the sum of `layer_energies`."""
        return self.layer_energies(u, t).sum(1)

    def score(self, u: Tensor, t: int | Tensor) -> Tensor:
        """grad_u [F(T(u), t) - |u|^2 / 2], (N, D), of noise `u` (N, D) at level `t`, an int or (N,) long in 0..T-1."""
        check_noise(u, self.dim, self.device)
        return walk_gradient(self._total, u, check_levels(t, len(u), self.schedule.steps, u.device)) - u

    def _corrections(self, z: Sequence[Tensor], t: Tensor, energies: Corrections | None = None) -> Tensor:
        """f_i(z_i, t), (N, L), of all layers or of the first ones; the published step rule's networks stand for F = f / s_t."""
        f = (energies or partial(one_by_one, list(self.energies)))([z_i.to(self.dtype) for z_i in z], t)
        if self.langevin.step_rule == "published":
            f = f / published_step(t, self.schedule, self.langevin, f.dtype)[:, None]
        return f

    def _total(self, u: Tensor, t: Tensor, layers: int | None = None, energies: Corrections | None = None) -> Tensor:
        """Sum of F(T(u), t) over samples; with `layers` that of the first layers' energies by their own noise."""
        return self._corrections(self.transform.to_latents(u, layers), t, energies).sum()

    @cached_property
    def _compiled_total(self) -> CompiledTotal:
        return CompiledTotal(self._total, self.device)

    def _chain(
        self, u_next: Tensor, t: Tensor, streams: Streams, *, steps: int | None = None, temperature: float = 1.0, hold: Held | None = None
    ) -> Tensor:
        """Draw u_t given u_next; at a temperature the chain runs in v = u / temperature, whose backbone has std_i * temperature."""
        energies = batched_energies(list(self.energies), self.latent_shapes, len(u_next), u_next.device)
        total = self._compiled_total if self.execution.compile else partial(self._total, energies=energies)
        whole, own = (chain_gradient(part, t, temperature, self.execution) for part in (total, partial(self._total, layers=1, energies=energies)))
        config, top = replace(self.langevin, steps=steps or self.langevin.steps), (math.prod(self.latent_shapes[0]), own)
        chain = partial(langevin_chain, schedule=self.schedule, config=config, streams=streams, hold=hold, top=top)
        # Spectrally normalised weights are worked out once, at the first step.
        with torch.no_grad(), parametrize.cached():
            return chain(whole, u_next, t, repeat=repeat if self.execution.graph else None)

    def sample_noise(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: Any = None,
        temperature: float = 1.0,
        trajectory: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw u_0 from the prior, through all noise levels (Alg. 2).

        Args:
            n: number of samples N.
            fixed: layer index -> noise u_i (N, *latent_shapes[i]) or (1, ...) to hold; at level t the layer is held at its own diffusion.
            labels: must be None, as this prior is not coupled to labels.
            temperature: multiplies the std of the backbone's Gaussian layers.
            trajectory: return every level's state.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Noise (N, D), or (T + 1, N, D) with entry t the state u_t.

        Raises:
            TypeError, ValueError: a wrong type, count, layer index, shape or temperature, or labels were given.
            ChainDiverged: a chain left the finite numbers.
        """
        self._check_request(n, fixed or {}, labels, temperature)
        states = self._sample_levels(draw_key(generator), range(n), fixed or {}, temperature)
        return torch.stack(states) if trajectory else states[0]

    def sample(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: Any = None,
        temperature: float = 1.0,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the prior.

        Args:
            n: number of images N.
            fixed: as in `sample_noise`.
            labels: as in `sample_noise`.
            temperature: as in `sample_noise`.
            chunk_size: images computed at a time; the result does not depend on it. None bounds the memory by the latents' size.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        self._check_request(n, fixed or {}, labels, temperature)
        chunk_size = max(1, CHUNK_DIMENSIONS // self.dim) if chunk_size is None else chunk_size
        check_count(chunk_size, "chunk_size")
        key, images = draw_key(generator), []
        for first in range(0, n, chunk_size):
            chunk = slice(first, first + chunk_size)
            held = {i: part if len(part) == 1 else part[chunk] for i, part in (fixed or {}).items()}
            u = self._sample_levels(key, range(n)[chunk], held, temperature)[0]
            with torch.no_grad():
                images.append(self.transform.decode(u))
        result = torch.cat(images)
        if not bool(torch.isfinite(result).all()):
            raise ChainDiverged("the backbone's images are not finite though the noise is; check the backbone's precision and statistics")
        return result

    def _check_request(self, n: int, fixed: Mapping[int, Tensor], labels: Any, temperature: float) -> None:
        check_count(n)
        check_temperature(temperature)
        check_fixed(fixed, self.latent_shapes, n)
        if labels is not None:
            raise ValueError(f"labels: this prior was not coupled to labels, so it cannot be asked for {labels!r}")

    def _sample_levels(self, key: int, samples: range, fixed: Mapping[int, Tensor], temperature: float) -> list[Tensor]:
        """States u_0..u_T of Alg. 2 of the given samples of a call."""
        streams = open_streams(key, samples, self.device, self.dtype, self.execution.backend)
        chain = partial(self._chain, streams=streams, steps=self.langevin.sampling_steps, temperature=temperature)
        held = held_states(fixed, self.transform, self.schedule, streams, temperature) if fixed else None
        return sample_levels(chain, self.schedule.steps, streams.normal(self.dim), held=held, temperature=temperature)

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Recovery-likelihood loss of every image at a random level (Alg. 1, Eq. 11-12); its gradient is the learning gradient.

        Args:
            images: (N, C, H, W) in [0, 1].
            generator: source of the posterior draw, the levels and the chains' noise; None takes torch's global generators.

        Returns:
            F(T(u_t^-), t) - F(T(u_t), t) in nats, (N,). Its value is no measure of quality: near 0 is where data and chain agree.

        Raises:
            TypeError, ValueError: images of a wrong type, shape or range.
            ChainDiverged: a chain left the finite numbers.
        """
        return self.recovery_loss(self.encode(images, generator=generator), generator)[0]

    def recovery_loss(self, u: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss from posterior noise instead of images.

        Args:
            u: posterior noise of the data (N, D).
            generator: source of the levels and of all other noise.

        Returns:
            The loss (N,) in nats, F^2 (N,) as the mean over chain and data, and the level t (N,) at which each sample was taken.

        Raises:
            ChainDiverged: a chain left the finite numbers.
        """
        streams, schedule = open_streams(draw_key(generator), range(len(u)), u.device, u.dtype, self.execution.backend), self.schedule
        t = streams.levels(schedule.steps)
        levels = (schedule.alpha, schedule.sigma, schedule.alpha_bar, schedule.sigma_bar)
        alpha, sigma, alpha_bar, sigma_bar = (level.to(u)[:, None] for level in levels)
        u_t = alpha_bar[t] * u + sigma_bar[t] * streams.normal(self.dim)
        u_next = alpha[t + 1] * u_t + sigma[t + 1] * streams.normal(self.dim)
        negative = self._chain(u_next, t, streams)
        with torch.no_grad():
            z = self.transform.to_latents(torch.cat((negative, u_t)))
        from_chain, from_data = self._corrections(z, t.repeat(2)).sum(1).chunk(2)
        return from_chain - from_data, (from_chain**2 + from_data**2) / 2, t

    def fit(
        self,
        data: "Tensor | Dataset[Any] | Iterable[Any]",
        *,
        iterations: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        training: "TrainingConfig | None" = None,
        callback: "Callback | None" = None,
        progress: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> "list[TrainingRecord]":
        """Learn the energies from images; the prior holds their moving average at every moment, also after Ctrl-C.

        Args:
            data: images (N, C, H, W) in [0, 1], a dataset of them, or a loader of batches; of tuples the first entry is taken.
            iterations: optimiser steps; None as in `training`.
            batch_size: images per step; None as in `training`; not to be given with a loader, which has its own.
            learning_rate: largest learning rate; None as in `training`.
            training: all other settings; None takes the defaults of `TrainingConfig`.
            callback: called as callback(prior, record) after every step.
            progress: show a progress bar; None shows one on a terminal only.
            generator: source of all randomness; None takes torch's global generators.

        Returns:
            One record per step.

        Raises:
            TypeError, ValueError: data of the wrong type, empty or out of range, or a bad setting.
            TrainingDiverged: training blew up again and again; the prior is at its last good state.
        """
        from .training import TrainingConfig, fit

        if batch_size is not None and not isinstance(data, Tensor | Dataset):
            raise ValueError(f"batch_size: a {type(data).__name__} has batches of its own; set the size there")
        given: dict[str, Any] = {"iterations": iterations, "batch_size": batch_size, "learning_rate": learning_rate}
        settings = replace(training or TrainingConfig(), **{name: value for name, value in given.items() if value is not None})
        return fit(self, data, settings, callback=callback, progress=progress, generator=generator)
