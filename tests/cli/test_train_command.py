"""`hvae-ebm-prior train`: where images come from, what it writes, and that the same command goes on."""

import json
import signal
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SMALL, TINY, read_strips, same, seed
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig
from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.training import loop
from hvae_ebm_prior.training.image_data import open_images

LOADER = """
import torch
from hvae_ebm_prior.adapters import HVAE, HVAEConfig

def load(path=None):
    torch.manual_seed(0)
    model = HVAE(HVAEConfig(image_size=8, widths=(8, 8), latent_channels=(2, 1)))
    return model if path is None else HVAE.load(path)
"""
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER)
    np.savez(tmp_path / "images.npz", train=PIXELS, wide=np.zeros((4, 8, 9), np.uint8))
    return tmp_path


@pytest.fixture
def folder(files):
    """The same images as PNG files, in two folders, among other files."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i, pixels in enumerate(PIXELS):
        path = files / "pictures" / ("a" if i < 5 else "b") / f"{i:02}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path)
    (files / "pictures" / "notes.txt").write_text("not an image")
    return files / "pictures"


PRESETS_ARE = pytest.mark.parametrize("preset", ["default", "joint-recovery"])


def command(images, *more, out="run", checkpoint=()):
    files = ["--images", images, "--out", out]
    return ["train", "mine.py:load", *checkpoint, *files, "--iterations", "6", "--batch-size", "4", *more]


def weights(out):
    return load_file(out / "model.safetensors")


@PRESETS_ARE
def test_a_prior_is_trained_from_an_array_as_fit_does_it(preset, files, capsys):
    from mine_loaded import load

    more = [] if preset == "default" else ["--preset", preset]
    assert main(command("images.npz:train", "--seed", "3", "--learning-rate", "0.002", *more)) == 0
    preset = PRESETS[preset]
    torch.manual_seed(3)
    backbone_then_energies = load()
    torch.manual_seed(3)
    prior = DiffusionEBMPrior(
        backbone_then_energies, schedule=preset.schedule, langevin=preset.langevin, energy=preset.energy
    )
    images = torch.from_numpy(PIXELS)[:, None].float() / 255
    arguments = {"iterations": 6, "batch_size": 4, "learning_rate": 0.002, "training": preset.training}
    prior.fit(images, generator=seed(3), progress=False, **arguments)
    assert same(weights(files / "run"), prior.state_dict())
    assert "6 iterations" in capsys.readouterr().err
    loaded = DiffusionEBMPrior.from_pretrained(files / "run", backbone=backbone_then_energies)
    assert (loaded.schedule, loaded.langevin) == (preset.schedule, preset.langevin)
    assert loaded.has_context == preset.energy.context
    assert loaded.trained.iterations == 6
    assert loaded.trained.settings["learning_rate"] == 0.002


@PRESETS_ARE
def test_what_was_trained_can_be_sampled_and_described(preset, files, capsys):
    about = ["--title", "Digits", "--license", "mit", "--dataset", "mnist", "usps", "--base-model", "me/vae"]
    options = ["--iterations", "2", "--preset", preset, *about, "--card-samples", "3"]
    assert main(command("images.npz:train", *options)) == 0
    card = ModelCard.load(files / "run" / "README.md")
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("mit", ["mnist", "usps"], "me/vae")
    assert "# Digits" in card.text
    assert "License: mit." in card.text
    assert "(samples.png)" in card.text
    assert len(read_strips(files / "run" / "samples.png")) == 2
    assert main(["sample", "mine.py:load", "--prior", "run", "--count", "2", "--out", "samples.png"]) == 0
    assert (files / "samples.png").exists()
    assert main(["info", "run"]) == 0
    assert "2 iterations" in capsys.readouterr().out


def test_the_objective_can_be_chosen(files):
    assert main(command("images.npz:train", "--iterations", "2", "--objective", "score")) == 0
    assert json.loads((files / "run" / "config.json").read_text())["training"]["settings"]["objective"] == "score"


def test_by_default_there_are_as_many_steps_as_the_images_bear(files, monkeypatch):
    monkeypatch.setitem(PRESETS, "default", replace(PRESETS["default"], training=TrainingConfig()))
    some = {len(PIXELS): TrainingConfig(iterations=3, batch_size=4, activity_images=0)}
    monkeypatch.setattr(TrainingConfig, "for_images", some.get)
    assert main(["train", "mine.py:load", "--images", "images.npz:train", "--out", "run"]) == 0
    assert json.loads((files / "run" / "config.json").read_text())["training"]["iterations"] == 3


@pytest.fixture(autouse=True)
def _small_preset(monkeypatch):
    # Eight images tell no active dimension, which energies with context would leave alone.
    for name, energy, measured in (("default", TINY, 0), ("joint-recovery", SMALL, 8)):
        preset = PRESETS[name]
        langevin = replace(preset.langevin, steps=2)
        training = replace(preset.training, activity_images=measured, recovery_share=0.4)
        monkeypatch.setitem(PRESETS, name, replace(preset, energy=energy, langevin=langevin, training=training))


@pytest.fixture(autouse=True)
def _mine_loaded(monkeypatch):
    """The functions of mine.py, for the test itself."""
    module = types.ModuleType("mine_loaded")
    exec(LOADER, module.__dict__)
    monkeypatch.setitem(sys.modules, "mine_loaded", module)


def test_a_folder_gives_the_same_prior_as_its_array(folder, files):
    images = open_images(str(folder), (1, 8, 8))
    assert torch.equal(
        torch.stack([images[i] for i in range(len(images))]), torch.from_numpy(PIXELS)[:, None].float() / 255
    )
    assert main(command(str(folder), "--iterations", "2")) == 0
    assert main(command("images.npz:train", "--iterations", "2", out="other")) == 0
    assert same(weights(files / "run"), weights(files / "other"))


@PRESETS_ARE
def test_the_same_command_goes_on(preset, files, monkeypatch, capsys):
    """Interrupted at the fourth step; with context, recovery begins at the fifth."""

    def command_of(*more, out="run"):
        return command("images.npz:train", "--preset", preset, *more, out=out)

    assert main(command_of(out="whole")) == 0
    save, steps = loop.save_checkpoint, []

    def interrupted(where, run):
        save(where, run)
        steps.append(len(run.history))
        if len(run.history) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", interrupted)
        assert main(command_of("--checkpoint-every", "2")) == 130
    assert steps == [2, 4]
    assert not (files / "run" / "model.safetensors").exists()
    ends = "hvae-ebm-prior: interrupted; the same command goes on from run/checkpoints/step_00000004.json\n"
    assert capsys.readouterr().err.endswith(ends)
    assert main(command_of("--checkpoint-every", "2")) == 0
    assert "going on from run" in capsys.readouterr().err
    assert same(weights(files / "run"), weights(files / "whole"))
    # Done already: once more changes nothing.
    assert main(command_of()) == 0
    assert same(weights(files / "run"), weights(files / "whole"))


def test_an_early_ctrl_c_loses_no_step(files, monkeypatch, capsys):
    """Long before a checkpoint is due, in the middle of the second step; and before the first."""
    assert main(command("images.npz:train", out="whole")) == 0
    step, steps = loop.training_step, []

    def interrupted(run, began):
        steps.append(len(run.history))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(run, began)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", interrupted)
        assert main(command("images.npz:train")) == 130
    ends = "interrupted; the same command goes on from run/checkpoints/step_00000002.json\n"
    assert capsys.readouterr().err.endswith(ends)
    assert main(command("images.npz:train")) == 0
    assert same(weights(files / "run"), weights(files / "whole"))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure_activity", stopped)
        assert main(command("images.npz:train", out="other")) == 130
    assert capsys.readouterr().err.endswith("the same command begins anew, as there is no checkpoint yet\n")


def test_logs_are_written_where_the_command_says(files, monkeypatch, capsys):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, "samples" in values)), finish=lambda: calls.append("finish")
    )
    stub = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings) or run, Image=lambda pixels, caption: pixels
    )
    monkeypatch.setitem(sys.modules, "trackio", stub)
    assert main(command("images.npz:train", out="plain")) == 0
    assert main(command("images.npz:train", "--log", "trackio:p", "--samples-every", "3")) == 0
    settings, *steps, end = calls
    assert (settings["project"], settings["name"], settings["resume"], end) == ("p", "run", "allow", "finish")
    assert steps == [(step, step % 3 == 0) for step in range(1, 7)]
    assert same(weights(files / "run"), weights(files / "plain"))


def test_the_models_file_is_handed_on(files):
    from mine_loaded import load

    model = load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save(files / "model.safetensors")
    assert main(command("images.npz:train", "--iterations", "2", out="plain")) == 0
    assert main(command("images.npz:train", "--iterations", "2", checkpoint=["model.safetensors"])) == 0
    assert not same(weights(files / "run"), weights(files / "plain"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere; expected a folder of PNG, JPEG or WebP files, hf:NAME"),
        (["images.npz:test"], "a name out of train, wide"),
        (
            ["images.npz:wide"],
            r"images.npz:wide: expected images (1, 8, 8) (channels, height, width), as the backbone draws, "
            "got (1, 8, 9); those of arrays are taken as they are",
        ),
        (["images.npz:train", "--size", "9"], "size: expected 8, as the backbone draws 8x8 pixels, got 9"),
        (["images.npz:train", "--limit", "0"], "limit: expected a positive number of images, got 0"),
        (["images.npz:train", "--batch-size", "0"], "batch_size must be a positive integer, got 0"),
        (["images.npz:train", "--checkpoint-every", "0"], "checkpoint_every: expected a positive integer, got 0"),
        (["images.npz:train", "--learning-rate", "1e9", "--iterations", "60"], "training diverged"),
        (["images.npz:train", "--log", "runs"], "log: expected tensorboard:FOLDER or trackio:PROJECT, got 'runs'"),
        (["images.npz:train", "--card-samples", "-1"], "card-samples: expected a positive integer, got -1"),
        (["hf:"], "expected hf:NAME[:SPLIT[:COLUMN]], got hf:"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*back to the last good state:RuntimeWarning")
def test_mistakes_are_explained_in_one_line(arguments, message, files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=None))
    assert main(command(*arguments)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("hvae-ebm-prior: ")
    assert message in printed


def test_another_run_in_the_same_folder_is_refused(files, capsys):
    assert main(command("images.npz:train")) == 0
    before = {path: path.read_bytes() for path in (files / "run").rglob("*") if path.is_file()}
    for arguments, message in (
        (
            ["--seed", "1"],
            "run holds another run: seed was 0 and is 1; give the same options to go on with it, or another --out",
        ),
        (["--limit", "5"], "limit was None and is 5"),
        (
            ["--learning-rate", "0.1"],
            "this checkpoint is of another run: training.learning_rate is 0.004 there and 0.1 here",
        ),
    ):
        assert main(command("images.npz:train", *arguments)) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (files / "run").rglob("*") if path.is_file()} == before


def test_images_of_a_folder_become_what_the_backbone_takes(files):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (files / "pictures").mkdir()
    colours = np.zeros((12, 20, 3), np.uint8)
    colours[:, 4:16] = (200, 100, 50)
    image.fromarray(colours).save(files / "pictures" / "wide.png")
    source = str(files / "pictures")
    # The square about the centre is all of one colour.
    expected = torch.tensor([200, 100, 50]).reshape(3, 1, 1).expand(3, 12, 12) / 255
    assert torch.equal(open_images(source, (3, 12, 12), size=12)[0], expected)
    grey = open_images(source, (1, 12, 12), size=12)[0]
    # ITU-R 601 luma, rounded to 8 bits.
    assert grey.shape == (1, 12, 12)
    torch.testing.assert_close(
        grey * 255, torch.full((1, 12, 12), 0.299 * 200 + 0.587 * 100 + 0.114 * 50), atol=1, rtol=0
    )
    # A gradient from left to right is the same gradient when it is halved: pixels 2k and 2k + 1 become their mean.
    (files / "ramp").mkdir()
    image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))).save(files / "ramp" / "ramp.png")
    halved = open_images(str(files / "ramp"), (1, 12, 12), size=12)[0][0] * 255
    torch.testing.assert_close(halved[:, 3:-3], (20.0 * torch.arange(12) + 5).expand(12, 12)[:, 3:-3], atol=1, rtol=0)
    with pytest.raises(
        ValueError, match=r"wide.png: expected 6x6 pixels, as the backbone draws, got 20x12; --size 6 resizes and crops"
    ):
        open_images(source, (3, 6, 6))
    with pytest.raises(ValueError, match="expected a backbone of grey or RGB images, this one's have 5 channels"):
        open_images(source, (5, 6, 6), size=6)
    image.fromarray(np.zeros((6, 6), np.uint16)).save(files / "pictures" / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: expected 8 bits per channel, got an image of mode I;16"):
        open_images(source, (1, 6, 6))
    (files / "pictures" / "deep.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"deep.png"):
        open_images(source, (1, 6, 6))
    (files / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images; expected files .jpeg, .jpg, .png, .webp"):
        open_images(str(files / "empty"), (1, 6, 6))


class Rows:
    """Stands in for a data set of the package datasets: rows are decoded when they are asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []
        self.features = {"label": object(), "photo": type("Image", (), {})(), "mask": type("Image", (), {})()}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked.append(index)
        return {"label": 3, "photo": self.images[index], "mask": self.images[0]}


def test_a_data_set_of_the_hub_is_read_row_by_row(files, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rows, asked = Rows([image.fromarray(pixels) for pixels in PIXELS]), []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    images = open_images("hf:someone/things", (1, 8, 8), limit=7)
    assert len(images) == 7
    assert torch.equal(images[6][0], torch.from_numpy(PIXELS[6]) / 255)
    assert rows.asked == [0, 6]
    assert torch.equal(open_images("hf:someone/things:test:mask", (1, 8, 8))[6][0], torch.from_numpy(PIXELS[0]) / 255)
    assert asked == [("someone/things", "train"), ("someone/things", "test")]
    with pytest.raises(ValueError, match="has no column face, but label, photo, mask"):
        open_images("hf:someone/things:test:face", (1, 8, 8))
    with pytest.raises(ValueError, match="image 0: expected an image, got int; name the column"):
        open_images("hf:someone/things:test:label", (1, 8, 8))
    with pytest.raises(ValueError, match=r"hf:a:b:c:d"):
        open_images("hf:a:b:c:d", (1, 8, 8))


@pytest.mark.parametrize(("module", "source"), [("PIL", "."), ("PIL", "hf:things"), ("datasets", "hf:things")])
def test_a_missing_package_is_named_with_the_extra(module, source, files, monkeypatch):
    if module != "PIL":
        pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"install hvae-ebm-prior\[data\]"):
        open_images(source, (1, 8, 8))


@pytest.mark.parametrize("spelling", ["./images.npz:train", "{files}/images.npz:train", "~/images.npz:train"])
def test_the_same_images_under_another_name_are_the_same_run(spelling, files, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(files))
    assert main(command("images.npz:train", "--iterations", "2")) == 0
    arguments = command(spelling.format(files=files), "--iterations", "2")
    arguments[arguments.index("mine.py:load")] = "./mine.py:load"
    assert main(arguments) == 0
    assert "going on from run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_other_images_of_the_same_shape_are_another_run(kind, folder, files, capsys):
    """Also under the name that the first ones had."""
    source = str(folder) if kind == "folder" else "images.npz:train"
    assert main(command(source, "--iterations", "2")) == 0
    others = 255 - PIXELS
    if kind == "folder":
        image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
        for path, pixels in zip(sorted(folder.rglob("*.PNG")), others, strict=True):
            image.fromarray(pixels).save(path)
    else:
        np.savez(files / "images.npz", train=others)
    assert main(command(source, "--iterations", "2")) == 2
    assert "this checkpoint is of another run: data.digest_of_images is" in capsys.readouterr().err
