"""The diffusion energy-based prior: backbone + schedule + energies.

On top of a frozen hierarchical VAE, energies F(u, t) = sum_i f_i in the noise space u correct the Gaussian prior at
every level t of noise. What they see, how they are learned and how they are drawn from is a matter of settings:

    energies    f_i(u_i, phi; c_i) with their context, the Gaussian that the layers above give; or f_i(z_i, t)
    objective   score matching and recovery likelihood layer by layer; or recovery likelihood of all layers together
    drawing     layer by layer, by the probability flow or chains; or all together by chains (Alg. 2)

The first of each are the defaults, the others those of Cui & Han (2024).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .backbone.elbo import backbone_bound, density_adapter
from .backbone.posterior import Posterior
from .backbone.transform import BackboneAdapter
from .backbone.validation import check_count, check_images, check_noise
from .chains.execution import ExecutionConfig
from .chains.langevin import LangevinConfig
from .chains.schedule import DiffusionSchedule
from .chains.streams import draw_key, drawing_by
from .density.ancestral import DrawingConfig, draw_layers
from .density.composition import Condition, Expression
from .density.energy_model import DEFAULT_SCHEDULE
from .density.log_prob import log_prob_by_layer
from .density.sampling import SamplingRequest, Tempering, make_request, split_request, temper
from .energies.coupling import Coupling, Labels, build_heads
from .energies.networks import EnergyConfig
from .training.config import TrainingConfig
from .training.learned_prior import LearnedPrior
from .training.objective import JOINT_RECOVERY, SCORE, BatchLoss, Objective
from .training.recovery import gradients_of_recovery, recovery_loss, teacher_forced_loss
from .training.score import score_loss


class DiffusionEBMPrior(LearnedPrior):
    """A learned prior for a hierarchical VAE, with labels if asked; its densities are those of `EnergyModel`.

    Args:
        backbone: as of `LatentPrior`.
        schedule: as of `EnergyModel`.
        langevin: as of `EnergyModel`.
        energy: as of `EnergyModel`.
        coupling: label sets bound to layers; see `couple`.
        drawing: how samples are drawn.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel` and `couple`.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {
        "schedule": DiffusionSchedule,
        "langevin": LangevinConfig,
        "drawing": DrawingConfig,
    }

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = DEFAULT_SCHEDULE,
        langevin: LangevinConfig = LangevinConfig(),  # noqa: B008
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        coupling: Coupling | None = None,
        drawing: DrawingConfig = DrawingConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        super().__init__(backbone, schedule=schedule, langevin=langevin, energy=energy, execution=execution)
        self.drawing = drawing
        try:
            if not isinstance(drawing, DrawingConfig):
                raise TypeError(f"drawing: expected a DrawingConfig, got {type(drawing).__name__}")
            if drawing.ancestral and not self.has_context:
                raise ValueError(
                    "drawing: energies without context have a density of all layers together alone; set "
                    "DrawingConfig(ancestral=False) or EnergyConfig(context=True)"
                )
            if coupling is not None:
                self.couple(coupling)
        except BaseException:
            self.release()
            raise

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "drawing": self.drawing}

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
        with torch.inference_mode(False):
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
        draws = check_count(draws, "draws")
        if self.coupling is None or (self.coupling.levels is not None and 0 not in self.coupling.levels):
            raise ValueError("classify: this prior is not coupled to labels at t = 0; see DiffusionEBMPrior.couple")
        probabilities: dict[str, list[Tensor]] = {name: [] for name in self.coupling.sets}
        levels = torch.zeros(len(images), dtype=torch.long, device=self.device)
        for _ in range(draws):
            u = self.encode(images, generator=generator)
            for name, logits in self.corrections(self.transform.states(u), levels)[1].items():
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
        tempering: Tempering = "after",
        trajectory: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw u_0 from the prior, as `drawing` says.

        Args:
            n: number of samples N.
            fixed: layer index -> noise u_i (N, *latent_shapes[i]) or (1, ...) to hold. If these are not the first
                layers, all are drawn jointly, where a layer is held at level t at its own diffusion.
            labels: label set -> category, as an index, a name or a tensor (N,) of indices with -1 for any; or an
                expression of labels and priors, see `hvae_ebm_prior.density.composition`.
            guidance: strength of the labels, a factor on their log-probability; 1 for the conditional distribution.
            temperature: multiplies the std of the backbone's Gaussian layers.
            tempering: "after" drawing, as in the published code, which multiplies the noise drawn at temperature 1; or
                "before", so that the energies see what will be decoded.
            trajectory: return every level's state.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Noise (N, D), or (T + 1, N, D) with entry t the state u_t.

        Raises:
            TypeError, ValueError: a wrong type, count, layer index, shape, temperature or label.
            ChainDiverged: a chain left the finite numbers.
        """
        request = make_request(
            self, n, fixed=fixed, labels=labels, guidance=guidance, temperature=temperature, tempering=tempering
        )
        key = draw_key(generator)
        states = self.draw_levels(key, range(n), request)
        return torch.stack(states) if trajectory else states[0]

    def sample(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        labels: Mapping[str, Any] | Expression | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        tempering: Tempering = "after",
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
            tempering: as in `sample_noise`.
            chunk_size: images computed at a time; the result does not depend on it, up to rounding. None bounds the
                memory by the latents' size.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        request = make_request(
            self, n, fixed=fixed, labels=labels, guidance=guidance, temperature=temperature, tempering=tempering
        )
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
        return self.decode(self._draw(draw_key(generator), range(n), request))

    def log_prob(self, u: Tensor, *, steps: int = 20, probes: int = 1, seed: int = 0) -> Tensor:
        """log p(u) of the prior in nats, normalised: the density of what ancestral drawing follows, with the noise of
        level 0 (`hvae_ebm_prior.density.log_prob`).

        Args:
            u: noise (N, D).
            steps: Runge-Kutta steps of every layer's flow.
            probes: random signs per layer of many active dimensions, whose divergence is estimated by them.
            seed: of the signs; the same seed gives the same result.

        Returns:
            Nats (N,).

        Raises:
            TypeError, ValueError: energies without context, or noise of a wrong type or shape.
        """
        check_noise(u, self.dim, self.device)
        steps = check_count(steps, "steps")
        probes = check_count(probes, "probes")
        parts = u.split(self.samples_per_chunk)
        return torch.cat([log_prob_by_layer(self, part, steps, probes, seed).sum(1) for part in parts])

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, *, steps: int = 20, generator: torch.Generator | None = None) -> Tensor:
        """A bound on log p(x): that of the backbone with this prior's density in the place of its Gaussian one.

            log p(x) >= E_q [log p(x | z) + log p(u) - log N(u; 0, I) + log p0(z) - log q(z | x)],     u = T⁻¹(z)

        estimated by one posterior draw of each image, p0 being the backbone's own prior.

        Args:
            images: (N, C, H, W) in [0, 1].
            steps: as of `log_prob`.
            generator: source of the posterior noise; None takes torch's global generators.

        Returns:
            Nats (N,), for a continuous p(x | z) those of a density over [0, 1].

        Raises:
            TypeError: the adapter gives no densities (`hvae_ebm_prior.backbone.elbo.DensityAdapter`), or energies
                without context.
            ValueError: images of a wrong shape or range.
        """
        check_images(images, self.backbone)
        density_adapter(self.backbone)
        images = self.transform.take(images)
        with drawing_by(generator, images.device):
            u, bound = backbone_bound(self.transform, images)
        gaussian = -(u.square().sum(1) + self.dim * math.log(2 * math.pi)) / 2
        return bound - gaussian + self.log_prob(u.to(self.dtype), steps=steps)

    def draw_levels(self, key: int, samples: range, request: SamplingRequest) -> list[Tensor]:
        if request.tempering == "after" and request.temperature != 1:
            states = self.draw_levels(key, samples, replace(request, temperature=1.0))
            return [temper(self, u, request) for u in states]
        if not self._draws_layers(request):
            return super().draw_levels(key, samples, request)
        parts = split_request(self, request, key, samples)
        chunks = [draw_layers(self, streams, self.drawing, part) for part, streams in parts]
        return [torch.cat(states) for states in zip(*chunks, strict=True)]

    def _draws_layers(self, request: SamplingRequest) -> bool:
        """Whether a request is drawn layer by layer: where that is asked for, and every layer needs those above
        alone.
        """
        if not (self.has_context if self.drawing.ancestral is None else self.drawing.ancestral):
            return False
        condition = request.condition or Condition()
        models = (self, *condition.experts)
        return (
            request.langevin is None
            and condition.log_likelihood is None
            and sorted(request.fixed) == list(range(len(request.fixed)))
            and all(model.has_context for model in models)
            and all(model.coupling is None or model.coupling.levels is None for model in models)
        )

    @property
    def gradients_per_step(self) -> int:
        """Gradients of the networks for a batch in one step of `fit`: one per noise level and image in score matching;
        in joint recovery one per step of the chain, and one to learn from.
        """
        return SCORE.noise_draws if self.has_context else gradients_of_recovery(self.langevin)

    def objective(self, config: TrainingConfig, step: int) -> Objective:
        """What `fit` minimises at a step, from 0; ValueError for one that the energies cannot be learned by."""
        name = config.objective or ("score-recovery" if self.has_context else "joint-recovery")
        if name == "joint-recovery":
            return JOINT_RECOVERY
        if not self.has_context:
            raise ValueError(
                f"objective: {name} is for energies with context, EnergyConfig(context=True); without it expected "
                f"joint-recovery, got {name!r}"
            )
        if name == "recovery":
            return Objective(recovery=1.0)
        score = replace(SCORE, noise_draws=config.noise_draws)
        if name == "score" or step < (1 - config.recovery_share) * config.iterations:
            return score
        return replace(score, recovery=config.recovery_weight, joint=name == "score-joint-recovery")

    def batch_loss(
        self,
        u: Tensor,
        labels: Tensor | Labels | None,
        generator: torch.Generator | None,
        rows: range | None = None,
        objective: Objective | None = None,
        posterior: Posterior | None = None,
    ) -> BatchLoss:
        """The loss that `fit` learns from; see `score_loss`, `teacher_forced_loss` and `recovery_loss`.

        Args:
            u: posterior noise (N, D) of images.
            labels: of the images; None for none.
            generator: source of all further noise.
            rows: numbers of these samples in a batch of which they are a part; None for a whole batch.
            objective: what to minimise; None for score matching if energies have context, else for joint recovery.
            posterior: the Gaussians that the noise was drawn from, where they are known; for score matching.

        Returns:
            The loss of every sample.
        """
        objective = objective or (SCORE if self.has_context else JOINT_RECOVERY)
        if not objective.score:
            if objective.joint:
                return recovery_loss(self, u, labels, generator, rows)
            if labels is not None:
                raise ValueError(
                    "labels: teacher-forced recovery by itself learns none; take objective='score-recovery'"
                )
            return teacher_forced_loss(self, u, generator, rows)
        score = score_loss(self, u, labels, generator, rows, objective, posterior)
        if not objective.recovery:
            return score
        if objective.joint:
            recovery = recovery_loss(self, u, None, generator, rows)
        else:
            recovery = teacher_forced_loss(self, u, generator, rows)
        return recovery._replace(
            total=score.total + objective.recovery * recovery.total,
            score=score.score,
            calibration=score.calibration,
            cross_entropy=score.cross_entropy,
            labelled=score.labelled,
        )
