"""Sampling (Alg. 2): from u_T ~ N(0, I) through the conditional priors to u_0, all layers together or some held.

At a temperature the backbone's stds are multiplied by it, before drawing or after. Before: the chains run in v = u /
temperature, in which the backbone's prior is N(0, I) again, and energies see what will be decoded. After, as in the
published code: noise is drawn at temperature 1, then multiplied. A held layer takes part at level t as its own
diffusion to that level, so that every conditional prior meets noise of the level it was trained on.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..backbone.transform import NoiseTransform
from ..backbone.validation import check_count, check_fixed, check_temperature
from ..chains.autograd import with_autograd
from ..chains.langevin import LangevinConfig
from ..chains.schedule import DiffusionSchedule
from ..chains.streams import Streams, open_streams
from .composition import Condition, Expression, make_condition
from .conditional import draw_conditional
from .energy_model import EnergyModel
from .latent_prior import LatentPrior

# What some priors' `sample` takes and others' does not, and what it is where nothing is asked for.
DEFAULTS = {"labels": None, "guidance": 1.0, "temperature": 1.0, "tempering": "after"}
Tempering = Literal["after", "before"]


@dataclass(frozen=True, eq=False)
class SamplingRequest:
    """What to sample, checked; see `DiffusionEBMPrior.sample_noise`.

    Attributes:
        fixed: layer index -> noise u_i (N, *latent_shapes[i]) or (1, ...) to hold.
        condition: what is sampled in the place of the prior; None for the prior alone.
        temperature: factor on the std of the backbone's Gaussian layers.
        tempering: whether it is multiplied by before or after drawing.
        langevin: settings of the chains; None takes the prior's.
    """

    fixed: Mapping[int, Tensor] = field(default_factory=dict)
    condition: Condition | None = None
    temperature: float = 1.0
    tempering: Tempering = "after"
    langevin: LangevinConfig | None = None

    def rows(self, chunk: slice) -> "SamplingRequest":
        """The request of some of its samples; held noise that is one for all samples stays."""
        fixed = {i: part if len(part) == 1 else part[chunk] for i, part in self.fixed.items()}
        return replace(self, fixed=fixed, condition=self.condition and self.condition.rows(chunk))


def make_request(
    model: EnergyModel,
    n: int,
    *,
    fixed: Mapping[int, Tensor] | None = None,
    labels: Mapping[str, Any] | Expression | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    tempering: Tempering = "after",
    log_likelihood: Callable[[Tensor], Tensor] | None = None,
    langevin: LangevinConfig | None = None,
) -> SamplingRequest:
    """Check what to sample.

    Args:
        model: the prior.
        n: number of samples.
        fixed: layers to hold.
        labels: label set -> category, or an expression.
        guidance: strength of the labels.
        temperature: of the backbone's Gaussian layers.
        tempering: "after" drawing, or "before".
        log_likelihood: log p(y | x) of images.
        langevin: settings of the chains.

    Returns:
        The request.

    Raises:
        TypeError, ValueError: something that cannot be sampled.
    """
    n = check_count(n)
    check_temperature(temperature)
    if tempering not in get_args(Tempering):
        raise ValueError(f"tempering: expected one of {', '.join(get_args(Tempering))}, got {tempering!r}")
    check_fixed(fixed or {}, model.latent_shapes, n)
    condition = make_condition(model, n, labels, guidance, log_likelihood)
    return SamplingRequest(fixed or {}, condition, temperature, tempering, langevin)


def supported_options(model: LatentPrior, **options: Any) -> dict[str, Any]:
    """Labels, guidance, temperature and tempering for the `sample` of any prior.

    Args:
        model: the prior.
        **options: some of these, by name.

    Returns:
        Those that the prior's `sample` takes.

    Raises:
        TypeError: one that it does not take, unless nothing is asked for by it.
    """
    taken = {name: value for name, value in options.items() if name in inspect.signature(model.sample).parameters}
    for name, value in options.items():
        if name not in taken and value != DEFAULTS[name]:
            raise TypeError(f"{name}: {type(model).__name__}.sample takes no {name}; take a DiffusionEBMPrior")
    return taken


def split_request(
    model: EnergyModel, request: SamplingRequest, key: int, samples: range
) -> Iterator[tuple[SamplingRequest, Streams]]:
    """A request in parts that bound the memory, each with the noise of its samples.

    Args:
        model: whose `samples_per_chunk` bounds the parts.
        request: what to sample.
        key: the key of all noise of the call, from `draw_key`.
        samples: numbers of the samples in the call.

    Yields:
        The request of some samples, and their noise.
    """
    size = model.samples_per_chunk
    for start in range(0, len(samples), size):
        rows = slice(start, start + size)
        yield request.rows(rows), open_streams(key, samples[rows], model.device, model.dtype, model.execution.backend)


@with_autograd
def sample_levels(model: EnergyModel, request: SamplingRequest, key: int, samples: range) -> list[Tensor]:
    """States of all levels, by the chains of `model`.

    Args:
        model: energies and backbone.
        request: what to sample.
        key: the key of all noise of the call, from `draw_key`.
        samples: numbers of the samples in the call.

    Returns:
        u_0..u_T, each (N, D); held dimensions are exact.

    Raises:
        ChainDiverged: a chain left the finite numbers.
    """
    streams = open_streams(key, samples, model.device, model.dtype, model.execution.backend)
    config = request.langevin or model.langevin
    config = replace(config, steps=config.sampling_steps or config.steps)
    temperature = request.temperature
    held = held_states(request.fixed, model.transform, model.schedule, streams, temperature) if request.fixed else None

    def hold(u: Tensor, t: int) -> Tensor:
        return u if held is None else torch.where(held[0], held[1][t], u)

    states = [hold(temperature * streams.normal(model.dim), model.schedule.steps)]
    for t in reversed(range(model.schedule.steps)):
        v = draw_conditional(
            model,
            states[0] / temperature,
            torch.full((len(samples),), t, dtype=torch.long, device=model.device),
            streams,
            langevin=config,
            temperature=temperature,
            hold=None if held is None else (held[0], held[1][t] / temperature),
            condition=request.condition,
        )
        states.insert(0, hold(temperature * v, t))
    return states


def temper(model: EnergyModel, u: Tensor, request: SamplingRequest) -> Tensor:
    """Noise (N, D) drawn at temperature 1, with all layers but the held ones multiplied by the request's."""
    parts = model.split(u)
    return model.join([part if i in request.fixed else request.temperature * part for i, part in enumerate(parts)])


def held_states(
    fixed: Mapping[int, Tensor],
    transform: NoiseTransform,
    schedule: DiffusionSchedule,
    streams: Streams,
    temperature: float,
) -> tuple[Tensor, list[Tensor]]:
    """The diffusion of held layers.

    Args:
        fixed: layer index -> noise u_i, (N, *latent_shapes[i]) or (1, ...).
        transform: the backbone's layers.
        schedule: noise levels.
        streams: the samples' noise.
        temperature: factor on the backbone's stds, so the std of pure noise.

    Returns:
        Mask (D,) of the held dimensions, and T + 1 states (N, D), the first noise-free.
    """
    masks: list[Tensor] = []
    parts: list[Tensor] = []
    for i, shape in enumerate(transform.latent_shapes):
        part = torch.zeros(len(streams), *shape, device=streams.device, dtype=streams.dtype)
        masks.append(torch.full_like(part[:1], i in fixed, dtype=torch.bool))
        parts.append(fixed[i].to(part).expand_as(part) if i in fixed else part)
    states = [transform.join(parts)]
    for alpha, sigma in zip(schedule.alpha[1:].tolist(), schedule.sigma[1:].tolist(), strict=True):
        states.append(alpha * states[-1] + sigma * temperature * streams.normal(transform.dim))
    return transform.join(masks)[0], states
