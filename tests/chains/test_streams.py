import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from backbones import RandomBackbone
from helpers import IMAGES, seed

from hvae_ebm_prior.baselines import GaussianPrior
from hvae_ebm_prior.chains.streams import SampleStreams, draw_key, draw_seeds, seeded

CPU = torch.device("cpu")


def test_a_samples_noise_does_not_depend_on_its_batch():
    seeds = draw_seeds(5, seed(0))
    whole, part = SampleStreams(seeds, CPU, torch.float32), SampleStreams(seeds[2:4], CPU, torch.float32)
    for dim in (3, 40):
        assert torch.equal(whole.normal(dim)[2:4], part.normal(dim))
    assert torch.equal(whole.levels(7)[2:4], part.levels(7))


def test_first_seeds_do_not_depend_on_the_count():
    few, many = (draw_seeds(n, seed(3)) for n in (2, 9))
    assert many[:2] == few
    assert len(set(many)) == 9


def test_noise_is_standard_normal_and_levels_uniform():
    streams = SampleStreams(draw_seeds(2000, seed(0)), CPU, torch.float64)
    noise = torch.cat([streams.normal(10), streams.normal(10)], dim=1)
    assert abs(noise.mean().item()) < 5 / 200
    assert abs(noise.var().item() - 1) < 5 * (2 / 40_000) ** 0.5
    correlation = torch.corrcoef(noise.T)
    assert (correlation - torch.eye(20, dtype=torch.float64)).abs().max() < 5 / 2000**0.5
    counts = torch.bincount(streams.levels(4), minlength=4)
    assert ((counts - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


def test_seeded_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    with seeded(1, CPU):
        first = torch.randn(3)
    with seeded(1, CPU):
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.get_rng_state(), before)


class Slow(RandomBackbone):
    """Draws its posterior in two parts, and lets other threads run in between."""

    def infer(self, images):
        first = super().infer(images)
        time.sleep(0.002)
        return [a + b for a, b in zip(first, super().infer(images), strict=True)]


def test_threads_encode_as_if_they_were_alone():
    prior = GaussianPrior(Slow([(2,), (3,)]))
    alone = [prior.encode(IMAGES, generator=seed(i)) for i in range(16)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: prior.encode(IMAGES, generator=seed(i)), range(16)))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_without_a_generator_disturb_no_others():
    prior = GaussianPrior(Slow([(2,)]))
    alone = prior.encode(IMAGES, generator=seed(0))
    done = threading.Event()

    def draw():
        while not done.is_set():
            prior.encode(IMAGES)
            draw_key(None)

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(draw)
        together = [prior.encode(IMAGES, generator=seed(0)) for _ in range(5)]
        done.set()
        other.result()
    assert all(torch.equal(each, alone) for each in together)
