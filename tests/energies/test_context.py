import copy
import math

import pytest
import torch
from backbones import IdentityBackbone, RandomBackbone
from helpers import seed
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig
from hvae_ebm_prior.backbone.transform import LayerState
from hvae_ebm_prior.chains.execution import ChainEnergies, group_networks, one_by_one
from hvae_ebm_prior.energies.context import ContextEnergy

TINY = EnergyConfig(width=16, vector_width=16)


def random_state(n: int, shape: tuple[int, ...], value: int = 0) -> LayerState:
    u, mean, log_std = (torch.randn(n, *shape, generator=seed(value + i)) for i in range(3))
    std = log_std.exp()
    return LayerState(u, mean + std * u, mean, std)


def learned(shape: tuple[int, ...], categories: int | None = None) -> ContextEnergy:
    """A network whose every weight is random."""
    network = ContextEnergy(shape, TINY, categories)
    for i, parameter in enumerate(network.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=seed(i))
    return network


@pytest.mark.parametrize("shape", [(6,), (16, 4, 4), (3, 7, 5), (8, 8, 8), (20, 16, 16), (2, 9, 17), (4, 64, 64)])
def test_every_shape_has_an_energy_of_noise_latents_and_context(shape):
    network, state = learned(shape), random_state(3, shape)
    angles = torch.tensor([[0.3, 0.0], [0.8, 0.8], [1.2, 0.0]])
    parts = [part.clone().requires_grad_() for part in (state.u, state.mean, state.std)]
    u, mean, std = parts
    values = network(LayerState(u, mean + std * u, mean, std), angles)
    assert values.shape == (3,)
    gradients = torch.autograd.grad(values.sum(), parts)
    assert all(bool((gradient != 0).flatten(1).any(1).all()) for gradient in gradients)
    # A sample's energy is its own.
    torch.testing.assert_close(network(LayerState(*(part[1:] for part in state)), angles[1:]), values[1:])
    assert not torch.allclose(network(state, angles.flip(1)), values)


def test_an_untrained_prior_and_pure_noise_are_gaussian_whatever_the_settings():
    for config in (TINY, EnergyConfig(), EnergyConfig(width=16, vector_width=8, blocks=3)):
        network = ContextEnergy((4, 8, 8), config)
        state, angles = random_state(5, (4, 8, 8)), torch.rand(5, 2, generator=seed(1)) * math.pi / 2
        assert bool((network(state, angles) == 0).all())
    network, half, pure = learned((4, 8, 8)), torch.full((5, 2), math.pi / 4), torch.full((5, 2), math.pi / 2)
    assert bool((network(state, pure).abs() < 1e-6 * network(state, half).abs()).all())


def test_inactive_dimensions_are_left_to_the_gaussian():
    network, state = learned((4, 8, 8)), random_state(2, (4, 8, 8))
    activity = (torch.arange(4 * 64).reshape(4, 8, 8) % 3 == 0).float()
    network.set_statistics(activity, torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8))
    u = state.u.clone().requires_grad_()
    angles = torch.full((2, 2), 0.5)
    gradient = torch.autograd.grad(network(LayerState(u, *state[1:]), angles).sum(), u)[0]
    assert bool((gradient[:, activity == 0] == 0).all())
    assert bool((gradient[:, activity == 1] != 0).all())


@pytest.mark.parametrize("shape", [(4,), (4, 8, 8), (4, 16, 16), (4, 13, 9)])
def test_what_has_no_activity_is_left_out_and_changes_nothing(shape):
    """Channels of a map, dimensions of a vector: as if they were read and multiplied by 0."""
    network, state = learned(shape), random_state(2, shape)
    activity = torch.rand(shape, generator=seed(1))
    activity[[0, 2]] = 0
    network.set_statistics(activity, torch.zeros(2, *shape), torch.ones(2, *shape))
    whole = copy.deepcopy(network)
    whole.active = torch.arange(4)
    assert network.active.tolist() == [1, 3]
    angles = torch.full((2, 2), 0.5)
    values, gradients = zip(*(value_and_gradients(each, state, angles) for each in (network, whole)), strict=True)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def value_and_gradients(
    network: ContextEnergy, state: LayerState, angles: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The energy, and its gradient in the noise and in every weight."""
    u = state.u.clone().requires_grad_()
    value = network(LayerState(u, *state[1:]), angles)
    return value, list(torch.autograd.grad(value.sum(), [u, *network.parameters()]))


def test_a_layer_without_active_dimensions_runs_no_network():
    """In whatever way it was told so, and no longer once it is told otherwise."""
    shape, statistics = (4, 8, 8), (torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8))
    network, other, state = learned(shape), learned(shape), random_state(2, shape)
    angles = torch.full((2, 2), 0.5)
    network.set_statistics(torch.zeros(shape), *statistics)
    other.load_state_dict(network.state_dict())
    other.network, network.network = None, None
    for silent in (network, other, copy.deepcopy(network)):
        u = state.u.clone().requires_grad_()
        value = silent(LayerState(u, *state[1:]), angles)
        assert value.tolist() == [0, 0]
        assert not torch.autograd.grad(value.sum(), u)[0].any()
    network = learned(shape)
    network.set_statistics(torch.zeros(shape), *statistics)
    network.load_state_dict(learned(shape).state_dict())
    assert torch.equal(network(state, angles), learned(shape)(state, angles))


def test_contexts_are_seen_in_their_own_units():
    network, state = learned((6,)), random_state(4, (6,))
    angles = torch.full((4, 2), 0.5)
    network.set_statistics(torch.ones(6), torch.full((2, 6), 3.0), torch.full((2, 6), 2.0))
    scaled = LayerState(state.u, state.z, (state.mean - 3) / 2, torch.exp((state.std.log() - 3) / 2))
    torch.testing.assert_close(network(state, angles), learned((6,))(scaled, angles))


def test_logits_do_not_depend_on_pure_noise():
    network = learned((4, 8, 8), categories=3)
    angles = torch.tensor([[math.pi / 2, 0.0], [0.2, 0.0]]).repeat_interleave(4, 0)
    logits = network(random_state(8, (4, 8, 8)), angles)
    assert logits.shape == (8, 3)
    torch.testing.assert_close(logits[:4], network.bias.expand(4, 3), atol=1e-4, rtol=0)
    assert logits[4:].std(0).min() > 1e-3


def test_networks_of_equal_shape_give_the_same_as_one_call():
    shapes = [(4, 4, 4), (2, 8, 8), (2, 8, 8), (4, 4, 4), (2, 8, 8)]
    networks = [learned(shape) for shape in shapes]
    # One with fewer active channels is by itself.
    activity = torch.stack((torch.zeros(8, 8), torch.ones(8, 8)))
    networks[4].set_statistics(activity, torch.zeros(2, 2, 8, 8), torch.ones(2, 2, 8, 8))
    for i, network in enumerate(networks):
        nn.init.normal_(network.offset.readout.weight, generator=seed(i))
    states = [random_state(3, shape, i) for i, shape in enumerate(shapes)]
    angles = torch.rand(3, 2, generator=seed(2))
    together = ChainEnergies(networks, group_networks(networks, shapes, 3, torch.device("cpu")))
    torch.testing.assert_close(together(states, angles), one_by_one(networks, states, angles), atol=0, rtol=1e-5)
    torch.testing.assert_close(
        together(states[:2], angles), one_by_one(networks[:2], states[:2], angles), atol=0, rtol=1e-5
    )


def test_a_prior_mixes_no_networks_with_and_without_context():
    class Plain(nn.Module):
        def forward(self, z, t):
            return z.flatten(1).sum(1)

    with pytest.raises(ValueError, match="all networks with context"):
        DiffusionEBMPrior(RandomBackbone([(2,), (3,)]), energy=[ContextEnergy((2,), TINY), Plain()])
    with pytest.raises(ValueError, match="set context=False"):
        EnergyConfig(spectral_norm=True)
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), energy=[Plain()])
    assert not prior.has_context
    with pytest.raises(TypeError, match="no normalised density"):
        prior.log_prob(torch.zeros(1, 2))
