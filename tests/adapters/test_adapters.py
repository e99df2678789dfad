"""Adapters of NVAE, VDVAE and hvae-oodd, against stand-ins with ancestral samplers of their own;
tests/adapters/test_official.py has the published models.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import seed
from stand_ins import VDVAE, AutoEncoder, DeepVAE, NormedConv, perturb
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig, LangevinConfig, TrainingConfig
from hvae_ebm_prior.adapters import (
    HVAEAdapter,
    LadderAdapter,
    NVAEAdapter,
    VDVAEAdapter,
    freeze,
    recalibrate_batch_norm,
)
from hvae_ebm_prior.backbone.elbo import backbone_bound
from hvae_ebm_prior.backbone.transform import NoiseTransform, drive
from hvae_ebm_prior.evaluation import describe_layers
from hvae_ebm_prior.evaluation.adapter_check import find_faults

NVAES = {
    "nvae": {},
    "nvae, one scale, flows": {"scales": 1, "groups": 3, "flows": 2},
    "nvae, three scales, no res_dist, SE": {"scales": 3, "groups": 1, "res_dist": False, "use_se": True, "size": 16},
    "nvae, mnist": {"dataset": "mnist", "operation": "swish", "nodes": 2},
    "nvae, normal output, elu": {"mixtures": 1, "operation": "elu", "nodes": 2},
    "nvae, vanilla": {"scales": 1, "groups": 1},
}
OTHERS = {
    "vdvae": (VDVAE, VDVAEAdapter, (3, 8, 8)),
    "lvae": (DeepVAE, LadderAdapter, (1, 2, 2)),
    "lvae, no skips": (lambda: DeepVAE(skip_stochastic=False), LadderAdapter, (1, 2, 2)),
    "biva": (lambda: DeepVAE(biva=True), LadderAdapter, (1, 2, 2)),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def build(name):
    """A stand-in, its adapter class, and the shape of its images."""
    torch.manual_seed(0)
    if name in NVAES:
        shape = (
            (1, 28, 28)
            if NVAES[name].get("dataset") == "mnist"
            else (3, NVAES[name].get("size", 16), NVAES[name].get("size", 16))
        )
        return perturb(AutoEncoder(**NVAES[name])), NVAEAdapter, shape
    make, adapter, shape = OTHERS[name]
    return perturb(make()), adapter, shape


@pytest.fixture(scope="module", params=[*NVAES, *OTHERS])
def family(request):
    model, adapter, shape = build(request.param)
    return model, adapter(model), torch.rand(8, *shape, generator=seed(0))


@torch.no_grad()
def test_samples_and_density_are_the_models_own(family):
    """Latents, output parameters and log p(z) for given noise, against the stand-in's own loop."""
    model, adapter, _ = family
    transform = NoiseTransform(adapter)
    u = torch.randn(5, transform.dim, generator=seed(1))
    expected, log_density, parameters = model.ancestral(transform.split(u))
    for ours, theirs in zip(transform.to_latents(u), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    density = -u.square().sum(1) / 2 - transform.dim / 2 * math.log(2 * math.pi) - transform.log_abs_det(u)
    torch.testing.assert_close(density, log_density, atol=1e-3, rtol=1e-5)
    if isinstance(model, AutoEncoder):
        torch.testing.assert_close(transform.decode(u), images_of(model, parameters), atol=1e-5, rtol=1e-5)
    if isinstance(model, DeepVAE):
        torch.testing.assert_close(transform.decode(u), parameters.sigmoid(), atol=1e-5, rtol=1e-5)


def images_of(model, logits):
    """Image means by the definition of each output."""
    if model.crop_output:
        return logits.sigmoid()[..., 2:30, 2:30]
    if model.num_mix_output == 1:
        return ((5 * torch.tanh(logits[:, :3] / 5)).clamp(-1, 1) + 1) / 2
    mixtures = model.num_mix_output
    weight = logits[:, :mixtures].softmax(1)

    def part(colour, kind, f=lambda x: x):
        first = mixtures * (1 + 3 * colour + kind)
        return (weight * f(logits[:, first : first + mixtures])).sum(1)

    red = part(0, 0).clamp(-1, 1)
    green = (part(1, 0) + part(0, 2, torch.tanh) * red).clamp(-1, 1)
    blue = (part(2, 0) + part(1, 2, torch.tanh) * red + part(2, 2, torch.tanh) * green).clamp(-1, 1)
    return (torch.stack((red, green, blue), 1) + 1) / 2


@torch.no_grad()
def test_nvae_posterior_by_hand():
    """Two groups, residual posterior and flows: every draw recomputed from the published formulas."""
    torch.manual_seed(0)
    model = perturb(AutoEncoder(1, 2, flows=1, operation="swish"))
    adapter, images = NVAEAdapter(model), torch.rand(3, 3, 16, 16, generator=seed(0))
    torch.manual_seed(1)
    z = adapter.infer(images)
    torch.manual_seed(1)
    h = model.pre_process[0](model.stem(2 * images - 1))
    side = model.enc_tower[0](h)
    top = model.enc0(model.enc_tower[2](side))

    def normal(parameters):
        mean, log_std = (5 * torch.tanh(part / 5) for part in parameters.chunk(2, 1))
        return mean + (log_std.exp() + 0.01) * torch.randn(mean.shape)

    first = normal(model.enc_sampler[0](top))
    first = first - 0.1 * model.nf_cells[0].shift(first)
    s = model.dec_tower[1](model.dec_tower[0](model.prior_ftr0.expand(3, -1, -1, -1), first))
    residual = model.enc_sampler[1](side + model.enc_tower[1].conv(s))
    second = normal(model.dec_sampler[0](s) + residual)
    second = second - 0.1 * model.nf_cells[1].shift(second)
    torch.testing.assert_close(z, [first, second], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_vdvae_posterior_by_hand():
    torch.manual_seed(0)
    model = perturb(VDVAE())
    images = torch.rand(2, 3, 8, 8, generator=seed(0))
    torch.manual_seed(1)
    z = VDVAEAdapter(model).infer(images)
    torch.manual_seed(1)
    acts = model.encode((images.permute(0, 2, 3, 1) * 255 - 120.63838) / 64.16736)
    block, x = model.decoder.dec_blocks[0], model.decoder.bias_xs[0].expand(2, -1, -1, -1)
    mean, log_std = block.enc(torch.cat((x, acts[1]), 1)).chunk(2, 1)
    torch.testing.assert_close(z[0], mean + log_std.exp() * torch.randn(mean.shape), atol=1e-5, rtol=1e-5)
    x = block.resnet(x + block.prior(x)[:, 4:] + block.z_proj(z[0]))
    below = model.decoder.dec_blocks[1]
    x = model.decoder.bias_xs[1] + F.interpolate(x, size=4)
    mean, log_std = below.enc(torch.cat((x, acts[4]), 1)).chunk(2, 1)
    torch.testing.assert_close(z[1], mean + log_std.exp() * torch.randn(mean.shape), atol=1e-5, rtol=1e-5)


def test_vdvae_normalisation_is_the_datasets_or_given():
    images = torch.rand(1, 3, 8, 8)
    seen = {}
    for dataset, given in (("cifar10", {}), ("ffhq_1024", {}), ("mine", {"shift": -1.0, "scale": 2.0})):
        model = perturb(VDVAE(dataset=dataset))
        original = model.encode
        model.encoder.forward = lambda x, dataset=dataset, original=original: (seen.update({dataset: x}), original(x))[
            1
        ]
        VDVAEAdapter(model, **given).infer(images)
    nhwc = images.permute(0, 2, 3, 1)
    torch.testing.assert_close(seen["cifar10"], (255 * nhwc - 120.63838) / 64.16736)
    torch.testing.assert_close(seen["ffhq_1024"], (nhwc - 0.4387) / 0.2743)
    torch.testing.assert_close(seen["mine"], (255 * nhwc - 1) * 2)
    with pytest.raises(ValueError, match="'mine' is none of cifar10"):
        VDVAEAdapter(VDVAE(dataset="mine"))


def test_posterior_draws_reconstruct_the_stage_draws_of_the_model():
    """The ladder's infer hands on the model's own draws, top to bottom."""
    for biva in (False, True):
        torch.manual_seed(0)
        model = perturb(DeepVAE(biva=biva))
        images = torch.rand(2, 1, 2, 2)
        torch.manual_seed(1)
        z = LadderAdapter(model).infer(images)
        assert [tuple(part.shape[1:]) for part in z] == model.shapes()
        torch.manual_seed(1)
        torch.testing.assert_close(z[0], model.stages[-1].stochastic(model.infer(images), inference=True)[0])


@pytest.mark.parametrize("biva", [False, True], ids=["lvae", "biva"])
def test_densities_of_the_ladder_against_the_models_own_distributions(biva):
    torch.manual_seed(0)
    model = perturb(DeepVAE(biva=biva))
    prior, images = DiffusionEBMPrior(model), torch.rand(3, 1, 2, 2).round()
    torch.manual_seed(1)
    stages = model.generate(model.infer(images), len(images))[1]
    torch.manual_seed(1)
    drawn = prior.backbone.infer_with_density(images)
    for (z, log_density), stage in zip(drawn, reversed(stages), strict=True):
        torch.testing.assert_close(log_density, stage.q.dist.log_prob(z).flatten(1).sum(1))
    # The bound of the same draws, by the stand-in's own pass through the prior.
    torch.manual_seed(1)
    u, bound = backbone_bound(prior.transform, images)
    _, log_prior, logits = model.ancestral(prior.split(u))
    log_likelihood = torch.distributions.Bernoulli(logits=logits).log_prob(images).sum((1, 2, 3))
    log_posterior = torch.stack([log_density for _, log_density in drawn]).sum(0)
    torch.testing.assert_close(bound, log_likelihood + log_prior - log_posterior, atol=1e-4, rtol=1e-4)


def test_contract(family):
    """All promises but reconstruction, which takes a trained model."""
    _, adapter, images = family
    faults = [
        fault
        for fault in find_faults(adapter, images, generator=seed(0))
        if "reconstructions are no closer" not in fault
    ]
    faults = [fault for fault in faults if "likelier, by" not in fault]
    assert faults == []


@pytest.mark.parametrize("context", [False, True])
def test_a_prior_is_trained_and_sampled_on_every_family(family, context):
    """With context, recovery begins at the third step; eight images tell no active dimension then."""
    model, adapter, images = family
    settings = {"energy": EnergyConfig(context=context, width=8, vector_width=16), "langevin": LangevinConfig(steps=2)}
    prior = DiffusionEBMPrior(model, **settings)
    assert type(prior.backbone) is type(adapter)
    before = copy.deepcopy(dict(prior.energies.named_parameters()))
    weights = [parameter.clone() for parameter in model.parameters()]
    prior.fit(
        images,
        batch_size=4,
        training=TrainingConfig(iterations=3, activity_images=0 if context else 8, recovery_share=0.5),
        generator=seed(0),
        progress=False,
    )
    assert any(not torch.equal(value, before[name]) for name, value in prior.energies.named_parameters())
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))
    samples = prior.sample(3, generator=seed(0))
    assert samples.shape == (3, *images.shape[1:])
    assert samples.min() >= 0
    assert samples.max() <= 1
    prior.release()


@pytest.mark.parametrize("name", ["nvae, one scale, flows", "nvae, vanilla", "vdvae", "biva"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_precision(name, dtype):
    """A prior is trained, sampled and asked for likelihoods, and the check finds nothing but what it finds in float32;
    double stays double, and what is in half precision comes as float32, near what float32 gives.
    """
    model, kind, shape = build(name)
    images, adapter = torch.rand(8, *shape, generator=seed(0)), kind(model)
    plain = NoiseTransform(adapter)
    u = torch.randn(4, plain.dim, generator=seed(1))
    with torch.no_grad():
        expected = plain.log_abs_det(u)
    model.to(dtype)
    prior = DiffusionEBMPrior(model, energy=EnergyConfig(width=8, vector_width=8), langevin=LangevinConfig(steps=2))
    training = TrainingConfig(iterations=1, batch_size=2, activity_images=0)
    prior.fit(images, training=training, generator=seed(0), progress=False)
    samples = prior.sample(2, generator=seed(0))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert samples.dtype == prior.transform.dtype == wide
    assert bool(torch.isfinite(samples).all())
    with torch.no_grad():
        error = (prior.transform.log_abs_det(u.to(wide)) - expected).abs() / prior.dim
        assert error.max() < (1e-5 if dtype == torch.float64 else 1e-2)
        assert bool(torch.isfinite(backbone_bound(prior.transform, images[:2].round())[1]).all())
    faults = [fault for fault in find_faults(adapter, images, generator=seed(0)) if "reconstructions are" not in fault]
    assert [fault for fault in faults if "likelier, by" not in fault] == []
    prior.release()


def test_the_table_of_a_model_in_half_precision():
    model, adapter, shape = build("nvae, vanilla")
    images = torch.rand(8, *shape, generator=seed(0))
    (plain,) = describe_layers(adapter(model), images, draws=4, generator=seed(1))
    (half,) = describe_layers(adapter(model.half()), images, draws=4, generator=seed(1))
    assert half.divergence == pytest.approx(plain.divergence, rel=0.02)


def test_checkpointing_changes_memory_only(family):
    """Same gradients; of the tensors kept for the backward pass, fewer bytes."""
    model, adapter, _ = family
    results = []
    for checkpoint in (False, True):
        transform, kept = NoiseTransform(type(adapter)(model, checkpoint=checkpoint)), {}
        u = torch.randn(4, transform.dim, generator=seed(0)).requires_grad_()

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = sum(z.sin().sum() for z in transform.to_latents(u))
        results.append((torch.autograd.grad(total, u)[0], sum(kept.values())))
    (plain, memory), (checkpointed, less) = results
    torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-4)
    if not getattr(model, "vanilla_vae", False):
        assert less < memory


@torch.no_grad()
def test_frozen_copies_compute_the_same(family):
    """To 1e-4, and nothing is left of what was folded; the model itself is untouched."""
    model, adapter, images = family
    weights = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    again = type(adapter)(frozen)
    ours, theirs = NoiseTransform(again), NoiseTransform(adapter)
    u = torch.randn(4, ours.dim, generator=seed(0))
    torch.testing.assert_close(ours.decode(u), theirs.decode(u), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.to_latents(u), theirs.to_latents(u), atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    draws = again.infer(images)
    torch.manual_seed(0)
    torch.testing.assert_close(draws, adapter.infer(images), atol=1e-4, rtol=1e-4)
    assert not any(
        isinstance(module, NormedConv | nn.modules.batchnorm._BatchNorm) or module._forward_pre_hooks
        for module in frozen.modules()
    )
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_folding_goes_through_padding_only_where_it_is_exact():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "before": nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
            "padded": nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
            "after": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        }
    )
    model = perturb(model, scale=0.5)
    frozen, x = freeze(model), torch.randn(2, 3, 5, 5, generator=seed(0))
    for name in model:
        torch.testing.assert_close(frozen[name](x), model[name](x), atol=1e-5, rtol=1e-5)
    assert [type(layer).__name__ for layer in frozen["padded"]] == ["Affine", "Conv2d"]
    assert type(frozen["before"]) is type(frozen["normed"]) is nn.Conv2d
    assert [type(layer).__name__ for layer in frozen["after"]] == ["Conv2d", "ReLU"]


def test_cells_of_forks_are_left_alone():
    class Residual(nn.Module):
        """Looks like an operation of NVAE, but adds its input."""

        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

        def forward(self, x):
            return x + self.conv(x)

    torch.manual_seed(0)
    model = AutoEncoder(1, 2)
    channels = model.post_process[0]._ops[0].conv[1].bn.num_features
    cell = model.dec_tower[1]
    cell._ops[0] = Residual(channels)
    model = perturb(model)
    with pytest.warns(UserWarning, match="normal_dec"):
        frozen = freeze(model)
    x = torch.randn(2, channels, 4, 4, generator=seed(0))
    torch.testing.assert_close(frozen.dec_tower[1](x), cell(x), atol=1e-5, rtol=1e-5)


def test_models_in_training_may_be_wrapped_and_go_on_training():
    """The wrapped model is used in eval mode by a prior, then trains as before, on the CPU too."""
    torch.manual_seed(0)
    model = AutoEncoder(1, 2).train()
    prior = DiffusionEBMPrior(NVAEAdapter(model))
    prior.release()
    assert model.training
    before = model.post_process[0]._ops[0].conv[2].conv[1].running_mean.clone()
    model.post_process[0](torch.randn(2, 8, 4, 4)).sum().backward()
    assert not torch.equal(model.post_process[0]._ops[0].conv[2].conv[1].running_mean, before)
    assert model.post_process[0]._ops[0].conv[2].conv[0].weight.grad is not None


@torch.no_grad()
def test_batch_norm_is_recalibrated_at_the_temperature():
    """The first batch norm after the top latent: its statistics against those of its own inputs at that temperature."""
    torch.manual_seed(0)
    model = perturb(AutoEncoder(1, 2, operation="swish"))
    adapter = NVAEAdapter(model)
    former = copy.deepcopy(model.state_dict())
    undo = recalibrate_batch_norm(adapter, 0.5, iterations=200, batch_size=16, generator=seed(0))
    norm = model.dec_tower[1]._ops[0].bn_act
    z = 0.5 * 1.01 * torch.randn(2000, *model.z0_size, generator=seed(1))
    inputs = model.dec_tower[0](model.prior_ftr0.expand(2000, -1, -1, -1), z)
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)), atol=0.02, rtol=0)
    torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3)), atol=0.02, rtol=0.1)
    assert not any(module.training for module in model.modules())
    encoder = [name for name in former if "running_mean" in name and name.startswith(("pre_process", "enc_tower"))]
    assert encoder
    assert all(torch.equal(model.state_dict()[name], former[name]) for name in encoder)
    undo()
    assert all(torch.equal(value, former[name]) for name, value in model.state_dict().items())


def test_recalibration_keeps_the_former_statistics_when_it_fails():
    torch.manual_seed(0)
    model = perturb(AutoEncoder(1, 2, operation="swish"))
    adapter = NVAEAdapter(model)
    former = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.dec_tower[0].conv.bias.fill_(float("inf"))
    broken = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        recalibrate_batch_norm(adapter, 0.5, iterations=2, generator=seed(0))
    assert all(torch.equal(value, broken[name]) for name, value in model.state_dict().items())
    model.load_state_dict(former)
    with pytest.raises(ValueError, match="before `freeze`"):
        recalibrate_batch_norm(NVAEAdapter(freeze(model)), 0.5)
    with pytest.raises(ValueError, match="float32"):
        recalibrate_batch_norm(NVAEAdapter(model.bfloat16()), 0.5)
    with pytest.raises(ValueError, match="temperature > 0"):
        recalibrate_batch_norm(adapter, 0.0)


@pytest.mark.parametrize("name", ["nvae", "nvae, mnist", "nvae, normal output, elu", "vdvae"])
@torch.no_grad()
def test_sampled_outputs_are_spread_about_their_mean_at_any_chunking(name):
    model, adapter, shape = build(name)
    transform = NoiseTransform(adapter(model, output="sample", generator=seed(0)))
    u = torch.randn(3, transform.dim, generator=seed(1))
    whole = transform.decode(u)
    transform.adapter.generator.manual_seed(0)
    torch.testing.assert_close(torch.cat([transform.decode(u[:1]), transform.decode(u[1:])]), whole, atol=1e-5, rtol=0)
    assert whole.shape == (3, *shape)
    if name == "nvae, mnist":
        assert set(whole.unique().tolist()) == {0.0, 1.0}
    if name in ("nvae, mnist", "nvae, normal output, elu"):
        many = transform.decode(u[:1].expand(2000, -1))
        parameters = drive(transform.adapter, 1, lambda i, mean, std: mean + std * transform.split(u[:1])[i])[1]
        for cell in model.post_process:
            parameters = cell(parameters)
        distribution = model.decoder_output(model.image_conditional(parameters))
        if name == "nvae, mnist":
            expected = distribution.mean[..., 2:30, 2:30]
        else:
            normal = torch.distributions.Normal(distribution.dist.mu, distribution.dist.sigma)
            expected = ((normal.sample((2000,)).clamp(-1, 1) + 1) / 2).mean(0)
        assert (many.mean(0) - expected[0]).abs().max() < 0.08
    with pytest.raises(ValueError, match='"mean" or "sample"'):
        adapter(model, output="mode")


def test_hvae_is_recognised_too():
    from hvae_ebm_prior.adapters import HVAE

    assert isinstance(DiffusionEBMPrior(HVAE()).backbone, HVAEAdapter)
