"""Langevin transitions: what the chains of sampling (Alg. 2) do, step by step, in short and in long runs.

A prior learned with K steps per level is a sampler; that it is an energy too shows when its chains run on. They should
stay where the data are: no drift of energies, no loss of quality, no oversaturated pixels. Recorded along a run are

- the layers' energies -f_i at every step. Their autocorrelation rho_m at lag m gives the relaxation time in steps,

      tau = 1/2 + sum_{m=1}^{M} rho_m,     M the first lag with M >= c tau     (Sokal's window),

  which is 1/2 for independent states, and (1 + phi)/(2 (1 - phi)) for a process x' = phi x + noise;
- the probability with which the Metropolis test (see `metropolis`) would take a step: 1 if a step has no error. The
  chain itself takes every one;
- mean, std and share of saturated pixels of the decoded states.

The chain is `langevin_chain` itself, watched where it asks for its gradient, once per step: all its settings are
supported, and the samples are those of `sample_noise`, drawn jointly, from the same generator. The tests' proposals are
plain steps with noise of their own. Where `top_steps` > 1 the chain's step is a composite of several and has no simple
test: the figure is then that of a plain step of the same size, with top_steps=1, which is less exact than the chain's.
So it is with `leimkuhler-matthews`, whose plain step is Euler's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..backbone.validation import check_count, check_images
from ..chains.autograd import walk_values_and_gradient
from ..chains.execution import chain_gradient
from ..chains.langevin import langevin_chain
from ..chains.metropolis import log_acceptance, plain_proposal, propose, visit
from ..chains.streams import Streams, draw_key, open_streams
from ..density.energy_model import EnergyModel
from ..processes import progress_bar

# Pixels nearer than this to 0 or 1 are saturated.
SATURATED = 0.02
# Records and pictures per level, where nothing else is asked for.
RECORDS = 20
COLUMNS = 5
# A run is oversaturated if a figure exceeds the reference's by this share of it, and by so many standard errors.
EXCESS = 0.1
SIGNIFICANT = 3.0


@dataclass(frozen=True)
class Transitions:
    """A recorded run of n chains through T levels of K steps; the first index t counts down in time.

    Attributes:
        energies: -f_i in nats after 0..K steps (T, K + 1, n, L).
        recorded: steps after which the next two were recorded (R,).
        acceptance: probability of the matching Metropolis test (T, R, n).
        pixels: mean, std and share of saturated pixels of the decoded states (T, R, n, 3).
        shown: steps after which states were kept (S,).
        states: the first m samples' noise there (T, S, m, D).
        samples: u_0 of all samples (n, D).
    """

    energies: Tensor
    recorded: Tensor
    acceptance: Tensor
    pixels: Tensor
    shown: Tensor
    states: Tensor
    samples: Tensor


def langevin_transitions(
    prior: EnergyModel,
    n: int,
    *,
    steps: int,
    every: int | None = None,
    shown: int = 8,
    columns: int = COLUMNS,
    generator: torch.Generator | None = None,
) -> Transitions:
    """Draw samples as `sample_noise` does, with `steps` steps per level, and record the run.

    A step costs what it costs in sampling; a record costs a gradient and a decoded image more.

    Args:
        prior: the trained prior.
        n: number of samples.
        steps: Langevin steps K per level.
        every: steps from one record of pixels and acceptance to the next, besides one at the end of each level; None
            makes about 20 per level.
        shown: number of samples, the first ones, whose states are kept.
        columns: number of times per level at which they are kept, evenly spread over the records from first to last.
        generator: source of the noise; None takes torch's default generator.

    Returns:
        The run.

    Raises:
        TypeError, ValueError: a count that is no positive integer.
        ChainDiverged: a chain left the finite numbers.
    """
    steps = check_count(steps, "steps")
    every = max(1, steps // RECORDS) if every is None else every
    for name, count in (("n", n), ("every", every), ("shown", shown), ("columns", columns)):
        count = check_count(count, name)
    recorded = sorted({*range(0, steps, every), steps})
    kept = torch.linspace(0, len(recorded) - 1, min(columns, len(recorded)), device="cpu", dtype=torch.float32)
    times = (
        torch.tensor(recorded, device="cpu", dtype=torch.long),
        torch.tensor([recorded[i] for i in kept.round().long().tolist()], device="cpu", dtype=torch.long),
    )
    # The chains' noise is that of sample_noise, so the first key must be.
    keys = draw_key(generator), draw_key(generator)
    starts = range(0, n, prior.samples_per_chunk)
    with progress_bar(len(starts) * prior.schedule.steps * (steps + 1), "Langevin steps") as bar:
        chunks = [
            run_chunk(prior, range(n)[first : first + starts.step], keys, steps, times, shown, bar.update)
            for first in starts
        ]
    joined = {"recorded": times[0], "shown": times[1]}
    for name, axis in (("energies", 2), ("acceptance", 2), ("pixels", 2), ("states", 2), ("samples", 0)):
        joined[name] = torch.cat([getattr(chunk, name) for chunk in chunks], dim=axis)
    return Transitions(**joined)


@torch.no_grad()
def run_chunk(
    prior: EnergyModel,
    samples: range,
    keys: tuple[int, int],
    steps: int,
    times: tuple[Tensor, Tensor],
    shown: int,
    report: Callable[[], object],
) -> Transitions:
    """The run of some samples of a call; `report` is called after every step."""
    streams, tests = (open_streams(key, samples, prior.device, prior.dtype, prior.execution.backend) for key in keys)
    rows = max(0, min(len(samples), shown - samples.start))
    levels: list[dict[str, Tensor]] = []

    u = streams.normal(prior.dim)
    for level in reversed(range(prior.schedule.steps)):
        t = torch.full((len(samples),), level, dtype=torch.long, device=u.device)
        u, records = watched_chain(prior, u, t, steps, times, rows, streams, tests, report)
        levels.insert(0, records)
    stacked = {name: torch.stack([level[name] for level in levels]) for name in levels[0]}
    return Transitions(recorded=times[0], shown=times[1], samples=u, **stacked)


def watched_chain(
    prior: EnergyModel,
    u_next: Tensor,
    t: Tensor,
    steps: int,
    times: tuple[Tensor, Tensor],
    rows: int,
    streams: Streams,
    tests: Streams,
    report: Callable[[], object],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The chain of one level.

    Args:
        prior: the prior.
        u_next: states of the noisier level (N, D).
        t: the level (N,).
        steps: Langevin steps.
        times: steps after which to record, and after which to keep states.
        rows: number of samples to keep states of.
        streams: the chain's noise.
        tests: noise of the Metropolis tests' proposals.
        report: called after every step.

    Returns:
        States (N, D), and the records of `Transitions` at this level.
    """
    recorded, kept = (set(some.tolist()) for some in times)
    energies = prior.chain_energies(len(u_next))
    proposal = plain_proposal(u_next, t, schedule=prior.schedule, config=prior.langevin)
    records: dict[str, list[Tensor]] = {name: [] for name in ("energies", "acceptance", "pixels", "states")}

    def layer_values(u: Tensor, t: Tensor) -> Tensor:
        return prior.corrections(prior.transform.states(u), t, energies)[0]

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        with prior.execution.precision(u.device):
            return walk_values_and_gradient(layer_values, u, t)

    def acceptance(u: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        def at_u(_: Tensor) -> tuple[Tensor, Tensor]:
            return values.sum(1), gradient

        def anywhere(u: Tensor) -> tuple[Tensor, Tensor]:
            values, gradient = evaluate(u)
            return values.sum(1), gradient

        now = visit(at_u, u, proposal)
        proposed = visit(anywhere, propose(now, u_next, proposal, tests), proposal)
        return log_acceptance(now, proposed, proposal).exp()

    def watch(u: Tensor) -> Tensor:
        step = len(records["energies"])
        values, gradient = evaluate(u)
        records["energies"].append(-values)
        if step in recorded:
            records["acceptance"].append(acceptance(u, values, gradient))
            records["pixels"].append(pixel_statistics(prior.decode(u)))
        if step in kept:
            records["states"].append(u[:rows].clone())
        report()
        return gradient

    def top_total(u: Tensor) -> Tensor:
        return prior.corrections(prior.transform.states(u, 1), t, energies)[0].sum()

    config = replace(prior.langevin, steps=steps)
    top = math.prod(prior.latent_shapes[0]), chain_gradient(top_total, 1.0, prior.execution)
    with parametrize.cached():
        u = langevin_chain(watch, u_next, t, schedule=prior.schedule, config=config, streams=streams, top=top)
        # The chain asks for no gradient at its last state.
        watch(u)
    return u, {name: torch.stack(values) for name, values in records.items()}


def pixel_statistics(images: Tensor) -> Tensor:
    """Mean, std and share of saturated pixels (N, 3) of images (N, C, H, W) in [0, 1]."""
    pixels = images.flatten(1)
    saturated = ((pixels < SATURATED) | (pixels > 1 - SATURATED)).to(pixels).mean(1)
    return torch.stack((pixels.mean(1), pixels.std(1, correction=0), saturated), dim=1)


@dataclass(frozen=True)
class Saturation:
    """Pixels of a run beside those of reference images.

    Attributes:
        reference: mean, std and share of saturated pixels of the reference (3,), means over images.
        run: the same at every record (T, R, 3).
        oversaturated: whether the std or the share of saturated pixels at the run's end exceeds the reference's by a
            tenth of it or more, and by three standard errors.
    """

    reference: Tensor
    run: Tensor
    oversaturated: bool


def oversaturation(run: Transitions, reference: Tensor | None = None) -> Saturation:
    """Whether a run ends in images that are more contrasty or more saturated than they should be.

    Args:
        run: the run.
        reference: images (M, C, H, W) in [0, 1], M >= 2; reconstructions suit better than real ones where the decoder
            blurs. None takes the run's own images at the first record of the last level.

    Returns:
        Shares of saturated pixels and stds of the run and of the reference, and whether the run is oversaturated.

    Raises:
        TypeError, ValueError: images of a wrong type, shape or range, or fewer than two images or samples.
    """
    if reference is not None:
        check_images(reference)
    expected = run.pixels[0, 0] if reference is None else pixel_statistics(reference)
    end = run.pixels[0, -1]
    if min(len(expected), len(end)) < 2:
        raise ValueError(f"expected at least 2 reference images and 2 samples, got {len(expected)} and {len(end)}")
    error = sum(part.var(0) / len(part) for part in (expected.cpu(), end.cpu())) ** 0.5
    beyond = end.mean(0).cpu() - expected.mean(0).cpu()
    excessive = (beyond > EXCESS * expected.mean(0).cpu()) & (beyond > SIGNIFICANT * error)
    return Saturation(expected.mean(0), run.pixels.mean(2), bool(excessive[1:].any()))


def relaxation_time(series: Tensor, *, window: float = 5.0) -> Tensor:
    """Integrated autocorrelation time of stationary chains, each about a mean of its own.

    Chains of different u_{t+1} have different means. Estimating them from the chain hides a part 2 tau/K of its
    variance, which is put back here, and autocovariances are half mean squares of differences, which need no mean; so K
    of 20 tau will do where there are many chains.

    Args:
        series: K states in a row of n chains (K, n), or of L quantities each (K, n, L), without the way to the
            stationary state.
        window: c, the window in relaxation times.

    Returns:
        tau in steps, () or (L,), one for all chains; infinite where K is too small to tell, NaN where nothing moves.

    Raises:
        ValueError: fewer than 4 states, or a series of another shape or not finite.
    """
    if series.ndim not in (2, 3) or len(series) < 4 or not bool(torch.isfinite(series).all()):
        raise ValueError(f"series: expected at least 4 finite states (K, n) or (K, n, L), got {tuple(series.shape)}")
    if series.ndim == 3:
        return torch.stack([relaxation_time(part, window=window) for part in series.unbind(2)])
    x = series.detach().to("cpu", torch.float64)
    x = x - x.mean(0)
    variance = x.square().mean()
    lags = torch.arange(1, len(x) // 2 + 1, device=x.device)
    if not bool(variance > 0):
        return x.new_tensor(torch.nan, dtype=torch.float32)
    decorrelated = half_square_differences(x)[1 : len(lags) + 1]
    tau = 0.5
    # The part of the variance that is hidden depends on tau itself: a fixed point.
    for _ in range(50):
        hidden = 2 * tau / len(x)
        if hidden > 0.5:
            return x.new_tensor(torch.inf, dtype=torch.float32)
        sums = 0.5 + torch.cumsum(1 - decorrelated * (1 - hidden) / variance, dim=0)
        closed = (lags >= window * sums.clamp(min=0.5)).nonzero()
        if not len(closed):
            return x.new_tensor(torch.inf, dtype=torch.float32)
        before, tau = tau, sums[closed[0, 0]].item()
        if abs(tau - before) < 1e-3 * tau:
            break
    return x.new_tensor(tau, dtype=torch.float32)


def half_square_differences(x: Tensor) -> Tensor:
    """Mean of (x_{k+m} - x_k)^2 / 2 over chains and steps k, (K,), at lags m = 0..K-1 of states (K, n)."""
    k = len(x)
    squares = x.square().mean(1).cumsum(0)
    # Padded to 2 K, so that products of the end with the beginning do not wrap around.
    spectrum = torch.fft.rfft(x, n=2 * k, dim=0)
    products = torch.fft.irfft(spectrum.abs().square().mean(1), n=2 * k)[:k]
    # Sums of squares of the first K - m states, and of the last ones.
    first = squares.flip(0)
    last = squares[-1] - torch.cat((squares.new_zeros(1), squares[:-1]))
    return ((first + last) / 2 - products) / torch.arange(k, 0, -1, device=x.device)
