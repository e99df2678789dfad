"""The layer-by-layer prior against Gaussians in closed form: every conditional prior of a linear Gaussian is one."""

import math

import pytest
import torch
import torch.nn.functional as F
from backbones import TRUTH, Pair, RandomBackbone, minimize_batch_loss
from helpers import seed
from torch import nn

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, DiffusionSchedule, EnergyConfig, LabelSet
from hvae_ebm_prior.baselines.layerwise import LayerwisePrior, pick
from hvae_ebm_prior.baselines.ncp import NCPPrior
from hvae_ebm_prior.density.composition import Expert
from hvae_ebm_prior.evaluation.likelihood import log_likelihood_bound, log_normalizer
from hvae_ebm_prior.evaluation.outliers import (
    density_scores,
    diffusion_scores,
    inference_scores,
    restoration_scores,
    typicality_scores,
)
from hvae_ebm_prior.evaluation.transitions import langevin_transitions

SCHEDULE = DiffusionSchedule.from_snr((20, 2, 0))
# Of the data of a Pair in noise: u_1 = z_1 and u_2 = (z_2 - z_1) / .5, linear in u_1.
(M, S), (A, B, R) = TRUTH
SLOPE, STD = (A - 1) / 0.5, (S, R / 0.5)
MEAN_U = torch.tensor([M, SLOPE * M + B / 0.5])
COV_U = torch.tensor([[STD[0] ** 2, SLOPE * STD[0] ** 2], [SLOPE * STD[0] ** 2, SLOPE**2 * STD[0] ** 2 + STD[1] ** 2]])


class Polynomial(nn.Module):
    """All products of two of (1, u, mean) of what a layer's network sees, with weights of every level's own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SCHEDULE.steps, 6))

    def forward(self, x, t):
        u, mean = x[:, 1], x[:, 2]
        return (torch.stack((torch.ones_like(u), u, mean, u * u, u * mean, mean * mean), dim=1) * self.w[t]).sum(1)


def make_prior(**settings):
    return LayerwisePrior(Pair((1,), (1,)), schedule=SCHEDULE, energy=[Polynomial(), Polynomial()], **settings)


def exact_conditionals():
    """Intercept, slope on u_1 of level 0 and variance of u_{t,i} given the layer above at level 0, by level and layer,
    from the forward process.
    """
    first, noise = SCHEDULE.alpha_bar[0].item(), SCHEDULE.sigma_bar[0].item()
    top = first**2 * COV_U[0, 0].item() + noise**2
    found = []
    for alpha_bar, sigma_bar in zip(SCHEDULE.alpha_bar[:-1].tolist(), SCHEDULE.sigma_bar[:-1].tolist(), strict=True):
        mean, variance = alpha_bar * MEAN_U, alpha_bar**2 * COV_U.diag() + sigma_bar**2
        slope = alpha_bar * first * COV_U[0, 1].item() / top
        below = (mean[1].item() - slope * first * MEAN_U[0].item(), slope, variance[1].item() - slope**2 * top)
        found.append(((mean[0].item(), 0.0, variance[0].item()), below))
    return found


def exact_slopes():
    """Coefficients of u, u^2 and u u_1 in log N(u; intercept + slope u_1, variance) - log N(u; 0, 1), by level and
    layer.
    """
    return torch.tensor([[(a / v, 0.5 - 0.5 / v, s / v) for a, s, v in level] for level in exact_conditionals()])


def draw_noise(n):
    """Posterior noise u of data, (n, 2)."""
    return MEAN_U + torch.randn(n, 2, generator=seed(0)) @ torch.linalg.cholesky(COV_U).T


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("negatives", [1, 4])
def test_ranking_recovers_the_conditionals_of_a_gaussian(negatives):
    prior, u = make_prior(negatives=negatives), draw_noise(8_000)
    minimize_batch_loss(prior, u, steps=15, seed=1)
    found = torch.stack([network.w.detach()[:, [1, 3, 4]] for network in prior.energies], dim=1)
    found[:, 0, 2] = 0  # the top layer's mean is constant
    torch.testing.assert_close(found, exact_slopes(), atol=0.12, rtol=0.1)
    # Learning has lowered the loss, which starts at 0.
    assert prior.batch_loss(u, None, seed(2)).total.mean() < -0.05


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("parts", [2**14, 50])
def test_samples_with_the_exact_conditionals(parts, monkeypatch):
    """Also where proposals are looked at in parts. What is left of level 0's noise is known."""
    monkeypatch.setattr("hvae_ebm_prior.baselines.layerwise.PROPOSED", parts)
    prior = make_prior(proposals=150)
    with torch.no_grad():
        for i, network in enumerate(prior.energies):
            network.w[:, [1, 3, 4]] = exact_slopes()[:, i]
    u = prior.sample_noise(6000, generator=seed(0))
    alpha_bar, sigma_bar = SCHEDULE.alpha_bar[0], SCHEDULE.sigma_bar[0]
    torch.testing.assert_close(u.mean(0), alpha_bar * MEAN_U, atol=0.05, rtol=0)
    torch.testing.assert_close(u.T.cov(), alpha_bar**2 * COV_U + sigma_bar**2 * torch.eye(2), atol=0.05, rtol=0)
    # A held layer is exact, and the layer below follows it.
    held = prior.sample_noise(6000, fixed={0: torch.full((1, 1), 1.5)}, generator=seed(1))
    assert (held[:, 0] == 1.5).all()
    assert held[:, 1].mean().item() == pytest.approx(
        float(alpha_bar * (MEAN_U[1] + SLOPE * (1.5 - MEAN_U[0]))), abs=0.12
    )


@pytest.mark.usefixtures("counters")
def test_untrained_it_is_the_backbones_prior_at_a_temperature():
    prior = LayerwisePrior(
        RandomBackbone([(3,), (1, 2, 2)]), energy=EnergyConfig(width=8, vector_width=16), proposals=4
    )
    u = prior.sample_noise(4000, temperature=0.5, generator=seed(0))
    assert u.std(0).tolist() == pytest.approx([0.5] * 7, abs=0.03)
    assert prior.input_shapes == ((12,), (4, 2, 2))


def test_the_loss_is_a_cross_entropy_less_that_of_chance():
    prior = make_prior(negatives=3)
    f = torch.randn(2, 50, 4, generator=seed(0))
    expected = F.cross_entropy(f.flatten(0, 1), torch.zeros(100, dtype=torch.long), reduction="none").reshape(
        2, 50
    ) - math.log(4)
    torch.testing.assert_close(prior.ranking_loss(f), expected)
    record = prior.batch_loss(draw_noise(8), None, seed(0))
    assert (record.total == 0).all()
    assert (record.recovery == 0).all()
    assert set(record.levels.tolist()) == {0, 1}


def test_sir_weights():
    """Frequencies are the softmax of the weights, also where proposals are looked at in two parts."""
    log_weights = torch.tensor([0.0, 1.0, -2.0, 2.5, 0.5]).expand(40_000, 5)
    noise = torch.randn(40_000, 5, generator=seed(0))
    index, score = pick(log_weights, noise)
    frequencies = index.bincount(minlength=5) / 40_000
    torch.testing.assert_close(frequencies, log_weights[0].softmax(0), atol=0.01, rtol=0)
    (first, a), (second, b) = pick(log_weights[:, :2], noise[:, :2]), pick(log_weights[:, 2:], noise[:, 2:])
    assert torch.equal(torch.where(b > a, second + 2, first), index)
    assert torch.equal(torch.maximum(a, b), score)
    assert torch.isfinite(pick(torch.zeros(1, 3), torch.tensor([[-8.0, 0.0, 8.0]]))[1]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: LayerwisePrior(b, proposals=0), ValueError, "proposals: expected a positive integer"),
        (lambda b: LayerwisePrior(b, negatives=0), ValueError, "negatives: expected a positive integer"),
        (
            lambda b: LayerwisePrior(b).couple(Coupling({"class": LabelSet(3)})),
            TypeError,
            "learns no labels; take a DiffusionEBMPrior",
        ),
        (
            lambda b: LayerwisePrior(b).posterior_sample(lambda x: x.sum((1, 2, 3)), 1),
            ValueError,
            "take a DiffusionEBMPrior",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(RandomBackbone([(2,), (1, 2, 2)]))


IMAGES = torch.rand(2, 1, 2, 2, generator=seed(0))


@pytest.mark.parametrize(
    "use",
    [
        lambda prior: inference_scores(prior, IMAGES),
        lambda prior: density_scores(prior, IMAGES),
        lambda prior: diffusion_scores(prior, IMAGES),
        lambda prior: restoration_scores(prior, IMAGES),
        lambda prior: typicality_scores(prior, IMAGES, reference=IMAGES),
        lambda prior: log_likelihood_bound(prior, IMAGES),
        lambda prior: log_normalizer(prior, torch.zeros(1, prior.dim), 0),
        lambda prior: langevin_transitions(prior, 1, steps=1),
        lambda prior: DiffusionEBMPrior(prior.backbone, schedule=prior.schedule).sample_noise(1, labels=Expert(prior)),
    ],
)
def test_its_energies_are_not_compared(use):
    """They are found up to offsets of the layers above, of which a classifier's logits have none."""
    backbone = RandomBackbone([(2,), (1, 2, 2)])
    with pytest.raises(
        TypeError, match="energies of different samples.* of a LayerwisePrior .*take a DiffusionEBMPrior"
    ):
        use(LayerwisePrior(backbone))
    NCPPrior(backbone).check_comparable("a score")
