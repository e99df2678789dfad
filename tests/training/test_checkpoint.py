"""Official NVAE checkpoints: what is read, what is completed, and what is refused."""

import argparse
import os
import types

import pytest
import torch
from helpers import seed
from stand_ins import AutoEncoder, perturb

from hvae_ebm_prior.adapters import NVAEAdapter, load_nvae, read_nvae_checkpoint
from hvae_ebm_prior.backbone.transform import NoiseTransform

ARGUMENTS = {"dataset": "cifar10", "num_groups_per_scale": 2, "num_latent_scales": 1}


def build(args, writer, architecture):
    """As `AutoEncoder` of NVAE is called; needs the arguments that old checkpoints lack, and uses the GPU."""
    assert writer is None
    assert architecture == {"normal_dec": ["res_elu"]}
    assert (args.ada_groups, args.min_groups_per_scale, args.num_mixture_dec) == (False, 1, 10)
    torch.zeros(1).cuda()
    return AutoEncoder(args.num_latent_scales, args.num_groups_per_scale, operation="elu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return perturb(AutoEncoder(1, 2, operation="elu"))


def save(path, model, prefix="", **changes):
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    content = {
        "epoch": 3,
        "args": argparse.Namespace(**ARGUMENTS),
        "state_dict": weights,
        "arch_instance": {"normal_dec": ["res_elu"]},
        **changes,
    }
    torch.save({name: value for name, value in content.items() if value is not None}, path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_models_are_loaded_without_cuda_and_ready(model, tmp_path, prefix):
    save(tmp_path / "checkpoint.pt", model, prefix)
    loaded = load_nvae(tmp_path / "checkpoint.pt", build)
    assert not loaded.training
    ours, theirs = NoiseTransform(NVAEAdapter(loaded)), NoiseTransform(NVAEAdapter(model))
    u = torch.randn(2, ours.dim, generator=seed(0))
    with torch.no_grad():
        assert torch.equal(ours.decode(u), theirs.decode(u))
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1).cuda()  # as it was


def test_missing_arguments_are_completed_and_given_ones_kept(model, tmp_path):
    save(tmp_path / "checkpoint.pt", model, args=argparse.Namespace(ada_groups=True, dataset="mnist"))
    args = read_nvae_checkpoint(tmp_path / "checkpoint.pt")["args"]
    assert vars(args) == {"ada_groups": True, "min_groups_per_scale": 1, "num_mixture_dec": 10, "dataset": "mnist"}


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("thing", [Evil(), types.SimpleNamespace(a=1)], ids=["code", "another class"])
def test_nothing_else_is_unpickled(model, tmp_path, thing, monkeypatch):
    ran = []
    save(tmp_path / "checkpoint.pt", model, extra=thing)
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(ValueError, match="not loaded for safety"):
        load_nvae(tmp_path / "checkpoint.pt", build)
    assert not ran
    with pytest.raises(Exception, match="argparse.Namespace"):
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # the allow-list ended with the call


def test_files_that_do_not_fit_are_explained(model, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="has no args and no state_dict"):
        load_nvae(path, build)
    save(path, model, arch_instance=None, args=argparse.Namespace(arch_instance="res_mbconv", **ARGUMENTS))
    with pytest.raises(ValueError, match=r"utils\.get_arch_cells\('res_mbconv'\)"):
        load_nvae(path, build)
    assert load_nvae(path, build, {"normal_dec": ["res_elu"]}) is not None
    weights = dict(model.state_dict())
    weights["stranger"] = weights.pop("stem.weight")
    save(path, model, state_dict=weights)
    with pytest.raises(ValueError, match=r"1 are missing \(stem.weight\), 1 are unknown \(stranger\)"):
        load_nvae(path, build)


def test_derived_weights_may_be_saved_or_not(model, tmp_path):
    """Some versions saved `weight_normalized`, which convolutions work out."""
    weights = {**model.state_dict(), "stem.weight_normalized": torch.zeros(1)}
    save(tmp_path / "checkpoint.pt", model, state_dict=weights)
    assert load_nvae(tmp_path / "checkpoint.pt", build) is not None
