"""Data that are no images: tables (N, F), sound (N, T, C) and maps of any range, all the way through."""

import json
import math

import numpy as np
import pytest
import torch
from backbones import ExactGaussian, IdentityBackbone
from helpers import TINY, same, seed, state
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader, TensorDataset

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, DiffusionSchedule, LabelSet, TrainingConfig
from hvae_ebm_prior.baselines import GaussianMixturePrior
from hvae_ebm_prior.callbacks import EarlyStopping
from hvae_ebm_prior.chains.langevin import ChainDiverged
from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.control import edit
from hvae_ebm_prior.evaluation.diagnosis import describe_layers
from hvae_ebm_prior.ood import SCHEMES, typicality_scores
from hvae_ebm_prior.posterior_cache import PosteriorCache
from hvae_ebm_prior.presets import PRESETS, Preset
from hvae_ebm_prior.testing import check_adapter
from hvae_ebm_prior.training.callbacks import sample_grid

SHAPES = [(6,), (3, 2), (1, 2, 3)]
QUICK = TrainingConfig(iterations=4, batch_size=16, activity_images=32)


class Tensors(IdentityBackbone):
    """Two layers of standard normals; data (N, *shape) are 100 u - 50, and the posterior adds noise."""

    data_kind = "tensors"

    def __init__(self, shape=(6,), noise=0.0):
        super().__init__((2,), (math.prod(shape) - 2,))
        self.shape, self.noise = shape, noise

    def infer(self, x):
        u = (x.flatten(1) + 50) / 100
        return list((u + self.noise * torch.randn_like(u)).split([2, u.shape[1] - 2], dim=1))

    def decode(self, features):
        return (100 * features - 50).unflatten(1, self.shape)


def data_of(u, shape):
    return (100 * u - 50).unflatten(1, shape)


def noise(n, number=0):
    """Noise of data, N(.8, .5^2)."""
    return 0.8 + 0.5 * torch.randn(n, 6, generator=seed(number))


def tiny(shape=(6,), **settings):
    torch.manual_seed(0)
    return DiffusionEBMPrior(Tensors(shape, noise=0.1), energy=TINY, **settings)


def exact(shape=(6,)):
    """The prior of the data themselves."""
    energies = [ExactGaussian(0.0, 0.8, 0.5), ExactGaussian(0.0, 0.8, 0.5)]
    return DiffusionEBMPrior(Tensors(shape), schedule=DiffusionSchedule.from_snr([2000, 15, 3, 0]), energy=energies)


@pytest.mark.parametrize("shape", SHAPES)
def test_data_of_any_range_and_shape_go_in_and_out(shape):
    prior, u = exact(shape), noise(2000)
    x = data_of(u, shape)
    assert x.shape == (2000, *shape)
    assert x.min() < -50
    torch.testing.assert_close(prior.encode(x), u, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prior.decode(prior.encode(x)), x, atol=1e-3, rtol=1e-5)
    drawn = prior.sample(2000, generator=seed(1))
    assert drawn.shape == x.shape
    assert drawn.mean().item() == pytest.approx(30, abs=2)
    assert drawn.std().item() == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(4, 6, dtype=torch.int16), TypeError, r"data: expected floating-point values, got torch.int16"),
        (torch.tensor([[0.0] * 6, [math.nan] * 6]), ValueError, r"data: 1 of 2 hold NaN or infinite values"),
        (torch.zeros(0, 6), ValueError, r"data: expected a non-empty batch \(N, ...\), got shape \(0, 6\)"),
        (torch.zeros(6), ValueError, r"data: expected a non-empty batch \(N, ...\), got shape \(6,\)"),
        ([[0.0] * 6], TypeError, r"data: expected a tensor \(N, ...\), got list"),
    ],
)
def test_what_is_no_data_is_refused_wherever_it_enters(data, error, message, tmp_path):
    prior = tiny()
    enter = [
        prior.encode,
        lambda x: check_adapter(prior.backbone, x),
        lambda x: describe_layers(prior.backbone, x),
        lambda x: SCHEMES["density"](prior, x),
        lambda x: prior.fit(noise(8), iterations=1, callback=EarlyStopping(x)),
    ]
    if isinstance(data, torch.Tensor):
        enter += [prior.fit, lambda x: PosteriorCache.build(prior, x, tmp_path)]
    for take in enter:
        with pytest.raises(error, match=message):
            take(data)


@pytest.mark.parametrize("wrong", [(5,), (7,), (2, 3), (1, 6)])
def test_tensors_of_another_shape_are_refused(wrong, tmp_path):
    prior = tiny()
    for take in (
        prior.encode,
        prior.fit,
        lambda x: PosteriorCache.build(prior, x, tmp_path),
        lambda x: check_adapter(prior.backbone, x),
        lambda x: describe_layers(prior.backbone, x),
        lambda x: SCHEMES["density"](prior, x),
    ):
        with pytest.raises(ValueError, match=r"data: this model takes tensors \('N', 6\), as it decodes to, got"):
            take(torch.zeros(8, *wrong))


def test_images_stay_images_and_say_how_data_are_declared():
    prior = DiffusionEBMPrior(IdentityBackbone((6,)), energy=TINY)
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got -1 to 1; .* data_kind = \"tensors\""):
        prior.encode(torch.linspace(-1, 1, 6).reshape(1, 1, 1, 6))
    with pytest.raises(
        ValueError, match=r"images: expected a non-empty batch \(N, C, H, W\), got shape \(2, 6\); if they are"
    ):
        prior.encode(torch.zeros(2, 6))
    Images = type("Images", (Tensors,), {"data_kind": "images"})
    prior = DiffusionEBMPrior(Images((1, 2, 3)), energy=TINY)
    with pytest.raises(ValueError, match=r"must return images in \[0, 1\], got .* data_kind = \"tensors\""):
        prior.sample(4)


def test_a_kind_of_data_that_there_is_not_is_refused():
    wrong = type("Wrong", (Tensors,), {"data_kind": "audio"})()
    with pytest.raises(ValueError, match=r"Wrong.data_kind: expected one of images, tensors, got 'audio'"):
        DiffusionEBMPrior(wrong, energy=TINY).encode(torch.zeros(2, 6))


def test_what_is_decoded_is_checked():
    class Decodes(Tensors):
        def decode(self, features):
            return self.result(super().decode(features))

    prior = DiffusionEBMPrior(adapter := Decodes(), energy=TINY)
    for result, error, message in (
        (lambda x: x.long(), TypeError, r"floating-point tensors \(N, ...\), got torch.int64"),
        (lambda x: x[:1], ValueError, r"must return 3 tensors \(3, ...\), got shape \(1, 6\)"),
        (lambda x: x[:, 0], ValueError, r"must return 3 tensors \(3, ...\), got shape \(3,\)"),
        (lambda x: x / 0, ChainDiverged, "not finite"),
    ):
        adapter.result = result
        with pytest.raises(error, match=message):
            prior.sample(3)


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_datasets_and_loaders_are_the_same_data(shape, tmp_path):
    """Also through a cache, as the draws in it are those of the encoder."""
    x = data_of(noise(16), shape)
    torch.manual_seed(0)
    quiet = DiffusionEBMPrior(Tensors(shape), energy=TINY)  # a posterior without noise, which no order can change
    learned = []
    for data in (x, TensorDataset(x), DataLoader(x, batch_size=16), PosteriorCache.build(quiet, x, tmp_path, draws=8)):
        torch.manual_seed(0)
        prior = DiffusionEBMPrior(Tensors(shape), energy=TINY)
        prior.fit(data, training=TrainingConfig(iterations=1, batch_size=16, activity_images=16), generator=seed(0))
        learned.append(state(prior))
    torch.testing.assert_close(learned[3], learned[0])  # one batch, whose order alone differs
    torch.testing.assert_close(learned[2], learned[0])
    assert same(learned[1], learned[0])


def test_the_prior_moves_to_the_data():
    prior = tiny()
    training = TrainingConfig(
        iterations=60, batch_size=32, learning_rate=2e-2, warmup=2, ema_decay=0.9, activity_images=0
    )
    prior.fit(data_of(noise(500), (6,)), training=training, generator=seed(0), progress=False)
    # The Gaussian prior's data are -50 +- 100, the true ones 30 +- 50.
    drawn = prior.sample(300, generator=seed(1))
    assert drawn.mean().item() == pytest.approx(30, abs=20)
    assert drawn.std().item() == pytest.approx(50, rel=0.3)


def test_labels_and_checkpoints(tmp_path):
    """An interrupted run with labels ends as one that never was."""
    x, labels = data_of(noise(32), (3, 2)), torch.arange(32) % 2
    coupled = {"coupling": Coupling({"kind": LabelSet(("cup", "hat"))})}

    def stop(prior, record):
        if record.iteration == 2:
            raise KeyboardInterrupt

    whole, halves = tiny((3, 2), **coupled), tiny((3, 2), **coupled)
    whole.fit(x, labels=labels, training=QUICK, generator=seed(0))
    files = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "labels": labels, "training": QUICK}
    with pytest.raises(KeyboardInterrupt):
        halves.fit(x, callback=[lambda *_: None, stop], generator=seed(0), **files)
    halves = tiny((3, 2), **coupled)
    halves.fit(x, resume=True, generator=seed(0), **files)
    assert same(state(halves), state(whole))
    assert whole.classify(x)["kind"].shape == (32, 2)
    assert whole.sample(2, labels={"kind": "hat"}).shape == (2, 3, 2)
    assert edit(whole, x[:2], hold=(0,), generator=seed(0)).shape == (2, 3, 2)
    other = tiny((3, 2), **coupled)
    with pytest.raises(ValueError, match="digest_of_images"):
        other.fit(x + 1, resume=True, generator=seed(0), **files)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_outlier_scores_are_those_of_the_data(shape):
    prior, u = exact(shape), noise(32)
    given = data_of(torch.cat((u, u + 4)), shape)
    expected = (((torch.cat((u, u + 4)) - 0.8) / 0.5).square() / 2 + math.log(0.5 * math.sqrt(2 * math.pi))).sum(1)
    torch.testing.assert_close(SCHEMES["flow"](prior, given, steps=20)[:, 0], expected, rtol=0.02, atol=0.2)
    for name in ("inference", "diffusion", "conditional-diffusion", "density"):
        scores = SCHEMES[name](prior, given, generator=seed(0))
        assert scores.shape == (64, 2)
    energies = SCHEMES["density"](prior, given, draws=1)[:, 0]
    assert energies[:32].max() < energies[32:].min()
    distances = typicality_scores(prior, given, reference=data_of(noise(64, 1), shape), draws=1)[:, 0]
    assert distances[:32].median() < distances[32:].min()


@pytest.mark.parametrize("shape", SHAPES[1:2])
def test_check_and_diagnosis(shape, capsys):
    reports = check_adapter(Tensors(shape, noise=0.1), data_of(noise(200), shape), generator=seed(0))
    assert "Prior hole in layers 0, 1." in capsys.readouterr().out
    # E u^2 = .8^2 + .5^2 + .1^2
    assert [report.second_moment for report in reports] == pytest.approx([0.9, 0.9], abs=0.1)


def test_the_check_takes_the_model_s_own_samples(capsys):
    adapter, x = Tensors((3, 2), noise=0.1), data_of(noise(16), (3, 2))
    own = data_of(torch.randn(400, 6, generator=seed(1)), (3, 2))
    check_adapter(adapter, x, samples=own, generator=seed(0))
    with pytest.raises(ValueError, match="400 images of the layers differ from the model's own .* spread 98.* and 155"):
        check_adapter(adapter, x, samples=1.5 * own, generator=seed(0))


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda x: x.flatten(1)[:, :5], r"data: this model takes tensors \(.N., 5\), as it decodes to, got \(1, 6\)"),
        (lambda x: x + math.inf, "decode: the images are not finite"),
    ],
)
def test_the_check_names_what_is_broken(decode, message):
    broken = type("Broken", (Tensors,), {"decode": lambda self, features: decode(Tensors.decode(self, features))})
    with pytest.raises(ValueError, match=message):
        check_adapter(broken(noise=0.1), data_of(noise(8), (6,)))


def test_saved_priors_have_no_picture(tmp_path):
    prior = tiny((3, 2))
    prior.fit(data_of(noise(32), (3, 2)), training=QUICK, generator=seed(0), progress=False)
    prior.save_pretrained(tmp_path, samples=4)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None
    assert "data = prior.sample(16)  # (16, ...)" in card.text
    assert ".png" not in card.text
    again = DiffusionEBMPrior.from_pretrained(tmp_path, backbone=Tensors((3, 2)))
    assert torch.equal(again.sample(4, generator=seed(1)), prior.sample(4, generator=seed(1)))
    assert sample_grid(prior, 4, 0) is None


def test_baselines_take_them(generator):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    mixture = GaussianMixturePrior(Tensors((3, 2)), components=1)
    mixture.fit(data_of(noise(500), (3, 2)), generator=generator)
    assert mixture.sample(2000, generator=generator).mean().item() == pytest.approx(30, abs=4)


LOADER = """
import sys
sys.path.insert(0, {tests!r})
from test_tensors import Tensors

def load():
    return Tensors((3, 2), noise=0.1)

def features():
    return lambda x: x.flatten(1) / 100
"""


@pytest.fixture
def files(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER.format(tests=str(request.path.parent)))
    np.savez("data.npz", sound=data_of(noise(40), (3, 2)).numpy().astype(">f8"), bytes=np.zeros((4, 3, 2), np.uint8))
    np.save("long.npy", np.zeros((4, 3, 3), np.float32))
    np.save("outliers.npy", data_of(noise(20) + 5, (3, 2)).numpy())
    torch.manual_seed(0)
    tiny((3, 2)).save_pretrained("prior")
    return tmp_path


def test_commands_that_take_them(files, capsys):
    assert main(["diagnose", "mine.py:load", "--images", "data.npz:sound", "--draws", "4"]) == 0
    assert "Prior hole in" in capsys.readouterr().out
    assert main(["sample", "mine.py:load", "--prior", "prior", "--count", "3"]) == 0
    prior = DiffusionEBMPrior.from_pretrained("prior", backbone=Tensors((3, 2)))
    assert np.array_equal(np.load("sample.npy"), prior.sample(3, generator=seed(0)).numpy())
    assert json.loads((files / "sample.json").read_text())["samples"] == 3
    assert not (files / "sample.png").exists()
    assert "sample.npy and sample.json written" in capsys.readouterr().err
    scoring = ["--images", "data.npz:sound", "--outliers", "outliers.npy", "--scheme", "density"]
    assert main(["ood", "mine.py:load", "--prior", "prior", *scoring]) == 0
    assert json.loads((files / "ood.json").read_text())["density"][0]["auroc"] == 1.0


def test_train_and_evaluate_take_them(files, monkeypatch, capsys):
    default = PRESETS["default"]
    monkeypatch.setitem(PRESETS, "default", Preset(default.schedule, default.langevin, TINY, QUICK))
    train = ["train", "mine.py:load", "--images", "data.npz:sound", "--limit", "32", "--out", "run"]
    assert main(train) == 0
    prior = DiffusionEBMPrior.from_pretrained("run", backbone=Tensors((3, 2)))
    assert prior.trained.iterations == 4
    assert "going on from" not in capsys.readouterr().err
    assert main(train) == 0
    assert "going on from" in capsys.readouterr().err
    measure = ["--images", "data.npz:sound", "--reference", "outliers.npy", "--features", "mine.py:features"]
    assert main(["evaluate", "mine.py:load", "--prior", "run", *measure, "--metrics", "--temperatures"]) == 0
    rows = json.loads((files / "evaluate.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"real", "reconstruction", "Gaussian", "prior"}
    # The outliers' noise is N(5.8, .5^2), that of the images N(.8, .5^2): six means that differ by 5.
    assert rows[0]["distance"] == pytest.approx(6 * 25, rel=0.1)
    assert main(["train", "mine.py:load", "--images", "data.npz:sound", "--size", "8", "--out", "other"]) == 2
    assert "size: this model takes plain tensors" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["edit", "interpolate", "transitions", "demo"])
def test_commands_of_pictures_say_so(files, capsys, command):
    assert main([command, "mine.py:load", "--prior", "prior"]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert f"{command}: pictures are of images, and Tensors takes plain tensors" in said


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "data.npz:bytes",
            "data.npz:bytes: expected floats ('N', 3, 2), as this model takes plain tensors, got uint8 (4, 3, 2)",
        ),
        ("long.npy", "long.npy: expected floats ('N', 3, 2), as this model takes plain tensors, got float32 (4, 3"),
        ("photos", "photos: expected file.npy or file.npz:name of floats ('N', 3, 2), as this model takes plain"),
    ],
)
def test_files_of_something_else_are_named(files, capsys, source, message):
    assert main(["diagnose", "mine.py:load", "--images", source]) == 2
    assert message in capsys.readouterr().err
