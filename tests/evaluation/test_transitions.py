"""Recorded runs against the library's own chains, and the figures against closed forms."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone
from helpers import check_strip, find_color, read_strips, seed
from matplotlib.image import imread
from stand_ins import perturb
from torch.distributions import Normal

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, DrawingConfig, EnergyConfig, LangevinConfig
from hvae_ebm_prior.chains.langevin import gaussian_part, langevin_coefficients
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.evaluation.pictures import save_energies, save_pixels, save_strips
from hvae_ebm_prior.evaluation.transitions import (
    langevin_transitions,
    oversaturation,
    pixel_statistics,
    relaxation_time,
)
from hvae_ebm_prior.saving.grid import GREY

INTEGRATORS = ["exponential", "strang", "euler", "leimkuhler-matthews"]


def make(**langevin):
    return DiffusionEBMPrior(
        RandomBackbone([(2,), (1, 2, 2)]),
        energy=[Quadratic(2, 0.5, -0.4), Quadratic(4, -0.3)],
        langevin=LangevinConfig(**langevin),
    )


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("settings", [{"start": "gaussian", "top_steps": 3}, {"start": "next", "drift_limit": 0.2}])
def test_the_run_is_the_chain_of_sampling(integrator, settings):
    """Same generator: its samples are sample_noise's, and the states kept at the end of each level are that
    trajectory's.
    """
    prior = make(integrator=integrator, step_size=0.3, sampling_steps=5, **settings)
    run = langevin_transitions(prior, 4, steps=5, shown=3, generator=seed(0))
    expected = prior.sample_noise(4, trajectory=True, generator=seed(0))
    torch.testing.assert_close(run.samples, expected[0])
    torch.testing.assert_close(run.states[:, -1], expected[:-1, :3])


def test_records_are_those_of_the_states():
    prior = make(step_size=0.3, start="next")
    run = langevin_transitions(prior, 5, steps=7, every=3, shown=5, columns=4, generator=seed(0))
    assert run.energies.shape == (3, 8, 5, 2)
    assert run.recorded.tolist() == run.shown.tolist() == [0, 3, 6, 7]
    assert run.acceptance.shape == (3, 4, 5)
    assert run.pixels.shape == (3, 4, 5, 3)
    assert run.states.shape == (3, 4, 5, 6)
    for t in range(3):
        for i, step in enumerate(run.shown.tolist()):
            u = run.states[t, i]
            torch.testing.assert_close(run.energies[t, step], prior.layer_energies(u, t))
            torch.testing.assert_close(run.pixels[t, i], pixel_statistics(prior.decode(u).detach()))
    # start="next": a level starts where the one above ended.
    assert torch.equal(run.states[1, 0], run.states[2, -1])


def test_records_do_not_depend_on_chunks_or_on_what_is_kept(monkeypatch):
    prior = make(step_size=0.3, top_steps=2)
    whole = langevin_transitions(prior, 5, steps=4, every=2, shown=3, generator=seed(0))
    monkeypatch.setattr("hvae_ebm_prior.density.latent_prior.CHUNK_DIMENSIONS", 2 * prior.dim)
    chunked = langevin_transitions(prior, 5, steps=4, every=2, shown=3, generator=seed(0))
    for name in ("energies", "acceptance", "pixels", "states", "samples"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
    fewer = langevin_transitions(prior, 5, steps=4, every=4, shown=1, columns=2, generator=seed(0))
    assert torch.equal(fewer.samples, whole.samples)
    assert torch.equal(fewer.states, whole.states[:, ::2, :1])


def test_proposals_of_the_tests_have_noise_of_their_own(monkeypatch):
    """One key for the chains and another for the tests, each the same in all chunks."""
    keys = []

    def opened(key, samples, *arguments):
        keys.append(key)
        return open_streams(key, samples, *arguments)

    prior = make()
    monkeypatch.setattr("hvae_ebm_prior.evaluation.transitions.open_streams", opened)
    monkeypatch.setattr("hvae_ebm_prior.density.latent_prior.CHUNK_DIMENSIONS", 2 * prior.dim)
    langevin_transitions(prior, 4, steps=1, generator=seed(0))
    assert keys[:2] == keys[2:]
    assert keys[0] != keys[1]


def test_recorded_acceptance_is_that_of_steps_of_the_chain():
    """E min(1, r) over the plain step from the same states, by many draws of it and densities written out."""
    h, w, v, n = 0.8, 0.9, -0.7, 1500
    schedule = DiffusionSchedule.ddpm(3)
    langevin = LangevinConfig(steps=3, step_size=h, top_steps=4, drift_limit=math.inf, start="gaussian")
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), schedule=schedule, langevin=langevin, energy=[Quadratic(2, w, v)])
    run = langevin_transitions(prior, n, steps=3, every=1, shown=n, columns=4, generator=seed(0))
    for t in (0, 1):  # u_T is not kept
        weight, precision = gaussian_part(torch.tensor([t]), schedule, langevin, torch.float32)
        a, b, c, d = langevin_coefficients(torch.tensor([t]), schedule, langevin, torch.float32)[0]
        u, u_next = run.states[t, 1], run.states[t + 1, -1]

        def log_target(u, u_next=u_next, weight=weight, precision=precision):
            return (w * u + v * u**2 + Normal(weight * u_next, precision**-0.5).log_prob(u)).sum(1)

        def step(u, u_next=u_next, a=a, b=b, c=c, d=d):
            return Normal(a * u + b * u_next + c * (w + 2 * v * u), d)

        proposed = torch.normal(step(u).mean, d.expand_as(u), generator=seed(1))
        log_ratio = (
            log_target(proposed) + step(proposed).log_prob(u).sum(1) - log_target(u) - step(u).log_prob(proposed).sum(1)
        )
        expected = log_ratio.clamp(max=0).exp()
        assert expected.mean() < 0.9
        difference = run.acceptance[t, 1].mean() - expected.mean()
        assert abs(difference) < 5 * (2 * expected.var() / n).sqrt()


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8, 0.9, -0.5])
@pytest.mark.parametrize(("steps", "n"), [(200, 400), (2000, 40)])
def test_relaxation_time_of_autoregressive_chains(phi, steps, n):
    """tau = (1 + phi) / (2 (1 - phi)); each chain about a mean of its own, and two layers of different scales."""
    g, x, states = seed(0), torch.randn(n, 2, generator=seed(1)), []
    for _ in range(steps):
        x = phi * x + math.sqrt(1 - phi**2) * torch.randn(n, 2, generator=g)
        states.append(x)
    series = torch.stack(states) * torch.tensor([1.0, 100.0]) + 3 * torch.randn(n, 2, generator=g)
    expected = (1 + phi) / (2 * (1 - phi))
    found = relaxation_time(series)
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx([expected, expected], rel=0.08, abs=0.05)


def test_relaxation_time_says_when_it_cannot_tell():
    g, x, states = seed(0), torch.randn(300, generator=seed(1)), []
    for _ in range(40):
        x = 0.99 * x + math.sqrt(1 - 0.99**2) * torch.randn(300, generator=g)
        states.append(x)
    assert relaxation_time(torch.stack(states)).item() == math.inf
    assert relaxation_time(torch.ones(10, 3)).isnan()
    for bad in (torch.zeros(3, 2), torch.zeros(5), torch.full((5, 2), math.nan)):
        with pytest.raises(ValueError, match="at least 4 finite states"):
            relaxation_time(bad)


def test_pixel_statistics():
    images = torch.tensor([[0.0, 0.019, 0.5, 0.981], [0.5, 0.5, 0.5, 0.5]])[:, None, None]
    spread = math.sqrt(sum((x - 0.375) ** 2 for x in (0.0, 0.019, 0.5, 0.981)) / 4)
    expected = torch.tensor([[0.375, spread, 0.75], [0.5, 0.0, 0.0]])
    torch.testing.assert_close(pixel_statistics(images), expected)


def test_oversaturation_is_told_from_none():
    """Images (z + 10) / 20: z pulled to 15 ends in white pixels, z of std 3 in strong contrast; z pulled to 2, or left
    at N(0, 1), in neither.
    """
    settings = {
        "schedule": DiffusionSchedule.marginal(),
        "langevin": LangevinConfig(step_size=0.5, drift_limit=math.inf),
    }
    real = (torch.randn(50, 1, 1, 6, generator=seed(1)) + 10) / 20
    for w, v, expected in ((15.0, 0.0, True), (0.0, 0.45, True), (2.0, 0.0, False), (0.0, 0.0, False)):
        prior = DiffusionEBMPrior(IdentityBackbone((6,)), energy=[Quadratic(6, w, v)], **settings)
        run = langevin_transitions(prior, 50, steps=20, every=5, generator=seed(0))
        for reference in (real, None):
            verdict = oversaturation(run, reference)
            assert verdict.oversaturated is expected
            torch.testing.assert_close(verdict.run, run.pixels.mean(2))
    assert verdict.reference.tolist() == pytest.approx([0.5, 0.05, 0.0], abs=0.01)
    with pytest.raises(ValueError, match="at least 2 reference images and 2 samples, got 1 and 50"):
        oversaturation(run, real[:1])


@pytest.mark.parametrize("context", [False, True])
def test_default_energies_in_a_chunk_and_pictures(context, tmp_path):
    """Chains through all layers, with context too."""
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (2,), (1, 8, 8)]),
        energy=EnergyConfig(context=context, width=8, vector_width=32),
        langevin=LangevinConfig(steps=3),
        drawing=DrawingConfig(ancestral=False),
    )
    perturb(prior)
    run = langevin_transitions(prior, 3, steps=3, generator=seed(0))
    torch.testing.assert_close(run.samples, prior.sample_noise(3, generator=seed(0)))
    torch.testing.assert_close(run.energies[0, -1], prior.layer_energies(run.samples, 0), atol=1e-4, rtol=1e-4)
    save_strips(tmp_path / "strips.png", prior, run)
    (picture,) = read_strips(tmp_path / "strips.png")
    with torch.no_grad():
        states = torch.stack([prior.decode(u) for u in run.states.flip(0).flatten(0, 1)], dim=1)
    for i, row in enumerate(np.array_split(picture, 3)):
        check_strip(row, states[i])
    save_energies(tmp_path / "energies.png", run)
    heights = [find_color(tmp_path / "energies.png", color)[:, 0].mean() for color in ("C0", "C1", "C2", GREY)]
    assert heights == sorted(heights)
    assert min(b - a for a, b in pairwise(heights)) > 50


def test_pixels_are_drawn_where_they_are(tmp_path):
    """Mean, std and share of .8, .5 and .1 are level lines, and a reference's mean of .3 is a dashed one."""
    run = langevin_transitions(make(steps=2), 2, steps=3, generator=seed(0))
    run = replace(run, pixels=torch.tensor([0.8, 0.5, 0.1]).expand(run.pixels.shape))
    save_pixels(tmp_path / "pixels.png", run)
    width = imread(tmp_path / "pixels.png").shape[1]
    found = [find_color(tmp_path / "pixels.png", color) for color in ("C0", "C1", "C2")]
    mean, std, share = (each[each[:, 1] < width / 2][:, 0].mean() for each in found)
    assert (std - mean) / (share - std) == pytest.approx(0.3 / 0.4, abs=0.02)
    save_pixels(tmp_path / "both.png", run, reference=torch.full((2, 1, 2, 2), 0.3))
    dashed = find_color(tmp_path / "both.png", "C0", tolerance=0.2)[:, 0].max()
    assert dashed == pytest.approx(mean + (share - mean) * 0.5 / 0.7, abs=4)


def test_bad_counts_are_refused():
    prior = make()
    for settings in ({"steps": 0}, {"steps": 2, "every": 0}, {"steps": 2, "shown": -1}, {"steps": 2, "columns": 0}):
        with pytest.raises(ValueError, match="expected a positive integer"):
            langevin_transitions(prior, 2, **settings)
    with pytest.raises(TypeError, match="steps: expected a positive integer, got float"):
        langevin_transitions(prior, 2, steps=2.0)
