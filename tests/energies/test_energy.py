import pytest
import torch
from backbones import RandomBackbone
from helpers import seed
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm

from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig, LangevinConfig
from hvae_ebm_prior.energies.networks import LayerEnergy

SHAPES = [(5,), (3, 1, 1), (2, 4, 4), (2, 5, 7), (1, 2, 33), (1, 128, 128), (2, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_starts_at_zero_and_depends_on_latent_and_level(shape):
    g = seed(0)
    network = LayerEnergy(shape, 3, EnergyConfig(context=False, width=8))
    z, t = torch.randn(4, *shape, generator=g), torch.tensor([0, 1, 2, 0])
    assert torch.equal(network(z, t), torch.zeros(4))
    nn.init.normal_(network.readout.weight, generator=g)
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=g)
    f = network(z, t)
    assert f.shape == (4,)
    assert not torch.isclose(network(z, torch.tensor([1, 1, 1, 1]))[0], f[0])
    # Samples are independent, and every entry of the latent matters.
    torch.testing.assert_close(network(z[2:3], t[2:3]), f[2:3], atol=1e-5, rtol=1e-4)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(network(z, t).sum(), z)
    assert (gradient != 0).all()


def test_untrained_prior_samples_the_gaussian_prior():
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (1, 4, 4)]), langevin=LangevinConfig(steps=2, step_size=5.0))
    u = prior.sample_noise(2000, generator=seed(0))
    assert abs(u.mean().item()) < 5 / 36_000**0.5
    assert abs(u.var().item() - 1) < 5 * (2 / 36_000) ** 0.5
    assert torch.equal(prior.energy(u, 1), torch.zeros(2000))


def test_spectral_norm_bounds_every_convolution_and_is_worked_out_once_per_chain(monkeypatch):
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(
        RandomBackbone([(1, 8, 8)]),
        energy=EnergyConfig(context=False, width=6, spectral_norm=True),
        langevin=LangevinConfig(steps=7),
    )
    convolutions = [m for m in prior.energies.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), ord=2).item() == pytest.approx(1, abs=0.05)
    calls, forward = [], _SpectralNorm.forward
    monkeypatch.setattr(_SpectralNorm, "forward", lambda self, weight: calls.append(1) or forward(self, weight))
    prior.sample_noise(2, generator=seed(0))
    assert len(calls) == len(convolutions) * prior.schedule.steps
    calls.clear()
    prior.train().loss(torch.zeros(2, 1, 2, 2), generator=seed(0)).sum().backward()
    # Once for the chain, once for positives and negatives together.
    assert len(calls) == 2 * len(convolutions)
    assert all(p.grad is not None for p in prior.parameters())


def test_channels_double_where_maps_are_halved():
    widths = [
        m.out_channels
        for m in LayerEnergy((3, 64, 40), 3, EnergyConfig(context=False, width=64)).modules()
        if isinstance(m, nn.Conv2d) and m.stride == (2, 2)
    ]
    assert widths == [16, 16, 32, 64]


def test_inactive_dimensions_are_not_looked_at():
    network = LayerEnergy((3, 8, 8), 3, EnergyConfig(context=False, width=8))
    nn.init.ones_(network.readout.weight)
    activity = torch.ones(3, 8, 8)
    activity[1] = 0
    network.set_activity(activity)
    z = torch.randn(2, 3, 8, 8, generator=seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(network(z, torch.tensor([0, 1])).sum(), z)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, ::2] != 0).all()


@pytest.mark.parametrize("shape", [(400,), (25, 4, 4)])
def test_features_of_a_vector_vary_alike_whatever_part_of_it_is_active(shape):
    torch.manual_seed(0)
    network = LayerEnergy(shape, 3, EnergyConfig(context=False, vector_width=512))
    activity = torch.zeros(400)
    activity[:8] = 0.9
    network.set_activity(activity.reshape(shape))
    z = torch.randn(2000, 400, generator=seed(0))
    assert network.features.inputs(z * activity).var(0).mean().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("energy", "error", "message"),
    [
        ([nn.Linear(2, 1)], ValueError, "one network per layer, 2 in all, got 1"),
        (nn.Linear(2, 1), TypeError, "expected an EnergyConfig or a list of one nn.Module per layer, got Linear"),
        ([lambda z, t: z, lambda z, t: z], TypeError, "list of one nn.Module per layer"),
    ],
)
def test_wrong_energies_are_refused(energy, error, message):
    with pytest.raises(error, match=message):
        DiffusionEBMPrior(RandomBackbone([(2,), (3,)]), energy=energy)


def test_network_of_wrong_output_is_refused():
    class Wide(nn.Module):
        def forward(self, z, t):
            return z.flatten(1)

    with pytest.raises(
        ValueError,
        match=r"energy network 1: for 2 latents of shape \(3,\) expected an output of shape \(2,\), got \(2, 3\)",
    ):
        DiffusionEBMPrior(RandomBackbone([(2,), (3,)]), energy=[LayerEnergy((2,), 3, EnergyConfig(8)), Wide()])


def test_bad_width_is_refused():
    with pytest.raises(ValueError, match="width must be a positive integer, got 0"):
        EnergyConfig(context=False, width=0)
    with pytest.raises(ValueError, match="blocks must be a positive integer, got 0"):
        EnergyConfig(blocks=0)
