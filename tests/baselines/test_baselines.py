"""Baselines behind one interface, each against a closed form, autograd or SciPy."""

import copy
import math

import pytest
import torch
from backbones import TRUTH, IdentityBackbone, Pair, Quadratic, RandomBackbone, images_of, minimize_batch_loss
from helpers import TINY, seed
from scipy import stats
from torch import nn

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    DiffusionSchedule,
    EnergyConfig,
    Expert,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.baselines import (
    FlowMatchingPrior,
    GaussianMixturePrior,
    GaussianPrior,
    JointEBMPrior,
    LatentDiffusionPrior,
    NCPPrior,
)
from hvae_ebm_prior.baselines.ncp import pick
from hvae_ebm_prior.chains.autograd import walk_gradient
from hvae_ebm_prior.chains.langevin import gaussian_part, langevin_coefficients
from hvae_ebm_prior.control import resample
from hvae_ebm_prior.energies.context import ContextEnergy
from hvae_ebm_prior.evaluation.likelihood import log_normalizer
from hvae_ebm_prior.evaluation.transitions import langevin_transitions
from hvae_ebm_prior.ood import diffusion_scores, inference_scores

SHAPES = [(2,), (1, 2, 2)]
SMALL = EnergyConfig(context=False, width=8, vector_width=16)
SHORT = LangevinConfig(steps=2)


def randomize(prior, std=0.3):
    g = seed(5)
    for network in prior.energies:
        nn.init.normal_(network.readout.weight, std=std, generator=g)
    return prior


MAKERS = {
    "gaussian": lambda backbone: GaussianPrior(backbone, 0.8),
    "mixture": lambda backbone: GaussianMixturePrior(backbone, components=3, covariance="diag"),
    "full mixture": lambda backbone: GaussianMixturePrior(backbone, components=2, dims=4),
    "joint": lambda backbone: JointEBMPrior(backbone, energy=SMALL, langevin=SHORT),
    "persistent": lambda backbone: JointEBMPrior(backbone, energy=SMALL, langevin=SHORT, chains="persistent", kept=50),
    "published": lambda backbone: JointEBMPrior(backbone, energy=SMALL, langevin=SHORT, target="published"),
    "sir": lambda backbone: NCPPrior(backbone, energy=SMALL, proposals=30),
    "ncp langevin": lambda backbone: NCPPrior(backbone, energy=SMALL, sampler="langevin", langevin=SHORT),
    "flow": lambda backbone: FlowMatchingPrior(backbone, width=16, vector_width=16, steps=2),
    "z": lambda backbone: LatentDiffusionPrior(backbone, energy=SMALL, langevin=SHORT),
}


@pytest.mark.parametrize("name", MAKERS)
def test_one_interface(name):
    """fit, sample, encode, decode, state dicts, seeds and chunks are alike for all; the backbone is left as it was."""

    def make(backbone):
        torch.manual_seed(0)  # initial weights
        return MAKERS[name](backbone)

    images = torch.rand(40, 1, 2, 2, generator=seed(0))
    prior, twin = make(RandomBackbone(SHAPES)), make(RandomBackbone(SHAPES))
    settings = (
        {"training": TrainingConfig(iterations=3, batch_size=16, activity_images=16)}
        if hasattr(prior, "gradients_per_step")
        else {}
    )
    history = prior.fit(images, **settings, generator=seed(1))
    assert len(history) == (3 if settings else 0)
    twin.fit(images, **settings, generator=seed(1))
    whole = prior.sample(7, generator=seed(2))
    assert whole.shape == (7, 1, 2, 2)
    assert torch.equal(twin.sample(7, generator=seed(2)), whole)
    for size in (1, 3):
        torch.testing.assert_close(prior.sample(7, chunk_size=size, generator=seed(2)), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(prior.decode(prior.sample_noise(7, generator=seed(2))), whole)
    assert not torch.allclose(prior.sample(7, generator=seed(3)), whole)
    loaded = make(RandomBackbone(SHAPES))
    loaded.load_state_dict(prior.state_dict())
    assert torch.equal(loaded.sample(7, generator=seed(2)), whole)
    assert prior.encode(images, generator=seed(0)).shape == (40, prior.dim) == (40, 6)
    assert (prior.device.type, prior.dtype) == ("cpu", torch.float32)


def test_tempered_gaussian():
    prior = GaussianPrior(RandomBackbone([(40,)]), temperature=0.7)
    u = prior.sample_noise(2000, generator=seed(0))
    assert u.std().item() == pytest.approx(0.7, rel=0.01)
    assert torch.equal(u, 0.7 * GaussianPrior(RandomBackbone([(40,)])).sample_noise(2000, generator=seed(0)))
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        GaussianPrior(RandomBackbone([(4,)]), temperature=0)


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_mixture_recovers_a_mixture(covariance):
    g = seed(0)
    which = torch.rand(4000, 1, generator=g) < 0.3
    noise = torch.randn(4000, 2, generator=g)
    shear = torch.tensor([[0.5, 0.4], [0.0, 0.3]]) if covariance == "full" else torch.diag(torch.tensor([0.5, 0.3]))
    u = torch.where(which, torch.tensor([3.0, 0.0]) + noise @ shear, torch.tensor([-1.0, 1.0]) + 0.5 * noise)
    prior = GaussianMixturePrior(IdentityBackbone((2,)), components=2, covariance=covariance)
    prior.fit(images_of(u), images=4000, generator=seed(1))
    order = prior.means[:, 0].argsort(descending=True)
    torch.testing.assert_close(prior.weights[order], torch.tensor([0.3, 0.7]), atol=0.03, rtol=0)
    torch.testing.assert_close(prior.means[order], torch.tensor([[3.0, 0.0], [-1.0, 1.0]]), atol=0.06, rtol=0)
    drawn = prior.sample_noise(20_000, generator=seed(2))
    torch.testing.assert_close(drawn.mean(0), u.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), u.T.cov(), atol=0.12, rtol=0.05)
    right = drawn[drawn[:, 0] > 1.2]
    assert len(right) / len(drawn) == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(right.T.cov(), shear.T @ shear, atol=0.03, rtol=0)


def test_mixture_is_over_the_most_active_dimensions():
    """Dimensions 1 and 3 are seen in images, the others are noise of the posterior: these stay as they are, whatever
    the noise.
    """

    class Noisy(IdentityBackbone):
        def infer(self, images):
            (z,) = super().infer(images)
            return [torch.where(torch.tensor([False, True, False, True]), z, 3 + torch.randn(z.shape))]

    u = torch.randn(400, 4, generator=seed(0)) * 0.2 - 1
    prior = GaussianMixturePrior(Noisy((4,)), components=1, dims=2)
    prior.fit(images_of(u), generator=seed(0))
    assert prior.active.tolist() == [1, 3]
    drawn = prior.sample_noise(4000, generator=seed(1))
    assert drawn.mean(0).tolist() == pytest.approx([0, -1, 0, -1], abs=0.06)
    assert drawn.std(0).tolist() == pytest.approx([1, 0.2, 1, 0.2], abs=0.05)


def test_mixture_takes_no_more_images_than_asked_and_one_pass(monkeypatch):
    taken = []
    encode = GaussianMixturePrior.encode
    monkeypatch.setattr(
        GaussianMixturePrior,
        "encode",
        lambda self, images, **rest: (taken.append(len(images)), encode(self, images, **rest))[1],
    )
    prior = GaussianMixturePrior(IdentityBackbone((2,)), components=2)
    images = images_of(torch.randn(350, 2, generator=seed(0)))
    prior.fit(images, images=120, generator=seed(0))
    assert sum(taken) == 2 * 200
    taken.clear()
    prior.fit([images[:100], images[100:]], generator=seed(0))
    assert taken == [100, 100, 250, 250]
    with pytest.raises(ValueError, match="at least one image per component, 2 in all, got 1"):
        prior.fit(images[:1])


def log_target(prior, published):
    """log p(u) of a Joint-EBM, written out: T layer by layer, and log|det| as that of autograd's Jacobian."""

    def log_p(u):
        z = prior.to_latents(u)
        t = torch.zeros(len(u), dtype=torch.long)
        total = sum(network(z_i, t) for network, z_i in zip(prior.energies, z, strict=True)) - u.square().sum(1) / 2
        if not published:
            return total
        flat = lambda u: torch.cat([z_i.flatten(1) for z_i in prior.to_latents(u[None])], dim=1)[0]  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(flat, u[0], create_graph=True)
        return total - torch.linalg.slogdet(jacobian)[1]

    return log_p


@pytest.mark.parametrize("target", ["u", "published"])
def test_joint_target_against_autograd(target):
    prior = randomize(JointEBMPrior(RandomBackbone(SHAPES, dtype=torch.float64), target=target, energy=SMALL).double())
    u = torch.randn(3, prior.dim, dtype=torch.float64, generator=seed(0))
    for i in range(3):
        one = u[i : i + 1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(log_target(prior, target == "published")(one).sum(), one)
        torch.testing.assert_close(prior.score(u, 0)[i : i + 1], expected)
        # What chains climb is what `score` says.
        t = torch.zeros(1, dtype=torch.long)
        terms = prior.terms_at(t)
        torch.testing.assert_close(
            walk_gradient(lambda u, t, terms=terms: terms(prior.transform.states(u), t)[0].sum(), one, t) - one,
            expected,
        )
    assert gaussian_part(torch.zeros(1, dtype=torch.long), prior.schedule, prior.langevin, torch.float64)[0].item() == 0


@pytest.mark.usefixtures("counters")
def test_published_chains_draw_from_the_density_without_the_jacobian():
    """z_2 = e^{a u_1} u_2: without the Jacobian, a factor e^{-a u_1} shifts u_1 by -a; with it, nothing moves."""

    class Scaled(IdentityBackbone):
        def top_down(self, batch_size):
            zeros = torch.zeros(batch_size, 1)
            z = yield zeros, zeros + 1
            z = yield zeros, (0.8 * z).exp()
            return z

    settings = {"energy": [Quadratic(1), Quadratic(1)], "langevin": LangevinConfig(steps=40, step_size=0.2)}
    for target, mean in (("u", 0.0), ("published", -0.8)):
        u = JointEBMPrior(Scaled((1,), (1,)), target=target, **settings).sample_noise(4000, generator=seed(0))
        assert u.mean(0).tolist() == pytest.approx([mean, 0.0], abs=0.06)
        assert u.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.06)


@pytest.mark.parametrize("target", ["u", "published"])
def test_learning_contrasts_the_networks_alone(target):
    """What is not learned has no part in the loss: with zero networks it is zero, though the density has a Jacobian
    more.
    """
    prior = JointEBMPrior(RandomBackbone(SHAPES), target=target, energy=SMALL)
    found = prior.batch_loss(torch.randn(8, prior.dim, generator=seed(0)), None, seed(1))
    assert found.recovery.abs().max() == 0
    assert found.total.requires_grad


def test_persistent_chains_persist_and_are_renewed():
    settings = {"energy": [Quadratic(3)], "langevin": LangevinConfig(steps=1, step_size=1e-6), "chains": "persistent"}
    u = torch.zeros(10, 3)
    never = JointEBMPrior(IdentityBackbone((3,)), kept=10, renewal=0.0, **settings)
    never.batch_loss(u, None, seed(0))
    before = never.states.clone()
    assert before.std().item() == pytest.approx(1, abs=0.3)
    never.batch_loss(u, None, seed(1))
    torch.testing.assert_close(never.states, before, atol=0.02, rtol=0)
    always = JointEBMPrior(IdentityBackbone((3,)), kept=10, renewal=1.0, **settings)
    always.batch_loss(u, None, seed(0))
    before = always.states.clone()
    always.batch_loss(u, None, seed(1))
    assert ((always.states - before).abs() > 0.02).any(dim=1).all()
    some = JointEBMPrior(IdentityBackbone((3,)), kept=1000, renewal=0.2, **settings)
    some.batch_loss(u.repeat(100, 1), None, seed(0))
    before = some.states.clone()
    some.batch_loss(u.repeat(100, 1), None, seed(1))
    assert ((some.states - before).abs() > 0.02).any(dim=1).float().mean().item() == pytest.approx(0.2, abs=0.05)
    # Larger batches than chains, and chains that are no part of the state.
    some.batch_loss(u.repeat(110, 1), None, seed(0))
    assert len(some.states) == 1100
    assert not any("states" in name for name in some.state_dict())
    assert copy.deepcopy(some).states is None
    some.load_state_dict(some.state_dict())
    assert some.states is None


@pytest.mark.usefixtures("counters")
def test_persistent_chains_go_on_where_they_were():
    """Short chains that persist reach the stationary mean w of F = w z; chains from noise stop on their way."""
    settings = {"energy": [Quadratic(1, w=2.0)], "langevin": LangevinConfig(steps=1, step_size=0.1)}
    u = torch.zeros(500, 1)
    prior = JointEBMPrior(IdentityBackbone((1,)), chains="persistent", kept=500, renewal=0.0, **settings)
    for step in range(60):
        found = prior.batch_loss(u, None, seed(step))
    assert prior.states.mean().item() == pytest.approx(2, abs=0.2)
    assert found.recovery.mean().item() == pytest.approx(4, abs=0.4)
    noise = JointEBMPrior(IdentityBackbone((1,)), **settings).batch_loss(u, None, seed(0))
    assert noise.recovery.mean().item() < 1


def test_published_chain_in_our_units():
    """The page's settings: a drift of half of 1e-5, and noise of std sqrt(1e-5)."""
    langevin = LangevinConfig(steps=10, step_size=5e-6, integrator="euler", drift_limit=math.inf)
    prior = JointEBMPrior(IdentityBackbone((2,)), target="published", langevin=langevin)
    found = langevin_coefficients(torch.zeros(1, dtype=torch.long), prior.schedule, prior.langevin, torch.float64)
    torch.testing.assert_close(
        found, torch.tensor([[1 - 5e-6, 0, 5e-6, 1e-5**0.5]], dtype=torch.float64), atol=1e-9, rtol=1e-6
    )


def test_joint_defaults_and_copies():
    assert JointEBMPrior(IdentityBackbone((2,))).langevin.sampling_steps is None
    prior = JointEBMPrior(IdentityBackbone((2,)), chains="persistent", target="published", kept=7, renewal=0.1)
    assert prior.langevin.sampling_steps == 10 * prior.langevin.steps
    assert copy.deepcopy(prior).settings() == prior.settings()
    coupled = JointEBMPrior(
        RandomBackbone(SHAPES), energy=SMALL, langevin=SHORT, coupling=Coupling({"class": LabelSet(3)})
    )
    assert coupled.sample(2, labels={"class": 1}, generator=seed(0)).shape == (2, 1, 2, 2)


class Polynomial(nn.Module):
    """All products of two of (1, z, mean) of what a layer's network sees: a log-ratio of two linear Gaussians is one of
    them.
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6))

    def forward(self, x, t):
        z, mean = x[:, 0], x[:, 2]
        return torch.stack((torch.ones_like(z), z, mean, z * z, z * mean, mean * mean), dim=1) @ self.w


def exact_ratio():
    """Coefficients of log q(z_i | z_<i) - log p(z_i | z_<i) of a Pair's data, from the normal densities' exponents."""
    (m, s), (a, b, r) = TRUTH
    top = [-math.log(s) - m**2 / (2 * s**2), m / s**2, 0, 0.5 - 0.5 / s**2, 0, 0]
    below = [
        math.log(0.5 / r) - b**2 / (2 * r**2),
        b / r**2,
        -a * b / r**2,
        2 - 0.5 / r**2,
        a / r**2 - 4,
        2 - a**2 / (2 * r**2),
    ]
    return torch.tensor([top, below])


def pair_data(n):
    (m, s), (a, b, r) = TRUTH
    noise = torch.randn(n, 2, generator=seed(0))
    z_1 = m + s * noise[:, :1]
    return torch.cat((z_1, a * z_1 + b + r * noise[:, 1:]), dim=1)


@pytest.mark.usefixtures("counters")
def test_nce_recovers_a_known_density_ratio():
    prior = NCPPrior(Pair((1,), (1,)), energy=[Polynomial(), Polynomial()])
    z = pair_data(10_000)
    u = prior.encode(images_of(z))
    minimize_batch_loss(prior, u, steps=25, seed=1)
    where = pair_data(500)
    states = prior.transform.states(prior.to_noise((where[:, :1], where[:, 1:])))
    expected = torch.stack([torch.from_numpy(values) for values in log_ratios(where)], dim=1).float()
    found = prior.learned_corrections(states, torch.zeros(500, dtype=torch.long))[0]
    assert (found - expected).abs().mean().item() < 0.08
    # At the exact ratio, the mean gradient is zero but for the data's spread.
    for network, w in zip(prior.energies, exact_ratio(), strict=True):
        network.w.data.copy_(w)
    torch.testing.assert_close(
        prior.learned_corrections(states, torch.zeros(500, dtype=torch.long))[0], expected, atol=1e-4, rtol=1e-4
    )
    loss = prior.batch_loss(u, None, seed(1)).total.mean()
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, list(prior.parameters()))) < 0.04


def log_ratios(z):
    """The same log-ratios by SciPy."""
    (m, s), (a, b, r) = TRUTH
    one, two = z.double().numpy().T
    normal = stats.norm.logpdf
    return normal(one, m, s) - normal(one, 0, 1), normal(two, a * one + b, r) - normal(two, one, 0.5)


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("sampler", ["sir", "langevin"])
def test_ncp_samples_with_the_exact_ratio(sampler):
    prior = NCPPrior(
        Pair((1,), (1,)),
        sampler=sampler,
        proposals=200,
        energy=[Polynomial(), Polynomial()],
        langevin=LangevinConfig(steps=80, step_size=0.08, integrator="strang"),
    )
    for network, w in zip(prior.energies, exact_ratio(), strict=True):
        network.w.data.copy_(w)
    z = torch.cat(prior.to_latents(prior.sample_noise(4000, generator=seed(0))), dim=1)
    (m, s), (a, b, r) = TRUTH
    assert z.mean(0).tolist() == pytest.approx([m, a * m + b], abs=0.05)
    cov = torch.tensor([[s**2, a * s**2], [a * s**2, a**2 * s**2 + r**2]])
    torch.testing.assert_close(z.T.cov(), cov, atol=0.04, rtol=0.05)


@pytest.mark.usefixtures("counters")
def test_sir_takes_many_proposals_in_parts(monkeypatch):
    """Exact ratio again, with parts of three proposals; held layers are exact, and the layers below follow them."""
    monkeypatch.setattr("hvae_ebm_prior.baselines.ncp.PROPOSED", 3)
    prior = NCPPrior(Pair((1,), (1,)), proposals=40, energy=[Polynomial(), Polynomial()])
    for network, w in zip(prior.energies, exact_ratio(), strict=True):
        network.w.data.copy_(w)
    z = torch.cat(prior.to_latents(prior.sample_noise(3000, generator=seed(0))), dim=1)
    assert z.mean(0).tolist() == pytest.approx([0.5, 0.4], abs=0.06)
    one = torch.full((1, 1), 1.5)
    held = prior.sample_noise(3000, fixed={0: one}, generator=seed(0))
    assert (held[:, 0] == 1.5).all()
    assert prior.to_latents(held)[1].mean().item() == pytest.approx(0.6 * 1.5 + 0.1, abs=0.04)


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("sampler", ["sir", "langevin"])
def test_untrained_ncp_is_the_backbones_prior_at_a_temperature(sampler):
    """Held layers are exact at any."""
    prior = NCPPrior(RandomBackbone([(3,), (1, 2, 2)]), energy=SMALL, sampler=sampler, proposals=4, langevin=SHORT)
    u = prior.sample_noise(4000, temperature=0.5, generator=seed(0))
    assert u.std(0).tolist() == pytest.approx([0.5] * 7, abs=0.03)
    held = prior.sample_noise(4000, fixed={0: torch.full((1, 3), 1.5)}, temperature=0.5, generator=seed(0))
    assert (held[:, :3] == 1.5).all()
    assert held[:, 3:].std(0).tolist() == pytest.approx([0.5] * 4, abs=0.03)


def test_sir_weights():
    """Frequencies are the softmax of the weights, also where proposals are looked at in two parts."""
    log_weights = torch.tensor([0.0, 1.0, -2.0, 2.5, 0.5]).expand(40_000, 5)
    noise = torch.randn(40_000, 5, generator=seed(0))
    index, score = pick(log_weights, noise)
    frequencies = index.bincount(minlength=5) / 40_000
    torch.testing.assert_close(frequencies, log_weights[0].softmax(0), atol=0.01, rtol=0)
    (first, a), (second, b) = pick(log_weights[:, :2], noise[:, :2]), pick(log_weights[:, 2:], noise[:, 2:])
    assert torch.equal(torch.where(b > a, second + 2, first), index)
    assert torch.equal(torch.maximum(a, b), score)
    assert torch.isfinite(pick(torch.zeros(1, 3), torch.tensor([[-8.0, 0.0, 8.0]]))[1]).all()


def test_ncp_energies_are_compared_as_any():
    """Outlier scores, normalisers, recorded chains and compositions take them."""
    prior = randomize(NCPPrior(RandomBackbone(SHAPES), energy=SMALL, sampler="langevin", langevin=SHORT))
    images = torch.rand(3, 1, 2, 2, generator=seed(0))
    assert inference_scores(prior, images, generator=seed(0)).shape == (3, 2)
    assert torch.isfinite(diffusion_scores(prior, images, generator=seed(0))).all()
    assert torch.isfinite(log_normalizer(prior, torch.zeros(2, prior.dim), 0, generator=seed(0)).forward).all()
    run = langevin_transitions(prior, 4, steps=SHORT.steps, generator=seed(1))
    torch.testing.assert_close(run.samples, prior.sample_noise(4, generator=seed(1)))
    torch.testing.assert_close(run.energies[0, -1], prior.layer_energies(run.samples, 0))
    other = DiffusionEBMPrior(prior.backbone, schedule=prior.schedule, energy=SMALL, langevin=SHORT)
    assert not torch.equal(
        other.sample_noise(4, labels=Expert(prior), generator=seed(2)), other.sample_noise(4, generator=seed(2))
    )


@pytest.mark.parametrize("kind", [NCPPrior, LatentDiffusionPrior])
def test_priors_without_labels_have_no_methods_of_them(kind):
    prior = kind(RandomBackbone(SHAPES), energy=SMALL, langevin=SHORT)
    assert not any(hasattr(prior, name) for name in ("couple", "classify", "posterior_sample"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'coupling'"):
        kind(RandomBackbone(SHAPES), coupling=Coupling({"class": LabelSet(3)}))
    for name in ("labels", "guidance", "trajectory", *(["temperature"] if kind is LatentDiffusionPrior else [])):
        for draw in (prior.sample, prior.sample_noise):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                draw(1, **{name: None})
    u = prior.sample_noise(3, generator=seed(0))
    again = resample(prior, u, [0], generator=seed(1))
    assert torch.equal(again[:, :2], u[:, :2])
    assert not torch.equal(again, u)
    for given in ({"labels": {"class": 1}}, {"guidance": 2.0}):
        (name,) = given
        with pytest.raises(
            TypeError, match=rf"{name}: {kind.__name__}\.sample takes no {name}; take a DiffusionEBMPrior"
        ):
            resample(prior, u, [0], **given)


@pytest.mark.parametrize("kind", [JointEBMPrior, NCPPrior, LatentDiffusionPrior])
def test_networks_of_baselines_see_no_context(kind):
    backbone = RandomBackbone(SHAPES)
    assert not kind(backbone).has_context
    for energy in (TINY, [ContextEnergy(shape, TINY) for shape in SHAPES]):
        with pytest.raises(ValueError, match=rf"networks of a {kind.__name__} see no context"):
            kind(backbone, energy=energy)
    prior = kind(backbone, energy=SMALL, langevin=SHORT)
    with pytest.raises(ValueError, match="objective: "):
        prior.fit(torch.rand(8, 1, 2, 2, generator=seed(0)), iterations=1, objective="score", progress=False)


def test_ncp_activity_reaches_all_that_is_stacked():
    prior = NCPPrior(RandomBackbone([(2,), (1, 8, 8)]), energy=SMALL)
    assert prior.input_shapes == ((8,), (4, 8, 8))
    activity = torch.tensor([0.5, 0.1])
    prior.energies[0].set_activity(activity)
    torch.testing.assert_close(prior.energies[0].activity, activity.repeat(4))
    prior.energies[1].set_activity(torch.full((1, 8, 8), 0.3))
    assert (prior.energies[1].activity == 0.3).all()


def test_ncp_record_says_how_much_better_than_chance():
    prior = NCPPrior(RandomBackbone(SHAPES), energy=SMALL)
    found = prior.batch_loss(torch.randn(8, prior.dim, generator=seed(0)), None, seed(1))
    assert found.total.abs().max() < 1e-6
    assert found.recovery.abs().max() < 1e-6


def z_target(prior, z, z_next, t):
    """log of exp(F(z)) p0(z) N(z_next; alpha z, sigma^2), written out with torch's distributions."""
    parts = prior.split(z)
    gaussians = prior.backbone.transform.gaussians(parts)
    log_p0 = sum(
        torch.distributions.Normal(m, s).log_prob(z_i).flatten(1).sum(1)
        for z_i, (m, s) in zip(parts, gaussians, strict=True)
    )
    levels = torch.full((len(z),), t, dtype=torch.long)
    f = sum(network(z_i, levels) for network, z_i in zip(prior.energies, parts, strict=True))
    alpha, sigma = prior.schedule.alpha[t + 1].double(), prior.schedule.sigma[t + 1].double()
    return f + log_p0 + torch.distributions.Normal(alpha * z, sigma).log_prob(z_next).sum(1)


def test_z_space_target_against_autograd():
    prior = randomize(LatentDiffusionPrior(RandomBackbone(SHAPES, dtype=torch.float64), energy=SMALL).double())
    z, z_next = (torch.randn(4, 6, dtype=torch.float64, generator=seed(i)) for i in (0, 1))
    torch.testing.assert_close(prior.to_latents(z), prior.split(z))
    for t in range(3):
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(z_target(prior, leaf, z_next, t).sum(), leaf)
        torch.testing.assert_close(prior.conditional_score(z, z_next, t), expected, atol=1e-5, rtol=1e-5)
    images = prior.decode(z)
    direct = JointEBMPrior(RandomBackbone(SHAPES, dtype=torch.float64))
    torch.testing.assert_close(images, direct.decode(direct.to_noise(prior.split(z))))


@pytest.mark.usefixtures("counters")
def test_z_space_chain_of_a_linear_gaussian():
    """With F = 0 and one level, p(z) is the backbone's own prior: a Pair's covariance comes out."""
    settings = {
        "schedule": DiffusionSchedule.marginal(),
        "langevin": LangevinConfig(steps=120, step_size=0.06, integrator="strang"),
    }
    z = LatentDiffusionPrior(Pair((1,), (1,)), energy=[Quadratic(1), Quadratic(1)], **settings).sample_noise(
        2000, generator=seed(0)
    )
    torch.testing.assert_close(z.T.cov(), torch.tensor([[1.0, 1.0], [1.0, 1.25]]), atol=0.12, rtol=0)
    plain = LatentDiffusionPrior(Pair((1,), (1,)), energy=[Quadratic(1), Quadratic(1)], base="normal", **settings)
    torch.testing.assert_close(plain.sample_noise(2000, generator=seed(0)).T.cov(), torch.eye(2), atol=0.12, rtol=0)


def test_z_space_freezes_and_shares_the_backbone():
    backbone = RandomBackbone(SHAPES)
    prior = LatentDiffusionPrior(backbone, energy=SMALL, base="normal")
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    twin = copy.deepcopy(prior)
    assert twin.backbone is prior.backbone
    assert twin.base == "normal"
    del twin
    prior.release()
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())


def test_learned_parts_that_are_fixed_do_not_enter_the_records():
    prior = LatentDiffusionPrior(RandomBackbone(SHAPES), energy=SMALL, langevin=LangevinConfig(steps=2))
    assert prior.batch_loss(torch.randn(8, 6, generator=seed(0)), None, seed(1)).recovery.abs().max() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: GaussianMixturePrior(b, components=0), ValueError, "components: expected a positive integer, got 0"),
        (lambda b: GaussianMixturePrior(b, dims=0), ValueError, "dims: expected a positive integer, got 0"),
        (
            lambda b: GaussianMixturePrior(b, covariance="tied"),
            ValueError,
            'covariance: expected "diag" or "full", got \'tied\'',
        ),
        (
            lambda b: JointEBMPrior(b, chains="long"),
            ValueError,
            "chains: expected one of noise, persistent, got 'long'",
        ),
        (lambda b: JointEBMPrior(b, target="z"), ValueError, "target: expected one of u, published, got 'z'"),
        (lambda b: JointEBMPrior(b, kept=0), ValueError, "kept: expected a positive integer"),
        (lambda b: JointEBMPrior(b, renewal=2.0), ValueError, "renewal: expected a probability from 0 to 1, got 2.0"),
        (lambda b: NCPPrior(b, sampler="mala"), ValueError, 'sampler: expected "sir" or "langevin", got \'mala\''),
        (lambda b: NCPPrior(b, proposals=0), ValueError, "proposals: expected a positive integer"),
        (
            lambda b: NCPPrior(b).loss(torch.rand(2, 1, 2, 2), labels=torch.zeros(2)),
            ValueError,
            "labels: this prior is not coupled",
        ),
        (
            lambda b: LatentDiffusionPrior(b).loss(torch.rand(2, 1, 2, 2), labels=torch.zeros(2)),
            ValueError,
            "labels: this prior is not coupled",
        ),
        (lambda b: NCPPrior(b).sample(1, temperature=0.0), ValueError, "temperature: expected a positive number"),
        (lambda b: LatentDiffusionPrior(b, base="u"), ValueError, 'base: expected "backbone" or "normal", got \'u\''),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(RandomBackbone(SHAPES))
