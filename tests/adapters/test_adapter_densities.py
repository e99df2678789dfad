"""Densities of the adapters against torch.distributions, on stand-ins; tests/adapters/test_official.py has the
published models.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import seed
from hvae_ebm_prior_adapters.logistic_mixture import mixture_log_likelihood
from stand_ins import VDVAE, AutoEncoder, DeepVAE, perturb
from torch import nn
from torch.distributions import AffineTransform, Bernoulli, Normal, SigmoidTransform, TransformedDistribution, Uniform

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.adapters import LadderAdapter, NVAEAdapter, VDVAEAdapter
from hvae_ebm_prior.backbone.elbo import DensityAdapter
from hvae_ebm_prior.backbone.posterior import PosteriorAdapter
from hvae_ebm_prior.backbone.transform import drive

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def total(log_prob):
    return log_prob.flatten(1).sum(1)


def features_of(adapter, latents):
    """What `top_down` returns for given latents."""
    return drive(adapter, len(latents[0]), lambda i, mean, std: latents[i])[1]


def drawn(adapter, images):
    """Posterior draws and log-densities, and a check that `infer` draws the same from the same seed."""
    torch.manual_seed(1)
    pairs = adapter.infer_with_density(images)
    torch.manual_seed(1)
    for (z, log_density), again in zip(pairs, adapter.infer(images), strict=True):
        assert torch.equal(z, again)
        assert log_density.shape == (len(images),)
    latents, log_densities = [z for z, _ in pairs], [log_density for _, log_density in pairs]
    check_posterior(adapter, images, latents, log_densities)
    return latents, log_densities


def check_posterior(adapter, images, latents, log_densities):
    """Where the adapter gives its Gaussians, its draws are the same, and have the density that they say."""
    if not isinstance(adapter, PosteriorAdapter):
        return
    torch.manual_seed(1)
    given = adapter.infer_with_posterior(images)
    for (z, mean, std), again, log_density in zip(given or (), latents, log_densities, strict=given is not None):
        assert torch.equal(z, again)
        torch.testing.assert_close(total(Normal(mean, std).log_prob(z)), log_density, atol=1e-3, rtol=1e-4)


def masses(parameters, images, levels):
    """log p of images under a mixture of discretised logistics, in double precision, from the logistic's cdf."""
    p, x = parameters.double().movedim(1, -1), 2 * images.double().movedim(1, -1)[..., None] - 1
    mixtures = p.shape[-1] // 10
    mean, log_scale, coefficient = p[..., mixtures:].unflatten(-1, (3, 3, mixtures)).unbind(-2)
    red, green, blue = mean.unbind(-2)
    green = green + coefficient[..., 0, :].tanh() * x[..., 0, :]
    blue = blue + coefficient[..., 1, :].tanh() * x[..., 0, :] + coefficient[..., 2, :].tanh() * x[..., 1, :]
    centre = torch.stack((red, green, blue), dim=-2)
    # Each mass is taken from the nearer tail, by reflection where that is the upper one, as 1 - 1 has no digits.
    sign = torch.where(x > centre, -1.0, 1.0)
    logistic = TransformedDistribution(
        Uniform(torch.zeros_like(centre), 1),
        [SigmoidTransform().inv, AffineTransform(sign * centre, log_scale.clamp(min=-7).exp())],
    )
    # Levels at the ends reach to infinity.
    low = torch.where(sign * x < -1 + 1e-6, 0, logistic.cdf(sign * x - 1 / (levels - 1)))
    high = torch.where(sign * x > 1 - 1e-6, 1, logistic.cdf(sign * x + 1 / (levels - 1)))
    weights = p[..., :mixtures].softmax(-1)
    return ((high - low).prod(-2) * weights).sum(-1).log().flatten(1).sum(1).float()


@pytest.mark.parametrize("levels", [256, 32])
def test_mixture_likelihood_is_the_mass_of_the_levels(levels):
    parameters, images = (
        torch.randn(3, 20, 2, 3, generator=seed(0)),
        torch.randint(levels, (3, 3, 2, 3), generator=seed(1)) / (levels - 1),
    )
    images[0, :, 0, 0], images[1, :, 1, 1] = 0, 1
    parameters[:, 2:].reshape(3, 3, 6, 2, 3)[:, :, 2:4] -= 2  # scales of some levels
    torch.testing.assert_close(
        mixture_log_likelihood(parameters, images, levels), masses(parameters, images, levels), atol=1e-3, rtol=1e-4
    )


def test_mixture_likelihood_adds_up_to_one_and_stays_finite_far_from_the_mean():
    colours = torch.cartesian_prod(*[torch.linspace(0, 1, 5)] * 3)[:, :, None, None]
    parameters = 2 * torch.randn(1, 30, 1, 1, generator=seed(0))
    assert mixture_log_likelihood(
        parameters.expand(125, -1, -1, -1), colours, levels=5
    ).exp().sum().item() == pytest.approx(1, abs=1e-5)
    far = torch.zeros(1, 10, 1, 1)
    far[:, 1:].reshape(1, 3, 3, 1, 1)[:, :, 1] = -7  # the smallest scale, exp(-7)
    grey = torch.full((1, 3, 1, 1), 200 / 255)
    distance, width = (2 * 200 / 255 - 1) * math.e**7, 2 / 255 * math.e**7
    # The logistic's tail is exponential: log mass = -(distance - width / 2) + log(1 - exp(-width)).
    expected = 3 * (-(distance - width / 2) + math.log1p(-math.exp(-width)))
    assert mixture_log_likelihood(far, grey).item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("biva", [False, True])
def test_ladder(biva, monkeypatch):
    # Dynamo, once imported by another test, turns the validation of distributions off for the whole process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    torch.manual_seed(0)
    model = perturb(DeepVAE(biva=biva))
    adapter, images = LadderAdapter(model), torch.rand(3, 1, 2, 2, generator=seed(0)).round()
    assert isinstance(adapter, DensityAdapter)
    latents, log_densities = drawn(adapter, images)
    h, d, skips, place = model.infer(images), None, None, 0
    for stage in reversed(model.stages):
        for layer in (
            [stage.td_stochastic, stage.bu_stochastic] if hasattr(stage, "td_stochastic") else [stage.stochastic]
        ):
            mean, scale = layer.q((h if d is None else h + d).flatten(1)).unflatten(1, (2, *layer.shape)).unbind(1)
            expected = Normal(mean, F.softplus(scale, beta=math.log(2))).log_prob(latents[place])
            torch.testing.assert_close(log_densities[place], total(expected))
            place += 1
        here = torch.cat(latents[place - 2 : place], dim=1) if hasattr(stage, "td_stochastic") else latents[place - 1]
        d, skips = model.below(stage, here, skips)
    expected = Bernoulli(logits=model.likelihood.head(F.pad(d, model.unpad))).log_prob(images)
    before = torch.get_rng_state()
    torch.testing.assert_close(adapter.log_likelihood(features_of(adapter, latents), images), total(expected))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="expected what BernoulliLikelihood has a likelihood for; binarise"):
        adapter.log_likelihood(features_of(adapter, latents), images + 0.5)


@torch.no_grad()
def test_ladder_takes_the_likelihood_of_what_the_model_is_given():
    torch.manual_seed(0)
    model = perturb(DeepVAE())
    model.lambda_init = torch.round
    adapter, grey = LadderAdapter(model), torch.rand(3, 1, 2, 2, generator=seed(0))
    latents, log_densities = drawn(adapter, grey)
    again, same = drawn(adapter, grey.round())
    torch.testing.assert_close((latents, log_densities), (again, same))
    features = features_of(adapter, latents)
    torch.testing.assert_close(adapter.log_likelihood(features, grey), adapter.log_likelihood(features, grey.round()))


class ScalingFlow(nn.Module):
    """z exp(s), with a log-determinant of s per dimension."""

    def __init__(self, s):
        super().__init__()
        self.s = s

    def forward(self, z, features):
        return z * math.exp(self.s), torch.full_like(z, self.s)


@torch.no_grad()
@pytest.mark.parametrize("res_dist", [True, False])
def test_nvae_posterior_densities(res_dist):
    """Two groups; the first has a scaling flow, so its latent is normal with the scaled mean and std."""
    torch.manual_seed(0)
    model = perturb(AutoEncoder(1, 2, flows=1, res_dist=res_dist, operation="swish"))
    model.nf_cells[0], model.nf_cells[1] = ScalingFlow(0.7), ScalingFlow(-0.2)
    adapter, images = NVAEAdapter(model), torch.rand(3, 3, 16, 16, generator=seed(0))
    assert isinstance(adapter, DensityAdapter)
    latents, log_densities = drawn(adapter, images)
    side = model.enc_tower[0](model.pre_process[0](model.stem(2 * images - 1)))
    s = model.dec_tower[1](model.dec_tower[0](model.prior_ftr0.expand(3, -1, -1, -1), latents[0]))
    parameters = [
        model.enc_sampler[0](model.enc0(model.enc_tower[2](side))),
        model.enc_sampler[1](side + model.enc_tower[1].conv(s)) + (model.dec_sampler[0](s) if res_dist else 0),
    ]
    for both, z, scale, log_density in zip(
        parameters, latents, (math.exp(0.7), math.exp(-0.2)), log_densities, strict=True
    ):
        mean, log_std = (5 * torch.tanh(part / 5) for part in both.chunk(2, 1))
        expected = Normal(scale * mean, scale * (log_std.exp() + 0.01)).log_prob(z)
        torch.testing.assert_close(log_density, total(expected), atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("res_dist", [True, False])
def test_nvae_posteriors_without_flows(res_dist):
    torch.manual_seed(0)
    adapter = NVAEAdapter(perturb(AutoEncoder(1, 2, res_dist=res_dist)))
    images = torch.rand(3, 3, 16, 16, generator=seed(0))
    assert adapter.infer_with_posterior(images) is not None
    drawn(adapter, images)


def test_flows_leave_no_gaussian():
    torch.manual_seed(0)
    adapter = NVAEAdapter(perturb(AutoEncoder(1, 2, flows=1)))
    images = torch.rand(3, 3, 16, 16, generator=seed(0))
    assert adapter.infer_with_posterior(images) is None
    assert DiffusionEBMPrior(adapter).encode_with_posterior(images, generator=seed(1))[1] is None


@torch.no_grad()
def test_nvae_likelihoods_of_every_output():
    def build(**settings):
        torch.manual_seed(0)
        model = perturb(AutoEncoder(1, 2, operation="swish", **settings))
        adapter = NVAEAdapter(model)
        return (
            model,
            adapter,
            features_of(adapter, [torch.randn(2, *model.z0_size, generator=seed(i)) for i in range(2)]),
        )

    def outputs(model, adapter, features):
        seen = []
        hook = model.image_conditional.register_forward_hook(lambda module, inputs, result: seen.append(result))
        adapter.decode(features)
        hook.remove()
        return seen[0]

    model, adapter, features = build()
    images = torch.randint(256, (2, 3, 16, 16), generator=seed(2)) / 255
    torch.testing.assert_close(
        adapter.log_likelihood(features, images),
        masses(outputs(model, adapter, features), images, 256),
        atol=0.1,
        rtol=1e-4,
    )
    model.decoder_output = lambda logits: SimpleNamespace(logit_probs=None, max_val=31.0)
    coarse = (images * 31).round() / 31
    torch.testing.assert_close(
        adapter.log_likelihood(features, coarse),
        masses(outputs(model, adapter, features), coarse, 32),
        atol=0.1,
        rtol=1e-4,
    )

    model, adapter, features = build(mixtures=1)
    mean, log_std = (5 * torch.tanh(part / 5) for part in outputs(model, adapter, features).chunk(2, 1))
    # In pixels of [0, 1], where NVAE's own are in [-1, 1].
    expected = Normal((mean + 1) / 2, (log_std.exp() + 0.01) / 2).log_prob(images)
    torch.testing.assert_close(adapter.log_likelihood(features, images), total(expected), atol=1e-2, rtol=1e-4)
    model.decoder_output = lambda logits: SimpleNamespace()
    with pytest.raises(TypeError, match="Bernoulli, NormalDecoder or DiscMixLogistic, got SimpleNamespace"):
        adapter.log_likelihood(features, images)

    model, adapter, features = build(dataset="mnist")
    images = torch.rand(2, 1, 28, 28, generator=seed(2)).round()
    expected = total(Bernoulli(logits=outputs(model, adapter, features)[..., 2:30, 2:30]).log_prob(images))
    torch.testing.assert_close(adapter.log_likelihood(features, images), expected, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(
        adapter.log_likelihood(features, F.pad(images, (2, 2, 2, 2))), expected, atol=1e-2, rtol=1e-4
    )
    with pytest.raises(ValueError, match="binary pixels"):
        adapter.log_likelihood(features, images / 2)


@torch.no_grad()
def test_vdvae():
    torch.manual_seed(0)
    model = perturb(VDVAE())
    model.decoder.out_net.out_conv.weight.mul_(0.1)  # levels far in a tail have no mass in the reference
    adapter, images = VDVAEAdapter(model), torch.randint(256, (2, 3, 8, 8), generator=seed(0)) / 255
    assert isinstance(adapter, DensityAdapter)
    latents, log_densities = drawn(adapter, images)
    acts = model.encode((images.permute(0, 2, 3, 1) * 255 - 120.63838) / 64.16736)
    xs = {bias.shape[2]: bias.expand(2, -1, -1, -1) for bias in model.decoder.bias_xs}
    for block, z, log_density in zip(model.decoder.dec_blocks, latents, log_densities, strict=True):
        x = xs.get(block.base, torch.zeros(2, 8, block.base, block.base))
        x = x + F.interpolate(xs[block.mixin], size=block.base) if block.mixin else x
        mean, log_std = block.enc(torch.cat((x, acts[block.base]), 1)).chunk(2, 1)
        torch.testing.assert_close(log_density, total(Normal(mean, log_std.exp()).log_prob(z)), atol=1e-4, rtol=1e-4)
        xs[block.base] = block.resnet(x + block.prior(x)[:, 4:] + block.z_proj(z))
    parameters = model.decoder.out_net.out_conv(xs[8] * model.decoder.gain + model.decoder.bias)
    features = features_of(adapter, latents)
    torch.testing.assert_close(
        adapter.log_likelihood(features, images), masses(parameters, images, 256), atol=1e-2, rtol=1e-4
    )
    # Five bits: pixels 0..255 are rounded down to multiples of 8, and masses are those within 1/31 of them.
    model.H.dataset = "ffhq_256"
    coarse = (
        torch.tensor([8 * (value // 8) for value in (images * 255).round().int().flatten().tolist()]).reshape(
            images.shape
        )
        / 255
    )
    torch.testing.assert_close(
        adapter.log_likelihood(features, images), masses(parameters, coarse, 32), atol=1e-2, rtol=1e-4
    )
