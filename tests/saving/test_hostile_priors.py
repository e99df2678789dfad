"""Saved priors from somebody who means us harm: whatever their files hold, loading them gives our own error or a prior,
in bounded memory.
"""

import copy
import json
import struct
import sys

import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from test_saving import COUPLING, SHAPES, SMALL, make_prior

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.saving.fingerprint import BackboneMismatch
from hvae_ebm_prior.saving.typed_json import InvalidPrior

ALLOWANCE = 2**30


@pytest.fixture(scope="module", params=[SMALL, TINY], ids=["plain", "context"])
def saved(request, tmp_path_factory):
    """The files of a good prior, as bytes."""
    folder = tmp_path_factory.mktemp("saved")
    make_prior(energy=request.param, coupling=COUPLING).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a folder in it, for the files; nothing may appear beside them."""
    (room := tmp_path_factory.mktemp("room") / "inner").mkdir()
    return room


@pytest.fixture(autouse=True)
def _bounded_memory():
    """No more than `ALLOWANCE` beyond what is in use now: an allocation beyond fails, and with it the test."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ALLOWANCE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(room, files):
    """Load a prior of these files: None, or our own error."""
    for path in room.iterdir():
        path.unlink()
    for name, data in files.items():
        (room / name).write_bytes(data)
    try:
        prior = DiffusionEBMPrior.from_pretrained(room, backbone=RandomBackbone(SHAPES))
        assert bool(torch.isfinite(prior.energy(torch.zeros(1, prior.dim), 0)))
        error = None
    except (InvalidPrior, BackboneMismatch) as raised:
        error = raised
        assert "allocate" not in str(error)
    assert {path.name: path.read_bytes() for path in room.iterdir()} == files
    assert [path.name for path in room.parent.iterdir()] == [room.name]
    return error


def places(values, path=()):
    """All paths in nested JSON values."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path] * bool(path) + [place for name, value in items for place in places(value, (*path, name))]


def parent_of(values, path):
    for name in path[:-1]:
        values = values[name]
    return values


NAMES = ["../../outside", "/etc/passwd", "__class__", "a" * 5000, "\x00", "os.system", "𝔘"]
NUMBERS = [0, -1, -(2**63), 2**31, 2**63, 10**400, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 1_000_000, 0.5]
OTHERS = [None, True, "", "inf", "-inf", "nan", [], {}, [[]], [{}], [1] * 20_000, {"a": {"b": {"c": {}}}}, *NAMES]
hostile_values = st.sampled_from([*NUMBERS, *OTHERS]) | st.recursive(
    st.integers() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=4)
)


def mutated_config(saved, data):
    """The files with one or two changes of the configuration's values."""
    config = json.loads(saved["config.json"])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(config)))
        parent = parent_of(config, path)
        match data.draw(st.sampled_from(["replace", "replace", "remove", "add", "repeat"])):
            case "replace":
                parent[path[-1]] = copy.deepcopy(data.draw(hostile_values))
            case "remove":
                del parent[path[-1]]
            case "add" if isinstance(parent, dict):
                parent[data.draw(st.sampled_from(NAMES))] = copy.deepcopy(data.draw(hostile_values))
            case "repeat" if isinstance(parent, list):
                # Copies, as a later change of one must not be one of all; no more than the test itself can hold.
                text = json.dumps(parent[path[-1]])
                count = min(data.draw(st.sampled_from([1, 1000, 50_000])), 2**22 // len(text))
                parent.extend(json.loads(f"[{', '.join([text] * count)}]"))
    return saved | {"config.json": json.dumps(config).encode()}


def mutated_bytes(saved, data):
    """The files with a change of the bytes of one of them."""
    name = data.draw(st.sampled_from(["config.json", "model.safetensors", "model.safetensors"]))
    content = bytearray(saved[name])
    match data.draw(st.sampled_from(["cut", "flip", "length", "insert", "append"])):
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "flip":
            # Most often in the header, where it does more.
            for place in data.draw(st.lists(st.integers(0, min(len(content), 2500) - 1), min_size=1, max_size=4)):
                content[place] = data.draw(st.integers(0, 255))
        case "length":
            content[:8] = struct.pack(
                "<Q", data.draw(st.sampled_from([0, 1, 7, len(content), 2**20, 2**27, 2**40, 2**63, 2**64 - 1]))
            )
        case "insert":
            place = data.draw(st.integers(0, len(content)))
            content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
        case "append":
            content += data.draw(st.binary(min_size=1, max_size=40))
    return saved | {name: bytes(content)}


@pytest.mark.parametrize("mutated", [mutated_config, mutated_bytes])
@given(data=st.data())
def test_mutated_files(saved, room, mutated, data):
    attempt(room, mutated(saved, data))


@pytest.mark.slow
@pytest.mark.parametrize("mutated", [mutated_config, mutated_bytes])
@settings(settings.get_profile("slow"))
@given(data=st.data())
def test_many_mutated_files(saved, room, mutated, data):
    attempt(room, mutated(saved, data))


def with_tensors(saved, change):
    tensors = load(saved["model.safetensors"])
    change(tensors)
    return saved | {"model.safetensors": save(tensors)}


def set_first(make):
    return lambda tensors: tensors.update({min(tensors): make(tensors[min(tensors)])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_first(lambda x: x.flatten()[:-1].clone()), "expected the shape"),
        (set_first(lambda x: x[None].clone()), "expected the shape"),
        (set_first(lambda x: torch.full_like(x, float("nan"))), "not finite"),
        (set_first(lambda x: torch.full_like(x, -float("inf"))), "not finite"),
        (set_first(lambda x: torch.full_like(x, 1e30)), "holds a number of size 1e+30, expected at most 1e+06"),
        (set_first(lambda x: torch.full_like(x, -2e6)), "holds a number of size 2e+06, expected at most 1e+06"),
        (set_first(lambda x: x.long()), "expected floating-point numbers"),
        (set_first(lambda x: x > 0), "expected floating-point numbers"),
        (set_first(lambda x: x.to(torch.float8_e4m3fn)), "expected floating-point numbers"),
        (set_first(lambda x: x.double()), "one dtype"),
        (lambda tensors: tensors.pop(min(tensors)), "lacks tensor"),
        (lambda tensors: tensors.clear(), "lacks tensor"),
        (lambda tensors: tensors.update({"../../outside": torch.zeros(1)}), "unexpected tensor"),
        (lambda tensors: tensors.update({f"empty.{i}": torch.zeros(0) for i in range(20_000)}), "unexpected tensor"),
    ],
)
def test_wrong_tensors(saved, room, change, message):
    assert message in str(attempt(room, with_tensors(saved, change)))


def header(entries, size=0):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"PK\x03\x04 a pickle in a zip",
        b"\x80\x04cos\nsystem\n",
        struct.pack("<Q", 2**62) + b"{}",
        header({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, 4),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}}, 4),
        header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, 4),
        header(b'{"x":' * 50_000),
        header(b" " * (9 * 2**20)),
        header(
            b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            4,
        ),
    ],
)
def test_wrong_weights_files(saved, room, content):
    assert attempt(room, saved | {"model.safetensors": content}) is not None


def changed(**changes):
    def change(config):
        for path, value in changes.items():
            names = path.split("__")
            parent_of(config, names)[names[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(schema=2), "newer version"),
        (changed(schema=None), "expected a schema"),
        (changed(kind="os.system"), "kind: expected one of"),
        (changed(kind="NCPPrior"), "missing or unknown"),
        (changed(kind="LayerwisePrior"), "there is no LayerwisePrior any more"),
        (changed(extra=1), "unknown field 'extra'"),
        (
            changed(settings__langevin__curvature_limit=0.5),
            "does what None meant, got 0.5; load it with the version that",
        ),
        (changed(energy__vector_size=64), "energy.vector_size: this version has no such setting"),
        (lambda config: config.pop("energy"), "'energy' is missing"),
        (changed(backbone__latent_shapes=[[1]] * 9000), "projections"),
        (changed(energy__blocks=10**6), "residual blocks"),
        (changed(energy__width=2**30), "features"),
        (changed(energy__width=60_000), "expected the shape|unexpected tensor|lacks tensor"),
        (changed(energy__vector_width=60_000), "expected the shape|unexpected tensor|lacks tensor"),
        (changed(energy__blocks=-1), "positive integer"),
        (changed(energy__blocks=1.5), "expected an integer"),
        (changed(energy__spectral_norm="yes"), "expected true or false"),
        (changed(settings__langevin__steps=10**30), "expected an integer"),
        (changed(settings__langevin__step_size=float("nan")), "expected a finite number"),
        (changed(settings__schedule__snr=[3, 2, 1]), "last signal-to-noise ratio"),
        (changed(settings__schedule__snr=[1.0] * 20_000), "at most 10000 entries"),
        (changed(coupling__sets={"../../outside": {"categories": 2}}), "letters, digits and underscores"),
        (
            changed(coupling__sets={f"s{i}": {"categories": 2} for i in range(9000)}, coupling__networks__blocks=2),
            "residual blocks",
        ),
        (
            changed(coupling__sets__kind__categories=2**31),
            "expected the shape|unexpected tensor|lacks tensor|config.json",
        ),
        (changed(coupling__levels=[99]), "expected levels"),
        (changed(energy__context=3), "expected true or false"),
        (changed(settings__drawing__flow_steps=-1), "flow_steps must be an integer from 0"),
        (changed(settings__drawing__flow_steps=10**30), "expected an integer"),
        (changed(settings__drawing__ancestral="yes"), "expected"),
        (changed(settings__drawing=None), "expected"),
        (changed(family="VAE\x1b[2K\rnothing to see"), "config.json.family: expected a text"),
        (changed(library="0.1\u202e0.9"), "config.json.library: expected a text"),
        (changed(coupling__sets__kind__categories=["cup", "hat\x9b31m"]), "categories[1]: expected a text"),
        (changed(coupling__sets={"a\u2028b": {"categories": 2}}), "coupling.sets: expected a text"),
        (changed(metrics=[{"name": "FD\nFD", "value": 1.0}]), "metrics[0].name: expected a text"),
        (changed(training={"iterations": 1, "seconds": 1.0, "settings": {"a\tb": 1}}), "settings: expected a text"),
    ],
)
def test_wrong_configs(saved, room, change, message):
    config = json.loads(saved["config.json"])
    change(config)
    error = attempt(room, saved | {"config.json": json.dumps(config).encode()})
    assert any(part in str(error) for part in message.split("|")), error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b"[" * 200_000,
        b'{"schema":' * 10_000,
        b" " * (2**20 + 1),
        b'{"schema": ' + b"9" * 100_000 + b"}",
    ],
)
def test_no_configs(saved, room, content):
    assert attempt(room, saved | {"config.json": content}) is not None


def test_a_good_prior_passes_the_same_checks(saved, room):
    assert attempt(room, saved) is None
