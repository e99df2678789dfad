import contextlib
import copy
import math

import pytest
import torch
from backbones import ExactGaussian, IdentityBackbone, Quadratic, RandomBackbone, images_of
from helpers import IMAGES, TINY, seed
from stand_ins import perturb
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    DiffusionSchedule,
    DrawingConfig,
    EnergyConfig,
    ExecutionConfig,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.density.composition import AND, NOT, OR, Expert, Label, log_weight, make_condition
from hvae_ebm_prior.training.objective import SCORE, Objective
from hvae_ebm_prior.training.recovery import recovery_loss
from hvae_ebm_prior.training.score import score_loss

SETS = {"kind": LabelSet(("cup", "hat", "bag"), layers=(0, 1)), "smile": LabelSet(2, layers=(1,))}


CONTEXT = pytest.mark.parametrize("context", [False, True])


def tiny(coupling=None, context=False, **settings):
    torch.manual_seed(0)
    networks = EnergyConfig(context=context, width=8, vector_width=8)
    return DiffusionEBMPrior(
        RandomBackbone([(2,), (3,)]), energy=networks, langevin=LangevinConfig(steps=2), coupling=coupling, **settings
    )


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "context"])
def prior(request):
    """Energies and logits that matter."""
    prior = tiny(Coupling(SETS, networks=EnergyConfig(context=False, vector_width=8)), context=request.param)
    if request.param:
        return perturb(prior, scale=0.15)
    for name, parameter in prior.named_parameters():
        if "readout" in name:
            nn.init.normal_(parameter, std=0.5, generator=seed(len(name)))
    return prior


def seen(prior, u, t):
    """What the networks of every layer are given at noise and levels: latents and levels, or states and angles."""
    states = prior.transform.states(u)
    if prior.has_context:
        return states, prior.schedule.angle[t][:, None].expand(-1, 2)
    return [state.z for state in states], t


class Linear(nn.Module):
    """Logits w_y z: under label y the Gaussian prior becomes N(w_y, 1), but for the normaliser."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, z, t):
        return z.flatten(1) * self.weights


WEIGHTS = [-1.5, 0.3, 2.0]


def line(w=0.4, v=-0.1):
    """One dimension, one level, F = w z + v z^2 and linear logits: every density is an integral over a line."""
    settings = {"langevin": LangevinConfig(steps=120, step_size=0.1), "execution": ExecutionConfig(backend="naive")}
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,)), schedule=DiffusionSchedule.marginal(), energy=[Quadratic(1, w, v)], **settings
    )
    prior.couple(Coupling({"class": LabelSet(3)}))
    prior.heads["class"]["0"] = Linear(WEIGHTS)
    return prior


Z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
LOGITS = torch.stack([w * Z for w in WEIGHTS])
EVIDENCE = torch.log(torch.exp(LOGITS).sum(0)) - math.log(3)
LOG_P = torch.log(torch.exp(LOGITS) / torch.exp(LOGITS).sum(0))
F_HAT = 0.4 * Z - 0.1 * Z**2 + EVIDENCE


def moments(log_w):
    density = torch.exp(log_w - Z**2 / 2)
    mean = (density * Z).sum() / density.sum()
    return mean.item(), ((density * (Z - mean) ** 2).sum() / density.sum()).item()


def test_the_drift_under_labels_is_that_of_the_logits(prior):
    """METHOD: grad [log p^(u_0|u_1) + log p(y|u_0)] = grad <logits, y>, written from the networks by hand."""
    u = torch.randn(6, 5, generator=seed(0), requires_grad=True)
    kind, smile = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([1, 0, 1, 0, 1, 0])
    for level in range(3):
        t = torch.full((6,), level)
        condition = make_condition(prior, 6, {"kind": kind, "smile": smile}, 1.0, None)
        actual = torch.autograd.grad(condition.target(prior, t)(u, t).sum(), u)[0]
        x, at = seen(prior, u, t)
        logits = prior.heads["kind"]["0"](x[0], at) + prior.heads["kind"]["1"](x[1], at)
        by_hand = sum(network(x_i, at) for network, x_i in zip(prior.energies, x, strict=True)) + logits[range(6), kind]
        by_hand = by_hand + prior.heads["smile"]["1"](x[1], at)[range(6), smile]
        torch.testing.assert_close(actual, torch.autograd.grad(by_hand.sum(), u)[0])


def test_energy_is_the_logsumexp_over_labels(prior):
    u, t = torch.randn(4, 5, generator=seed(0)), torch.tensor([0, 1, 2, 0])
    x, at = seen(prior, u, t)
    total = torch.zeros(4)
    for kind in range(3):
        for smile in range(2):
            joint = sum(network(x_i, at) for network, x_i in zip(prior.energies, x, strict=True))
            joint = joint + (prior.heads["kind"]["0"](x[0], at) + prior.heads["kind"]["1"](x[1], at))[:, kind]
            total = total + (joint + prior.heads["smile"]["1"](x[1], at)[:, smile]).exp() / 6
    torch.testing.assert_close(prior.energy(u, t), -total.log())
    torch.testing.assert_close(prior.layer_energies(u, t).sum(1), prior.energy(u, t))
    # A set's term counts to the lowest of its layers, so the top layer's energy is its own network's alone.
    torch.testing.assert_close(prior.layer_energies(u, t)[:, 0], -prior.energies[0](x[0], at))


@CONTEXT
def test_coupling_afterwards_changes_nothing_yet(context):
    prior = tiny(context=context)
    perturb(prior.energies, scale=0.3)
    before, u = prior.sample_noise(3, generator=seed(0)), torch.randn(3, 5, generator=seed(2))
    score = prior.score(u, 1)
    prior.couple(Coupling(SETS))
    torch.testing.assert_close(prior.sample_noise(3, generator=seed(0)), before)
    torch.testing.assert_close(prior.score(u, 1), score)
    assert torch.allclose(prior.classify(IMAGES[:3], generator=seed(0))["kind"], torch.tensor(1 / 3))
    training = TrainingConfig(iterations=2, activity_images=0)
    prior.fit(IMAGES, labels={"kind": torch.arange(40) % 3}, training=training, progress=False, generator=seed(0))
    assert not torch.allclose(prior.score(u, 1), score)


@pytest.mark.parametrize(
    ("condition", "log_w"),
    [
        ({"class": 2}, F_HAT + LOG_P[2]),
        ({"class": torch.tensor(-1).expand(2000)}, F_HAT),
        (Label("class", 0) | Label("class", 1), F_HAT + torch.log(LOG_P[0].exp() + LOG_P[1].exp())),
        (~Label("class", 2), F_HAT + torch.log(1 - LOG_P[2].exp())),
        (
            NOT(OR(Label("class", 0), Label("class", 2)), 2.0),
            F_HAT + 2 * torch.log((1 - LOG_P[0].exp()) * (1 - LOG_P[2].exp())),
        ),
        (NOT(AND(Label("class", 0), NOT(Label("class", 1)))), F_HAT + torch.log((1 - LOG_P[0].exp()) + LOG_P[1].exp())),
        ("and", F_HAT + 0.9 * Z - 0.3 * Z**2),
        ("or", torch.logaddexp(F_HAT, 0.9 * Z - 0.3 * Z**2 - 0.5)),
        ("not", F_HAT - 1.5 * torch.log1p(torch.exp(0.9 * Z - 0.3 * Z**2 - 0.5))),
    ],
    ids=["label", "unknown", "or", "not", "not or", "not and", "experts and", "experts or", "experts not"],
)
def test_compositions_against_integration(condition, log_w):
    prior = line()
    other = DiffusionEBMPrior(prior.backbone, schedule=prior.schedule, energy=[Quadratic(1, 0.9, -0.3)])
    shifted = Expert(other, offset=0.5)
    if isinstance(condition, str):
        condition = {"and": AND(prior, other), "or": OR(prior, shifted), "not": AND(prior, NOT(shifted, 1.5))}[
            condition
        ]
    u = prior.sample_noise(2000, labels=condition, generator=seed(0))
    mean, variance = moments(log_w)
    assert u.mean().item() == pytest.approx(mean, abs=4 * (variance / 2000) ** 0.5 + 0.02)
    assert u.var().item() == pytest.approx(variance, rel=0.12)


@pytest.mark.usefixtures("counters")
def test_guidance_is_a_factor_on_the_log_probability():
    prior = line()
    u = prior.sample_noise(2000, labels={"class": 0}, guidance=2.5, generator=seed(0))
    mean, variance = moments(F_HAT + 2.5 * LOG_P[0])
    assert u.mean().item() == pytest.approx(mean, abs=0.07)
    assert u.var().item() == pytest.approx(variance, rel=0.12)
    nothing = prior.sample_noise(3, labels={"class": 0}, guidance=0.0, generator=seed(0))
    torch.testing.assert_close(nothing, prior.sample_noise(3, generator=seed(0)))


def test_not_is_bounded():
    """However sure a prior is, what NOT multiplies the density by is at most 1, and its force is no larger than that of
    the energy itself.
    """
    sampled, hostile = line(), line(w=50.0, v=0.0)
    z = torch.linspace(-8, 8, 101)[:, None].requires_grad_()
    t = torch.zeros(101, dtype=torch.long)
    values = {prior: prior.terms_at(t)(prior.transform.states(z), t) for prior in (sampled, hostile)}
    terms = values.__getitem__
    for part in (Label("class", torch.full((101,), 2)), Expert(hostile)):
        log_w = log_weight(NOT(part), sampled, terms)
        own = torch.autograd.grad(log_weight(part, sampled, terms).sum(), z, retain_graph=True)[0]
        force = torch.autograd.grad(log_w.sum(), z, retain_graph=True)[0]
        assert log_w.max() <= 0
        assert torch.isfinite(force).all()
        if isinstance(part, Expert):
            assert (force.abs() <= own.abs() * (1 + 1e-5)).all()


def test_held_layers_are_exact_under_labels(prior):
    u = prior.sample_noise(5, generator=seed(1))
    held = prior.split(u)[0]
    drawn = prior.sample_noise(5, fixed={0: held}, labels={"smile": 1}, generator=seed(0))
    assert torch.equal(prior.split(drawn)[0], held)
    assert not torch.allclose(prior.split(drawn)[1], prior.split(u)[1])


def test_labels_per_sample_at_any_chunking(prior):
    labels = {"kind": torch.tensor([0, 1, 2, -1, 1]), "smile": 1}
    whole = prior.sample(5, labels=labels, generator=seed(0))
    torch.testing.assert_close(
        prior.sample(5, labels=labels, chunk_size=2, generator=seed(0)), whole, atol=1e-5, rtol=0
    )
    single = prior.sample(2, labels={"kind": "hat", "smile": 1}, generator=seed(0))
    torch.testing.assert_close(single[1], whole[1], atol=1e-5, rtol=0)


def test_classify_is_the_mean_over_posterior_draws(prior):
    probabilities = prior.classify(IMAGES[:6], draws=3, generator=seed(0))
    assert {name: tuple(p.shape) for name, p in probabilities.items()} == {"kind": (6, 3), "smile": (6, 2)}
    g, expected = seed(0), 0
    for _ in range(3):
        x, at = seen(prior, prior.encode(IMAGES[:6], generator=g), torch.zeros(6, dtype=torch.long))
        expected = expected + torch.softmax(prior.heads["smile"]["1"](x[1], at), 1) / 3
    torch.testing.assert_close(probabilities["smile"], expected)


@CONTEXT
def test_levels_that_are_not_coupled_know_no_labels(context):
    prior = tiny(Coupling(SETS, levels=(0,), networks=EnergyConfig(vector_width=8)), context=context)
    perturb(prior.heads["kind"], scale=0.2)
    u, plain = torch.randn(4, 5, generator=seed(0)), tiny(context=context)
    for level in (1, 2):
        torch.testing.assert_close(prior.score(u, level), plain.score(u, level))
    assert not torch.allclose(prior.score(u, 0), plain.score(u, 0))
    states = prior.sample_noise(4, labels={"kind": 1}, trajectory=True, generator=seed(0))
    free = prior.sample_noise(4, trajectory=True, generator=seed(0))
    assert torch.equal(states[1], free[1])
    assert not torch.allclose(states[0], free[0])


def learns_nothing(networks, loss):
    gradients = torch.autograd.grad(loss.sum(), list(networks.parameters()), retain_graph=True, allow_unused=True)
    return all(gradient is None or bool((gradient == 0).all()) for gradient in gradients)


def test_unknown_labels_are_left_out_of_the_cross_entropy(prior):
    u = torch.randn(8, 5, generator=seed(0))
    labels = {"kind": torch.tensor([0.0, float("nan"), 2, -1, 1, float("nan"), 0, -1])}
    found = recovery_loss(prior, u, labels, seed(1))
    free = recovery_loss(prior, u, None, seed(1))
    assert found.labelled.sum() == 4
    torch.testing.assert_close(found.recovery, free.total)
    known = torch.tensor([0, 2, 4, 6])
    assert (found.cross_entropy[[1, 3, 5, 7]] == 0).all()
    assert (found.cross_entropy[known] > 0).all()
    torch.testing.assert_close(found.total, free.total + prior.coupling.weight * found.cross_entropy)
    # The smile's networks learn nothing of it, nor of unknown labels.
    assert learns_nothing(prior.heads["smile"], found.cross_entropy)


@pytest.mark.parametrize("objective", [SCORE, Objective(score=1.0, calibration=1.0)])
def test_images_without_labels_learn_in_score_matching_as_if_there_were_none(objective):
    prior = perturb(tiny(Coupling(SETS, networks=EnergyConfig(vector_width=8)), context=True), scale=0.15)
    u = torch.randn(8, 5, generator=seed(0))
    labels = {"kind": torch.tensor([0.0, float("nan"), 2, -1, 1, float("nan"), 0, -1])}
    found, free = (score_loss(prior, u, each, seed(1), None, objective) for each in (labels, None))
    unknown, known = slice(1, None, 2), slice(0, None, 2)
    assert found.labelled.tolist() == [1, 0] * 4
    assert (found.cross_entropy[unknown] == 0).all()
    assert (found.cross_entropy[known] > 0).all()
    torch.testing.assert_close(found.total[unknown], free.total[unknown])
    # With a label, every other noise level learns the energy under it.
    assert ((found.score - free.score)[known].abs() > 1e-4).all()
    torch.testing.assert_close(
        found.total,
        found.score + objective.calibration * found.calibration + prior.coupling.weight * found.cross_entropy,
    )
    assert learns_nothing(prior.heads["smile"], found.cross_entropy)
    assert not learns_nothing(prior.heads["kind"], found.cross_entropy)


class Classes(nn.Module):
    """Logits with context of classes that are Gaussians: each logit is the exact energy of its class."""

    context = True

    def __init__(self, means, std):
        super().__init__()
        self.classes = nn.ModuleList(ExactGaussian(0.0, mean, std) for mean in means)

    def forward(self, state, angles):
        return torch.stack([energy(state, angles) for energy in self.classes], dim=1)


def test_labels_of_exact_energies_are_drawn_from_layer_by_layer():
    """Two classes, N(-1, .6^2) and N(1, .6^2), as likely as each other, and a second layer that knows none."""
    schedule = DiffusionSchedule.from_snr([2000, 15, 3, 0])
    sets = {"side": LabelSet(("left", "right"), layers=(0,))}
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,), (1,)), schedule=schedule, energy=[ExactGaussian(0.0, 0.0, 1.0)] * 2
    )
    prior.couple(Coupling(sets))
    prior.heads["side"]["0"] = Classes((-1.0, 1.0), 0.6)
    for side, mean in (("left", -1.0), ("right", 1.0)):
        u = prior.sample_noise(6000, labels={"side": side}, generator=seed(0))
        assert u.mean(0).tolist() == pytest.approx([mean, 0.0], abs=0.05)
        assert u.std(0).tolist() == pytest.approx([0.6, 1.0], abs=0.03)
    u = prior.sample_noise(6000, generator=seed(0))
    assert (u[:, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert u[:, 0].std().item() == pytest.approx(math.hypot(1, 0.6), abs=0.03)
    nothing = prior.sample_noise(5, labels={"side": "left"}, guidance=0.0, generator=seed(0))
    torch.testing.assert_close(nothing, prior.sample_noise(5, generator=seed(0)))
    either = prior.sample_noise(6000, labels=Label("side", "left") | Label("side", "right"), generator=seed(0))
    torch.testing.assert_close(either, u, atol=1e-4, rtol=1e-4)
    at = torch.linspace(-1, 1, 5)
    found = prior.classify(images_of(torch.stack((at, 0 * at), dim=1)), generator=seed(0))["side"][:, 1]
    torch.testing.assert_close(found, torch.sigmoid(2 * at / 0.36), atol=0.01, rtol=0)


def test_cross_entropy_is_that_of_the_diffused_data(prior):
    """With chains and levels drawn under one seed, -log p(y | u_t) is what the networks say of alpha_bar_t u +
    sigma_bar_t eps.
    """
    u, smile = torch.randn(6, 5, generator=seed(0)), torch.tensor([0, 1, 1, 0, 1, 0])
    found = recovery_loss(prior, u, {"smile": smile}, seed(1))
    again = recovery_loss(prior, u, {"smile": 1 - smile}, seed(1))
    # exp(-CE) are the probabilities of the two labels of the same u_t: they add up to one.
    torch.testing.assert_close((-found.cross_entropy).exp() + (-again.cross_entropy).exp(), torch.ones(6))


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("objective", ["joint-recovery", "score", "score-recovery"])
def test_learning_finds_bayes_rule(objective):
    """Two Gaussian classes on a line, known a posteriori: p(y = 1 | z) = sigmoid(2 m z) for means -m and m and unit
    variances.
    """
    context = objective != "joint-recovery"
    m, g = 0.8, seed(0)
    y = torch.arange(2000) % 2
    z = m * (2 * y - 1) + torch.randn(2000, generator=g)
    images = images_of(z[:, None])
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,)),
        schedule=DiffusionSchedule.cosine(2),
        energy=EnergyConfig(context=context, vector_width=16, blocks=1),
        coupling=Coupling({"side": LabelSet(("left", "right"))}, networks=EnergyConfig(vector_width=16, blocks=1)),
        langevin=LangevinConfig(steps=4, step_size=0.4, start="gaussian"),
    )
    y = torch.where(torch.rand(2000, generator=g) < 0.5, y, -1)  # half of the labels are known
    training = TrainingConfig(
        iterations=120, batch_size=128, learning_rate=1e-2, warmup=20, ema_decay=0.95, recovery_share=0.3
    )
    history = prior.fit(images, labels=y, training=training, objective=objective, progress=False, generator=g)
    assert history[-1].cross_entropy < 0.69
    at = torch.linspace(-2, 2, 9)
    probability = prior.classify(images_of(at[:, None]), generator=g)["side"][:, 1]
    assert (probability - torch.sigmoid(2 * m * at)).abs().max() < 0.12
    right = prior.sample_noise(2000, labels={"side": "right"}, generator=g)
    assert right.mean().item() == pytest.approx(m, abs=0.25)
    if context:
        assert right.std().item() == pytest.approx(1, abs=0.15)


@CONTEXT
@pytest.mark.parametrize("kind", ["loader", "dataset", "dict"])
def test_labels_come_with_the_batches(kind, context):
    prior = tiny(Coupling({"kind": LabelSet(3)}), context=context)
    data = TensorDataset(IMAGES, torch.arange(40) % 3)
    if kind == "loader":
        data = DataLoader(data, 8)
    if kind == "dict":
        data = [(IMAGES[:8], {"kind": torch.arange(8) % 3})]
    history = prior.fit(data, iterations=3, progress=False, generator=seed(0))
    assert all(0 < record.cross_entropy < 3 for record in history)
    plain = tiny(context=context)
    assert all(
        math.isnan(record.cross_entropy) for record in plain.fit(data, iterations=2, progress=False, generator=seed(0))
    )


def test_copies_and_states_hold_the_label_networks(prior):
    new = copy.deepcopy(prior)
    assert not any(a is b for a, b in zip(new.parameters(), prior.parameters(), strict=True))
    torch.testing.assert_close(
        new.sample(2, labels={"kind": 1}, generator=seed(0)), prior.sample(2, labels={"kind": 1}, generator=seed(0))
    )
    fresh = tiny(Coupling(SETS, networks=EnergyConfig(context=False, vector_width=8)), context=prior.has_context)
    fresh.load_state_dict(prior.state_dict())
    torch.testing.assert_close(fresh.classify(IMAGES, generator=seed(0)), prior.classify(IMAGES, generator=seed(0)))
    with pytest.raises(RuntimeError, match="heads"):
        tiny().load_state_dict(prior.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.sample(2, labels={"colour": 1}), ValueError, "'colour'.*kind, smile"),
        (lambda p: p.sample(2, labels={"kind": 3}), ValueError, r"0\.\.2, got 3"),
        (lambda p: p.sample(2, labels={"kind": "shoe"}), ValueError, "cup, hat, bag.*'shoe'"),
        (lambda p: p.sample(2, labels={"smile": "yes"}), ValueError, r"an index 0\.\.1, got 'yes'"),
        (lambda p: p.sample(2, labels={"kind": 1.5}), TypeError, "index or name.*float"),
        (lambda p: p.sample(2, labels={"kind": torch.tensor([0, 1, 2])}), ValueError, r"shape \(2,\), got \(3,\)"),
        (lambda p: p.sample(2, labels={"kind": torch.tensor([0, 7])}), ValueError, "or -1 where unknown, got 7"),
        (lambda p: p.sample(2, labels=3), TypeError, "label set: category"),
        (lambda p: p.sample(2, labels={"kind": 1}, guidance=-1), ValueError, "guidance"),
        (lambda p: p.sample(2, labels=AND(p, Label("kind", 1)), guidance=2), ValueError, "strength"),
        (lambda p: p.sample(2, labels=AND(p, tiny())), ValueError, "same adapter object"),
        (lambda p: p.fit(IMAGES, labels=torch.zeros(40)), TypeError, "each of kind, smile"),
        (lambda p: p.fit(IMAGES, labels={"kind": torch.zeros(39)}), ValueError, r"shape \(40,\), got \(39,\)"),
        (lambda p: p.fit(TensorDataset(IMAGES), labels={"kind": torch.zeros(40)}), ValueError, "go with a tensor"),
        (lambda p: tiny().sample(2, labels={"kind": 1}), ValueError, "not coupled"),
        (lambda p: tiny().fit(IMAGES, labels=torch.zeros(40)), ValueError, "not coupled"),
        (lambda p: tiny().classify(IMAGES), ValueError, "not coupled"),
        (lambda p: tiny(Coupling({"kind": LabelSet(2, layers=(2,))})), ValueError, r"0 \(top\) to 1"),
        (lambda p: tiny(Coupling({"kind": LabelSet(2)}, levels=(3,))), ValueError, r"levels 0\.\.2"),
        (lambda p: LabelSet(1), ValueError, "at least two"),
        (lambda p: LabelSet(("a", "a")), ValueError, "distinct"),
        (lambda p: Coupling({}), TypeError, "LabelSet by name"),
        (lambda p: Coupling({"a b": LabelSet(2)}), ValueError, "letters"),
        (lambda p: p.couple("kind"), TypeError, "Coupling"),
        (lambda p: AND(), ValueError, "at least one"),
        (lambda p: OR(Label("kind", 1), 3), TypeError, "int"),
        (lambda p: NOT(p, 0), ValueError, "strength"),
    ],
)
def test_errors_say_what_is_wrong(prior, call, error, message):
    with pytest.raises(error, match=message):
        call(prior)


@pytest.mark.parametrize(("values", "warns"), [([1, -1, -1, 1], True), ([0, 1, -1, 1], False), ([1, 1, 1, 1], False)])
def test_labels_of_1_and_minus_1_are_noticed(values, warns):
    prior = DiffusionEBMPrior(IdentityBackbone((2,)), energy=TINY, coupling=Coupling({"smile": LabelSet(2)}))
    training = TrainingConfig(iterations=1, batch_size=4, activity_images=0)
    expected = pytest.warns(RuntimeWarning, match=r"labels 'smile': all are 1 or -1.*\(labels \+ 1\) // 2")
    with expected if warns else contextlib.nullcontext():
        images = images_of(torch.zeros(4, 2))
        prior.fit(images, labels={"smile": torch.tensor(values)}, training=training, progress=False)


# Names that a module has attributes of, or that Python or its dictionaries have a use for.
NAMES = ("type", "items", "training", "_modules", "class")


def test_label_sets_have_any_name(tmp_path):
    """They learn, draw and are saved as those of other names."""
    names = {True: NAMES, False: [f"set_{i}" for i in range(len(NAMES))]}
    settings = TrainingConfig(iterations=1, batch_size=4, activity_images=0)
    files = {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_every": 1, "progress": False}
    prior, plain = (
        tiny(
            Coupling({name: LabelSet(("a", "b"), layers=(1,)) for name in each}, networks=TINY),
            True,
            drawing=DrawingConfig(flow_steps=2),
        )
        for each in names.values()
    )
    labels = {name: (torch.arange(40) + i) % 2 for i, name in enumerate(NAMES)}
    prior.fit(IMAGES, labels=labels, training=settings, generator=seed(1), **files)
    others = {f"set_{i}": values for i, values in enumerate(labels.values())}
    plain.fit(IMAGES, labels=others, training=settings, generator=seed(1), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(prior.state_dict().values(), plain.state_dict().values(), strict=True))
    drawn = prior.sample(3, labels={"training": "b", "items": 0}, generator=seed(2))
    assert torch.equal(drawn, plain.sample(3, labels={"set_2": "b", "set_1": 0}, generator=seed(2)))
    assert prior.classify(IMAGES[:2], generator=seed(3)).keys() == set(NAMES)
    prior.save_pretrained(tmp_path / "saved")
    loaded = DiffusionEBMPrior.from_pretrained(tmp_path / "saved", backbone=RandomBackbone([(2,), (3,)]))
    for each in (loaded, copy.deepcopy(prior), prior.train().eval().double().float()):
        assert torch.equal(each.sample(3, labels={"training": "b", "items": 0}, generator=seed(2)), drawn)
    resumed = tiny(prior.coupling, True, drawing=DrawingConfig(flow_steps=2))
    resumed.fit(IMAGES, labels=labels, training=settings, generator=seed(1), resume=True, **files)
    assert all(torch.equal(value, prior.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.slow
def test_label_sets_of_any_name_can_be_compiled():
    prior = tiny(Coupling({name: LabelSet(2) for name in NAMES[:3]}))
    u, t = torch.randn(2, prior.dim, generator=seed(0)), torch.zeros(2, dtype=torch.long)
    assert torch.equal(torch.compile(prior._total, backend="eager")(u, t), prior._total(u, t))
