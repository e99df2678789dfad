"""The adapters against the published models themselves. Run with clones of them:

    NVAE_REPO=.../NVAE VDVAE_REPO=.../vdvae OODD_REPO=.../hvae-oodd python3 tests/run.py tests/adapters/test_official.py

of github.com/NVlabs/NVAE, github.com/openai/vdvae and github.com/JakobHavtorn/hvae-oodd. Models are small, random and
on the CPU.
"""

import argparse
import importlib
import math
import os
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from helpers import seed
from hvae_ebm_prior_adapters.checkpoint import without_cuda
from stand_ins import perturb

from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig, LangevinConfig, TrainingConfig
from hvae_ebm_prior.adapters import LadderAdapter, NVAEAdapter, VDVAEAdapter, freeze, load_nvae, recalibrate_batch_norm
from hvae_ebm_prior.backbone.transform import NoiseTransform, drive
from hvae_ebm_prior.evaluation.adapter_check import find_faults

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def modules_of(variable, *names):
    """Modules of the clone that an environment variable points to; packages that the machine lacks are stubbed while
    they are imported.
    """
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not point to a clone")
    for name in ("utils", "model"):  # two of the repositories have modules of these names
        sys.modules.pop(name, None)
    sys.path.insert(0, folder)
    stubs = []
    try:
        while True:
            try:
                return [importlib.import_module(name) for name in names]
            except ModuleNotFoundError as error:
                stubs.append(error.name)
                sys.modules[error.name] = MagicMock(__path__=[], __spec__=ModuleSpec(error.name, None))
    finally:
        sys.path.remove(folder)
        for name in stubs:
            del sys.modules[name]


def density(transform, u):
    return -u.square().sum(1) / 2 - transform.dim / 2 * math.log(2 * math.pi) - transform.log_abs_det(u)


def check_training(model, adapter, images):
    """A prior is trained for a few steps and sampled, and the frozen copy is the same function to 1e-4."""
    settings = {"energy": EnergyConfig(width=8, vector_width=16), "langevin": LangevinConfig(steps=2)}
    prior = DiffusionEBMPrior(model, **settings)
    assert type(prior.backbone) is type(adapter)
    prior.fit(
        images,
        batch_size=2,
        training=TrainingConfig(iterations=2, activity_images=4, recovery_share=0.5),
        generator=seed(0),
        progress=False,
    )
    assert prior.sample(2, generator=seed(0)).shape == images[:2].shape
    prior.release()
    frozen, u = NoiseTransform(type(adapter)(freeze(model))), torch.randn(3, prior.dim, generator=seed(2))
    original = NoiseTransform(adapter)
    with torch.no_grad():
        torch.testing.assert_close(frozen.decode(u), original.decode(u), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(frozen.to_latents(u), original.to_latents(u), atol=1e-4, rtol=1e-4)
    # The models are not trained: of the promises, only those that take a trained one may be broken.
    untrained = ("reconstructions are no closer", "likelier, by")
    assert [
        fault
        for fault in find_faults(adapter, images, generator=seed(0))
        if not any(part in fault for part in untrained)
    ] == []


# NVAE.

BASE = {
    "dataset": "cifar10",
    "use_se": True,
    "res_dist": True,
    "num_x_bits": 8,
    "num_latent_scales": 1,
    "num_groups_per_scale": 3,
    "num_latent_per_group": 4,
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 2,
    "num_mixture_dec": 10,
    "num_nf": 0,
}
NVAES = {
    "one scale, SE, residual": {},
    "three scales, adaptive": {"num_latent_scales": 3, "num_groups_per_scale": 4, "ada_groups": True},
    "flows": {"num_nf": 2},
    "flows, three scales, no residual, no SE": {
        "num_nf": 1,
        "num_latent_scales": 3,
        "num_groups_per_scale": 1,
        "res_dist": False,
        "use_se": False,
    },
    "mnist": {"dataset": "mnist", "num_latent_scales": 2, "num_groups_per_scale": 2},
    "normal output": {"num_mixture_dec": 1},
    "swish cells": {"arch_instance": "res_bnswish"},
    "elu cells": {"arch_instance": "res_elu"},
    "vanilla": {"num_groups_per_scale": 1},
}


@pytest.fixture(params=NVAES)
def nvae(request):
    utils, distributions, module = modules_of("NVAE_REPO", "utils", "distributions", "model")
    args = argparse.Namespace(**{"arch_instance": "res_mbconv", **BASE, **NVAES[request.param]})
    torch.manual_seed(0)
    with without_cuda():
        model = perturb(module.AutoEncoder(args, None, utils.get_arch_cells(args.arch_instance)), scale=0.05)
    channels, size = (1, 28) if args.dataset == "mnist" else (3, 32)
    images = torch.rand(8, channels, size, size, generator=seed(0))
    return SimpleNamespace(
        model=model,
        adapter=NVAEAdapter(model),
        images=images,
        args=args,
        distributions=distributions,
        module=module,
        utils=utils,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_nvae_samples(nvae, temperature, monkeypatch):
    transform = NoiseTransform(nvae.adapter)
    u = torch.randn(4, transform.dim, generator=seed(1))
    noise, latents = list(transform.split(u)), []

    def sample(mean, std):
        latents.append(mean + std * noise[len(latents)])
        return latents[-1], None

    monkeypatch.setattr(nvae.distributions, "sample_normal_jit", sample)
    with without_cuda():
        logits = nvae.model.sample(4, temperature)
        output = nvae.model.decoder_output(logits)
    for ours, theirs in zip(transform.to_latents(temperature * u), latents, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    seen = []
    hook = nvae.model.image_conditional.register_forward_hook(lambda module, inputs, result: seen.append(result))
    images = transform.decode(temperature * u)
    hook.remove()
    torch.testing.assert_close(seen[0], logits, atol=1e-5, rtol=1e-5)
    if nvae.args.dataset == "mnist":
        expected = output.mean[..., 2:30, 2:30]
    elif nvae.args.num_mixture_dec == 1:
        expected = output.dist.mu.clamp(-1, 1) / 2 + 0.5
    else:
        expected = output.mean()
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nvae_posterior_and_density(nvae):
    """With the same seed: decoder parameters of a reconstruction, and log p of its latents."""
    images = nvae.images
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2)) if nvae.args.dataset == "mnist" else images
    torch.manual_seed(3)
    logits, _, log_p, _, _ = nvae.model(padded)
    torch.manual_seed(3)
    z = nvae.adapter.infer(images)
    transform, seen = NoiseTransform(nvae.adapter), []
    hook = nvae.model.image_conditional.register_forward_hook(lambda module, inputs, result: seen.append(result))
    u = transform.to_noise(z)
    transform.decode(u)
    hook.remove()
    torch.testing.assert_close(seen[0], logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(density(transform, u), log_p, atol=1e-2, rtol=1e-5)


@torch.no_grad()
def test_nvae_densities(nvae):
    """log q and the reconstruction loss of the published training step, for the same draws."""
    binary = nvae.args.dataset == "mnist"
    # Off the outermost levels: the published mixture takes pixels from .99 on as the last one.
    images = nvae.images.round() if binary else (nvae.images * 250).round() / 255
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2)) if binary else images
    torch.manual_seed(3)
    logits, log_q, _, _, _ = nvae.model(padded)
    torch.manual_seed(3)
    z, log_densities = zip(*nvae.adapter.infer_with_density(images), strict=True)
    torch.testing.assert_close(sum(log_densities), log_q, atol=1e-2, rtol=1e-5)
    _, features = drive(nvae.adapter, len(images), lambda i, mean, std: z[i])
    expected = -nvae.utils.reconstruction_loss(nvae.model.decoder_output(logits), padded, crop=nvae.model.crop_output)
    if nvae.args.num_mixture_dec == 1 and not binary:
        expected = expected + images[0].numel() * math.log(2)  # of pixels in [0, 1] instead of [-1, 1]
    torch.testing.assert_close(nvae.adapter.log_likelihood(features, images), expected, atol=1e-2, rtol=1e-4)


def test_nvae_trains_and_freezes(nvae):
    check_training(nvae.model, nvae.adapter, nvae.images)


@torch.no_grad()
def test_nvae_mixture_samples(nvae, monkeypatch):
    """The published sampler's own uniform noise, handed to ours."""
    if nvae.args.dataset == "mnist" or nvae.args.num_mixture_dec == 1:
        pytest.skip("no mixture")
    from hvae_ebm_prior_adapters.logistic_mixture import mixture_sample

    logits = torch.randn(2, 100, 32, 32, generator=seed(0))
    torch.manual_seed(1)
    with without_cuda():
        theirs = nvae.model.decoder_output(logits).sample()
    torch.manual_seed(1)
    choice = torch.Tensor(2, 10, 32, 32).uniform_(1e-5, 1 - 1e-5)
    noise = torch.Tensor(2, 3, 32, 32).uniform_(1e-5, 1 - 1e-5)
    torch.testing.assert_close(mixture_sample(logits, choice, noise), theirs, atol=1e-5, rtol=1e-5)


def test_nvae_checkpoint_and_batch_norm(nvae, tmp_path):
    """As train.py saves it, with arguments that older versions lack taken out; then batch norm is recalibrated and put
    back.
    """
    old = argparse.Namespace(
        **{name: value for name, value in vars(nvae.args).items() if name not in ("ada_groups", "min_groups_per_scale")}
    )
    if nvae.args.ada_groups:
        old = nvae.args
    optimizer = torch.optim.Adamax(nvae.model.parameters())
    weights = {f"module.{name}": value for name, value in nvae.model.state_dict().items()}
    saved = {
        "epoch": 1,
        "state_dict": weights,
        "args": old,
        "arch_instance": nvae.model.arch_instance,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(saved, tmp_path / "checkpoint.pt")
    model = load_nvae(tmp_path / "checkpoint.pt", nvae.module.AutoEncoder)
    ours, theirs = NoiseTransform(NVAEAdapter(model)), NoiseTransform(nvae.adapter)
    u = torch.randn(2, ours.dim, generator=seed(0))
    with torch.no_grad():
        before = theirs.decode(u)
        torch.testing.assert_close(ours.decode(u), before, atol=1e-6, rtol=1e-5)
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        undo = recalibrate_batch_norm(ours.adapter, 0.5, iterations=3, generator=seed(0))
        with torch.no_grad():
            assert not torch.allclose(ours.decode(u), before, atol=1e-4)
            undo()
            torch.testing.assert_close(ours.decode(u), before, atol=1e-6, rtol=1e-5)


# VDVAE.

VDVAES = {
    "1x1 to 32x32": {
        "dec_blocks": "1x1,4m1,4x2,8m4,8x1,16m8,16x1,32m16,32x1",
        "enc_blocks": "32x1,32d2,16x1,16d2,8x1,8d2,4x1,4d4,1x1",
    },
    "no bias at the bottom, custom widths": {
        "dec_blocks": "1x2,4m1,8m4,16m8,32m16",
        "enc_blocks": "32x1,32d2,16x1,16d2,8x1,8d2,4x1,4d4,1x1",
        "no_bias_above": 8,
        "custom_width_str": "1:16,4:16,8:16",
    },
}


@pytest.fixture(params=VDVAES)
def vdvae(request):
    hps, module = modules_of("VDVAE_REPO", "hps", "vae")
    settings = {"custom_width_str": "", "no_bias_above": 64, **VDVAES[request.param]}
    defaults = {
        "width": 8,
        "zdim": 4,
        "bottleneck_multiple": 0.5,
        "image_size": 32,
        "image_channels": 3,
        "num_mixtures": 10,
        "dataset": "cifar10",
    }
    torch.manual_seed(0)
    model = perturb(module.VAE(hps.Hyperparams(**defaults, **settings)))
    return SimpleNamespace(
        model=model, adapter=VDVAEAdapter(model), images=torch.rand(8, 3, 32, 32, generator=seed(0)), module=module
    )


@torch.no_grad()
def test_vdvae_samples_and_density(vdvae, monkeypatch):
    transform = NoiseTransform(vdvae.adapter)
    u = torch.randn(3, transform.dim, generator=seed(1))
    noise, latents, log_p = list(transform.split(u)), [], []

    def sample(mean, log_std):
        latents.append(mean + log_std.exp() * noise[len(latents)])
        log_p.append(torch.distributions.Normal(mean, log_std.exp()).log_prob(latents[-1]).flatten(1).sum(1))
        return latents[-1]

    monkeypatch.setattr(vdvae.module, "draw_gaussian_diag_samples", sample)
    features = vdvae.model.decoder.forward_uncond(3)
    parameters = vdvae.model.decoder.out_net(features).permute(0, 3, 1, 2)
    for ours, theirs in zip(transform.to_latents(u), latents, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(density(transform, u), sum(log_p), atol=1e-2, rtol=1e-5)
    seen = []
    hook = vdvae.model.decoder.out_net.out_conv.register_forward_hook(
        lambda module, inputs, result: seen.append(result)
    )
    transform.decode(u)
    hook.remove()
    torch.testing.assert_close(seen[0], parameters, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_vdvae_posterior(vdvae):
    """Latents with the published preprocessing and the same seed."""
    nhwc = (vdvae.images * 255).permute(0, 2, 3, 1)
    torch.manual_seed(2)
    stats = vdvae.model.forward_get_latents((nhwc - 120.63838) * (1 / 64.16736))
    torch.manual_seed(2)
    for ours, theirs in zip(vdvae.adapter.infer(vdvae.images), stats, strict=True):
        torch.testing.assert_close(ours, theirs["z"], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dataset", ["cifar10", "ffhq_256"])
def test_vdvae_likelihood(vdvae, dataset):
    """Of features, against the published loss of images as the published data.py hands them on."""
    features, levels = torch.randn(8, 8, 32, 32, generator=seed(0)), (vdvae.images * 255).round()
    vdvae.model.H.dataset = vdvae.model.decoder.out_net.H.dataset = dataset
    target = (levels / 8).floor() * 8 if dataset == "ffhq_256" else levels
    loss = vdvae.model.decoder.out_net.nll(
        vdvae.model.decoder.final_fn(features), (target.permute(0, 2, 3, 1) - 127.5) / 127.5
    )
    ours = vdvae.adapter.log_likelihood(features, levels / 255)
    torch.testing.assert_close(ours, -loss * levels[0].numel(), atol=1e-2, rtol=1e-4)


@torch.no_grad()
def test_vdvae_mixture_samples(vdvae):
    """Our sample, rounded as theirs is, with their uniform noise."""
    from hvae_ebm_prior_adapters.logistic_mixture import mixture_sample

    features = torch.randn(2, 8, 32, 32, generator=seed(0))
    torch.manual_seed(1)
    theirs = vdvae.model.decoder.out_net.sample(features)
    torch.manual_seed(1)
    choice = torch.empty(2, 32, 32, 10).uniform_(1e-5, 1 - 1e-5).permute(0, 3, 1, 2)
    noise = torch.empty(2, 32, 32, 3).uniform_(1e-5, 1 - 1e-5).permute(0, 3, 1, 2)
    ours = mixture_sample(vdvae.model.decoder.out_net.out_conv(features), choice, noise).permute(0, 2, 3, 1)
    assert (torch.as_tensor(theirs).int() - (255 * ours + 1e-3).int()).abs().max() <= 1
    assert (torch.as_tensor(theirs).int() == (255 * ours).int()).float().mean() > 0.999


def test_vdvae_trains_and_freezes(vdvae):
    check_training(vdvae.model, vdvae.adapter, vdvae.images)


# hvae-oodd.

CONVOLUTIONS = [
    [
        {
            "block": "ResBlockConv2d",
            "out_channels": 8,
            "kernel_size": 3,
            "stride": stride,
            "weightnorm": True,
            "gated": False,
        }
        for stride in (1, 2)
    ]
] * 3
VECTORS = [
    {"block": "GaussianConv2d", "latent_features": 2, "weightnorm": True},
    {"block": "GaussianDense", "latent_features": 6, "weightnorm": True},
    {"block": "GaussianDense", "latent_features": 4, "weightnorm": True},
]
MAPS = [{"block": "GaussianConv2d", "latent_features": 2, "weightnorm": True}] * 3
LADDERS = {
    "VAE": ("VAE", VECTORS, True),
    "LVAE": ("LVAE", VECTORS, True),
    "LVAE, no skips": ("LVAE", VECTORS, False),
    "BIVA": ("BIVA", MAPS, True),
}


@pytest.fixture(params=LADDERS)
def ladder(request):
    (dvae,) = modules_of("OODD_REPO", "oodd.models.dvae")
    kind, stochastic, skips = LADDERS[request.param]
    torch.manual_seed(0)
    likelihood = "DiscretizedLogisticLikelihoodConv2d" if request.param == "LVAE" else "BernoulliLikelihoodConv2d"
    model = getattr(dvae, kind)(
        input_shape=(1, 28, 28),
        likelihood_module=likelihood,
        config_deterministic=CONVOLUTIONS,
        config_stochastic=[dict(block) for block in stochastic],
        padded_shape=(32, 32),
        skip_stochastic=skips,
        features_out=None if likelihood.startswith("Bernoulli") else 1,
        activation="Swish",
    )
    images = torch.rand(8, 1, 28, 28, generator=seed(0)).round()  # Bernoulli likelihoods take no others
    with torch.no_grad():
        model(images)  # initialises weight normalisation from data
    return SimpleNamespace(model=perturb(model, scale=0.05), images=images)


@torch.no_grad()
def test_ladder_samples_and_density(ladder, monkeypatch):
    """Normal draws of the model's own sampler replaced by ours."""
    adapter = LadderAdapter(ladder.model)
    transform = NoiseTransform(adapter)
    u = torch.randn(3, transform.dim, generator=seed(1))
    noise = list(transform.split(u))
    monkeypatch.setattr(
        torch.distributions.normal, "_standard_normal", lambda shape, dtype, device: noise.pop(0).reshape(shape)
    )
    likelihood, stages = ladder.model.sample_from_prior(n_prior_samples=3)
    latents = [stage.p.z for stage in reversed(stages)]
    for ours, theirs in zip(transform.to_latents(u), latents, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    log_p = sum(stage.p.dist.log_prob(stage.p.z).flatten(1).sum(1) for stage in stages)
    torch.testing.assert_close(density(transform, u), log_p, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(transform.decode(u), likelihood.mean, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ladder_posterior(ladder):
    """With the same seed, reconstructions are the model's own."""
    adapter = LadderAdapter(ladder.model)
    torch.manual_seed(2)
    likelihood, stages = ladder.model(ladder.images)
    torch.manual_seed(2)
    z = adapter.infer(ladder.images)
    transform = NoiseTransform(adapter)
    u = transform.to_noise(z)
    torch.testing.assert_close(transform.decode(u), likelihood.mean, atol=1e-4, rtol=1e-4)
    log_p = sum(stage.p.dist.log_prob(stage.q.z).flatten(1).sum(1) for stage in stages)
    torch.testing.assert_close(density(transform, u), log_p, atol=1e-2, rtol=1e-4)
    torch.manual_seed(2)
    z, log_densities = zip(*adapter.infer_with_density(ladder.images), strict=True)
    kl = sum(stage.loss.kl_samplewise for stage in stages)
    torch.testing.assert_close(sum(log_densities) - density(transform, u), kl, atol=1e-2, rtol=1e-4)
    _, features = drive(adapter, len(z[0]), lambda i, mean, std: z[i])
    torch.testing.assert_close(
        adapter.log_likelihood(features, ladder.images), likelihood.likelihood, atol=1e-2, rtol=1e-4
    )


def test_ladder_trains_and_freezes(ladder):
    check_training(ladder.model, LadderAdapter(ladder.model), ladder.images)
