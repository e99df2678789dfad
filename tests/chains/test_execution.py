"""Choices of speed change no result: batched energies, repeated steps, the compiled gradient and its gate, half
precision.
"""

import warnings

import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY, seed
from stand_ins import perturb
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, DrawingConfig, EnergyConfig, ExecutionConfig, LangevinConfig
from hvae_ebm_prior.chains.autograd import walk_gradient
from hvae_ebm_prior.chains.execution import ChainEnergies, CompiledTotal, group_networks, one_by_one, plain_copy
from hvae_ebm_prior.energies.build import build_energies

CPU = torch.device("cpu")


def loud(energies):
    """Networks whose outputs are not zero, and know different activities."""
    for i, network in enumerate(energies):
        nn.init.normal_(network.readout.weight, std=0.3, generator=seed(i))
        network.activity.uniform_(0.2, 1.0, generator=seed(10 + i))
    return energies


def make_prior(**settings):
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (1, 4, 4), (1, 4, 4)]),
        energy=EnergyConfig(context=False, width=8),
        langevin=LangevinConfig(steps=4, start="gaussian"),
        **settings,
    )
    loud(prior.energies)
    return prior


def with_context(**settings):
    """Energies with context, all layers drawn together unless asked otherwise, so that chains walk the backbone."""
    torch.manual_seed(0)
    settings = {"drawing": DrawingConfig(ancestral=False), "langevin": LangevinConfig(steps=4)} | settings
    return perturb(DiffusionEBMPrior(RandomBackbone([(2,), (1, 4, 4), (1, 5, 5)]), energy=TINY, **settings))


EITHER = pytest.mark.parametrize("make", [make_prior, with_context])


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_batched_energies_are_the_networks_one_by_one(spectral_norm):
    """Five layers of three shapes, values and gradients; nothing of the networks is changed."""
    torch.manual_seed(0)
    shapes = [(3,), (2, 8, 8), (2, 8, 8), (3,), (2, 8, 8)]
    energies = loud(
        build_energies(
            EnergyConfig(context=False, width=8, vector_width=16, spectral_norm=spectral_norm), shapes, 3, CPU
        )
    ).eval()
    before = {name: value.clone() for name, value in energies.state_dict().items()}
    t = torch.tensor([0, 2, 1, 1])
    z = [torch.randn(4, *shape, generator=seed(1)).requires_grad_() for shape in shapes]
    groups = group_networks(energies, shapes, 4, CPU)
    assert sorted(groups) == [(0, 3), (1, 2, 4)]
    batched = ChainEnergies(list(energies), groups)
    expected, actual = one_by_one(list(energies), z, t), batched(z, t)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), z) for value in (expected, actual)]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batched(z[:2], t), expected[:, :2], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in energies.state_dict().items())
    # Weights that move in place are read anew; memory that changes hands is noticed.
    assert batched.is_of(energies)
    with torch.no_grad():
        for parameter in energies.parameters():
            parameter.mul_(1.1)
    assert batched.is_of(energies)
    batched.refresh()
    torch.testing.assert_close(batched(z, t), one_by_one(list(energies), z, t), atol=1e-5, rtol=1e-5)
    assert (batched(z, t) - expected).abs().max() > 1e-3
    assert not batched.is_of(energies[:4])
    assert not batched.is_of(energies.double())


def test_networks_of_equal_shape_are_called_once(monkeypatch):
    """Three of one shape: one forward pass while inputs are small, three when they are large or the networks are the
    user's own.
    """
    from hvae_ebm_prior.chains import execution

    calls = []
    original = execution.LayerEnergy.forward
    monkeypatch.setattr(execution.LayerEnergy, "forward", lambda self, z, t: (calls.append(1), original(self, z, t))[1])
    shapes = [(2, 8, 8)] * 3
    energies = list(build_energies(EnergyConfig(context=False, width=8), shapes, 3, CPU))
    for n, expected in ((2, 1), (execution.BATCHED_INPUTS // 128 + 1, 3)):
        corrections = ChainEnergies(energies, group_networks(energies, shapes, n, CPU))
        calls.clear()
        corrections([torch.zeros(n, *shape) for shape in shapes], torch.zeros(n, dtype=torch.long))
        assert len(calls) == expected


def test_plain_copies_have_the_effective_weights():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    ).eval()
    plain = plain_copy(network)
    x = torch.randn(5, 3)
    torch.testing.assert_close(plain(x), network(x))
    assert [type(layer) for layer in plain] == [nn.Linear, nn.Linear]
    assert "0.parametrizations.weight.original" in network.state_dict()


def test_spectral_norm_has_converged_in_a_chain():
    """The weights a chain uses after some training steps have a largest singular value within 3 per cent of 1."""
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (1, 8, 8)]), energy=EnergyConfig(context=False, width=8, spectral_norm=True)
    )
    prior.fit(torch.rand(20, 1, 2, 2), iterations=5, batch_size=4, generator=seed(0), progress=False)
    for network in prior.energies:
        for module in plain_copy(network).features.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert torch.linalg.svdvals(module.weight.flatten(1))[0] < 1.03


@EITHER
def test_graphs_are_for_cuda(make):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA; benchmarks/gpu_check.py compares graphs with eager steps")
    with pytest.raises(ValueError, match="CUDA alone"):
        make(execution=ExecutionConfig(graph=True, backend="naive")).sample(2, generator=seed(0))
    with pytest.raises(ValueError, match="counted noise"):
        make(execution=ExecutionConfig(graph=True)).sample(2, generator=seed(0))


def planted(error):
    """A compiler whose gradient is off by a factor."""
    return lambda function, **_: lambda u, t: (1 + error) * function(u, t)


@EITHER
def test_the_compile_gate_catches_a_wrong_gradient(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", planted(0.02))
    plain = make().sample_noise(3, generator=seed(0))
    prior = make(execution=ExecutionConfig(compile=True))
    with pytest.warns(UserWarning, match=r"differs from the plain one by 2\.0%"):
        caught = prior.sample_noise(3, generator=seed(0))
    assert torch.equal(caught, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.sample_noise(3, generator=seed(0))  # warned once


def test_a_compiler_that_fails_is_survived(monkeypatch):
    def broken(function, **_):
        def call(u, t):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    total = CompiledTotal(lambda u, t: (u**2).sum(), CPU)
    u, t = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.warns(UserWarning, match="no C"):
        torch.testing.assert_close(walk_gradient(total, u, t), 2 * u)


@EITHER
def test_a_right_gradient_passes_the_gate(make, monkeypatch):
    """A compiler that changes nothing is used, and asked for once."""
    asked = []

    def compiler(function, **_):
        asked.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    prior = make(execution=ExecutionConfig(compile=True))
    torch.testing.assert_close(
        prior.sample_noise(3, generator=seed(0)), make().sample_noise(3, generator=seed(0)), atol=1e-5, rtol=1e-5
    )
    assert len(asked) == 1


@EITHER
def test_the_walk_compiles_in_dynamo(make):
    """The real compiler's front end (without its back end, which takes minutes): the gradient through an adapter's
    coroutine is the plain one.
    """
    if not hasattr(
        torch._dynamo.variables.functions, "LocalGeneratorObjectVariable"
    ):  # before PyTorch 2.7 generators are not traced
        prior = make(execution=ExecutionConfig(compile=True))
        with pytest.warns(UserWarning, match=r"(?s)torch.compile failed .* the plain gradient is used"):
            samples = prior.sample_noise(3, generator=seed(0))
        assert torch.equal(samples, make().sample_noise(3, generator=seed(0)))
        return
    prior = make()
    u, t = torch.randn(3, prior.dim, generator=seed(0)), torch.tensor([0, 1, 2])
    compiled = torch.compile(prior._total, backend="aot_eager")
    torch.testing.assert_close(walk_gradient(compiled, u, t), walk_gradient(prior._total, u, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "drawing", [None, DrawingConfig(ancestral=False), DrawingConfig(), DrawingConfig(flow_steps=0)]
)
def test_half_precision_is_the_gradient_to_its_own(drawing):
    """bfloat16 in the walk or in a layer's network, states in float32: samples within a few per cent, and not the same
    bits.
    """

    def draw(**settings):
        prior = make_prior(**settings) if drawing is None else with_context(drawing=drawing, **settings)
        return prior.sample_noise(4, generator=seed(0))

    plain, half = draw(), draw(execution=ExecutionConfig(autocast="bfloat16"))
    assert half.dtype == torch.float32
    assert not torch.equal(half, plain)
    assert (half - plain).norm() / plain.norm() < 0.05


def test_execution_is_kept_by_copies_and_checked():
    import copy

    for make in (make_prior, with_context):
        prior = make(execution=ExecutionConfig(backend="naive"))
        assert copy.deepcopy(prior).settings() == prior.settings()
    for settings, message in (
        ({"backend": "cuda"}, "backend: expected one of auto"),
        ({"autocast": "int8"}, 'expected None, "bfloat16"'),
    ):
        with pytest.raises(ValueError, match=message):
            ExecutionConfig(**settings)
