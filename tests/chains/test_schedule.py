import math

import pytest
import torch

from hvae_ebm_prior import DiffusionSchedule


def test_ddpm_has_the_published_levels():
    schedule = DiffusionSchedule.ddpm(3)
    torch.testing.assert_close(schedule.sigma, torch.tensor([0.0100, 0.6918, 0.9224, 0.9997]), atol=5e-5, rtol=0)
    torch.testing.assert_close(schedule.sigma_bar, torch.tensor([0.0100, 0.6918, 0.9603, 1.0000]), atol=5e-5, rtol=0)


def test_ddpm_alpha_is_the_product_of_betas_between_two_indices():
    # The definition, by an explicit loop: indices 0, 250, 500, 999 for T = 3.
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    expected, previous = [], -1
    for index in (0, 250, 500, 999):
        expected.append(math.prod(math.sqrt(1 - beta) for beta in betas[previous + 1 : index + 1]))
        previous = index
    torch.testing.assert_close(DiffusionSchedule.ddpm(3).alpha, torch.tensor(expected))


def test_cosine_is_noise_free_at_0_and_pure_noise_at_the_end():
    schedule = DiffusionSchedule.cosine(3)
    torch.testing.assert_close(schedule.alpha[1:], torch.tensor([0.8660, 0.5774, 0.0]), atol=5e-5, rtol=0)
    assert schedule.alpha_bar[0] == 1
    assert schedule.sigma_bar[0] == 0
    assert schedule.alpha_bar[3] == 0
    assert schedule.sigma_bar[3] == 1


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 50])
@pytest.mark.parametrize("name", ["ddpm", "cosine"])
def test_every_step_preserves_variance_and_steps_compose(name, steps):
    schedule = getattr(DiffusionSchedule, name)(steps)
    assert schedule.steps == steps
    assert all(
        len(level) == steps + 1 for level in (schedule.alpha, schedule.sigma, schedule.alpha_bar, schedule.sigma_bar)
    )
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(steps + 1))
    torch.testing.assert_close(schedule.alpha.cumprod(0), schedule.alpha_bar, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(schedule.alpha_bar**2 + schedule.sigma_bar**2, torch.ones(steps + 1))


def test_marginal_is_one_step_from_data_to_noise():
    schedule = DiffusionSchedule.marginal()
    assert schedule.steps == 1
    assert schedule.alpha.tolist() == [1, 0]
    assert schedule.sigma.tolist() == [0, 1]


def test_from_snr_gives_back_the_ratios():
    ratios = [100.0, 4.0, 0.5, 1e-3]
    schedule = DiffusionSchedule.from_snr(ratios)
    torch.testing.assert_close((schedule.alpha_bar / schedule.sigma_bar) ** 2, torch.tensor(ratios))


def test_nearly_noise_free_levels_keep_their_noise():
    schedule = DiffusionSchedule.from_snr([math.inf, 1e17, 1.0, 0.0])
    assert schedule.sigma[1].item() == pytest.approx(1e-17**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionSchedule.from_snr([1.0]), "at least 2"),
        (lambda: DiffusionSchedule.from_snr([1.0, 2.0, 0.0]), "strictly decreasing"),
        (lambda: DiffusionSchedule.from_snr([1.0, -1.0]), "non-negative"),
        (lambda: DiffusionSchedule.from_snr([float("nan"), 0.0]), "non-negative"),
        (lambda: DiffusionSchedule.from_snr([9.0, 1.0]), "append 0"),
        (lambda: DiffusionSchedule.cosine(0), "at least 1, got 0"),
        (lambda: DiffusionSchedule.ddpm(1.5), r"integer number of steps of at least 1, got 1\.5"),
        (lambda: DiffusionSchedule.ddpm(501), "room for 500"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
