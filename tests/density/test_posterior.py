import pytest
import torch
from backbones import IdentityBackbone, Pair, images_of
from helpers import seed
from torch.distributions import Normal

from hvae_ebm_prior.baselines import GaussianPrior


class Observed(Pair):
    """x | z_2 ~ N(z_2, .2^2), with an encoder that knows nothing: its draws are those of the prior."""

    def infer(self, images):
        z_1 = torch.randn(len(images), 1)
        return [z_1, z_1 + 0.5 * torch.randn(len(images), 1)]

    def infer_with_density(self, images):
        raise NotImplementedError

    def log_likelihood(self, features, images):
        return Normal(features[:, 1], 0.2).log_prob(20 * images.flatten(1)[:, 0] - 10)


def test_chains_find_the_posterior_of_a_linear_gaussian_model():
    """x = u_1 + u_2 / 2 + .2 e, so u | x is Gaussian with precision I + a a^T / .04 and mean cov a x / .04."""
    n, x = 1000, 1.5
    prior = GaussianPrior(Observed((1,), (1,)))
    images = images_of(torch.full((n, 2), x))
    u = prior.encode(images, mcmc_steps=80, generator=seed(0)).double()
    a = torch.tensor([1.0, 0.5], dtype=torch.float64)
    covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + a[:, None] * a / 0.04)
    torch.testing.assert_close(u.mean(0), covariance @ a * x / 0.04, atol=0.1, rtol=0)
    torch.testing.assert_close(u.T.cov(), covariance, atol=0.1, rtol=0)
    # Along the observation the posterior is narrow, and so are the chains, to a tenth.
    assert (u @ a).var().item() == pytest.approx((a @ covariance @ a).item(), rel=0.15)


def test_no_steps_are_the_encoders_draws_and_the_same_seed_gives_the_same():
    prior, images = GaussianPrior(Observed((1,), (1,))), images_of(torch.ones(4, 2))
    assert torch.equal(prior.encode(images, generator=seed(0)), prior.encode(images, mcmc_steps=0, generator=seed(0)))
    first, again = (prior.encode(images, mcmc_steps=5, generator=seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, prior.encode(images, generator=seed(0)))


def test_chains_need_densities_and_a_count():
    images = images_of(torch.ones(2, 2))
    with pytest.raises(TypeError, match="log_likelihood"):
        GaussianPrior(IdentityBackbone((2,))).encode(images, mcmc_steps=3)
    with pytest.raises(ValueError, match="mcmc_steps"):
        GaussianPrior(Observed((1,), (1,))).encode(images, mcmc_steps=-1)
