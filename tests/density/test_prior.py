import copy
import math
import pickle

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone
from helpers import SMALL, TINY, seed
from stand_ins import perturb
from torch import nn

from hvae_ebm_prior import DiffusionEBMPrior, DiffusionSchedule, DrawingConfig, EnergyConfig, LangevinConfig
from hvae_ebm_prior.chains.langevin import ChainDiverged
from hvae_ebm_prior.chains.streams import SampleStreams, draw_seeds
from hvae_ebm_prior.training.recovery import recovery_loss

# Every way of drawing: energies without context, and with it by the flow, by chains of layers, and all layers together.
WAYS = {
    "plain": {"energy": EnergyConfig(context=False, width=8)},
    "flow": {"energy": TINY},
    "layers": {
        "energy": TINY,
        "drawing": DrawingConfig(flow_steps=0),
        "langevin": LangevinConfig(steps=3, corrector_steps=2),
    },
    "joint": {"energy": TINY, "drawing": DrawingConfig(ancestral=False)},
}


def make_prior(way):
    torch.manual_seed(0)
    return DiffusionEBMPrior(RandomBackbone([(2,), (1, 4, 4)]), **{"langevin": LangevinConfig(steps=3), **WAYS[way]})


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return request.param


@pytest.fixture(scope="module")
def prior(way):
    """A prior with energies that matter."""
    return perturb(make_prior(way), scale=0.2)


@pytest.fixture(scope="module")
def default():
    return make_prior("flow")


def test_same_seed_same_samples_at_any_chunking(prior):
    whole = prior.sample(7, generator=seed(0))
    assert whole.shape == (7, 1, 2, 2)
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert torch.equal(prior.sample(7, generator=seed(0)), whole)
    for chunk_size in (1, 3, 100):
        torch.testing.assert_close(prior.sample(7, chunk_size=chunk_size, generator=seed(0)), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(prior.sample(3, generator=seed(0)), whole[:3], atol=1e-5, rtol=0)
    assert not torch.allclose(prior.sample(7, generator=seed(1)), whole)


def test_sampling_steps_lengthen_the_chains_of_sampling_alone():
    calls = []

    class Counting(nn.Module):
        def forward(self, z, t):
            calls.append(len(z))
            return z.flatten(1).sum(1)

    settings = {"schedule": DiffusionSchedule.marginal(), "langevin": LangevinConfig(steps=3, sampling_steps=7)}
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), energy=[Counting()], **settings)
    calls.clear()
    prior.sample(2, generator=seed(0))
    assert len(calls) == 7
    calls.clear()
    prior.loss(torch.full((2, 1, 1, 2), 0.5), generator=seed(0))
    assert len(calls) == 3 + 1


def test_sample_is_the_decoded_noise(prior):
    torch.testing.assert_close(
        prior.decode(prior.sample_noise(4, generator=seed(0))), prior.sample(4, generator=seed(0))
    )


def test_trajectory_holds_every_level(prior):
    states = prior.sample_noise(5, trajectory=True, generator=seed(0))
    assert states.shape == (4, 5, prior.dim)
    assert torch.equal(states[0], prior.sample_noise(5, generator=seed(0)))


@pytest.mark.usefixtures("counters")
def test_held_layers_are_exact_and_diffuse_with_the_others():
    schedule = DiffusionSchedule.ddpm(3)
    langevin = LangevinConfig(steps=3)
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (1, 2, 2)]), schedule=schedule, langevin=langevin, energy=SMALL)
    top = torch.randn(4000, 2, generator=seed(1))
    states = prior.sample_noise(4000, fixed={0: top}, trajectory=True, generator=seed(0))
    assert torch.equal(prior.split(states[0])[0], top)
    # The held layer's state at level t is its own diffusion, started without noise: correlation alpha_bar_t /
    # alpha_bar_0, variance 1.
    for t in range(1, 4):
        held = prior.split(states[t])[0]
        expected = (schedule.alpha_bar[t] / schedule.alpha_bar[0]).item()
        assert (held * top).mean().item() == pytest.approx(expected, abs=0.06)
        assert held.var().item() == pytest.approx(1, abs=0.08)
    one = torch.randn(1, 2, generator=seed(1))
    u = prior.sample_noise(3, fixed={0: one}, temperature=0.7, tempering="before", generator=seed(0))
    assert torch.equal(prior.split(u)[0], one.expand(3, 2))
    images = prior.sample(5, fixed={1: top[:5, :1, None, None].expand(5, 1, 2, 2)}, chunk_size=2, generator=seed(0))
    assert images.shape == (5, 1, 2, 2)


@pytest.mark.usefixtures("counters")
def test_holding_a_layer_conditions_the_others():
    """Two correlated unknowns with a known joint density: the conditional mean given the held one must come out."""

    class Coupled(IdentityBackbone):
        # z_2 | z_1 ~ N(z_1, 1). Tilted by exp(w z_2 + v z_2^2) it has precision 1 - 2v and mean (z_1 + w) / (1 - 2v).
        def top_down(self, batch_size):
            zero = torch.zeros(batch_size, 1)
            z = yield zero, zero + 1
            z = yield z, zero + 1
            return z

    prior = DiffusionEBMPrior(
        Coupled((1,), (1,)),
        schedule=DiffusionSchedule.marginal(),
        energy=[Quadratic(1), Quadratic(1, w=0.5, v=-0.5)],
        langevin=LangevinConfig(steps=100, step_size=0.05),
    )
    u = prior.sample_noise(4000, fixed={0: torch.full((1, 1), 2.0)}, generator=seed(0))
    z = prior.to_latents(u)
    assert (z[0] == 2).all()
    assert z[1].mean().item() == pytest.approx(1.25, abs=0.06)
    # Held only at the end, z_1 would have followed z_2's tilt on the way, and z_2 - z_1 would not know of z_1 = 2.
    assert z[1].var().item() == pytest.approx(0.5, rel=0.1)


def test_temperature_multiplies_the_std_of_the_gaussian_layers():
    """With F = w z, v = u / T is N(T w, 1): the chain's own temperature stays 1, so u is N(T^2 w, T^2)."""
    temperature, w = 0.6, 0.9
    prior = DiffusionEBMPrior(
        IdentityBackbone((40,)),
        schedule=DiffusionSchedule.marginal(),
        energy=[Quadratic(40, w)],
        langevin=LangevinConfig(steps=60, step_size=0.2),
    )
    u = prior.sample_noise(500, temperature=temperature, tempering="before", generator=seed(0))
    assert u.mean().item() == pytest.approx(temperature**2 * w, abs=0.02)
    assert u.std().item() == pytest.approx(temperature, rel=0.03)
    # After drawing, u is what is drawn at temperature 1, N(w, 1), times T; held layers are as they are.
    after = prior.sample_noise(500, temperature=temperature, tempering="after", generator=seed(0))
    torch.testing.assert_close(after, temperature * prior.sample_noise(500, generator=seed(0)))
    assert after.mean().item() == pytest.approx(temperature * w, abs=0.02)
    held = torch.full((1, *prior.latent_shapes[0]), 0.3)
    u = prior.sample_noise(5, fixed={0: held}, temperature=temperature, tempering="after", generator=seed(0))
    assert torch.equal(prior.split(u)[0], held.expand(5, *held.shape[1:]))


def test_learning_gradient_against_numerical_integration():
    """d/dw of -log p(u_t | u_next) is E_model[z | u_next] - u_t, for f(z) = w sin(z), integrated on a grid."""

    class Sine(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.5))

        def forward(self, z, t):
            return self.w * torch.sin(2 * z[:, 0])

    n = 5000
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,)), energy=[Sine()], langevin=LangevinConfig(steps=120, step_size=0.05, start="gaussian")
    )
    data = 0.4 + 0.5 * torch.randn(n, 1, generator=seed(1))
    u = data
    found = recovery_loss(prior, u, generator=seed(0))
    losses, t = found.total, found.levels
    (gradient,) = torch.autograd.grad(losses.mean(), prior.energies[0].w)

    # The same forward diffusion, replayed from the same streams.
    replay, schedule = SampleStreams(draw_seeds(n, seed(0)), torch.device("cpu"), torch.float32), prior.schedule
    assert torch.equal(replay.levels(3), t)
    u_t = schedule.alpha_bar[t, None] * u + schedule.sigma_bar[t, None] * replay.normal(1)
    u_next = schedule.alpha[t + 1, None] * u_t + schedule.sigma[t + 1, None] * replay.normal(1)
    grid = torch.linspace(-7, 7, 1401)[None]
    log_p = (
        1.5 * torch.sin(2 * grid)
        - grid**2 / 2
        - (u_next - schedule.alpha[t + 1, None] * grid) ** 2 / (2 * schedule.sigma[t + 1, None] ** 2)
    )
    expected = (torch.softmax(log_p, dim=1) * torch.sin(2 * grid)).sum(1) - torch.sin(2 * u_t[:, 0])
    # The loss of a sample estimates `expected` with the spread of one draw of sin(2u), at most 1.
    assert gradient.item() == pytest.approx(expected.mean().item(), abs=5 / n**0.5)
    assert abs(expected.mean().item()) > 10 / n**0.5


def test_learning_gradient_vanishes_where_data_and_model_agree():
    """Data drawn from the model itself: u ~ N(0, 1) and zero energy, where every parameter's mean gradient is 0."""
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,)), energy=[Quadratic(1)], langevin=LangevinConfig(steps=20, step_size=0.3)
    )
    losses = recovery_loss(prior, torch.randn(5000, 1, generator=seed(0)), generator=seed(1)).total
    w, v = torch.autograd.grad(losses.mean(), list(prior.parameters()))
    assert abs(w.item()) < 5 * (2 / 5000) ** 0.5
    assert abs(v.item()) < 5 * (4 / 5000) ** 0.5


def test_loss_is_reproducible_and_one_value_per_image(prior):
    images = torch.rand(6, 1, 2, 2, generator=seed(0))
    first = prior.loss(images, generator=seed(1))
    assert first.shape == (6,)
    assert first.requires_grad
    assert torch.equal(prior.loss(images, generator=seed(1)), first)


def test_state_dict_device_and_dtype(way, prior):
    other = make_prior(way)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.sample(3, generator=seed(0)), prior.sample(3, generator=seed(0)))
    double = make_prior(way).double()
    double.load_state_dict(prior.state_dict())
    u = torch.randn(3, prior.dim, generator=seed(0))
    # Energies in float64 over a float32 backbone.
    torch.testing.assert_close(double.energy(u.double(), 1).float(), prior.energy(u, 1), atol=1e-4, rtol=1e-4)
    assert double.sample_noise(2, generator=seed(0)).dtype == torch.float64
    meta = prior.__class__(RandomBackbone([(2,)])).to("meta")
    assert meta.device.type == "meta"
    with pytest.raises(ValueError, match="expected a tensor on meta"):
        meta.energy(torch.zeros(1, 2), 0)


def test_deep_copies_share_the_backbone_and_pickling_is_refused(prior):
    twin = copy.deepcopy(prior)
    assert twin.backbone is prior.backbone
    assert twin.settings() == prior.settings()
    assert torch.equal(twin.sample(2, generator=seed(0)), prior.sample(2, generator=seed(0)))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in prior.parameters()}
    with pytest.raises(TypeError, match=r"save prior.state_dict\(\)"):
        pickle.dumps(prior)


def test_inference_mode(prior):
    expected = prior.sample(2, generator=seed(0))
    u = prior.sample_noise(2, generator=seed(1))
    with torch.inference_mode():
        assert torch.equal(prior.sample(2, generator=seed(0)), expected)
        torch.testing.assert_close(prior.score(u.clone(), 0), prior.score(u, 0))
        densities = prior.log_prob(u.clone(), steps=2) if prior.has_context else None
    if prior.has_context:
        torch.testing.assert_close(densities, prior.log_prob(u, steps=2))


def test_double_images_are_accepted():
    adapter = IdentityBackbone((4,))
    u = DiffusionEBMPrior(adapter).encode(torch.full((2, 1, 1, 4), 0.5, dtype=torch.float64))
    assert u.dtype == torch.float32


def test_backbone_on_another_device_is_named():
    class Moved(RandomBackbone):
        def top_down(self, batch_size):
            h = yield from super().top_down(batch_size)
            return h

    adapter = Moved([(2,)])
    moved = DiffusionEBMPrior(adapter)
    adapter.model.to("meta")
    adapter.start = adapter.start.to("meta")
    with pytest.raises(
        ValueError, match="the backbone is on meta, the prior's noise or latents on cpu; move one of them"
    ):
        moved.energy(torch.zeros(1, 2), 0)


def test_float32_noise_over_a_bfloat16_backbone():
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (3,)], dtype=torch.bfloat16))
    u = prior.sample_noise(2, generator=seed(0))
    assert u.dtype == torch.float32
    assert prior.decode(u).dtype == torch.bfloat16


class Exploding(nn.Module):
    def forward(self, z, t):
        return z.flatten(1).pow(4).sum(1) * 1e6


def test_diverging_chain_is_no_silent_nan():
    prior = DiffusionEBMPrior(
        IdentityBackbone((2,)), energy=[Exploding()], langevin=LangevinConfig(drift_limit=math.inf)
    )
    with pytest.raises(ChainDiverged, match="not finite"):
        prior.sample(2, generator=seed(0))


def test_non_finite_images_are_reported():
    adapter = IdentityBackbone((2,))
    prior = DiffusionEBMPrior(adapter)
    adapter.decode = lambda features: features[:, None, None] * torch.nan
    with pytest.raises(ChainDiverged, match="images are not finite"):
        prior.sample(2, generator=seed(0))


IMAGES = torch.zeros(2, 1, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.encode(IMAGES.numpy()), TypeError, r"expected a tensor \(N, C, H, W\), got ndarray"),
        (lambda p: p.encode(IMAGES.byte()), TypeError, r"got torch.uint8; convert with images.float\(\) / 255"),
        (lambda p: p.encode(IMAGES[0]), ValueError, r"non-empty batch \(N, C, H, W\), got shape \(1, 2, 2\)"),
        (lambda p: p.encode(IMAGES[:0]), ValueError, "non-empty batch"),
        (lambda p: p.encode(IMAGES - 1), ValueError, r"values in \[0, 1\], got -1 to -1; rescale"),
        (lambda p: p.encode(IMAGES + 2), ValueError, r"values in \[0, 1\], got 2 to 2"),
        (lambda p: p.encode(IMAGES / 0), ValueError, "2 of 2 hold NaN or infinite pixels; drop or repair them"),
        (lambda p: p.loss(IMAGES * torch.nan), ValueError, "NaN or infinite pixels"),
        (lambda p: p.energy(torch.zeros(2, 3), 0), ValueError, r"u: expected shape \(N, 18\), .* got \(2, 3\)"),
        (
            lambda p: p.energy(torch.zeros(2, 18).long(), 0),
            TypeError,
            "u: expected a floating-point tensor .* got torch.int64",
        ),
        (lambda p: p.decode([0.0]), TypeError, "got list"),
        (lambda p: p.split(torch.zeros(18)), ValueError, r"u: expected shape \(N, 18\)"),
        (lambda p: p.energy(torch.zeros(2, 18), 3), ValueError, r"t: expected levels 0..2, got 3 to 3"),
        (lambda p: p.score(torch.zeros(2, 18), -1), ValueError, r"t: expected levels 0..2, got -1"),
        (
            lambda p: p.energy(torch.zeros(2, 18), torch.zeros(3).long()),
            ValueError,
            r"one level per sample, shape \(2,\), got \(3,\)",
        ),
        (
            lambda p: p.energy(torch.zeros(2, 18), torch.zeros(2)),
            TypeError,
            "t: expected an int or a torch.long tensor, got torch.float32",
        ),
        (lambda p: p.energy(torch.zeros(2, 18), 0.0), TypeError, "t: expected an int .* got float"),
        (
            lambda p: p.join((torch.zeros(2, 2), torch.zeros(2, 4, 4))),
            ValueError,
            r"layers to join: expected .* got \[\(2, 2\), \(2, 4, 4\)\]",
        ),
        (
            lambda p: p.to_noise((torch.zeros(2, 2),)),
            ValueError,
            r"latents: expected \[\('N', 2\), \('N', 1, 4, 4\)\] .* got \[\(2, 2\)\]",
        ),
        (
            lambda p: p.to_noise((torch.zeros(2, 2), torch.zeros(3, 1, 4, 4))),
            ValueError,
            r"got \[\(2, 2\), \(3, 1, 4, 4\)\]",
        ),
        (lambda p: p.sample(0), ValueError, "n: expected a positive integer, got 0"),
        (lambda p: p.sample(2.0), TypeError, "n: expected a positive integer, got float"),
        (lambda p: p.sample(1, chunk_size=0), ValueError, "chunk_size: expected a positive integer, got 0"),
        (lambda p: p.sample(1, tempering="during"), ValueError, "after, before, got 'during'"),
        (lambda p: p.sample(1, temperature=0.0), ValueError, r"temperature: expected a positive number, got 0\.0"),
        (lambda p: p.sample(1, labels={"class": 3}), ValueError, "not coupled to labels"),
        (
            lambda p: p.sample(1, fixed={2: torch.zeros(1, 2)}),
            ValueError,
            r"layer indices 0 \(top\) to 1 \(bottom\), got 2",
        ),
        (lambda p: p.sample(1, fixed={-1: torch.zeros(1, 2)}), ValueError, "layer indices"),
        (
            lambda p: p.sample_noise(3, fixed={0: torch.zeros(2, 2)}),
            ValueError,
            r"fixed\[0\]: expected shape \(3, 2\), or \(1, 2\)",
        ),
        (
            lambda p: p.sample(1, fixed=[torch.zeros(1, 2)]),
            TypeError,
            "fixed: expected a mapping of layer index to noise u_i, got list",
        ),
        (
            lambda p: p.sample(1, fixed={0: torch.full((1, 2), torch.nan)}),
            ValueError,
            r"fixed\[0\]: expected finite noise",
        ),
        (lambda p: p.to_noise("abc"), TypeError, "latents: expected a list or tuple of one tensor per layer, got str"),
        (lambda p: p.join([[0.0]]), TypeError, "layers to join: expected a list or tuple of one tensor per layer"),
        (lambda p: p.sample_noise(3, fixed={0: [1.0]}), TypeError, r"fixed\[0\]: expected a floating-point tensor"),
    ],
)
def test_bad_input_is_refused(default, call, error, message):
    with pytest.raises(error, match=message):
        call(default)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"schedule": 3}, TypeError, "schedule: expected a DiffusionSchedule, got int"),
        ({"langevin": 15}, TypeError, "langevin: expected a LangevinConfig, got int"),
        (
            {
                "langevin": LangevinConfig(integrator="euler", step_rule="published"),
                "schedule": DiffusionSchedule.cosine(3),
                "energy": SMALL,
            },
            ValueError,
            "use DiffusionSchedule.ddpm",
        ),
        (
            {"langevin": LangevinConfig(integrator="euler", step_rule="published")},
            ValueError,
            r"set EnergyConfig\(context=False\)",
        ),
        ({"drawing": 15}, TypeError, "drawing: expected a DrawingConfig, got int"),
        ({"drawing": DrawingConfig(ancestral=True), "energy": SMALL}, ValueError, r"EnergyConfig\(context=True\)"),
    ],
)
def test_bad_constructor_arguments_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        DiffusionEBMPrior(RandomBackbone([(2,)]), **settings)
