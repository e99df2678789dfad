"""NCP-VAE (Aneja et al., "A Contrastive Learning Approach for Training Variational Autoencoder Priors", NeurIPS 2021).

Layer by layer a binary classifier separates posterior latents from prior ones, given the same posterior latents above.
Its logit is learned to be

    f_i(z_i, z_<i) = log q(z_i | z_<i) - log p(z_i | z_<i),
    loss_i = softplus(-f_i(z_i)) + softplus(f_i(z_i^-)),      z_i^- ~ p(. | z_<i),

with q the aggregate posterior (noise-contrastive estimation, Gutmann & Hyvaerinen 2010); there are no chains in
training. The prior is then prod_i p(z_i | z_<i) exp f_i(z_i, z_<i), where every factor is normalised if the logits are
right. Two ways to draw from it:

- "sir", sampling-importance-resampling: top to bottom, of M proposals z_i ~ p(. | z_<i) one is taken with probability
  proportional to exp f_i;
- "langevin": chains in u over all layers, on sum_i f_i - |u|^2 / 2.

What the original takes from its own decoder as a summary of z_<i is here what any backbone offers: the networks see
z_i, u_i, mean_i and log std_i, stacked along the first dimension. Neither more proposals nor more steps are always
better: classifiers are trained on the posterior and the prior, on nothing between or beyond, and the harder one
searches for where f_i is high, the more one finds where it is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.posterior import Posterior
from ..backbone.transform import BackboneAdapter, LayerState, drive
from ..backbone.validation import check_count
from ..chains.execution import ExecutionConfig
from ..chains.langevin import LangevinConfig
from ..chains.schedule import DiffusionSchedule
from ..chains.streams import Streams, draw_key, open_streams
from ..density.energy_model import Shapes
from ..density.sampling import SamplingRequest, make_request, split_request
from ..energies.build import without_context
from ..energies.coupling import Labels, check_labels
from ..energies.networks import EnergyConfig
from ..presets import PRESETS
from ..training.learned_prior import LearnedPrior
from ..training.objective import BatchLoss, Objective

Sampler = Literal["sir", "langevin"]
# Latents that the networks see side by side: z, u, mean and log std.
STACKED = 4
# Numbers per sample that the proposals looked at together may hold. It bounds memory, and samples depend on it by
# rounding alone.
PROPOSED = 2**14


class NCPPrior(LearnedPrior):
    """Noise-contrastive priors over the layers of a hierarchical VAE; its `energy` is -sum_i f_i.

    A single level without noise, whose energies are logits of binary classifiers. It learns no labels.

    Args:
        backbone: as of `LatentPrior`.
        sampler: "sir" or "langevin".
        proposals: number M of proposals per layer of "sir".
        langevin: the chain of "langevin".
        energy: settings of the default networks, or the user's own, one per layer: network(x, t) returns f_i, (N,), of
            x, (N, *input_shapes[i]): z_i, u_i, mean_i and log std_i stacked along the first dimension.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, an unknown sampler, or `proposals` is no positive integer.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {
        "sampler": Sampler,
        "proposals": int,
        "langevin": LangevinConfig,
    }

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        sampler: Sampler = "sir",
        proposals: int = 100,
        langevin: LangevinConfig = PRESETS["ncp"].langevin,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(context=False),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        if sampler not in ("sir", "langevin"):
            raise ValueError(f'sampler: expected "sir" or "langevin", got {sampler!r}')
        proposals = check_count(proposals, "proposals")
        super().__init__(
            backbone,
            schedule=DiffusionSchedule.marginal(),
            langevin=langevin,
            energy=without_context(energy, "NCPPrior"),
            execution=execution,
        )
        self.sampler = sampler
        self.proposals = proposals

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sampler", "proposals", "langevin", "execution")}

    @staticmethod
    def network_shapes(latent_shapes: Shapes) -> Shapes:
        """Shapes of the classifiers' inputs for latents of the given shapes: `STACKED` times as many channels."""
        return tuple((STACKED * shape[0], *shape[1:]) for shape in latent_shapes)

    def inputs(self, states: Sequence[LayerState]) -> list[Tensor | LayerState]:
        """The classifiers' inputs (N, *input_shapes[i]) for the states of all layers, or of the first ones."""
        return [stack(state.u[:, None], state.mean, state.std).to(self.dtype) for state in states]

    @property
    def gradients_per_step(self) -> int:
        """One, as there are no chains in training."""
        return 1

    def batch_loss(
        self,
        u: Tensor,
        labels: Tensor | Labels | None,
        generator: torch.Generator | None,
        rows: range | None = None,
        objective: Objective | None = None,
        posterior: Posterior | None = None,
    ) -> BatchLoss:
        """The classifiers' loss, less that of chance: `total` is the sum over layers, `recovery` their mean.

        All layers learn in one teacher-forced walk, each from the data and one draw of the backbone's prior.

        Args:
            u: posterior noise of the data (N, D).
            labels: of the images; ValueError unless None.
            generator: source of all noise.
            rows: numbers of these samples in a batch of which they are a part; None for a whole batch.
            objective: of no matter, as there is one alone.
            posterior: not used.

        Returns:
            The loss of every sample.
        """
        n = len(u)
        if labels is not None:
            check_labels(labels, self.coupling, n, u.device)
        samples = range(n) if rows is None else rows
        streams = open_streams(draw_key(generator), samples, u.device, u.dtype, self.execution.backend)
        t = streams.levels(1)
        # Unused: a seed gives what it gave when a diffusion was drawn here.
        for _ in range(3):
            streams.normal(self.dim)
        data = self.split(u)
        inputs: list[Tensor] = []

        def collect_inputs(i: int, mean: Tensor, std: Tensor) -> Tensor:
            draw = streams.normal(data[i][0].numel()).reshape(data[i].shape)
            inputs.append(stack(torch.stack((data[i], draw), dim=1), mean, std).to(self.dtype))
            return mean + std * data[i].to(mean)

        with self.execution.loss_precision(u.device):
            with torch.no_grad():
                drive(self.backbone, n, collect_inputs, stop_after=len(data))
            levels = t.repeat_interleave(2)
            f = [network(x, levels).unflatten(0, (n, 2)) for network, x in zip(self.energies, inputs, strict=True)]
        logits = torch.stack(f, dim=1).to(u)
        losses = classification_loss(logits)
        return BatchLoss(
            total=losses.sum(1),
            recovery=losses.mean(1),
            squares=logits.sum(1).square().mean(1),
            cross_entropy=losses.new_zeros(n),
            labelled=torch.zeros_like(t),
            levels=t,
        )

    def sample_noise(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw u_0 from the prior, by proposals or by chains.

        Args:
            n: number of samples N.
            fixed: layer index -> noise u_i (N, *latent_shapes[i]) or (1, ...) to hold.
            temperature: multiplies the std of the backbone's Gaussian layers.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Noise (N, D).

        Raises:
            TypeError, ValueError: a wrong type, count, layer index, shape or temperature.
            ChainDiverged: a chain left the finite numbers.
        """
        request = make_request(self, n, fixed=fixed, temperature=temperature)
        return self._draw(draw_key(generator), range(n), request)

    def sample(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        temperature: float = 1.0,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the prior.

        Args:
            n: number of images N.
            fixed: as in `sample_noise`.
            temperature: as in `sample_noise`.
            chunk_size: images computed at a time; the result does not depend on it, up to rounding. None bounds the
                memory by the latents' size.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        request = make_request(self, n, fixed=fixed, temperature=temperature)
        return self._draw_images(n, request, chunk_size, generator)

    def _draw(self, key: int, samples: range, request: SamplingRequest = SamplingRequest()) -> Tensor:  # noqa: B008
        if self.sampler == "langevin":
            return super()._draw(key, samples, request)
        parts = split_request(self, request, key, samples)
        return torch.cat([self._draw_from_proposals(streams, part) for part, streams in parts])

    @torch.no_grad()
    def _draw_from_proposals(self, streams: Streams, request: SamplingRequest) -> Tensor:
        """Noise (N, D), layer by layer in one walk through the backbone."""
        parts: list[Tensor] = []

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            if i in request.fixed:
                u = request.fixed[i].to(self.dtype).expand(mean.shape)
            else:
                u = self._choose(i, mean, std, request.temperature, streams)
            parts.append(u)
            return mean + std * u.to(mean)

        drive(self.backbone, len(streams), draw, stop_after=len(self.latent_shapes))
        return self.join(parts)

    def _choose(self, i: int, mean: Tensor, std: Tensor, temperature: float, streams: Streams) -> Tensor:
        """One of several proposals u_i per sample, (N, ...), in proportion to exp f_i, given the backbone's Gaussian of
        layer i.
        """
        n, size = len(mean), mean[0].numel()
        together = max(1, min(self.proposals, PROPOSED // size))
        # A draw that stands where no proposal has a weight.
        best = temperature * streams.normal(size).reshape(mean.shape)
        score = torch.full((n,), -torch.inf, device=mean.device, dtype=mean.dtype)
        for start in range(0, self.proposals, together):
            count = min(together, self.proposals - start)
            u = temperature * streams.normal(count * size).reshape(n, count, *mean.shape[1:])
            levels = torch.zeros(n * count, dtype=torch.long, device=mean.device)
            f = self.energies[i](stack(u, mean, std).to(self.dtype), levels).unflatten(0, (n, count))
            index, now = pick(f, streams.normal(count))
            taken = u[torch.arange(n, device=u.device), index]
            best = torch.where((now > score).reshape(-1, *[1] * (best.ndim - 1)), taken, best)
            score = torch.maximum(now, score)
        return best


def classification_loss(f: Tensor) -> Tensor:
    """The classifiers' losses (...), less that of chance, 2 log 2, of logits (..., 2) of data and of a prior draw."""
    return F.softplus(-f[..., 0]) + F.softplus(f[..., 1]) - 2 * F.softplus(f.new_zeros(()))


def stack(u: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What a layer's network sees of M states `u` (N, M, C, ...) per sample: z, u, mean and log std, (N M, STACKED C,
    ...).
    """
    u = u.to(mean)
    # The logarithm is taken of N stds, not of the N M that they are repeated to.
    above = [part[:, None].expand_as(u) for part in (mean, std.log())]
    return torch.cat((mean[:, None] + std[:, None] * u, u, *above), dim=2).flatten(0, 1)


def pick(log_weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One of M proposals, the k-th with probability proportional to its weight: the largest log-weight after Gumbel
    noise is added.

    The largest of several calls' scores is one of all their proposals, so proposals may be looked at in parts.

    Args:
        log_weights: (N, M).
        noise: standard normal numbers (N, M).

    Returns:
        Index (N,) and score (N,) of the proposal taken.
    """
    score, index = (log_weights - torch.log(-torch.special.log_ndtr(noise))).max(dim=1)
    return index, score
