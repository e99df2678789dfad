import math
from functools import partial

import numpy as np
import pytest
import torch
from backbones import PAIR_ENERGIES, IdentityBackbone, Pair, Quadratic, RandomBackbone, images_of
from helpers import seed
from stand_ins import perturb
from torch.distributions import Normal

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, EnergyConfig, LangevinConfig
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.evaluation.detection import detection
from hvae_ebm_prior.evaluation.detours import (
    conditional_diffusion_scores,
    diffusion_scores,
    draw_beside,
    restoration_scores,
    restore,
)
from hvae_ebm_prior.evaluation.outliers import (
    SCHEMES,
    bound_scores,
    density_scores,
    flow_scores,
    inference_scores,
    ratio_scores,
    typicality_scores,
)

Z = torch.randn(6, 5, generator=seed(0))


@pytest.fixture(scope="module")
def known():
    """Identity latents of sizes 2 and 3, so that scores are sums over their squares."""
    return DiffusionEBMPrior(
        IdentityBackbone((2,), (3,)),
        energy=[Quadratic(2, 0.5, -0.2), Quadratic(3, -0.3, 0.1)],
        langevin=LangevinConfig(steps=2),
    )


def test_inference_and_density_scores_in_closed_form(known):
    top = -(0.5 * Z[:, :2] - 0.2 * Z[:, :2] ** 2).sum(1)
    both = top - (-0.3 * Z[:, 2:] + 0.1 * Z[:, 2:] ** 2).sum(1)
    torch.testing.assert_close(inference_scores(known, images_of(Z)), torch.stack((both, top), 1), atol=1e-4, rtol=1e-4)
    gaussian = torch.stack((Z.square().sum(1), Z[:, :2].square().sum(1)), 1) / 2
    torch.testing.assert_close(
        density_scores(known, images_of(Z)), torch.stack((both, top), 1) + gaussian, atol=1e-4, rtol=1e-4
    )


def test_flow_scores_are_minus_the_log_density_of_the_layers_above_the_cut():
    """Of Gaussian layers, u_1 ~ N(.5, .8^2) and u_2 | u_1 ~ N(.2 - .8 u_1, .8^2), with hardly any noise at level 0."""
    schedule = DiffusionSchedule.from_snr([1e5, 15, 3, 0])
    prior = DiffusionEBMPrior(Pair((1,), (1,)), schedule=schedule, energy=list(PAIR_ENERGIES))
    u = torch.randn(6, 2, generator=seed(0))
    images = images_of(torch.stack((u[:, 0], u[:, 0] + 0.5 * u[:, 1]), dim=1))
    top = -Normal(0.5, 0.8).log_prob(u[:, 0])
    both = top - Normal(0.2 - 0.8 * u[:, 0], 0.8).log_prob(u[:, 1])
    scores = flow_scores(prior, images, steps=30)
    torch.testing.assert_close(scores, torch.stack((both, top), 1), atol=5e-3, rtol=5e-3)
    with pytest.raises(TypeError, match="context"):
        flow_scores(DiffusionEBMPrior(Pair((1,), (1,)), energy=EnergyConfig(context=False)), images)


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("diffusion_scores", [diffusion_scores, conditional_diffusion_scores])
def test_diffusion_scores_between_their_limits(diffusion_scores):
    """From a level without noise they are the inference scores; from pure noise nothing of the image is left, and they
    are those of samples.
    """
    energies = [Quadratic(2, 0.5, -0.2), Quadratic(3, -0.3, 0.1)]
    settings = {"energy": energies, "langevin": LangevinConfig(steps=30, start="gaussian")}
    sharp = DiffusionEBMPrior(
        IdentityBackbone((2,), (3,)), schedule=DiffusionSchedule.from_snr([1e9, 1e8, 0]), **settings
    )
    # The top layer's, as those below the cut are the prior's own.
    torch.testing.assert_close(
        diffusion_scores(sharp, images_of(Z))[:, 1], inference_scores(sharp, images_of(Z))[:, 1], atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        diffusion_scores(sharp, images_of(Z))[:, 0], inference_scores(sharp, images_of(Z))[:, 0], atol=2e-3, rtol=0
    )
    noisy = DiffusionEBMPrior(IdentityBackbone((2,), (3,)), schedule=DiffusionSchedule.marginal(), **settings)
    images = images_of(torch.full((2000, 5), 4.0))
    scores = diffusion_scores(noisy, images, level=1, generator=seed(0))
    samples = noisy.layer_energies(noisy.sample_noise(2000, generator=seed(1)), 0)
    for column, expected in ((0, samples.sum(1)), (1, samples[:, 0])):
        assert scores[:, column].mean().item() == pytest.approx(
            expected.mean().item(), abs=5 * expected.std().item() * (2 / 2000) ** 0.5
        )
    assert inference_scores(noisy, images).mean() > 2 * scores.mean()


def test_lower_layers_of_the_detour_are_those_of_samples_or_drawn_given_the_image():
    """z_2 = u_1 + u_2 / 2 and f_2 = -20 z_2^2, so u_2 | u_1 ~ N(-(20/11) u_1, 1/11), and u_2 ~ N(0, 41/51) in samples
    of the prior. From a level with hardly any noise the last chains move nothing.
    """
    n = 500
    prior = DiffusionEBMPrior(
        Pair((1,), (1,)),
        energy=[Quadratic(1), Quadratic(1, 0.0, -20.0)],
        schedule=DiffusionSchedule.from_snr([1e9, 1e8, 0]),
        langevin=LangevinConfig(steps=250, step_size=0.01, drift_limit=math.inf),
    )
    u = torch.ones(n, 2)
    samples = prior.sample_noise(n, trajectory=True, generator=seed(0))[1]
    streams = open_streams(1, range(n), prior.device, prior.dtype)
    beside = list(draw_beside(prior, u, samples, 1, 1.0, streams))
    given = list(restore(prior, u, 1, 1.0, streams))
    for (first, second), mean, variance in ((beside, 0.0, 41 / 51), (given, -20 / 11, 1 / 11)):
        torch.testing.assert_close(first, u, atol=2e-3, rtol=0)
        torch.testing.assert_close(second[:, 0], u[:, 0], atol=2e-3, rtol=0)
        assert second[:, 1].mean().item() == pytest.approx(mean, abs=0.1)
        assert second[:, 1].var().item() == pytest.approx(variance, rel=0.15)


def test_typicality_is_the_mahalanobis_distance_of_energies_and_gaussian_parts(known):
    """Against numpy's covariance and inverse, with the statistics written out."""
    reference, z = torch.randn(400, 5, generator=seed(3)), torch.cat((Z, 3 * Z))

    def statistics(z, layers):
        f = [0.5 * z[:, :2] - 0.2 * z[:, :2] ** 2, -0.3 * z[:, 2:] + 0.1 * z[:, 2:] ** 2]
        return torch.stack(
            [part for i, size in ((0, z[:, :2]), (1, z[:, 2:])) for part in (-f[i].sum(1), size.square().sum(1) / 2)][
                : 2 * layers
            ],
            1,
        )

    # The energies do not depend on t, so that three of them are one, and count once.
    scores = typicality_scores(known, images_of(z), reference=images_of(reference), draws=1)
    for column, layers in ((0, 2), (1, 1)):
        usual, seen = statistics(reference, layers).double().numpy(), statistics(z, layers).double().numpy()
        inverse = np.linalg.inv(np.cov(usual.T))
        expected = np.einsum("ni,ij,nj->n", seen - usual.mean(0), inverse, seen - usual.mean(0))
        torch.testing.assert_close(scores[:, column].double(), torch.from_numpy(expected), rtol=2e-2, atol=2e-2)


class LinearGaussian(IdentityBackbone):
    """z_1 ~ N(0, 1), z_2 | z_1 ~ N(z_1, 1), x | z_2 ~ N(z_2, s^2), with its exact posterior: every draw of the bound is
    log p(x) itself.
    """

    s = 0.5

    def __init__(self):
        super().__init__((1,), (1,))

    def top_down(self, batch_size):
        zero = torch.zeros(batch_size, 1)
        z = yield zero, zero + 1
        z = yield z, zero + 1
        return z

    def observed(self, images):
        return 20 * images.flatten(1) - 10

    def posteriors(self, x, z_1):
        top = Normal(x / (2 + self.s**2), math.sqrt(1 - 1 / (2 + self.s**2)))
        precision = 1 + 1 / self.s**2
        return top, z_1 if z_1 is None else Normal((z_1 + x / self.s**2) / precision, precision**-0.5)

    def infer_with_density(self, images):
        x = self.observed(images)
        top, _ = self.posteriors(x, None)
        z_1 = top.sample()
        z_2 = (low := self.posteriors(x, z_1)[1]).sample()
        return [(z_1, top.log_prob(z_1).sum(1)), (z_2, low.log_prob(z_2).sum(1))]

    def infer(self, images):
        return [z for z, _ in self.infer_with_density(images)]

    def log_likelihood(self, features, images):
        return Normal(features, self.s).log_prob(self.observed(images)).sum(1)

    def decode(self, features):
        return ((features + 10) / 20).clamp(0, 1)[:, None, None]


@pytest.mark.usefixtures("counters")
def test_the_backbones_bounds_of_a_linear_gaussian_model():
    prior = DiffusionEBMPrior(LinearGaussian())
    x = torch.tensor([0.3, -2.0, 4.0])
    images = images_of(x[:, None])
    scores = bound_scores(prior, images.repeat(600, 1, 1, 1), draws=1, generator=seed(0)).unflatten(0, (-1, 3)).mean(0)
    evidence = Normal(0, math.sqrt(2 + 0.25)).log_prob(x)
    torch.testing.assert_close(scores[:, 0], -evidence, atol=1e-3, rtol=1e-3)
    # L^{>1}: z_1 from its posterior N(m, v), z_2 ~ N(z_1, 1), so E (x - z_2)^2 = (x - m)^2 + v + 1, and the KL
    # divergence of q(z_1 | x) is lost.
    m, v = x / 2.25, 1 - 1 / 2.25
    divergence = 0.5 * (m**2 + v - 1 - math.log(v))
    expected = -divergence - 0.5 * math.log(2 * math.pi * 0.25) - ((x - m) ** 2 + v + 1) / (2 * 0.25)
    torch.testing.assert_close(scores[:, 1], -expected, rtol=0.06, atol=0.1)
    ratio = ratio_scores(prior, images, draws=20, generator=seed(0))
    assert (ratio[:, 0] == 0).all()
    again = bound_scores(prior, images, draws=20, generator=seed(0))
    torch.testing.assert_close(ratio[:, 1], again[:, 1] - again[:, 0])


@pytest.mark.usefixtures("counters")
def test_density_scores_are_means_over_the_posterior():
    """Without energies: u_1 = z_1 and u_2 = z_2 - z_1 share x alike, so each is N(m, v) given x, and E u^2 / 2 = (m^2 +
    v) / 2.
    """
    x = torch.tensor([0.3, -2.0, 4.0])
    half = ((x / 2.25) ** 2 + 1 - 1 / 2.25) / 2
    scores = density_scores(DiffusionEBMPrior(LinearGaussian()), images_of(x[:, None]), draws=20_000, generator=seed(0))
    torch.testing.assert_close(scores, torch.stack((2 * half, half), dim=1), rtol=0.03, atol=0.02)


@pytest.mark.usefixtures("counters")
def test_restoration_scores_in_closed_form():
    """A sharp level moves no layer above the cut. Without energies z_2 below it is N(z_1, 1), not its posterior."""
    schedule = DiffusionSchedule.from_snr([1e9, 1e8, 0])
    prior = DiffusionEBMPrior(LinearGaussian(), schedule=schedule, langevin=LangevinConfig(steps=2, start="gaussian"))
    x = torch.tensor([0.3, -2.0, 4.0])
    images = images_of(x.repeat_interleave(400)[:, None])
    scores = restoration_scores(prior, images, draws=2, generator=seed(0))
    assert scores[:, 0].abs().max() < 0.02
    scores = scores.unflatten(0, (3, 400)).mean(1)
    m, v, v_2 = x / 2.25, 1 - 1 / 2.25, 1 / (1 / 2 + 4)
    expected = ((x - m) ** 2 + v + 1 - (x - 4 * v_2 * x) ** 2 - v_2) / (2 * 0.25)
    torch.testing.assert_close(scores[:, 1], expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["restoration", "bound", "ratio"])
def test_scores_of_densities_do_not_depend_on_the_other_images(name, monkeypatch):
    prior = DiffusionEBMPrior(
        LinearGaussian(), energy=[Quadratic(1, 0.5, -0.2), Quadratic(1, -0.3, 0.1)], langevin=LangevinConfig(steps=2)
    )
    images = torch.rand(5, 1, 1, 1, generator=seed(0))
    whole = SCHEMES[name](prior, images, draws=2, generator=seed(1))
    torch.testing.assert_close(
        SCHEMES[name](prior, images[:2], draws=2, generator=seed(1)), whole[:2], atol=1e-4, rtol=1e-5
    )
    monkeypatch.setattr("hvae_ebm_prior.density.latent_prior.CHUNK_DIMENSIONS", 2 * prior.dim)
    torch.testing.assert_close(SCHEMES[name](prior, images, draws=2, generator=seed(1)), whole, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(SCHEMES[name](prior, images, draws=2, generator=seed(2)), whole)


@pytest.mark.parametrize("name", ["inference", "diffusion", "density", "typicality"])
@pytest.mark.parametrize("context", [False, True])
def test_scores_do_not_depend_on_the_other_images(context, name, monkeypatch):
    torch.manual_seed(0)
    # In double precision: what rounding does to a typicality, a difference of log-densities, depends on the machine.
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (3,)], dtype=torch.float64),
        energy=EnergyConfig(context=context, vector_width=8),
        langevin=LangevinConfig(steps=2),
    )
    perturb(prior.double())
    images = torch.rand(7, 1, 2, 2, generator=seed(0), dtype=torch.float64)
    score = partial(
        SCHEMES[name],
        prior,
        **(
            {"reference": torch.rand(30, 1, 2, 2, generator=seed(9), dtype=torch.float64)}
            if name == "typicality"
            else {}
        ),
    )
    whole = score(images, draws=2, generator=seed(1))
    assert whole.shape == (7, 2)
    changed = images.clone()
    changed[3:] = 1 - changed[3:]
    torch.testing.assert_close(score(changed, draws=2, generator=seed(1))[:3], whole[:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score(images[:2], draws=2, generator=seed(1)), whole[:2], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("hvae_ebm_prior.density.latent_prior.CHUNK_DIMENSIONS", 2 * prior.dim)
    torch.testing.assert_close(score(images, draws=2, generator=seed(1)), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(score(images, draws=2, generator=seed(2)), whole)


def test_detection_of_a_small_example():
    found = detection(torch.tensor([[0.0, 0], [1, 1], [2, 2], [3, 3]]), torch.tensor([[2.5, -1], [4, -2]]))
    assert (found[0].auroc, found[0].fpr80) == (7 / 8, 1 / 4)
    assert found[0].auprc == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert (found[1].auroc, found[1].fpr80) == (0, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p: bound_scores(p, images_of(Z)),
            TypeError,
            "IdentityBackbone gives no densities.*infer_with_density, log_likelihood",
        ),
        (lambda p: restoration_scores(p, images_of(Z)), TypeError, "gives no densities"),
        (lambda p: restoration_scores(p, images_of(Z), level=0), ValueError, r"1\.\.3, got 0"),
        (lambda p: density_scores(p, images_of(Z), draws=0), ValueError, "draws"),
        (lambda p: diffusion_scores(p, images_of(Z), level=4), ValueError, r"1\.\.3, got 4"),
        (lambda p: diffusion_scores(p, images_of(Z), noise=-1), ValueError, "factor"),
        (lambda p: inference_scores(p, images_of(Z), draws=0), ValueError, "draws"),
        (lambda p: inference_scores(p, images_of(Z) + 1), ValueError, r"\[0, 1\]"),
        (
            lambda p: typicality_scores(p, images_of(Z), reference=images_of(Z)),
            ValueError,
            "more images than statistics, 8, got 6",
        ),
        (lambda p: detection(Z, Z[:, :2]), ValueError, r"\(6, 5\) and \(6, 2\)"),
    ],
)
def test_errors_say_what_is_wrong(known, call, error, message):
    with pytest.raises(error, match=message):
        call(known)
