"""Saved priors: what comes back is what was saved, over the backbone that it was saved for."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import Pair, Quadratic, RandomBackbone
from helpers import TINY, seed
from safetensors.torch import load_file, save_file
from torch import nn

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    DiffusionSchedule,
    DrawingConfig,
    EnergyConfig,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.baselines import GaussianPrior, JointEBMPrior, LatentDiffusionPrior, NCPPrior
from hvae_ebm_prior.saving.fingerprint import BackboneMismatch, fingerprint
from hvae_ebm_prior.saving.typed_json import InvalidPrior
from hvae_ebm_prior.training.learned_prior import LearnedPrior

SHAPES = ((2, 5, 5), (3,))
SMALL = EnergyConfig(context=False, width=4, vector_width=4, blocks=1)
# Written by the first version of the format, with the numbers of its samples; never to be written again.
FIXTURE = Path(__file__).parents[1] / "data" / "prior_schema_1"


def randomised(prior, scale=0.2):
    with torch.no_grad():
        generator = seed(5)
        for parameter in prior.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for network in prior.energies:
            for value in (buffer for buffer in network.buffers() if buffer.is_floating_point()):
                value.copy_(0.1 + 0.9 * torch.rand(value.shape, generator=generator))
    return prior


def make_prior(**changes):
    settings = {
        "schedule": DiffusionSchedule.cosine(2),
        "langevin": LangevinConfig(steps=2, drift_limit=float("inf")),
        "energy": SMALL,
    }
    return randomised(DiffusionEBMPrior(RandomBackbone(SHAPES), **settings | changes))


COUPLING = Coupling(
    {"kind": LabelSet(("cup", "hat")), "size": LabelSet(3, layers=(1,))}, levels=(0,), weight=0.5, networks=SMALL
)
PRIORS = {
    "plain": make_prior,
    "coupled": lambda: make_prior(coupling=COUPLING),
    "spectral norm": lambda: make_prior(energy=replace(SMALL, spectral_norm=True)),
    "default": lambda: randomised(DiffusionEBMPrior(RandomBackbone(SHAPES)), scale=0.04),
    "context": lambda: make_prior(energy=TINY, drawing=DrawingConfig(flow_steps=7)),
    "context, chains by layer": lambda: make_prior(energy=TINY, drawing=DrawingConfig(True, flow_steps=0)),
    "context, all layers": lambda: make_prior(
        energy=TINY, drawing=DrawingConfig(ancestral=False), coupling=replace(COUPLING, networks=TINY)
    ),
    "context, coupled": lambda: make_prior(energy=TINY, coupling=replace(COUPLING, levels=None)),
    "ncp by proposals": lambda: randomised(NCPPrior(RandomBackbone(SHAPES), proposals=5, energy=SMALL)),
    "ncp": lambda: randomised(NCPPrior(RandomBackbone(SHAPES), sampler="langevin", energy=SMALL)),
    "joint": lambda: randomised(
        JointEBMPrior(RandomBackbone(SHAPES), chains="persistent", target="published", renewal=0.25, energy=SMALL)
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_round_trip_is_exact(name, tmp_path):
    prior = PRIORS[name]()
    prior.save_pretrained(tmp_path)
    loaded = type(prior).from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))
    assert type(LearnedPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))) is type(prior)
    assert type(loaded) is type(prior)
    assert loaded.settings() == prior.settings()
    assert loaded.coupling == prior.coupling
    assert loaded.state_dict().keys() == prior.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in prior.state_dict().items())
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    labels = {"kind": "hat"} if prior.coupling else {}
    options = {"labels": labels} if labels else {}
    assert torch.equal(prior.sample(3, generator=seed(1), **options), loaded.sample(3, generator=seed(1), **options))


@pytest.mark.parametrize("energy", [SMALL, TINY])
def test_a_fresh_process_draws_the_same(energy, tmp_path):
    prior = make_prior(energy=energy, coupling=COUPLING)
    prior.save_pretrained(tmp_path)
    code = f"""
        import json, torch
        from backbones import RandomBackbone
        from hvae_ebm_prior import DiffusionEBMPrior
        prior = DiffusionEBMPrior.from_pretrained({str(tmp_path)!r}, backbone=RandomBackbone({SHAPES}))
        print(json.dumps(prior.sample(3, generator=torch.Generator().manual_seed(1)).flatten().tolist()))
    """
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == prior.sample(3, generator=seed(1)).flatten().tolist()


def test_what_the_first_version_wrote_still_loads():
    prior = DiffusionEBMPrior.from_pretrained(FIXTURE, backbone=RandomBackbone(SHAPES))
    expected = load_file(FIXTURE / "expected.safetensors")
    torch.testing.assert_close(prior.energy(expected["u"], 1), expected["energy"])
    torch.testing.assert_close(
        prior.sample(4, labels={"kind": "hat"}, generator=seed(3)), expected["samples"], rtol=1e-4, atol=1e-5
    )
    assert prior.trained.iterations == 7
    assert prior.trained.settings["clip_norm"] == 10.0
    assert not prior.has_context
    assert prior.drawing == DrawingConfig()


def without_names(values, names):
    """JSON values without the fields of these names."""
    if isinstance(values, dict):
        return {name: without_names(value, names) for name, value in values.items() if name not in names}
    return values


@pytest.mark.parametrize("name", ["plain", "coupled", "spectral norm", "ncp", "ncp by proposals", "joint"])
def test_files_from_before_energies_with_context_are_of_energies_without(name, tmp_path):
    prior = PRIORS[name]()
    prior.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    before = without_names(config, ("context", "drawing"))
    assert before != config
    (tmp_path / "config.json").write_text(json.dumps(before))
    loaded = type(prior).from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))
    assert not loaded.has_context
    assert loaded.settings() == prior.settings()
    assert loaded.coupling == prior.coupling
    assert torch.equal(prior.sample(3, generator=seed(1)), loaded.sample(3, generator=seed(1)))


@pytest.mark.parametrize("name", ["plain", "coupled", "ncp", "joint", "context", "context, coupled"])
def test_networks_with_context_are_told_from_those_without(name, tmp_path):
    PRIORS[name]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["energy"]["context"] = not config["energy"]["context"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidPrior):
        LearnedPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("energy", [SMALL, EnergyConfig(width=4, vector_width=4, blocks=1)])
def test_other_dtypes_agree_within_rounding(energy, dtype, rounding, tmp_path):
    prior = make_prior(energy=energy)
    prior.save_pretrained(tmp_path)
    loaded = DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES), dtype=dtype)
    assert loaded.dtype == dtype
    u = torch.randn(8, prior.dim, generator=seed())
    rounding *= 2 if prior.has_context else 1  # where an energy with context is a difference times up to 50
    torch.testing.assert_close(loaded.energy(u.to(dtype), 0).float(), prior.energy(u, 0), rtol=rounding, atol=rounding)
    loaded.save_pretrained(tmp_path / "again")  # and in its own dtype back
    again = DiffusionEBMPrior.from_pretrained(tmp_path / "again", backbone=RandomBackbone(SHAPES))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_backbone_in_half_precision_is_the_same_one(tmp_path):
    prior = make_prior()
    prior.save_pretrained(tmp_path)
    for dtype in (torch.float64, torch.bfloat16):
        backbone = RandomBackbone(SHAPES)
        backbone.model.to(dtype)
        backbone.start = backbone.start.to(dtype)
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=backbone)


def nudged(backbone, part, by):
    """The backbone with one parameter moved."""
    with torch.no_grad():
        next(backbone.model[part].parameters()).add_(by)
    return backbone


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (lambda: RandomBackbone(SHAPES[:1]), "2 latent layers, this one has 1"),
        (
            lambda: RandomBackbone(((2, 5, 4), (3,))),
            r"a latent of shape \(2, 5, 5\) in layer 0, this one has \(2, 5, 4\)",
        ),
        (lambda: RandomBackbone(SHAPES, seed=1), "the Gaussian of layer 0 differs.*strict=False"),
        (lambda: nudged(RandomBackbone(SHAPES), "inputs", 0.5), "the Gaussian of layer 1 differs"),
    ],
)
def test_another_backbone_is_refused(backbone, message, tmp_path):
    make_prior().save_pretrained(tmp_path)
    with pytest.raises(BackboneMismatch, match=message):
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=backbone())


def test_a_permuted_backbone_is_another_one(tmp_path):
    """Channels that change places change no mean and no size."""
    make_prior().save_pretrained(tmp_path)
    backbone = RandomBackbone(SHAPES)
    with torch.no_grad():
        head = backbone.model["heads"][0]
        order = torch.cat((torch.arange(25, 50), torch.arange(25), torch.arange(75, 100), torch.arange(50, 75)))
        head.weight.copy_(head.weight[order])
        head.bias.copy_(head.bias[order])
    with pytest.raises(BackboneMismatch, match="layer 0"):
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=backbone)


def test_not_strict_warns_if_shapes_agree(tmp_path):
    prior = make_prior()
    prior.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="layer 0 differs"):
        loaded = DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES, seed=1), strict=False)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in prior.state_dict().items())
    with pytest.raises(BackboneMismatch, match="2 latent layers"):
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES[:1]), strict=False)


def test_the_fingerprint_is_of_the_model_in_eval_mode():
    backbone = RandomBackbone(SHAPES)
    backbone.model["inputs"][0] = nn.Sequential(backbone.model["inputs"][0], nn.Dropout(0.5))
    backbone.model.train()
    prior = GaussianPrior(backbone)
    torch.manual_seed(0)
    first = fingerprint(prior)
    torch.manual_seed(1)
    assert fingerprint(prior) == first
    prior.release()
    assert backbone.model.training


def test_a_failed_load_lets_the_backbone_go(tmp_path):
    make_prior().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[min(tensors)] *= float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    backbone = RandomBackbone(SHAPES)
    backbone.model.train()
    with pytest.raises(InvalidPrior, match="not finite"):
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=backbone)
    assert backbone.model.training
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())


def test_networks_of_ones_own_are_handed_over(tmp_path):
    def prior():
        return DiffusionEBMPrior(
            Pair((1,), (1,)), energy=[Quadratic(1, w=0.3), Quadratic(1, v=-0.2)], langevin=LangevinConfig(steps=2)
        )

    prior().save_pretrained(tmp_path)
    loaded = DiffusionEBMPrior.from_pretrained(tmp_path, backbone=Pair((1,), (1,)), energy=[Quadratic(1), Quadratic(1)])
    assert torch.equal(loaded.sample(3, generator=seed()), prior().sample(3, generator=seed()))
    with pytest.raises(TypeError, match="saved with networks of its own"):
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=Pair((1,), (1,)))
    make_prior().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="saved with default networks"):
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES), energy=[nn.Identity()] * 2)


@pytest.mark.parametrize(
    ("saved", "kind"),
    [("plain", JointEBMPrior), ("plain", NCPPrior), ("ncp", DiffusionEBMPrior), ("ncp", JointEBMPrior)],
)
def test_a_class_loads_its_own_kind_alone(saved, kind, tmp_path):
    prior = PRIORS[saved]()
    prior.save_pretrained(tmp_path)
    name = type(prior).__name__
    with pytest.raises(
        InvalidPrior, match=rf"expected a {kind.__name__}, got a {name}; load it with {name}\.from_pretrained"
    ):
        kind.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))


def test_a_saved_joint_prior_is_a_diffusion_prior(tmp_path):
    PRIORS["joint"]().save_pretrained(tmp_path)
    loaded = DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))
    assert type(loaded) is JointEBMPrior


@pytest.mark.parametrize("kind", [DiffusionEBMPrior, NCPPrior, LearnedPrior])
def test_a_class_that_is_gone_is_said(kind, tmp_path):
    make_prior().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "kind": "LayerwisePrior",
        "settings": {"schedule": {"snr": ["inf", 0.0]}, "proposals": 5, "negatives": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InvalidPrior,
        match="there is no LayerwisePrior any more; train a DiffusionEBMPrior, or install the version of this library "
        "that wrote it",
    ):
        kind.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))


def test_a_kind_without_labels_is_not_given_any(tmp_path):
    PRIORS["ncp"]().save_pretrained(tmp_path / "ncp")
    make_prior(coupling=COUPLING).save_pretrained(tmp_path / "coupled")
    config = json.loads((tmp_path / "ncp" / "config.json").read_text())
    config["coupling"] = json.loads((tmp_path / "coupled" / "config.json").read_text())["coupling"]
    (tmp_path / "ncp" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidPrior, match="coupling: a NCPPrior has no labels"):
        NCPPrior.from_pretrained(tmp_path / "ncp", backbone=RandomBackbone(SHAPES))


def test_what_cannot_be_described_is_not_saved(tmp_path):
    class Mine(DiffusionEBMPrior):
        pass

    for prior in (Mine(RandomBackbone(SHAPES)), LatentDiffusionPrior(RandomBackbone(SHAPES))):
        with pytest.raises(TypeError, match="expected one of DiffusionEBMPrior"):
            prior.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("energy", [SMALL, TINY])
def test_training_leaves_its_record_and_can_go_on(energy, tmp_path):
    backbone, images = Pair((1,), (1,)), torch.rand(16, 1, 1, 2, generator=seed()) * 0.2 + 0.4
    prior = DiffusionEBMPrior(backbone, energy=energy, langevin=LangevinConfig(steps=2))
    assert prior.trained is None
    history = prior.fit(images, training=TrainingConfig(iterations=3, batch_size=4), generator=seed(), progress=False)
    prior.save_pretrained(tmp_path)
    loaded = DiffusionEBMPrior.from_pretrained(tmp_path, backbone=backbone)
    assert loaded.trained.iterations == 3
    assert loaded.trained.seconds == pytest.approx(history[-1].seconds)
    assert loaded.trained.settings["betas"] == (0.9, 0.999)
    assert "objective" not in loaded.trained.settings, "it was not set"
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    loaded.fit(images, iterations=2, batch_size=4, generator=seed(), progress=False)
    assert any(not torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("source", "said"), [(".", ", in a clone of the library's repository"), ("hvae-ebm-prior", "")]
)
def test_the_card_says_how_to_install_the_library(source, said, tmp_path, monkeypatch):
    """From a clone until the first release, which changes one word."""
    monkeypatch.setattr("hvae_ebm_prior.saving.extras.SOURCE", source)
    make_prior().save_pretrained(tmp_path)
    assert (
        f"Install `hvae-ebm-prior`{said}:\n\n    pip install {source}\n\n```python"
        in (tmp_path / "README.md").read_text()
    )


def test_saving_again_replaces_and_never_leaves_half_a_file(tmp_path, monkeypatch):
    make_prior().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors", "README.md"}

    def broken(*arguments, **options):
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("hvae_ebm_prior.saving.weights_file.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        make_prior(schedule=DiffusionSchedule.cosine(3)).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder, and no repository"):
        DiffusionEBMPrior.from_pretrained(tmp_path / "nothing", backbone=RandomBackbone(SHAPES))
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_files_that_are_none_of_a_priors_are_not_overwritten(name, tmp_path):
    """As those of a model that lies in a folder of its own."""
    prior = make_prior()
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match=rf"holds {name}, which would be overwritten, and no saved prior"):
        prior.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"
    with pytest.raises(FileExistsError, match="expected a folder to write to, got a file"):
        prior.save_pretrained(tmp_path / name)


def test_a_folder_in_which_the_first_saving_was_killed_can_be_saved_to(tmp_path, monkeypatch):
    prior, replace = make_prior(), os.replace

    def replace_or_die(old, new):
        if new.name == "model.safetensors":
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            prior.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    prior.save_pretrained(tmp_path)
    assert DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES)).dim == prior.dim
