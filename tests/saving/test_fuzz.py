"""Files of strangers: whatever they hold, a reader gives what it promises, or refuses them by a ValueError, TypeError
or OSError that names the file, in bounded memory. Saved priors have a file of their own (test_hostile_priors.py).

Files begin as whole ones of kinds that people have (turned and transparent photos, arrays of every type, checkpoints),
and are cut, damaged, given lying headers, changed in their values, or replaced by junk.
"""

import copy
import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import IdentityBackbone
from helpers import SMALL, seed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from test_hostile_priors import _bounded_memory, hostile_values, parent_of, places  # noqa: F401

from hvae_ebm_prior import DiffusionEBMPrior, LangevinConfig, TrainingConfig
from hvae_ebm_prior.baselines import GaussianPrior
from hvae_ebm_prior.evaluation.comparison import Budget, Candidate, FrechetMetric, compare, comparison_table
from hvae_ebm_prior.evaluation.features import Extractor
from hvae_ebm_prior.evaluation.reference import load_reference, make_reference, save_reference
from hvae_ebm_prior.posterior_cache import PosteriorCache
from hvae_ebm_prior.saving.digest import digest_file
from hvae_ebm_prior.training import loop
from hvae_ebm_prior.training.array_data import load_images, load_tensors
from hvae_ebm_prior.training.checkpoint import load_checkpoint, read_checkpoint, restore_run
from hvae_ebm_prior.training.image_data import open_images
from hvae_ebm_prior.training.label_data import open_labels

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
DATA = torch.rand(40, 1, 1, 4, generator=seed(0))
TRAINING = TrainingConfig(iterations=2, batch_size=8, activity_images=0)


def mutated(content, data):
    """The bytes of a file, changed in one way or left alone."""
    content = bytearray(content)
    match data.draw(st.sampled_from(["whole", "cut", "flip", "flip", "insert", "append", "number", "junk"])):
        case "cut":
            del content[data.draw(st.integers(0, len(content))) :]
        case "flip":
            # Most often at the beginning, where headers are.
            last = data.draw(st.sampled_from([min(len(content), 200), len(content)])) - 1
            for place in data.draw(st.lists(st.integers(0, max(0, last)), min_size=1, max_size=4)):
                content[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
        case "insert":
            place = data.draw(st.integers(0, len(content)))
            content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
        case "append":
            content += data.draw(st.binary(min_size=1, max_size=40))
        case "number":
            place = data.draw(st.integers(0, max(0, min(len(content), 200) - 8)))
            number = data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1]))
            content[place : place + 8] = number.to_bytes(8, data.draw(st.sampled_from(["little", "big"])))
        case "junk":
            junk = [
                b"",
                b"<!doctype html><title>404</title>",
                b"PK\x03\x04",
                b"\x89PNG\r\n\x1a\n",
                b"\x80\x04N.",
                b"[[[[",
            ]
            content = bytearray(data.draw(st.sampled_from(junk) | st.binary(max_size=300)))
    return bytes(content)


def mutated_json(text, data):
    """JSON with one value replaced, removed or added, or its bytes changed."""
    if data.draw(st.integers(0, 3)) == 0:
        return mutated(text, data)
    values = json.loads(text)
    # Every part as often as the others, however many values it has.
    part = data.draw(st.sampled_from(sorted(values)))
    path = data.draw(st.sampled_from([place for place in places(values) if place[0] == part]))
    parent, value = parent_of(values, path), copy.deepcopy(data.draw(hostile_values))
    match data.draw(st.sampled_from(["replace", "replace", "remove", "whole"])):
        case "replace":
            parent[path[-1]] = value
        case "remove":
            del parent[path[-1]]
        case "whole":
            values = value
    return json.dumps(values).encode()


def mutated_tensors(content, data):
    """A safetensors file with one tensor of another shape, type, name or value, or its bytes changed."""
    if data.draw(st.integers(0, 2)) == 0:
        return mutated(content, data)
    tensors = load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__")
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    changes = {
        "none": lambda x: x,
        "cut": lambda x: x.flatten()[:-1].clone(),
        "scalar": lambda x: x.new_zeros(()),
        "empty": lambda x: x.new_zeros(0),
        "more": lambda x: x[None].clone(),
        "nan": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else ~x,
        "large": lambda x: torch.full_like(x, 1e30) if x.is_floating_point() else torch.full_like(x, 200),
        "type": lambda x: x.to(data.draw(st.sampled_from([torch.float16, torch.int64, torch.bool, torch.uint8]))),
    }
    change = data.draw(st.sampled_from(["remove", "rename", *changes]))
    if change == "rename":
        tensors[data.draw(st.text(min_size=1, max_size=8) | st.sampled_from(["kept._modules", "adam.x.step"]))] = tensor
    elif change != "remove":
        tensors[name] = changes[change](tensor)
    return save(tensors, metadata)


def attempt(read, *names):
    """What a reader gives; None where it refuses, by an error that names one of the files and is one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except (ValueError, TypeError, OSError) as error:
            said = str(error)
    assert any(name in said for name in names), said
    assert len(said.splitlines()) == 1, said
    return None


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("room")


def clear(folder):
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV", "La", "PA"]


def fuzz_pictures(room, data):
    """Photos as cameras, editors and broken downloads leave them."""
    folder = clear(room / "pictures")
    size = data.draw(st.sampled_from([(8, 8), (8, 5), (1, 1)]))
    mode = data.draw(st.sampled_from(MODES))
    kind = data.draw(st.sampled_from(["png", "jpeg", "webp", "gif", "tiff"]))
    picture = pillow.new(mode, size, data.draw(st.integers(0, 255))) if mode != "I;16" else pillow.new(mode, size)
    exif = pillow.Exif()
    exif[0x112] = data.draw(st.integers(0, 9) | st.just(65_000))
    options = data.draw(st.sampled_from([{}, {"exif": exif}, {"exif": b"Exif\x00\x00MM\x00*"}, {"transparency": 0}]))
    file = io.BytesIO()
    try:
        picture.save(file, kind, **options)
    except Exception:  # a mode or option that this format has not
        file = io.BytesIO()
        pillow.new("RGB", size).save(file, kind)
    (folder / "a.png").write_bytes(mutated(file.getvalue(), data))
    shape = data.draw(st.sampled_from([(3, 8, 8), (1, 8, 8)]))
    resize, skip = data.draw(st.sampled_from([None, 8])), data.draw(st.booleans())
    image = attempt(lambda: open_images(str(folder), shape, size=resize, skip_broken=skip)[0], "a.png")
    assert image is None or (image.shape == shape and 0 <= image.min() <= image.max() <= 1)


TYPES = ["u1", "i1", "<f4", ">f8", "<f2", "f16", "?", "<c8", ">i4", "u8", "S3", "U2", "M8[s]", "O", "V4", "i4,f4"]
ARRAY_SHAPES = [(2, 1, 4, 4), (2, 4, 4, 1), (2, 4, 4), (3, 6), (5,), (), (0, 4, 4), (2, 0, 4, 4), (1, 1, 1, 1, 1)]


def fuzz_arrays(room, data):
    """NumPy's files of images, of other data and of labels."""
    kind, shape = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from(ARRAY_SHAPES))
    value = data.draw(st.sampled_from([0, 1, -1, 2, 255, 2**40, 2**63, 0.5, math.nan, -math.inf, 1e300]))
    with np.errstate(all="ignore"):
        try:
            array = np.full(shape, value).astype(kind)
        except (ValueError, TypeError, OverflowError):
            array = np.zeros(shape, kind)
    file, archive = io.BytesIO(), data.draw(st.booleans())
    if archive:
        data.draw(st.sampled_from([np.savez, np.savez_compressed]))(file, a=array, b=np.zeros(2))
    else:
        np.save(file, array, allow_pickle=True)
    path = room / ("x.npz" if archive else "x.npy")
    path.write_bytes(mutated(file.getvalue(), data))
    source = f"{path}:a" if archive else str(path)
    images = attempt(lambda: load_images(source), path.name)
    assert images is None or (images.ndim == 4 and images.dtype == torch.float32)
    images = attempt(lambda: open_images(source, (1, 4, 4)), path.name)
    assert images is None or (images.shape[1:] == (1, 4, 4) and 0 <= images.min() <= images.max() <= 1)
    tensors = attempt(lambda: load_tensors(source, (6,), limit=2), path.name)
    assert tensors is None or (tensors.shape == (2, 6) and bool(tensors.isfinite().all()))
    found = attempt(lambda: open_labels(source, "photos", 2), path.name)
    if found is not None:
        categories, labels = found
        assert (labels.shape, labels.dtype) == ((2,), torch.long)
        assert -1 <= labels.min() <= labels.max() < categories


def small_prior():
    torch.manual_seed(0)
    return DiffusionEBMPrior(IdentityBackbone((2,), (2,)), langevin=LangevinConfig(steps=1), energy=SMALL)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The files of a run's only checkpoint, and that run before its next step."""
    folder = tmp_path_factory.mktemp("begun")
    small_prior().fit(DATA, training=TRAINING, checkpoint_dir=folder, generator=seed(0), progress=False)
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_steps", lambda run, *_: runs.append(run))
        prior = small_prior()
        prior.fit(DATA, training=TRAINING, checkpoint_dir=folder, resume=True, generator=seed(0), progress=False)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}, runs[0], prior


def fuzz_checkpoints(room, data, begun):
    files, run, _ = begun
    folder = clear(room / "checkpoints")
    path = folder / "step_00000002.json"
    weights, text = files[".safetensors"], files[".json"]
    if data.draw(st.booleans()):
        # Under a digest that is right: what only a look at the tensors can find.
        weights = mutated_tensors(weights, data)
        path.with_suffix(".safetensors").write_bytes(weights)
        text = json.dumps(json.loads(text) | {"sha256": digest_file(path.with_suffix(".safetensors"))}).encode()
    else:
        text = mutated_json(text, data)
    path.with_suffix(".safetensors").write_bytes(weights)
    path.write_bytes(text)
    state = attempt(lambda: read_checkpoint(path, run), "step_00000002")
    if state is not None:
        restore_run(run, *state)
        next(run.batches)
    else:
        attempt(lambda: load_checkpoint(folder, run), "step_00000002")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The files of a cache of two shards, with labels."""
    folder = tmp_path_factory.mktemp("cache")
    labels = {"kind": torch.arange(40) % 3}
    build = {"labels": labels, "draws": 2, "shard_size": 700, "generator": seed(0)}
    PosteriorCache.build(small_prior(), DATA, folder, **build)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fuzz_caches(room, data, cache):
    folder = clear(room / "cache")
    files = dict(cache)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(name for name in files if name.startswith("shard"))))
        files[name] = mutated_tensors(files[name], data)
        (folder / name).write_bytes(files[name])
        index = json.loads(files["index.json"])
        index["shards"][int(name[6:11])]["sha256"] = digest_file(folder / name)
        files["index.json"] = json.dumps(index).encode()
    else:
        files["index.json"] = mutated_json(files["index.json"], data)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    opened = attempt(lambda: PosteriorCache(folder), str(folder))
    if opened is not None:
        rows = torch.arange(len(opened))
        assert opened.noise(rows, 1, seed(0)).shape == (40, 4)
        opened.labels(rows)


FLAT = Extractor(lambda x: x.flatten(1), "mine:flat", "abc")


def fuzz_references(room, data):
    path = room / data.draw(st.sampled_from(["r.safetensors", "r.npz"]))
    features = DATA.flatten(1).double()
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, mu=features.mean(0).numpy(), sigma=torch.cov(features.T).numpy())
        path.write_bytes(mutated(path.read_bytes(), data))
    else:
        save_reference(make_reference(DATA, FLAT, torch.device("cpu")), path)
        path.write_bytes(mutated_tensors(path.read_bytes(), data))
    loaded = attempt(lambda: load_reference(path, FLAT), path.name)
    if loaded is not None:
        mean, covariance = loaded.moments
        assert mean.dtype == covariance.dtype == torch.float64
        assert covariance.shape == (len(mean), len(mean))
        assert bool(covariance.isfinite().all() & mean.isfinite().all())
        assert torch.linalg.eigvalsh(covariance).min() >= -1e-6 * covariance.abs().max()


class AtOnce(GaussianPrior):
    def fit(self, data, *, generator):
        return []


def fuzz_results(room, data, results):
    content, again = results
    path = room / "compare.json"
    path.write_bytes(mutated_json(content, data))
    runs = attempt(lambda: again(path), "compare.json")
    if runs is not None:
        comparison_table(runs, ["at once"], "1 iterations", [0])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The file of a comparison, and a function that goes on with one."""
    metric = FrechetMetric(DATA[:20], DATA[20:], {"flat": FLAT})

    def again(path):
        backbone = IdentityBackbone((2,), (2,))
        budgets = [Budget(iterations=1)]
        candidates = {"at once": Candidate(AtOnce)}
        return compare(backbone, candidates, DATA, metric, budgets=budgets, seeds=[0], path=path, report=len)

    path: Path = tmp_path_factory.mktemp("results") / "compare.json"
    again(path)
    return path.read_bytes(), again


FUZZ = {
    "pictures": (fuzz_pictures, None),
    "arrays": (fuzz_arrays, None),
    "checkpoints": (fuzz_checkpoints, "begun"),
    "caches": (fuzz_caches, "cache"),
    "references": (fuzz_references, None),
    "results": (fuzz_results, "results"),
}


def run_fuzz(name, room, request, data):
    fuzz, whole = FUZZ[name]
    fuzz(room, data, *([request.getfixturevalue(whole)] if whole else []))


@pytest.mark.parametrize("name", FUZZ)
@settings(settings.get_profile("quick"), max_examples=6)
@given(data=st.data())
def test_readers_of_files(name, room, request, data):
    run_fuzz(name, room, request, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZ)
@settings(settings.get_profile("slow"))
@given(data=st.data())
def test_readers_of_many_files(name, room, request, data):
    run_fuzz(name, room, request, data)
