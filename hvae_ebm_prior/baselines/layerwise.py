"""The diffusion prior layer by layer: every layer is diffused by itself, given the layers above it, and there are no
chains.

    p(u) = prod_i p(u_i | z_<i),      p(u_{t,i} | u_{t+1,i}, z_<i) proportional to exp f_i(z_{t,i}, t; z_<i) q(u_{t,i})
    q(u) = N(u; w u_{t+1,i}, 1/lambda), the Gaussian part N(u; 0, I) N(u_{t+1,i}; alpha u, sigma^2), drawn from exactly

with z_{t,i} = mean_i(z_<i) + std_i(z_<i) u_{t,i} and z_<i of level 0. Every factor has one layer's share of one level
of the prior hole to close, so its Gaussian part is near it, and a few draws u^1..u^M of that stand for the rest.
Learning is recovery likelihood (Eq. 11) with the normaliser estimated from them, the data among them so that the
estimate is bounded:

    loss_i = log [(exp f_i(u_{t,i}) + sum_m exp f_i(u^m)) / (M + 1)] - f_i(u_{t,i})

This is noise-contrastive estimation by ranking (Ma & Collins, 2018), which finds f_i for any M, up to what depends on
u_{t+1,i} and z_<i alone; that cancels, as proposals are compared under the same. Sampling goes down the layers, and
through the levels of each: of M proposals of q one is taken, with probability proportional to exp f_i. Either costs one
walk through the backbone, without its gradient, and passes of the networks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter, NoiseTransform, drive
from ..backbone.validation import check_count
from ..chains.execution import ExecutionConfig
from ..chains.langevin import gaussian_part
from ..chains.schedule import DiffusionSchedule
from ..chains.streams import Streams, draw_key, open_streams
from ..density.energy_model import EnergyModel, Shapes
from ..density.sampling import SamplingRequest
from ..energies.coupling import Coupling, Labels, check_labels
from ..energies.networks import EnergyConfig
from ..presets import PRESETS
from ..prior import DiffusionEBMPrior
from ..training.recovery import RecoveryLoss

# Latents that the networks see side by side: z, u, mean and log std.
STACKED = 4
# Numbers per sample that the proposals looked at together may hold. It bounds memory, and samples depend on it by
# rounding alone.
PROPOSED = 2**14


class LayerwisePrior(DiffusionEBMPrior):
    """A prior that is a product of diffusion priors over the layers; see the module's text.

    Training cannot run away and takes no gradient of the backbone; drawing takes `proposals` passes of every network
    per level. What it cannot do is what needs one density of all layers together: labels, observations
    (`posterior_sample`), and energies of different samples side by side, as its f_i are found up to offsets that depend
    on the layers above. Layers can be held.

    Args:
        backbone: as of `LatentPrior`.
        schedule: noise levels of the diffusion.
        proposals: number M of proposals of which one is drawn, per layer and level.
        negatives: number M of draws that a training sample is compared with, per layer.
        energy: settings of the default networks, or the user's own, one per layer: network(x, t) returns f_i, (N,), of
            x, (N, *input_shapes[i]): z_i, u_i, mean_i and log std_i stacked along the first dimension.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, or `proposals` or `negatives` is no positive integer.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {
        "schedule": DiffusionSchedule,
        "proposals": int,
        "negatives": int,
    }
    # Its f_i are found up to offsets that depend on the layers above.
    comparable: ClassVar[bool] = False

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = PRESETS["layerwise"].schedule,
        proposals: int = 128,
        negatives: int = 8,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        check_count(proposals, "proposals")
        check_count(negatives, "negatives")
        super().__init__(backbone, schedule=schedule, energy=energy, execution=execution)
        self.proposals, self.negatives = proposals, negatives

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("schedule", "proposals", "negatives", "execution")}

    @staticmethod
    def network_shapes(latent_shapes: Shapes) -> Shapes:
        """Shapes of what the networks see of latents of the given shapes, with `STACKED` times as many channels."""
        return stacked_shapes(latent_shapes)

    def inputs(self, z: Sequence[Tensor]) -> list[Tensor]:
        """What the networks see, (N, *input_shapes[i]) of all layers or of the first ones, by a teacher-forced walk."""
        return stacked_inputs(self.transform, z)

    @property
    def gradients_per_step(self) -> int:
        """One, as there are no chains in training."""
        return 1

    def couple(self, coupling: Coupling) -> None:
        """Raises TypeError: labels need a density of all layers together."""
        raise TypeError("a LayerwisePrior learns no labels; take a DiffusionEBMPrior")

    def batch_loss(
        self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None, rows: range | None = None
    ) -> RecoveryLoss:
        """The loss of posterior noise `u` (N, D): `total` is the sum over layers, `recovery` their mean; 0 while
        nothing is learned.
        """
        return contrast_layers(self, u, labels, generator, rows, self.negatives, self.ranking_loss)

    def ranking_loss(self, f: Tensor) -> Tensor:
        """Loss (L, N) of the values `f` (L, N, 1 + negatives) of data, which come first, and of draws; 0 where all are
        alike.
        """
        return f.logsumexp(2) - math.log(f.shape[2]) - f[:, :, 0]

    def _sample_levels(self, request: SamplingRequest, key: int, samples: range) -> list[Tensor]:
        if request.condition is not None:
            raise ValueError(
                "labels and observations need a density of all layers together, which a LayerwisePrior has not; "
                "take a DiffusionEBMPrior"
            )
        return sample_layers(self, request, key, samples, self.proposals)


def stacked_shapes(latent_shapes: Shapes) -> Shapes:
    """Shapes of the networks' inputs for latents of the given shapes: `STACKED` times as many channels."""
    return tuple((STACKED * shape[0], *shape[1:]) for shape in latent_shapes)


def stacked_inputs(transform: NoiseTransform, z: Sequence[Tensor]) -> list[Tensor]:
    """The networks' inputs for latents `z` of all layers, or of the first ones."""
    return [
        stack(((z_i - mean) / std)[:, None], mean, std)
        for z_i, (mean, std) in zip(z, transform.gaussians(z), strict=True)
    ]


def contrast_layers(
    prior: EnergyModel,
    u: Tensor,
    labels: Tensor | Labels | None,
    generator: torch.Generator | None,
    rows: range | None,
    negatives: int,
    loss: Callable[[Tensor], Tensor],
) -> RecoveryLoss:
    """The loss of posterior noise against draws of the Gaussian part, layer by layer.

    Args:
        prior: the prior to learn.
        u: posterior noise of the data (N, D).
        labels: of the images; ValueError unless None, as the prior is not coupled.
        generator: source of the levels and of all other noise.
        rows: numbers of these samples in a batch of which they are a part; None for a whole batch.
        negatives: draws per sample and layer.
        loss: losses (L, N) of the values f (L, N, 1 + negatives) of data, which come first, and of draws.

    Returns:
        The loss: `total` is the sum over layers, `recovery` their mean.
    """
    n = len(u)
    if labels is not None:
        check_labels(labels, prior.coupling, n, u.device)
    streams = open_streams(
        draw_key(generator), range(n) if rows is None else rows, u.device, u.dtype, prior.execution.backend
    )
    t, *states = diffuse_from_first(prior.schedule, u, streams)
    first, data, noisier = (prior.split(state) for state in states)
    inputs: list[Tensor] = []

    def collect_inputs(i: int, mean: Tensor, std: Tensor) -> Tensor:
        draws = propose(prior, noisier[i], t, negatives, streams)
        inputs.append(stack(torch.cat((data[i][:, None], draws), dim=1), mean, std).to(prior.dtype))
        return mean + std * first[i].to(mean)

    levels = t.repeat_interleave(negatives + 1)
    with prior.execution.loss_precision(u.device):
        with torch.no_grad():
            drive(prior.backbone, n, collect_inputs, stop_after=len(first))
        f = torch.stack(
            [network(x, levels).unflatten(0, (n, -1)) for network, x in zip(prior.energies, inputs, strict=True)]
        ).to(u)
    losses = loss(f).T
    return RecoveryLoss(
        total=losses.sum(1),
        recovery=losses.mean(1),
        squares=f.sum(0).square().mean(1),
        cross_entropy=losses.new_zeros(n),
        labelled=torch.zeros_like(t),
        levels=t,
    )


def sample_layers(
    prior: EnergyModel, request: SamplingRequest, key: int, samples: range, proposals: int
) -> list[Tensor]:
    """States of all levels, drawn layer by layer; held layers are alike in all.

    Args:
        prior: energies and backbone.
        request: what to sample; without a condition.
        key: the key of all noise of the call, from `draw_key`.
        samples: numbers of the samples in the call.
        proposals: number of states of which one is drawn, per sample, layer and level.

    Returns:
        u_0..u_T, each (N, D).
    """
    size, chunks = prior.samples_per_chunk, []
    for start in range(0, len(samples), size):
        rows = slice(start, start + size)
        streams = open_streams(key, samples[rows], prior.device, prior.dtype, prior.execution.backend)
        chunks.append(descend_layers(prior, streams, request.rows(rows).fixed, request.temperature, proposals))
    return [torch.cat(states) for states in zip(*chunks, strict=True)]


@torch.no_grad()
def descend_layers(
    prior: EnergyModel, streams: Streams, fixed: Mapping[int, Tensor], temperature: float, proposals: int
) -> list[Tensor]:
    """States of all levels by one walk through the backbone; see `sample_layers`.

    Args:
        prior: energies and backbone.
        streams: the samples' noise.
        fixed: layer index -> noise u_i to hold.
        temperature: factor on the std of the backbone's Gaussian layers.
        proposals: number of states of which one is drawn.

    Returns:
        u_0..u_T, each (N, D).
    """
    layers: list[list[Tensor]] = []
    steps = prior.schedule.steps

    def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
        if i in fixed:
            states = [fixed[i].to(prior.dtype).expand(mean.shape)] * (steps + 1)
        else:
            states = [temperature * streams.normal(mean[0].numel()).reshape(mean.shape)]
            for level in reversed(range(steps)):
                t = torch.full((len(mean),), level, dtype=torch.long, device=mean.device)
                states.insert(0, choose(prior, i, states[0], t, mean, std, temperature, streams, proposals))
        layers.append(states)
        return mean + std * states[0].to(mean)

    drive(prior.backbone, len(streams), draw, stop_after=len(prior.latent_shapes))
    return [prior.join(parts) for parts in zip(*layers, strict=True)]


def choose(
    prior: EnergyModel,
    i: int,
    u_next: Tensor,
    t: Tensor,
    mean: Tensor,
    std: Tensor,
    temperature: float,
    streams: Streams,
    proposals: int,
) -> Tensor:
    """Draw one of several proposals per sample, in proportion to exp f_i.

    Args:
        prior: energies and backbone.
        i: the layer.
        u_next: its noisier states (N, ...).
        t: levels (N,).
        mean: of the backbone's Gaussian.
        std: of the backbone's Gaussian.
        temperature: factor on that std.
        streams: the samples' noise.
        proposals: how many there are.

    Returns:
        States u_{t,i} (N, ...).
    """
    together = max(1, min(proposals, PROPOSED // mean[0].numel()))
    best, score = u_next, torch.full((len(mean),), -torch.inf, device=mean.device)
    for start in range(0, proposals, together):
        count = min(together, proposals - start)
        # In units of the temperature the Gaussians are those of temperature 1.
        u = temperature * propose(prior, u_next / temperature, t, count, streams)
        f = prior.energies[i](stack(u, mean, std).to(prior.dtype), t.repeat_interleave(count))
        index, now = pick(f.unflatten(0, (len(mean), count)), streams.normal(count))
        taken = u[torch.arange(len(mean), device=u.device), index]
        best = torch.where((now > score).reshape(-1, *[1] * (best.ndim - 1)), taken, best)
        score = torch.maximum(now, score)
    return best


def propose(prior: EnergyModel, u_next: Tensor, t: Tensor, count: int, streams: Streams) -> Tensor:
    """`count` draws (N, count, ...) of the Gaussian part of a layer given u_{t+1,i} (N, ...)."""
    weight, precision = (
        x.reshape(-1, *[1] * u_next.ndim) for x in gaussian_part(t, prior.schedule, prior.langevin, u_next.dtype)
    )
    noise = streams.normal(count * u_next[0].numel()).reshape(len(u_next), count, *u_next.shape[1:])
    return weight * u_next[:, None] + noise * precision.rsqrt()


def diffuse_from_first(
    schedule: DiffusionSchedule, u: Tensor, streams: Streams
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels t (N,), drawn uniformly, and states u_0, u_t and u_{t+1} (N, D) of one diffusion of noise `u` (N, D)."""
    t = streams.levels(schedule.steps)
    alpha, sigma, alpha_bar, sigma_bar = (
        level.to(u)[:, None] for level in (schedule.alpha, schedule.sigma, schedule.alpha_bar, schedule.sigma_bar)
    )
    first = alpha_bar[0] * u + sigma_bar[0] * streams.normal(u.shape[1])
    kept = alpha_bar[t] / alpha_bar[0]
    u_t = kept * first + (1 - kept**2).sqrt() * streams.normal(u.shape[1])
    return t, first, u_t, alpha[t + 1] * u_t + sigma[t + 1] * streams.normal(u.shape[1])


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
