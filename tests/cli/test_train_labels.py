"""`hvae-ebm-prior train --labels`: where labels come from, and that the prior knows them afterwards."""

import sys
import types

import numpy as np
import pytest
import torch
from helpers import TINY, same
from safetensors.torch import load_file

from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.presets import PRESETS, Preset
from hvae_ebm_prior.training.config import TrainingConfig
from hvae_ebm_prior.training.label_data import open_labels

LOADER = """
import torch
from hvae_ebm_prior.adapters import HVAE, HVAEConfig

def load():
    torch.manual_seed(0)
    return HVAE(HVAEConfig(image_size=8, widths=(8, 8), latent_channels=(2, 1)))
"""
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
KINDS = np.array([0] * 5 + [1] * 7)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Images as an array and as files in the folders cup and hat."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER)
    np.savez(
        tmp_path / "data.npz", images=PIXELS, kinds=KINDS, half=np.where(np.arange(12) % 2, KINDS, -1), wrong=KINDS / 2
    )
    for i, pixels in enumerate(PIXELS):
        path = tmp_path / "pictures" / ("hat" if KINDS[i] else "cup") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path)
    default = PRESETS["default"]
    training = TrainingConfig(iterations=3, batch_size=4, activity_images=0, recovery_share=0.4)
    monkeypatch.setitem(PRESETS, "default", Preset(default.schedule, default.langevin, TINY, training))
    return tmp_path


def train(images, *more, out="run"):
    return main(["train", "mine.py:load", "--images", images, "--out", out, *more])


def test_folders_and_arrays_give_the_same_labels(files):
    assert train("pictures", "--labels", "kind=folders", "--label-layers", "kind=0") == 0
    assert train("data.npz:images", "--labels", "kind=data.npz:kinds", "--label-layers", "kind=0", out="other") == 0
    assert same(load_file("run/model.safetensors"), load_file("other/model.safetensors"))
    # The names of the folders are those of the labels.
    for name, run in (("hat", "run"), ("1", "other")):
        options = ["--prior", run, "--labels", f"kind={name}", "--count", "2", "--out", f"{run}.png"]
        assert main(["sample", "mine.py:load", *options]) == 0
    heads = [name for name in load_file("run/model.safetensors") if name.startswith("heads.")]
    assert {name.split(".")[:3] == ["heads", "kind", "0"] for name in heads} == {True}


def test_several_sets_and_unknown_labels(files):
    assert train("data.npz:images", "--labels", "a=data.npz:kinds", "b=data.npz:half") == 0
    heads = {name.split(".")[1] for name in load_file("run/model.safetensors") if name.startswith("heads.")}
    assert heads == {"a", "b"}


class Rows:
    """Stands in for a data set of the package datasets: a row by its number, a column by its name."""

    def __init__(self, pictures):
        self.columns = {"kind": KINDS.tolist(), "word": ["red", "blue"] * 6, "image": pictures}
        kinds = types.SimpleNamespace(names=["cup", "hat"])
        self.features = {"kind": kinds, "word": object(), "image": type("Image", (), {})()}

    def __len__(self):
        return len(KINDS)

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: each[key] for name, each in self.columns.items()}


def test_columns_of_the_hub():
    names, labels = open_labels("column:kind", "hf:someone/things", 7, Rows([]))
    assert names == ("cup", "hat")
    assert torch.equal(labels, torch.from_numpy(KINDS[:7]))
    names, labels = open_labels("column:word", "hf:someone/things", 3, Rows([]))
    assert names == ("blue", "red")
    assert torch.equal(labels, torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="has no column size, but kind, word, image"):
        open_labels("column:size", "hf:someone/things", 3, Rows([]))


def test_a_data_set_of_the_hub_is_opened_once_for_its_images_and_labels(files, monkeypatch):
    opened = []

    def load_dataset(name, split):
        opened.append((name, split))
        return Rows([pillow.fromarray(pixels) for pixels in PIXELS])

    pillow = pytest.importorskip("PIL.Image")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert train("hf:someone/things", "--labels", "kind=column:kind") == 0
    assert opened == [("someone/things", "train")]
    assert train("pictures", "--labels", "kind=folders", out="other") == 0
    assert same(load_file("run/model.safetensors"), load_file("other/model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "folders"], "expected SET=SOURCE"),
        (["--labels", "a=folders", "--labels", "a=data.npz:kinds"], "with different sets"),
        (["--labels", "kind=words.txt"], "expected folders (of --images"),
        (["--labels", "kind=column:kind"], "columns are those of an hf: data set, and --images is pictures"),
        (["--labels", "kind=data.npz:wrong"], "expected whole numbers (N,), got float64 (12,)"),
        (["--labels", "kind=data.npz:none"], "a name out of images, kinds"),
        (["--labels", "kind=folders", "--label-layers", "size=0"], "expected labels out of kind, got size"),
        (
            ["--labels", "kind=folders", "--label-layers", "kind=7"],
            "expected layer indices 0 (top) to 1 (bottom), got 7",
        ),
        (["--labels", "kind=folders", "--label-layers", "kind=top"], "label-layers: expected SET=LAYERS"),
    ],
)
def test_mistakes_are_explained(arguments, message, files, capsys):
    assert train("pictures", *arguments) == 2
    assert message in capsys.readouterr().err


def test_images_outside_of_folders_have_no_class(files, capsys):
    (files / "pictures" / "cup" / "00.png").rename(files / "pictures" / "loose.png")
    assert train("pictures", "--labels", "kind=folders") == 2
    assert "1 of 12 lie in pictures itself, loose.png the first of them" in capsys.readouterr().err


def test_other_labels_are_another_run(files, capsys):
    assert train("data.npz:images", "--labels", "kind=data.npz:kinds") == 0
    assert train("data.npz:images", "--labels", "kind=data.npz:half") == 2
    printed = capsys.readouterr().err
    assert f"labels was ['kind={files}/data.npz:kinds'] and is ['kind={files}/data.npz:half']" in printed
