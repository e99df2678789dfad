"""Launches, counted exactly: PyTorch's operations that compute something, of which an update of the chain is one.

Counted on the CPU with counted noise, where operations are those of a GPU but for what runs on the CPU there too (the
levels). What the fused kernel launches for an update, one or two kernels, is counted in interpreted.py.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY, seed
from stand_ins import perturb
from torch.utils._python_dispatch import TorchDispatchMode

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, ExecutionConfig, LabelSet, LangevinConfig
from hvae_ebm_prior.chains import streams as streams_module
from hvae_ebm_prior.chains.graphs import Captured, Graphs
from hvae_ebm_prior.chains.langevin import langevin_chain
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.density import energy_model
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.training import loop
from hvae_ebm_prior.training.objective import SCORE
from hvae_ebm_prior.training.score import layers_loss
from hvae_ebm_prior.training.score_data import draw_data
from hvae_ebm_prior.training.step import training_step

CPU = torch.device("cpu")
# Operations whose number is not that of another version of PyTorch.
THIS_TORCH = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counts of PyTorch 2.13")


class Launches(TorchDispatchMode):
    """Counts operations by name, but for those that make no more than a view or empty memory."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function._schema.returns
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in returned)
        name = str(function).removeprefix("aten.").removeprefix("hvae_ebm_prior.").removesuffix(".default")
        if not views and not name.startswith(("detach", "empty", "new_empty")):
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "updates"),
    [
        (LangevinConfig(), 1),
        (LangevinConfig(integrator="strang"), 1),
        (LangevinConfig(integrator="leimkuhler-matthews"), 1),
        (PRESETS["joint-recovery"].langevin, 7),
        (PRESETS["paper-cifar10"].langevin, 1),
    ],
)
def test_a_step_is_its_updates_and_nothing_else(config, updates):
    """Beside the gradients, which are none here: drift limit, counting of steps, shorter steps and all."""
    whole, own, t = torch.randn(4, 40, generator=seed(0)), torch.randn(4, 8, generator=seed(1)), torch.arange(4) % 3

    def launches(steps):
        settings = {"schedule": PRESETS["paper-cifar10"].schedule, "config": replace(config, steps=steps)}
        streams = open_streams(1, range(4), CPU, torch.float32, "naive")
        with Launches() as counted:
            langevin_chain(lambda u: whole, whole, t, streams=streams, top=(8, lambda u: own), **settings)
        return counted.names

    launches(2), launches(3)  # tables of coefficients are made once
    assert launches(3) - launches(2) == Counter({"drawn_update": updates})
    assert launches(2).total() - 2 * updates <= 24


def count_iterations(preset, iterations, monkeypatch, graph=False, **settings):
    """Launches of every iteration of training on a small backbone, by name; those of a graph are not counted."""
    counts, step = [], training_step

    def counting(run, began):
        with Launches() as counted:
            record = step(run, began)
        counts.append(counted.names)
        return record

    monkeypatch.setattr(loop, "training_step", counting)
    monkeypatch.setattr(streams_module, "philox_levels", lambda key, step, stream, n, levels: torch.arange(n) % levels)
    torch.manual_seed(0)
    backbone = RandomBackbone([(4,), (2, 8, 8)])
    energy = replace(preset.energy, width=8, vector_width=8)
    prior = perturb(
        DiffusionEBMPrior(
            backbone,
            schedule=preset.schedule,
            langevin=replace(preset.langevin, **settings),
            energy=energy,
            execution=ExecutionConfig(backend="naive", graph=graph),
        )
    )
    training = replace(preset.training, batch_size=4, activity_images=0, gap_limit=math.inf)
    images = torch.rand(8, 1, 2, 2, generator=seed(0))
    prior.fit(images, training=training, iterations=iterations, generator=seed(1), progress=False)
    return counts


def test_noise_of_an_iteration_is_one_launch_a_draw(monkeypatch):
    """Default: contexts, and one draw a layer; with the chains' states, twice, and their start. Of the paper: u_t and
    u_{t+1}.
    """
    default = count_iterations(PRESETS["default"], 10, monkeypatch)
    paper = count_iterations(PRESETS["paper-cifar10"], 2, monkeypatch, steps=3)
    assert [counted["drawn_noise"] for counted in default] == [3] * 9 + [3 + 3]
    assert [counted["drawn_update"] for counted in default] == [0] * 9 + [5]
    assert [counted["drawn_noise"] for counted in paper] == [2, 2]
    assert [counted["drawn_update"] for counted in paper] == [3, 3]


@THIS_TORCH
def test_a_whole_iteration(monkeypatch):
    """Every launch: of the default by the score, and in the end with chains beside it; of the paper, with one step
    and with one more.
    """
    default = [counted.total() for counted in count_iterations(PRESETS["default"], 10, monkeypatch)]
    paper = [count_iterations(PRESETS["paper-cifar10"], 4, monkeypatch, steps=steps)[3].total() for steps in (3, 4)]
    found = SimpleNamespace(score=default[7], recovery=default[9], paper=paper[0], paper_step=paper[1] - paper[0])
    assert found == SimpleNamespace(score=2151, recovery=3826, paper=2540, paper_step=168)


@THIS_TORCH
@pytest.mark.parametrize("graph", [False, True])
def test_a_whole_iteration_with_adam_as_on_a_gpu(graph, monkeypatch):
    """Beside the graphs, which replay nothing here: posterior draws, the walk, noise, copies and Adam."""
    monkeypatch.setattr(energy_model, "Graphs", partial(Graphs, lambda function: Captured(lambda: None, function())))
    # On a GPU Adam moves all weights by a few launches.
    monkeypatch.setattr(torch.optim, "Adam", partial(torch.optim.Adam, foreach=True))
    counts = count_iterations(PRESETS["default"], 20, monkeypatch, graph)
    found = SimpleNamespace(score=counts[10].total(), recovery=counts[19].total())
    expected = {False: SimpleNamespace(score=1679, recovery=3351), True: SimpleNamespace(score=436, recovery=947)}
    assert found == expected[graph]
    # Of them numbers that are read: those of the record and the checks, and of Adam, which has its own on the host.
    assert counts[10]["_local_scalar_dense"] == 158


# What waits for the device, or brings something there.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh_copy"}


def test_what_a_graph_captures_waits_for_nothing(monkeypatch):
    """No number is read: a capture would fail of it."""
    names = Counter()

    def record(function):
        with Launches() as counted:
            results = function()
        names.update(counted.names)
        return Captured(lambda: None, results)

    monkeypatch.setattr(energy_model, "Graphs", partial(Graphs, record))
    count_iterations(PRESETS["default"], 10, monkeypatch, graph=True)
    assert names["drawn_update"] == 5
    assert names["convolution"] > 20
    assert not names.keys() & {*WAITS, "_to_copy"}


def test_the_score_brings_nothing_to_the_device():
    """On the device without memory a number cannot be read, and nothing of the host's can be computed with; nothing is
    copied there either.
    """
    coupling = Coupling({"kind": LabelSet(3, layers=(0, 1))}, networks=TINY)
    prior = DiffusionEBMPrior(RandomBackbone([(2,), (1, 5, 5), (1, 16, 16)]), energy=TINY, coupling=coupling)
    u, labels = torch.randn(4, prior.dim, generator=seed(0)), {"kind": torch.tensor([0, 1, -1, 2])}
    data = draw_data(prior, u, None, labels, range(4), seed(1), SCORE)
    prior.energies.to("meta"), prior.heads.to("meta")
    prior.schedule.on(torch.device("meta"), torch.float32)  # which it has been since the first loss
    data = data.like([x.to("meta") for x in data.tensors()])
    with Launches() as counted:
        total = layers_loss(prior, data, SCORE, start=0)[0].sum()
        torch.autograd.grad(total, list(prior.parameters()), allow_unused=True)
    assert counted.names["convolution_backward"] > 20
    assert not counted.names.keys() & {*WAITS, "_to_copy", "copy_"}
