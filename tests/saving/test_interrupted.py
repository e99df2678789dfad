"""A folder holds a whole prior at every moment: the one before, or the new one."""

import math
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY, seed

from hvae_ebm_prior import DiffusionEBMPrior, LangevinConfig
from hvae_ebm_prior.saving import folder as saved
from hvae_ebm_prior.saving.config import Metric
from hvae_ebm_prior.saving.files import FORGOTTEN, write_atomically, write_json
from hvae_ebm_prior.saving.typed_json import InvalidPrior

BACKBONE = RandomBackbone([(2,), (1, 4, 4)])


def make(number):
    """Priors that differ in settings and in weights."""
    prior = DiffusionEBMPrior(BACKBONE, energy=TINY, langevin=LangevinConfig(steps=number))
    for parameter in prior.parameters():
        torch.nn.init.constant_(parameter, float(number))
    return prior


def number_of(path):
    """Which of them lies in a folder; fails where settings and weights are of two."""
    prior = DiffusionEBMPrior.from_pretrained(path, backbone=BACKBONE)
    values = {parameter.unique().item() for parameter in prior.parameters()}
    assert values == {float(prior.langevin.steps)}
    return prior.langevin.steps


@pytest.mark.parametrize("at", ["weights", "settings", "card"])
def test_a_save_that_ends_early_leaves_the_prior_before(at, tmp_path, monkeypatch):
    make(1).save_pretrained(tmp_path)
    calls = {"weights": (os, "replace"), "settings": (saved, "write_json"), "card": (saved, "write_atomically")}
    owner, name = calls[at]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            make(2).save_pretrained(tmp_path)
    # The card is for people; by then the new prior is whole.
    assert number_of(tmp_path) == (2 if at == "card" else 1)
    make(3).save_pretrained(tmp_path)
    assert number_of(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_second_save_that_ends_early_leaves_it_too(tmp_path, monkeypatch):
    """Between the first and the second the folder holds weights that no settings go with."""
    make(1).save_pretrained(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saved, "write_json", killed)
        for number in (2, 3):
            with pytest.raises(KeyboardInterrupt):
                make(number).save_pretrained(tmp_path)
            assert number_of(tmp_path) == 1
    make(4).save_pretrained(tmp_path)
    assert number_of(tmp_path) == 4


def test_weights_of_another_prior_are_refused(tmp_path):
    for number in (1, 2):
        make(number).save_pretrained(tmp_path / str(number))
    (tmp_path / "1" / "model.safetensors").write_bytes((tmp_path / "2" / "model.safetensors").read_bytes())
    with pytest.raises(InvalidPrior, match=r"model.safetensors: not the weights that config.json was written with"):
        number_of(tmp_path / "1")


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    make(1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for metrics in ([Metric("FID", math.nan)], [Metric("x" * 2000, 1.0)]):
        with pytest.raises((InvalidPrior, ValueError)):
            make(2).save_pretrained(tmp_path, metrics=metrics)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_threads_may_save_into_one_folder(tmp_path):
    priors = [make(number) for number in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            list(pool.map(lambda number: write_json(tmp_path / "record.json", {"number": number}), range(24)))
        list(pool.map(lambda prior: prior.save_pretrained(tmp_path / f"{prior.langevin.steps}"), priors))
    assert [number_of(tmp_path / str(number)) for number in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert not list(tmp_path.rglob("*.part*"))


def test_colleagues_can_read_what_is_written(tmp_path):
    before = os.umask(0o022)
    try:
        make(1).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_what_killed_processes_left_is_removed(tmp_path):
    names = ("a.4711-0a", "a.4712-0b", "b.4711-0a", "a.mine", "a.4711-0a.b")
    old, young, other, mine, another = paths = [tmp_path / f"{name}.part.json" for name in names]
    for path in paths:
        path.write_text("{")
    for path in (old, mine, another):
        os.utime(path, (time.time() - FORGOTTEN - 60,) * 2)
    write_json(tmp_path / "a.json", {})
    assert {*tmp_path.iterdir()} == {young, other, mine, another, tmp_path / "a.json"}


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors"):
            make(1).save_pretrained(tmp_path)
        with pytest.raises(OSError, match="big.txt"):
            write_atomically(tmp_path / "big.txt", lambda path: path.write_text("x" * 5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.rglob("*.part*"))


def save_in_child(path, priors):
    """Save priors in turn into one folder, in a fork of this process until it is killed; the child's id, and a pipe
    that has a byte for every saving that began.
    """
    begun, begin = os.pipe()
    child = os.fork()
    if child:
        os.close(begin)
        return child, begun
    try:
        while True:
            for prior in priors:
                os.write(begin, b".")
                prior.save_pretrained(path)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_leaves_no_mixed_folder(count, tmp_path):
    path, priors = tmp_path / "prior", [make(1), make(2)]
    begun = time.monotonic()
    priors[0].save_pretrained(path)
    duration = time.monotonic() - begun
    found = []
    # Killed in its first, second or third saving, however busy the machine is.
    for i, wait in enumerate((torch.rand(count, generator=seed(0)) * duration).tolist()):
        child, savings = save_in_child(path, priors)
        for _ in range(1 + i % 3):
            os.read(savings, 1)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(savings)
        found.append(number_of(path))
    assert set(found) == {1, 2}
