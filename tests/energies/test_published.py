"""The published networks, against their numbers of parameters, and with EBM_REPO=.../diffusion-hierarchical-ebm set
against the published code itself.
"""

import os
import runpy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from backbones import RandomBackbone
from helpers import seed
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig
from hvae_ebm_prior.energies.published import PublishedEnergy, sinusoids
from hvae_ebm_prior.presets import PRESETS

CIFAR10, CELEBAHQ = PRESETS["paper-cifar10"].energy, PRESETS["paper-celebahq256"].energy
# Of latents 20x16x16, counted in the published modules.
PARAMETERS = [(CIFAR10, 2_116_624), (CELEBAHQ, 1_855_744)]
SHAPES = [(20, 16, 16), (20, 8, 8), (3, 32, 32)]


@pytest.mark.parametrize(("config", "count"), PARAMETERS)
def test_as_many_parameters_as_published(config, count):
    network = PublishedEnergy((20, 16, 16), config)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert all("bias" not in name for name, _ in network.named_parameters())


@pytest.mark.parametrize("config", [CIFAR10, CELEBAHQ])
@pytest.mark.parametrize("shape", [(5,), (3, 1, 1), (2, 4, 4), (2, 5, 7), (1, 2, 33)])
def test_any_shape_depends_on_latent_and_level(config, shape):
    torch.manual_seed(0)
    network = PublishedEnergy(shape, config).eval()
    z, t = torch.randn(4, *shape, generator=seed(0)), torch.tensor([0, 1, 2, 0])
    f = network(z, t)
    assert f.shape == (4,)
    assert network(z, torch.tensor([1, 1, 1, 1]))[0] != f[0]
    torch.testing.assert_close(network(z[2:3], t[2:3]), f[2:3], atol=1e-6, rtol=1e-4)
    assert PublishedEnergy(shape, config, categories=3)(z, t).shape == (4, 3)


def test_every_weight_of_cifar10_has_spectral_norm_one():
    torch.manual_seed(0)
    network = PublishedEnergy((2, 8, 8), replace(CIFAR10, width=8))
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1), ord=2).item() == pytest.approx(1, abs=0.05)
    assert len(weights) == sum(1 for _ in network.parameters())


def test_sinusoids_are_of_the_levels():
    waves = sinusoids(torch.tensor([0, 2]))
    assert torch.equal(waves[0], torch.cat((torch.ones(64), torch.zeros(64))))
    assert waves[1, 64].item() == pytest.approx(0.9093, abs=1e-4)  # sin 2
    assert waves[1, 63].item() == pytest.approx(1, abs=1e-6)


def test_published_networks_are_without_context():
    with pytest.raises(ValueError, match="context=False"):
        EnergyConfig(architecture="published-cifar10")
    with pytest.raises(ValueError, match="published-cifar10.*got 'resnet'"):
        EnergyConfig(architecture="resnet")


def test_saved_with_their_architecture(tmp_path):
    backbone = RandomBackbone([(3,), (2, 8, 8)])
    energy = EnergyConfig(context=False, width=8, spectral_norm=True, architecture="published-cifar10")
    prior = DiffusionEBMPrior(backbone, energy=energy)
    prior.save_pretrained(tmp_path / "prior")
    again = DiffusionEBMPrior.from_pretrained(tmp_path / "prior", backbone=backbone)
    u = torch.randn(3, prior.dim, generator=seed(0))
    assert torch.equal(again.layer_energies(u, 1), prior.layer_energies(u, 1))
    assert again.energies[1].config == energy


def copy_published(ours, theirs):
    """Weights of a published module, in ours; names are those of the published code."""

    def copy(target, source):
        source = source[-1] if isinstance(source, nn.Sequential) else source
        target.weight.data.copy_(source.weight.data)

    times = [(ours.embedding, theirs.t_ebm_model2 if ours.sees_time else theirs.t_ebm_model1)]
    blocks = []
    if ours.sees_time:
        times.append((ours.shift, theirs.t_ebm_model1))
        blocks.append((ours.maps[0], [theirs.conv_start, theirs.t_linear, theirs.conv_all, theirs.conv_short]))
        for block, each in zip(ours.maps[1:], theirs.res_blocks, strict=True):
            blocks.append((block, [each.conv2d_1, each.linear, each.conv2d_2, each.conv2d_shortcut]))
    else:
        convolutions = [*(module for module in theirs.conv2d if isinstance(module, nn.Conv2d)), theirs.downsample]
        for target, source in zip(ours.maps, convolutions, strict=True):
            copy(target, source)
    for target, source in times:
        copy(target[0], source[0])
        copy(target[2], source[2])
    for block, name in zip(ours.vectors, ("linear1", "linear2"), strict=True):
        blocks.append((block, [getattr(theirs, f"{name}_{part}") for part in ("x", "t", "all", "short")]))
    for block, sources in blocks:
        for target, source in zip((block.first, block.time, block.second, block.shortcut), sources, strict=True):
            copy(target, source)
    copy(ours.readout, theirs.out)


@pytest.mark.skipif("EBM_REPO" not in os.environ, reason="EBM_REPO: a clone of jcui1224/diffusion-hierarchical-ebm")
@pytest.mark.parametrize(("name", "config"), [("_CIFAR10_netE", CIFAR10), ("_CelebA256_netE", CELEBAHQ)])
@pytest.mark.parametrize("shape", SHAPES)
def test_energies_are_the_published_ones(name, config, shape):
    module = runpy.run_path(f"{os.environ['EBM_REPO']}/ebm_net.py")
    torch.manual_seed(0)
    theirs = module[name]((5, *shape), SimpleNamespace(ch=config.width, max_T=3, add_sn=False))
    for each in theirs.modules():
        if hasattr(each, "weight_orig"):
            nn.utils.remove_spectral_norm(each)
    for parameter in theirs.parameters():
        parameter.data.mul_(3 / parameter.data.flatten(1).norm(dim=1).mean())
    ours = PublishedEnergy(shape, EnergyConfig(config.width, context=False, architecture=config.architecture))
    copy_published(ours, theirs)
    z, t = torch.randn(5, *shape, generator=seed(0)), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(ours(z, t), theirs(z, t).squeeze(1), rtol=1e-4, atol=1e-5)
