"""Kept graphs, with a recorder that runs the function again where a replay would: the bits of the plain way, whatever
changed between calls.
"""

import math
from functools import partial

import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY, seed
from stand_ins import perturb

from hvae_ebm_prior import (
    AND,
    Coupling,
    DiffusionEBMPrior,
    DrawingConfig,
    EnergyConfig,
    ExecutionConfig,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.chains.autograd import walk_gradient
from hvae_ebm_prior.chains.graphs import KEPT, Captured, Graphs
from hvae_ebm_prior.chains.langevin import langevin_chain
from hvae_ebm_prior.chains.schedule import DiffusionSchedule
from hvae_ebm_prior.chains.streams import open_streams
from hvae_ebm_prior.density import energy_model
from hvae_ebm_prior.training.objective import SCORE
from hvae_ebm_prior.training.score import score_loss

CPU = torch.device("cpu")


class Recorder:
    """Captures by running; a replay runs again and writes where the first results are. Every graph is replayed once
    to be checked.
    """

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function):
        self.captured += 1
        results = function()

        def replay():
            self.replayed += 1
            for place, value in zip(results, function(), strict=True):
                place.copy_(value)

        return Captured(replay, results)


@pytest.fixture
def recorder(monkeypatch):
    """Takes the place of CUDA's in every prior made from here on."""
    recorder = Recorder()
    monkeypatch.setattr(energy_model, "Graphs", partial(Graphs, recorder))
    return recorder


def test_inputs_are_copied_and_results_are_the_callers_own():
    recorder = Recorder()
    graphs = Graphs(recorder)
    weight = torch.tensor([2.0])
    results = []
    for value in (1.0, 5.0, 7.0):
        x = torch.full((2, 3), value)
        results += graphs.run("double", lambda x, nothing: [weight * x], (x, None))
        x.zero_()
    assert [result[0, 0].item() for result in results] == [2.0, 10.0, 14.0]
    # What stays in place is read anew.
    weight.fill_(3.0)
    assert graphs.run("double", None, (torch.ones(2, 3), None))[0][0, 0] == 3.0
    assert (recorder.captured, recorder.replayed) == (1, 4)
    graphs.run("double", lambda x, nothing: [x], (torch.ones(3, 3), None))
    graphs.run("other", lambda x, nothing: [x], (torch.ones(2, 3), None))
    assert recorder.captured == 3


def test_graphs_that_were_not_used_for_long_are_dropped():
    recorder = Recorder()
    graphs = Graphs(recorder)
    for i in (*range(KEPT), 0, KEPT, 0, 1):
        graphs.run(i, lambda x: [x + 1], (torch.zeros(1),))
    assert (recorder.captured, recorder.replayed) == (KEPT + 2, KEPT + 2 + 2)


@pytest.mark.parametrize("integrator", ["exponential", "strang", "leimkuhler-matthews"])
@pytest.mark.parametrize(("top_steps", "split"), [(1, 3), (2, 3), (3, 7)])
def test_a_kept_chain_has_the_bits_of_a_plain_one(integrator, top_steps, split):
    """Three chains of other states, levels, targets, held states and noise, one after the other on the same streams."""
    schedule, config = DiffusionSchedule.cosine(3), LangevinConfig(4, integrator=integrator, top_steps=top_steps)
    recorder = Recorder()
    keep = partial(Graphs(recorder).run, "chain")
    results = []
    for how in (None, keep):
        streams, ends = open_streams(4, range(5), CPU, torch.float32, "naive"), []
        for k in range(3):
            g = seed(k)
            u_next, centre, value = (torch.randn(5, 7, generator=g) for _ in range(3))
            t = torch.randint(3, (5,), generator=g)
            end = langevin_chain(
                lambda u, centre: 3 * (centre - u).sin(),
                u_next,
                t,
                schedule=schedule,
                config=config,
                streams=streams,
                hold=(torch.arange(7) % 3 == k, value),
                top=(split, lambda a, centre: (centre[:, : a.shape[1]] - a).sin()),
                inputs=(centre,),
                keep=how,
            )
            ends += [end, streams.normal(2)]
        results.append(ends)
    assert all(map(torch.equal, *results))
    assert (recorder.captured, recorder.replayed) == (1, 3)


def make_prior(context, graph, drawing=None, **langevin):
    torch.manual_seed(0)
    energy = TINY if context else EnergyConfig(context=False, width=8, vector_width=8, spectral_norm=True)
    prior = DiffusionEBMPrior(
        RandomBackbone([(2,), (1, 5, 5), (1, 5, 5)]),
        energy=energy,
        langevin=LangevinConfig(steps=3, **langevin),
        execution=ExecutionConfig(backend="naive", graph=graph),
    )
    if drawing is not None:
        prior.drawing = drawing
    return perturb(prior)


@pytest.mark.parametrize(
    ("context", "drawing", "settings"),
    [
        (True, DrawingConfig(flow_steps=4), {}),
        (True, DrawingConfig(flow_steps=4), {"temperature": 0.8, "tempering": "before"}),
        (True, DrawingConfig(flow_steps=0), {}),
        (True, DrawingConfig(ancestral=False), {}),
        (False, None, {"temperature": 0.8}),
    ],
)
def test_samples_from_graphs_are_the_plain_ones(context, drawing, settings, recorder, monkeypatch):
    """In chunks, the last of which is smaller, twice, and after the weights moved in place."""
    monkeypatch.setattr(DiffusionEBMPrior, "samples_per_chunk", 2)
    results = []
    for graph in (False, True):
        prior = make_prior(context, graph, drawing, top_steps=1 if context else 2)
        draws = [prior.sample_noise(5, generator=seed(k), **settings) for k in range(2)]
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.mul_(1.2)
        draws.append(prior.sample_noise(5, generator=seed(0), **settings))
        results.append(draws)
    assert all(map(torch.equal, *results))
    assert not torch.equal(results[1][0], results[1][2])
    # By layer three networks and two sizes of chunks, together one size and all levels alike; nothing again.
    assert recorder.captured == (6 if context and drawing.ancestral is None else 1)
    assert recorder.replayed > 3 * recorder.captured


def train(graph, context=True, **settings):
    """Weights after four iterations."""
    prior = make_prior(context, graph)
    prior.fit(
        torch.rand(12, 1, 2, 2, generator=seed(0)),
        training=TrainingConfig(iterations=4, gap_limit=math.inf, **{"batch_size": 4} | settings),
        generator=seed(1),
        progress=False,
    )
    return list(prior.parameters())


@pytest.mark.parametrize(
    ("context", "objective"), [(True, "score"), (True, "recovery"), (True, "joint-recovery"), (False, None)]
)
def test_training_from_graphs_is_the_plain_one(context, objective, recorder):
    """Weights after some iterations, in which a graph of the first one's chain, or loss, serves all."""
    results = [train(graph, context, objective=objective) for graph in (False, True)]
    assert all(map(torch.equal, *results))
    assert (recorder.captured, recorder.replayed) == (1, 4)


def test_scores_from_graphs_by_parts_and_with_chains_beside(recorder):
    """Parts of a batch calibrate other images, so each has a graph of its own; then the chains have one more."""
    plain, parts = train(False, objective="score"), {"objective": "score", "batch_size": 6, "micro_batch": 3}
    assert recorder.captured == 0
    torch.testing.assert_close(train(True, **parts), train(False, **parts))
    assert (recorder.captured, recorder.replayed) == (2, 8)
    beside = {"objective": "score-recovery", "recovery_share": 0.5}
    torch.testing.assert_close(train(True, **beside), train(False, **beside))
    assert (recorder.captured, recorder.replayed) == (4, 8 + 4 + 2)
    assert not all(map(torch.equal, plain, train(True, **beside)))


def test_networks_in_other_memory_are_captured_anew(recorder):
    prior = make_prior(False, True)
    u = prior.sample_noise(2, generator=seed(0))
    prior.energies[0] = make_prior(False, False).energies[0]
    assert torch.equal(prior.sample_noise(2, generator=seed(0)), u)
    assert recorder.captured == 2


def test_conditions_run_without_a_graph(recorder):
    """A composition has tensors of its own; its samples are those without graphs."""
    draws = []
    for graph in (False, True):
        prior = make_prior(True, graph)
        draws.append(prior.sample_noise(2, labels=AND(prior, prior), generator=seed(0)))
    assert torch.equal(*draws)
    assert recorder.captured == 0


def test_gradients_take_inputs():
    u, a = torch.randn(2, 3, generator=seed(0)), torch.randn(2, 3, generator=seed(1))
    torch.testing.assert_close(walk_gradient(lambda u, a: (a * u**2).sum(), u, a), 2 * a * u)


def test_scores_of_labels_from_graphs(recorder):
    """Gradients of a loss of other noise and labels than the graph was captured with, some of them unknown."""
    coupling = Coupling({"kind": LabelSet(3, layers=(0, 1)), "smile": LabelSet(2, layers=(2,))}, networks=TINY)
    found = []
    for graph in (False, True):
        execution = ExecutionConfig(backend="naive", graph=graph)
        torch.manual_seed(0)
        backbone = RandomBackbone([(2,), (1, 5, 5), (1, 5, 5)])
        prior = perturb(DiffusionEBMPrior(backbone, energy=TINY, coupling=coupling, execution=execution))
        for labels in ([0, 1, 2, -1], [2, -1, 0, 1]):
            u = torch.randn(4, prior.dim, generator=seed(labels[0]))
            prior.zero_grad()
            loss = score_loss(prior, u, {"kind": torch.tensor(labels)}, seed(labels[1]), None, SCORE)
            (2.5 * loss.total.mean()).backward()
        found.append([loss.total.detach(), loss.cross_entropy, *(x.grad for x in prior.parameters())])
    for plain, from_graph in zip(*found, strict=True):
        if plain is None or from_graph is None:  # those of "smile", of which no labels are given, say nothing alone
            assert plain is from_graph
        else:
            torch.testing.assert_close(from_graph, plain)
    assert (recorder.captured, recorder.replayed) == (1, 2)


def test_a_graph_that_gives_other_numbers_is_not_used():
    def record(function):
        return Captured(lambda: None, [1.03 * x for x in function()])

    graphs = Graphs(record)
    with pytest.warns(RuntimeWarning, match=r"graph \(chain\) gives other numbers .* without a graph"):
        first = graphs.run(("chain", 3), lambda x: [2 * x], (torch.ones(2),))
    second = graphs.run(("chain", 3), lambda x: [2 * x], (torch.full((2,), 4.0),))
    assert [first[0].tolist(), second[0].tolist()] == [[2, 2], [8, 8]]


def test_what_cannot_be_compared_is_captured_the_next_time():
    recorder = Recorder()
    graphs = Graphs(recorder)
    for value, captured in ((math.inf, 0), (1.0, 1), (math.inf, 1)):
        (result,) = graphs.run("inverse", lambda x: [1 / x], (torch.tensor([1 / value]),))
        assert (result.item(), recorder.captured) == (value, captured)


def test_a_loss_from_a_graph_in_a_loop_of_ones_own(recorder):
    """Samples that do not weigh alike have no gradient; frozen weights, other sizes and a mode are captured anew, also
    while an earlier loss is alive; restored weights are not.
    """
    prior, plain = make_prior(True, True), make_prior(True, False)
    images = torch.rand(4, 1, 2, 2, generator=seed(0))
    loss = prior.loss(images, generator=seed(1))
    (loss * torch.tensor([1.0, 2, 1, 1])).sum().backward()
    assert all(x.grad is None or x.grad.isnan().all() for x in prior.parameters())
    assert sum(x.grad is not None for x in prior.parameters()) > 20
    prior.load_state_dict(prior.state_dict())
    prior.loss(images, generator=seed(2))
    assert (recorder.captured, recorder.replayed) == (1, 2)
    for k, change in enumerate((lambda x: None, lambda x: x.energies[1].requires_grad_(False), lambda x: x.train())):
        for each in (prior, plain):
            change(each)
            each.zero_grad()
            each.loss(images[: 4 - k], generator=seed(3)).mean().backward()
        for x, y in zip(prior.parameters(), plain.parameters(), strict=True):
            assert (x.grad is None) == (y.grad is None)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, y.grad)
    assert recorder.captured == 3
    prior.requires_grad_(False)
    torch.testing.assert_close(*(each.loss(images, generator=seed(3)) for each in (prior, plain)))
    assert recorder.captured == 3
