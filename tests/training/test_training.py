import math
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone, images_of
from helpers import IMAGES, TINY, seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    DiffusionSchedule,
    EnergyConfig,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
    TrainingDiverged,
    processes,
)
from hvae_ebm_prior.training import recovery
from hvae_ebm_prior.training.batches import Batches
from hvae_ebm_prior.training.guard import Guard
from hvae_ebm_prior.training.optimizer import learning_rate


def tiny_prior(**settings):
    torch.manual_seed(0)
    return DiffusionEBMPrior(
        RandomBackbone([(2,), (3,)]),
        energy=EnergyConfig(context=False, width=8),
        langevin=LangevinConfig(steps=2),
        **settings,
    )


def with_context(**settings):
    torch.manual_seed(0)
    return DiffusionEBMPrior(RandomBackbone([(2,), (3,)]), energy=TINY, langevin=LangevinConfig(steps=2), **settings)


EITHER = pytest.mark.parametrize("make", [tiny_prior, with_context])


def finite(prior):
    return all(torch.isfinite(parameter).all() for parameter in prior.parameters())


class Toy(IdentityBackbone):
    """z_1 = u_1, z_2 = tanh(z_1) + exp(0.4 tanh z_1) u_2: the layers are coupled and the map is nonlinear."""

    def top_down(self, batch_size):
        zero = torch.zeros(batch_size, 1)
        z_1 = yield zero, torch.ones_like(zero)
        z_2 = yield torch.tanh(z_1), torch.exp(0.4 * torch.tanh(z_1))
        return torch.cat((z_1, z_2), dim=1)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Embedding(3, 32)
        self.layers = nn.ModuleList([nn.Linear(1, 32), nn.Linear(32, 32), nn.Linear(32, 1)])
        nn.init.zeros_(self.layers[2].weight)

    def forward(self, z, t):
        h = nn.functional.silu(self.layers[0](z) + self.level(t))
        return self.layers[2](nn.functional.silu(self.layers[1](h))).squeeze(1)


def test_activity_is_the_part_of_the_variance_that_images_determine():
    """Posteriors mean a_d x + sqrt(1 - a_d^2) noise with x ~ N(0, 1) from the image: the determined part is a_d^2."""
    strength = torch.tensor([0.0, 0.3, 0.7, 0.95])

    class Posterior(IdentityBackbone):
        def infer(self, images):
            x = 20 * images[:, 0, 0, :1] - 10
            return [strength * x + (1 - strength**2).sqrt() * torch.randn(len(x), 4)]

    images = (torch.randn(4000, 1, 1, 1, generator=seed(0)) + 10) / 20
    prior = DiffusionEBMPrior(Posterior((4,)), langevin=LangevinConfig(steps=1))
    prior.fit(
        images.expand(-1, 1, 1, 4),
        training=TrainingConfig(iterations=1, batch_size=100, activity_images=4000),
        generator=seed(1),
    )
    activity = prior.energies[0].activity.clone()
    torch.testing.assert_close(activity, strength**2, atol=5 / 4000**0.5, rtol=0)
    # It is part of the state, and measured once.
    assert torch.equal(prior.state_dict()["energies.0.activity"], activity)
    prior.fit(
        images[:1].expand(8, 1, 1, 4), training=TrainingConfig(iterations=1, activity_images=8), generator=seed(1)
    )
    assert torch.equal(prior.energies[0].activity, activity)


@EITHER
def test_activity_can_be_left_unmeasured(make):
    prior = make()
    prior.fit(IMAGES, training=TrainingConfig(iterations=1, activity_images=0), generator=seed(0))
    assert all((network.activity == 1).all() for network in prior.energies)


@pytest.mark.usefixtures("counters")
def test_a_two_layer_toy_of_known_density_is_recovered():
    """The truth is p(z) proportional to exp(g_1(z_1) + g_2(z_2)) N(z_1) N(z_2 | z_1), drawn by rejection; the Gaussian
    prior is far from it.
    """
    g = seed(0)

    def draw(n):
        u = torch.randn(40 * n, 2, generator=g)
        z_1 = u[:, 0]
        z_2 = torch.tanh(z_1) + torch.exp(0.4 * torch.tanh(z_1)) * u[:, 1]
        # Two modes in z_1, a band in z_2; the tilt is bounded by 1, so accepting with its value is exact.
        accept = torch.exp(-((z_1.abs() - 1.2) ** 2) - (z_2 - 0.8) ** 2)
        kept = torch.rand(len(u), generator=g) < accept
        return torch.stack((z_1, z_2), dim=1)[kept][:n]

    data, truth = draw(4000), draw(4000)
    assert len(truth) == 4000
    torch.manual_seed(0)
    langevin = LangevinConfig(steps=8, step_size=0.3, start="gaussian")
    prior = DiffusionEBMPrior(Toy((1,), (1,)), energy=[Mlp(), Mlp()], langevin=langevin)
    gaussian = torch.cat(prior.to_latents(torch.randn(4000, 2, generator=g)), dim=1)
    training = TrainingConfig(iterations=80, batch_size=500, learning_rate=2e-2, warmup=5, ema_decay=0.85)
    prior.fit(images_of(data), training=training, generator=g, progress=False)
    ours = torch.cat(prior.to_latents(prior.sample_noise(4000, generator=g)), dim=1)

    def distance(a, b):
        """Kolmogorov-Smirnov distance, largest over 16 directions."""
        angles = torch.arange(16) * math.pi / 16
        directions = torch.stack((angles.cos(), angles.sin()))
        result = 0.0
        for x, y in zip((a @ directions).T, (b @ directions).T, strict=True):
            grid = torch.cat((x, y)).sort().values
            cdf = [torch.searchsorted(s.sort().values, grid, right=True) / len(s) for s in (x, y)]
            result = max(result, (cdf[0] - cdf[1]).abs().max().item())
        return result

    # Two sets of 4,000 draws from one law differ by 0.03 at the 5 % level in one direction.
    assert distance(truth, data) < 0.05
    assert distance(gaussian, data) > 0.25
    assert distance(ours, data) < 0.08


@EITHER
def test_history_callback_and_reproducibility(make):
    seen, runs = [], []
    for _ in range(2):
        prior = make()
        prior.load_state_dict({name: torch.full_like(value, 0.05) for name, value in prior.state_dict().items()})
        history = prior.fit(
            IMAGES,
            iterations=5,
            batch_size=8,
            progress=False,
            generator=seed(3),
            callback=lambda p, r: seen.append((p, r.iteration)),
        )
        runs.append((prior, [record.loss for record in history]))
    assert [iteration for _, iteration in seen] == [1, 2, 3, 4, 5] * 2
    assert seen[0][0] is runs[0][0]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))
    assert [record.iteration for record in history] == [1, 2, 3, 4, 5]
    assert history[0].seconds < history[-1].seconds


@pytest.mark.usefixtures("counters")
def test_gap_is_the_energy_of_chains_over_that_of_data():
    """Data at 3 and f(z) = z: the chains from far noise stay below, so their energy -z is higher than the data's."""
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,)),
        energy=[Quadratic(1, w=1.0)],
        schedule=DiffusionSchedule.marginal(),
        langevin=LangevinConfig(steps=40, step_size=0.2),
    )
    history = prior.fit(
        torch.full((512, 1, 1, 1), 0.65),
        iterations=1,
        batch_size=512,
        learning_rate=1e-6,
        generator=seed(0),
        progress=False,
    )
    # p(z) proportional to exp(z) N(z; 0, 1) is N(1, 1): energies -1 against -3.
    assert history[0].gaps[0] == pytest.approx(2.0, abs=0.25)
    assert history[0].loss == pytest.approx(-2.0, abs=0.25)


def test_the_prior_holds_a_moving_average():
    """With Adam at beta = 0 and a constant gradient sign the trainee moves by the learning rate at every step, so the
    average is known.
    """

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, z, t):
            return self.w * z[:, 0]

    # Data far to the right: the gradient of the loss is negative at every step.
    prior = DiffusionEBMPrior(IdentityBackbone((1,)), energy=[Linear()])
    settings = TrainingConfig(iterations=20, betas=(0.0, 0.0), warmup=0, final_learning_rate=1.0, ema_decay=0.9)
    prior.fit(torch.full((64, 1, 1, 1), 0.95), training=settings, learning_rate=1e-3, generator=seed(0), progress=False)
    average = 0.0
    for step in range(20):
        decay = min(0.9, (1 + step) / (10 + step))
        average += (1 - decay) * (1e-3 * step - average)
    assert prior.energies[0].w.item() == pytest.approx(average, rel=1e-4)


def test_learning_rate_warms_up_and_decays():
    config = TrainingConfig(iterations=101, warmup=9, learning_rate=1.0, final_learning_rate=0.1)
    assert learning_rate(config, 0, 0) == pytest.approx(0.1, rel=1e-3)
    assert max(learning_rate(config, step, 0) for step in range(101)) < 1
    assert learning_rate(config, 101, 0) == pytest.approx(0.1)
    for iterations, steps in ((19, 0), (400, 20), (2000, 100), (20_000, 100)):
        config = TrainingConfig(iterations=iterations, learning_rate=1.0, final_learning_rate=1.0)
        rates = [learning_rate(config, step, 0) for step in range(steps + 1)]
        assert rates == pytest.approx([(step + 1) / (steps + 1) for step in range(steps + 1)])
    for iterations, rate in ((100, 4e-3), (500, 4e-3), (1000, 2e-3 * 2**0.5), (2000, 2e-3), (20_000, 2e-3)):
        config = TrainingConfig(iterations=iterations, warmup=0, final_learning_rate=1.0)
        assert learning_rate(config, 0, 0) == pytest.approx(rate)
    paper = TrainingConfig(warmup=0, learning_rate=4e-5, final_learning_rate=1.0, epoch_decay=0.9)
    assert learning_rate(paper, 500, 2) == pytest.approx(4e-5 * 0.81)


def test_what_is_noted_of_a_training_has_the_numbers_that_follow_from_its_iterations():
    prior = DiffusionEBMPrior(IdentityBackbone((1,)))
    prior.fit(torch.full((8, 1, 1, 1), 0.5), iterations=1, objective="score", generator=seed(0), progress=False)
    assert (prior.trained.settings["learning_rate"], prior.trained.settings["warmup"]) == (4e-3, 0)


@EITHER
def test_gradient_norm_is_clipped(make, monkeypatch):
    norms = []
    original = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    history = make().fit(
        IMAGES,
        training=TrainingConfig(iterations=5, clip_norm=1e-3, activity_images=0),
        generator=seed(0),
        progress=False,
    )
    assert all(norm <= 1.001e-3 for norm in norms)
    assert max(record.gradient_norm for record in history) > 1e-3


@pytest.mark.parametrize(
    "data",
    [
        IMAGES,
        TensorDataset(IMAGES, torch.arange(40)),
        DataLoader(TensorDataset(IMAGES), batch_size=8),
        [IMAGES[:8], (IMAGES[8:16], "a label")],
    ],
)
@EITHER
def test_every_kind_of_data_trains(data, make):
    batch_size = 8 if isinstance(data, torch.Tensor | TensorDataset) else None
    history = make().fit(data, iterations=7, batch_size=batch_size, generator=seed(0), progress=False)
    assert len(history) == 7


def test_a_loader_has_its_own_batch_size():
    with pytest.raises(ValueError, match="batch_size: a DataLoader has batches of its own"):
        tiny_prior().fit(DataLoader(TensorDataset(IMAGES), batch_size=8), batch_size=4)


def test_one_pass_over_a_tensor_sees_every_image_once():
    images = torch.arange(40.0)[:, None, None, None].expand(40, 1, 2, 2) / 40
    batches = Batches(images, 8, seed(0))
    first, second = ([next(batches) for _ in range(5)] for _ in range(2))
    assert [epoch for _, _, epoch in first + second] == [0] * 5 + [1] * 5
    orders = [torch.cat([batch[:, 0, 0, 0] for batch, _, _ in part]) for part in (first, second)]
    assert all(torch.equal(order.sort().values, images[:, 0, 0, 0]) for order in orders)
    assert not torch.equal(*orders)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "data: expected images .* got int"),
        (IMAGES[:0], ValueError, "non-empty batch"),
        (IMAGES.byte(), TypeError, r"convert with images.float\(\) / 255"),
        (IMAGES * 3, ValueError, r"values in \[0, 1\]"),
        (IMAGES / 0, ValueError, "NaN or infinite pixels"),
        (TensorDataset(IMAGES[:0]), ValueError, "the dataset is empty"),
        (
            DataLoader(TensorDataset(IMAGES[:3]), batch_size=8, drop_last=True),
            ValueError,
            "DataLoader gave no batch in pass 1",
        ),
        (iter([IMAGES[:8]]), ValueError, "gave no batch in pass 2; it must hold images and allow several passes"),
        ([IMAGES[:8] * torch.nan], ValueError, "NaN or infinite pixels"),
    ],
)
def test_bad_data_is_refused_and_leaves_a_good_prior(data, error, message):
    prior = tiny_prior()
    with pytest.raises(error, match=message):
        prior.fit(data, training=TrainingConfig(iterations=3, batch_size=8), generator=seed(0), progress=False)
    assert finite(prior)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be a positive integer, got 0"),
        ({"batch_size": 1.5}, r"batch_size must be a positive integer, got 1\.5"),
        ({"learning_rate": 0.0}, r"learning_rate must be positive, got 0\.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_prior().fit(IMAGES, **settings)


@pytest.mark.parametrize(
    "settings", [{"final_learning_rate": 2.0}, {"ema_decay": 1.0}, {"warmup": -1}, {"clip_norm": 0.0}]
)
def test_bad_training_configs_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainingConfig(**settings)


@pytest.mark.parametrize("name", ["clip_norm", "weight_decay", "restarts"])
def test_none_stands_for_no_setting_but_those_that_follow_from_the_iterations(name):
    with pytest.raises(TypeError):
        TrainingConfig(**{name: None})


@EITHER
def test_absurd_learning_rate_ends_in_training_diverged_with_a_good_prior(make):
    prior = make()
    with (
        pytest.warns(RuntimeWarning, match="back to the last good state, learning rate now at most") as warned,
        pytest.raises(TrainingDiverged, match=r"diverged 3 times.*last good state. Lower learning_rate") as raised,
    ):
        prior.fit(
            IMAGES,
            training=TrainingConfig(iterations=200, warmup=0, restarts=2, activity_images=0),
            learning_rate=1e6,
            generator=seed(0),
            progress=False,
        )
    assert len(warned) == 2
    assert len(raised.value.history) >= 1
    assert finite(prior)
    assert torch.isfinite(prior.sample(4, generator=seed(0))).all()


class Faulty(nn.Module):
    """w . z, but for one call of the trainee's: a stand-in for the blow-up of a real run."""

    def __init__(self, call, value):
        super().__init__()
        self.w, self.call, self.value, self.calls = nn.Parameter(torch.full((), 1e-3)), call, value, 0

    def forward(self, z, t):
        self.calls += self.training
        factor = self.value if self.training and self.calls == self.call else 1.0
        return self.w * factor * z.flatten(1).sum(1)


# With two Langevin steps, step k calls the network 3k - 2 and 3k - 1 times in the chain and 3k times in the loss.
@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        (180, torch.nan, "the loss is nan"),
        (179, torch.nan, "Langevin chains are not finite"),
        (178, 1e9, "the energy gap between chains and data"),
    ],
)
def test_guard_goes_back_to_the_last_good_state(call, value, message):
    prior = DiffusionEBMPrior(
        IdentityBackbone((2,)), energy=[Faulty(call, value)], langevin=LangevinConfig(steps=2, drift_limit=math.inf)
    )
    averages, restored = {}, []

    def watch(prior, record):
        averages[record.iteration] = prior.energies[0].w.item()

    original = Guard.restore

    def restore(self, *args):
        original(self, *args)
        restored.append((self.prior.energies[0].w.item(), self.trainee.energies[0].w.item()))

    training = TrainingConfig(iterations=100, batch_size=8, learning_rate=1e-3, final_learning_rate=1.0, warmup=10)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(Guard, "restore", restore)
        history = prior.fit(
            torch.full((16, 1, 1, 2), 0.55), training=training, callback=watch, generator=seed(0), progress=False
        )
    assert len(caught) == 1
    assert re.search(
        f"step 60: .*{message}.*; back to the last good state, learning rate now at most 0.0005", str(caught[0].message)
    )
    # Snapshots are taken at steps 26 and 51 (0-based 25 and 50); at the failure of step 60 the one of step 26 had
    # outlived the next.
    assert restored == [(averages[26], averages[26])]
    assert len(set(averages.values())) > 90
    rates = [record.learning_rate for record in history]
    assert len(rates) == 100
    assert max(rates[:59]) == pytest.approx(1e-3)
    assert max(rates[59:]) == pytest.approx(5e-4)
    assert rates[59] < 1e-4
    assert all(math.isfinite(record.loss) for record in history)
    assert finite(prior)


@EITHER
def test_nan_images_in_mid_run_are_refused_and_the_backbone_is_given_back(make):
    prior = make()
    batches = [IMAGES[:8]] * 5 + [IMAGES[:8] * torch.nan]
    with pytest.raises(ValueError, match="8 of 8 hold NaN") as raised:
        prior.fit(batches, iterations=20, generator=seed(0), progress=False)
    assert finite(prior)
    adapter = prior.backbone
    assert not any(m.training for m in adapter.model.modules())
    # Also while the error's frames are alive.
    prior.release()
    assert all(m.training for m in adapter.model.modules())
    del raised


@pytest.mark.parametrize(
    ("make", "where"), [(tiny_prior, "callback"), (tiny_prior, "chain"), (with_context, "callback")]
)
def test_ctrl_c_leaves_the_moving_average(make, where, monkeypatch):
    prior, states = make(), []

    def keep(prior, record):
        states.append({name: value.clone() for name, value in prior.state_dict().items()})
        if where == "callback" and record.iteration == 12:
            raise KeyboardInterrupt

    chain, calls = recovery.draw_conditional, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if where == "chain" and len(calls) == 13:
            raise KeyboardInterrupt
        return chain(*args, **kwargs)

    monkeypatch.setattr(recovery, "draw_conditional", interrupted)
    training = TrainingConfig(iterations=30, activity_images=0)
    with pytest.raises(KeyboardInterrupt):
        prior.fit(IMAGES, training=training, generator=seed(0), progress=False, callback=keep)
    assert len(states) == 12
    assert all(torch.equal(value, states[-1][name]) for name, value in prior.state_dict().items())
    assert any(not torch.equal(value, states[0][name]) for name, value in prior.state_dict().items())
    assert torch.isfinite(prior.sample(2, generator=seed(0))).all()


def test_networks_without_parameters_cannot_be_trained():
    class Fixed(nn.Module):
        def forward(self, z, t):
            return -z.flatten(1).square().sum(1)

    with pytest.raises(ValueError, match="no parameters"):
        DiffusionEBMPrior(IdentityBackbone((2,)), energy=[Fixed()]).fit(torch.full((4, 1, 1, 2), 0.5), progress=False)


def test_progress_in_a_log_has_lines_with_loss_gap_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(processes, "LOG_SECONDS", 0.0)
    tiny_prior().fit(IMAGES, iterations=3, batch_size=8, generator=seed(0), progress=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss" in shown
    assert "gap " in shown
    assert re.search(r"prior: 2/3 after \d\d:\d\d, \d\d:\d\d left, loss [-\d.]+, gap [-\d.]+\n", shown)
    tiny_prior().fit(IMAGES, iterations=3, batch_size=8, generator=seed(0))
    assert capsys.readouterr().err == ""
    with_context().fit(IMAGES, iterations=3, batch_size=8, generator=seed(0), progress=True)
    shown = capsys.readouterr().err
    assert "loss" in shown
    assert "gap" not in shown, "there are no chains"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with_context().fit(IMAGES, iterations=3, batch_size=8, generator=seed(0), progress=True)
    assert re.search(r"3/3 .*\d\d:\d\d<\d\d:\d\d", capsys.readouterr().err), "on a terminal"


@pytest.mark.usefixtures("counters")
def test_quadratic_energy_is_learned_in_closed_form():
    """F = w u + v u^2 under the marginal schedule: of data of mean m and variance s^2 maximum likelihood is w = m / s^2
    and v = 1/2 - 1 / (2 s^2).
    """
    data = 1.0 + torch.randn(1000, 1, generator=seed(0))
    m, variance = data.mean().item(), data.var().item()
    prior = DiffusionEBMPrior(
        IdentityBackbone((1,)),
        energy=[Quadratic(1)],
        schedule=DiffusionSchedule.marginal(),
        langevin=LangevinConfig(steps=8, step_size=0.5),
    )
    training = TrainingConfig(
        iterations=60,
        batch_size=1000,
        learning_rate=0.1,
        betas=(0.5, 0.99),
        warmup=0,
        final_learning_rate=0.1,
        ema_decay=0.8,
    )
    prior.fit(images_of(data), training=training, generator=seed(1), progress=False)
    assert prior.energies[0].w.item() == pytest.approx(m / variance, abs=0.08)
    assert prior.energies[0].v.item() == pytest.approx(0.5 - 0.5 / variance, abs=0.04)
    u = prior.sample_noise(4000, generator=seed(2))
    assert u.mean().item() == pytest.approx(m, abs=0.1)
    assert u.std().item() == pytest.approx(variance**0.5, abs=0.1)


def test_a_coupled_prior_without_labels_is_warned_of():
    prior = DiffusionEBMPrior(RandomBackbone([(2,)]), energy=TINY, coupling=Coupling({"kind": LabelSet(3)}))
    with pytest.warns(UserWarning, match="coupled to kind, of which it will learn nothing, as no labels are given"):
        prior.fit(torch.rand(4, 1, 2, 2, generator=seed(0)), iterations=1, generator=seed(0), progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 1, 1, 2), np.float32), r"convert them with torch.from_numpy\(images\)"),
        (
            [{"pixels": torch.rand(4, 1, 1, 2)}],
            r"batches of images, or of \(images, labels\), got a mapping of pixels",
        ),
    ],
)
def test_other_data_are_refused_with_advice(data, message):
    with pytest.raises(TypeError, match=message):
        DiffusionEBMPrior(RandomBackbone([(2,)]), energy=TINY).fit(data, iterations=1, progress=False)


def test_a_seed_in_the_place_of_a_generator_is_told():
    with pytest.raises(TypeError, match=r"a torch.Generator, as torch.Generator\(\).manual_seed\(0\), got int"):
        DiffusionEBMPrior(RandomBackbone([(2,)]), energy=TINY).sample(2, generator=0)
