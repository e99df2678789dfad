import pytest
import torch
from helpers import seed

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, HVAEConfig
from hvae_ebm_prior.backbone.elbo import DensityAdapter


@pytest.fixture(scope="module")
def model():
    """A small HVAE whose heads are not zero, so that every layer matters."""
    torch.manual_seed(0)
    model = HVAE(HVAEConfig(widths=(8, 8, 8), latent_channels=(3, 2, 1)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_shapes_follow_the_image_size():
    for size, channels, expected in ((28, 1, (4, 8, 16)), (32, 3, (4, 8, 16)), (17, 1, (3, 6, 12))):
        model = HVAE(HVAEConfig(image_channels=channels, image_size=size, widths=(8, 8, 8)))
        prior = DiffusionEBMPrior(HVAEAdapter(model))
        assert prior.latent_shapes == (
            (16, expected[0], expected[0]),
            (8, expected[1], expected[1]),
            (4, expected[2], expected[2]),
        )
        images = torch.rand(2, channels, size, size)
        assert prior.decode(prior.encode(images)).shape == images.shape


def test_one_layer():
    prior = DiffusionEBMPrior(HVAEAdapter(HVAE(HVAEConfig(image_size=8, widths=(8,), latent_channels=(2,)))))
    assert prior.latent_shapes == ((2, 4, 4),)
    assert prior.sample(2, generator=seed(0)).shape == (2, 1, 8, 8)


def test_divergence_and_likelihood_against_torch_distributions(model):
    """The same latents, pushed through torch's own normals: KL by Monte Carlo, -log p(x|z) exactly."""
    images = torch.rand(1, 1, 28, 28, generator=seed(0))
    draws = 4000
    with torch.no_grad():
        nll, divergences = model(images.expand(draws, -1, -1, -1), generator=seed(1))
        # Replay with the same noise.
        g = seed(1)
        h, ratios = model.start.expand(draws, -1, -1, -1), []
        for block, features in zip(model.blocks, model.bottom_up(images.expand(draws, -1, -1, -1)), strict=True):
            mean, std = block.prior(h)
            shift, log_ratio = block.posterior(h, features)
            p, q = (
                torch.distributions.Normal(mean, std),
                torch.distributions.Normal(mean + std * shift, std * log_ratio.exp()),
            )
            z = q.mean + q.stddev * torch.randn(mean.shape, generator=g)
            ratios.append((q.log_prob(z) - p.log_prob(z)).flatten(1).sum(1))
            torch.testing.assert_close(
                torch.distributions.kl_divergence(q, p).flatten(1).sum(1), divergences[:, len(ratios) - 1]
            )
            h = block(h, z)
        log_prob = torch.distributions.Normal(model.image_mean(h), model.log_scale.exp()).log_prob(
            images.expand(draws, -1, -1, -1)
        )
    torch.testing.assert_close(-log_prob.flatten(1).sum(1), nll, rtol=1e-4, atol=1e-2)
    for i, ratio in enumerate(ratios):
        assert abs(ratio.mean() - divergences[:, i].mean()) < 5 * ratio.std() / draws**0.5


def test_adapter_draws_what_the_model_draws(model):
    prior = DiffusionEBMPrior(HVAEAdapter(model))
    images = torch.rand(2, 1, 28, 28)
    z = HVAEAdapter(model).infer(images)
    assert [tuple(z_i.shape[1:]) for z_i in z] == list(prior.latent_shapes)
    # infer and top_down agree on the layers' Gaussians: the noise of a posterior draw maps back to it.
    for z_i, again in zip(z, prior.to_latents(prior.to_noise(z)), strict=True):
        torch.testing.assert_close(again, z_i, atol=1e-5, rtol=1e-4)


def test_samples_of_a_batch_are_independent(model):
    prior = DiffusionEBMPrior(HVAEAdapter(model))
    u = torch.randn(4, prior.dim, generator=seed(0))
    torch.testing.assert_close(prior.decode(u)[1:2], prior.decode(u[1:2]), atol=1e-5, rtol=1e-4)


def test_save_and_load(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    again = HVAE.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    model = HVAE(HVAEConfig(widths=(8, 8, 8), latent_channels=(3, 2, 1)))
    images, u = torch.rand(2, 1, 28, 28), torch.randn(2, 3 * 16 + 2 * 64 + 256)
    expected = DiffusionEBMPrior(HVAEAdapter(model)).decode(u)
    prior = DiffusionEBMPrior(HVAEAdapter(model.to(dtype)))
    torch.testing.assert_close(
        prior.decode(u), expected.to(prior.decode(u).dtype), atol=2e-2 if dtype is torch.bfloat16 else 1e-5, rtol=0
    )
    assert torch.isfinite(prior.encode(images.to(torch.float64))).all()


def test_wrong_config_is_refused():
    with pytest.raises(ValueError, match=r"one entry per layer, got \(1, 2\) and \(8,\)"):
        HVAEConfig(latent_channels=(1, 2), widths=(8,))


@torch.no_grad()
def test_posteriors_of_the_adapter_have_its_densities(model):
    adapter, images = HVAEAdapter(model), torch.rand(3, 1, 28, 28, generator=seed(0))
    torch.manual_seed(1)
    drawn = adapter.infer_with_density(images)
    torch.manual_seed(1)
    for (z, mean, std), (again, log_density) in zip(adapter.infer_with_posterior(images), drawn, strict=True):
        assert torch.equal(z, again)
        expected = torch.distributions.Normal(mean, std).log_prob(z).flatten(1).sum(1)
        torch.testing.assert_close(log_density, expected, atol=1e-3, rtol=1e-4)


def test_densities_of_the_adapter_against_torch_distributions(model):
    adapter, images = HVAEAdapter(model), torch.rand(3, 1, 28, 28, generator=seed(0))
    assert isinstance(adapter, DensityAdapter)
    with torch.no_grad():
        torch.manual_seed(1)
        drawn = adapter.infer_with_density(images)
        walk = adapter.top_down(3)
        mean, std = next(walk)
        h = model.start.expand(3, -1, -1, -1)
        for i, ((z, log_density), block, features) in enumerate(
            zip(drawn, model.blocks, model.bottom_up(images), strict=True)
        ):
            shift, log_ratio = block.posterior(h, features)
            expected = (
                torch.distributions.Normal(mean + std * shift, std * log_ratio.exp()).log_prob(z).flatten(1).sum(1)
            )
            torch.testing.assert_close(log_density, expected)
            h = block(h, z)
            if i < 2:
                mean, std = walk.send(z)
        with pytest.raises(StopIteration) as stop:
            walk.send(drawn[-1][0])
        expected = (
            torch.distributions.Normal(adapter.decode(stop.value.value), model.log_scale.exp())
            .log_prob(images)
            .flatten(1)
            .sum(1)
        )
        torch.testing.assert_close(adapter.log_likelihood(stop.value.value, images), expected)
