"""The recipes in small: generated images, tiny backbones, two iterations, through the same code."""

import argparse
import io
import itertools
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import check_strip, read_strips, seed
from recipe_backbones import TINY, official_nvae
from recipe_data import Pictures, Shapes, category_names, celeba_hq, cifar10, lsun_churches
from recipe_estimate import BatchCost, duration, extrapolate
from recipes import RECIPES, Labels, Run, load_prior, main, settings
from stand_ins import AutoEncoder, perturb

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.adapters import HVAE

# Where the recipes find their backbone: each stand-in with the kind of output of the official one.
FUNCTIONS = {
    "cifar10-nvae": "mixture_of_32",
    "celeba64-nvae": "mixture_of_64",
    "celebahq256-nvae": "mixture_of_64",
    "lsun-church64-nvae": "normal_of_64",
}


def mixture_of_32(checkpoint=None):
    return stand_in(size=32)


def mixture_of_64(checkpoint=None):
    model = stand_in(size=64)
    model.num_bits = 5
    return model


def normal_of_64(checkpoint=None):
    return stand_in(size=64, mixtures=1)


def stand_in(**settings):
    torch.manual_seed(0)
    return perturb(AutoEncoder(**settings))


def backbone_options(recipe):
    return ["--loader", f"{__file__}:{FUNCTIONS[recipe]}"] if recipe in FUNCTIONS else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs, made when first asked for."""
    made = {}

    def run(recipe, preset="paper"):
        if (recipe, preset) not in made:
            folder = made[recipe, preset] = tmp_path_factory.mktemp(recipe)
            main(
                [
                    recipe,
                    "--smoke",
                    "--preset",
                    preset,
                    *backbone_options(recipe),
                    "--device",
                    "cpu",
                    "--out",
                    str(folder),
                    "--export",
                    "6",
                ]
            )
        return made[recipe, preset]

    return run


@pytest.mark.parametrize(
    ("recipe", "preset"), [*((recipe, "paper") for recipe in RECIPES), ("cifar10-nvae", "default")]
)
def test_smoke(runs, recipe, preset):
    folder, size = runs(recipe, preset), min(RECIPES[recipe].image_size, 64)
    results = json.loads((folder / "results.json").read_text())
    assert results["iterations"] == 2
    assert results["run"]["recipe"] == recipe
    assert ("published" in results["settings"]["langevin"]) == (preset == "paper")
    strips, drawn = read_strips(folder / "samples.png"), np.load(folder / "held_out.npy")[:2]
    assert len(strips) == 4
    check_strip(strips[0], torch.from_numpy(drawn) / 255)
    for name in ("held_out", "training"):
        images = np.load(folder / f"{name}.npy")
        assert images.shape == (6, 3, size, size)
        assert images.dtype == np.uint8
    assert not list(folder.glob("part.*"))


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_a_conditional_recipe_knows_its_classes(preset, tmp_path):
    """Those of the generated images are even and odd; in the paper labels take part at t = 0 alone."""
    options = ["--smoke", "--conditional", "--device", "cpu", "--out", str(tmp_path), "--export", "6"]
    main(["cifar10-hvae", "--preset", preset, *options])
    assert len(read_strips(tmp_path / "samples.png")) == 6
    prior = load_prior(tmp_path)
    assert tuple(prior.coupling.sets["class"].categories) == ("even", "odd")
    assert prior.coupling.sets["class"].layers == (0, 1, 2)
    assert prior.coupling.levels == ((0,) if preset == "paper" else None)
    assert prior.sample(2, labels={"class": "odd"}, generator=seed(0)).shape == (2, 3, 32, 32)


def test_attributes_of_a_recipe_are_drawn_in_turn(tmp_path):
    """Those above in the layers above."""
    options = ["--smoke", "--conditional", "--device", "cpu", "--out", str(tmp_path), "--export", "6"]
    main(["celeba64-nvae", "--preset", "default", *backbone_options("celeba64-nvae"), *options])
    prior = load_prior(tmp_path)
    layers = [prior.coupling.sets[name].layers for name in ("gender", "smile", "hair")]
    assert list(itertools.chain(*layers)) == list(range(len(prior.latent_shapes)))
    assert len(read_strips(tmp_path / "samples.png")) == 7


def test_labels_need_images_that_have_them(tmp_path):
    options = ["--smoke", "--conditional", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="celebahq256-nvae: --conditional: its images have no labels"):
        main(["celebahq256-nvae", *backbone_options("celebahq256-nvae"), *options])


def test_labels_of_pictures():
    pictures = Pictures(Shapes(4, 8), 8, columns={"class": "label", "smile": "Smiling"})
    image, labels = pictures[3]
    assert labels == {"class": 1, "smile": 1}
    assert torch.equal(image, pictures.first(4)[3])
    assert category_names(Shapes(4, 8), "label") == ("even", "odd")
    assert category_names(Shapes(4, 8), "Smiling") == ("no", "yes")
    with pytest.raises(ValueError, match="folders of classes in the folder train"):
        category_names([], "label")
    parts = [Labels("", part).of(35) for part in ((0, 0.2), (0.2, 0.6), (0.6, 1))]
    assert parts == [tuple(range(7)), tuple(range(7, 21)), tuple(range(21, 35))]
    assert Labels("", (0.5, 0.6)).of(1) == (0,)


@pytest.mark.parametrize("recipe", RECIPES)
def test_loaded_prior_is_the_trained_one(runs, recipe):
    priors = [load_prior(runs(recipe)) for _ in range(2)]
    assert all(isinstance(prior, DiffusionEBMPrior) for prior in priors)
    assert any(
        bool(parameter.any()) for name, parameter in priors[0].named_parameters() if "readout" in name
    )  # zero before training
    draws = [prior.sample(2, generator=seed(1)) for prior in priors]
    assert torch.equal(*draws)
    assert draws[0].shape[-1] == min(RECIPES[recipe].image_size, 64)


def test_command_line_samples_from_a_recipe(runs, tmp_path, monkeypatch):
    from hvae_ebm_prior.cli.main import main as command

    monkeypatch.setattr(sys, "path", list(sys.path))
    loader = f"{Path(__file__).parent.parent / 'examples' / 'recipes.py'}:load_prior"
    assert command(["sample", loader, str(runs("cifar10-hvae")), "--count", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").exists()


def test_batch_norm_is_estimated_anew_and_kept(runs):
    from hvae_ebm_prior.adapters import NVAEAdapter, freeze

    prior = load_prior(runs("cifar10-nvae"))
    as_trained = DiffusionEBMPrior(NVAEAdapter(freeze(mixture_of_32())))
    u = torch.randn(2, prior.dim, generator=seed(0))
    assert (runs("cifar10-nvae") / "batch_norm.safetensors").exists()
    assert not torch.allclose(prior.to_latents(u)[-1], as_trained.to_latents(u)[-1], atol=1e-3)
    # The other recipes keep the statistics of training.
    kept, untouched = load_prior(runs("celebahq256-nvae")), DiffusionEBMPrior(NVAEAdapter(freeze(mixture_of_64())))
    u = torch.randn(2, kept.dim, generator=seed(0))
    torch.testing.assert_close(kept.to_latents(u), untouched.to_latents(u))


def test_a_model_of_five_bits_gets_images_of_five_bits(runs):
    exported = np.load(runs("celebahq256-nvae") / "held_out.npy").astype(float) * 31 / 255
    assert np.abs(exported - exported.round()).max() < 0.1  # levels of 31, rounded to 8 bits
    reference = np.load(runs("celebahq256-nvae") / "training.npy")
    assert len(np.unique(reference)) > 64


def test_trained_hvae_can_be_given(runs, tmp_path):
    given = runs("cifar10-hvae") / "hvae.safetensors"
    main(
        [
            "cifar10-hvae",
            str(given),
            "--smoke",
            "--device",
            "cpu",
            "--iterations",
            "1",
            "--out",
            str(tmp_path),
            "--export",
            "2",
        ]
    )
    assert torch.equal(HVAE.load(given).start, HVAE.load(tmp_path / "hvae.safetensors").start)


def test_stopping_keeps_what_is_learned(tmp_path, monkeypatch):
    def stop(self, *args, callback, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionEBMPrior, "fit", stop)
    main(
        [
            "cifar10-nvae",
            "--smoke",
            *backbone_options("cifar10-nvae"),
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
            "--export",
            "2",
        ]
    )
    assert json.loads((tmp_path / "results.json").read_text())["iterations"] == 0
    assert load_prior(tmp_path).sample(1, generator=seed(0)).shape == (1, 3, 32, 32)


def test_paper_settings_are_the_presets():
    run = Run("celebahq256-nvae", "paper", None, None, None, "sample", False, False, 0, "cpu")
    assert settings(run).langevin.steps == 30
    assert settings(run).training.batch_size == 4


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("NVAE_REPO", raising=False)
    with pytest.raises(ValueError, match="a clone of https://github.com/NVlabs/NVAE, got None"):
        main(["cifar10-nvae", "--smoke", "--device", "cpu", "--out", str(tmp_path)])
    for source, package in ((cifar10, "datasets"), (lsun_churches, "lmdb"), (celeba_hq, "datasets")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"need {package}; install hvae-ebm-prior\[recipes\]"):
            source(tmp_path)


def test_checkpoint_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.SOURCES", {"cifar10": lambda folder: (Shapes(4, 32), Shapes(4, 32))})
    with pytest.raises(ValueError, match="expected a checkpoint after its name"):
        main(["cifar10-nvae", "--repo", str(tmp_path), "--device", "cpu", "--out", str(tmp_path)])


# Images.


def test_pictures_are_cut_to_size_from_any_collection():
    from PIL import Image

    tall = Image.fromarray(
        np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[:, None, None], 40, axis=1).repeat(3, axis=2)
    )  # 120 high, 40 wide
    for source in ([tall], [{"label": 3, "img": tall}]):
        image = Pictures(source, 20)[0]
        assert image.shape == (3, 20, 20)
        # The middle third: rows 40 to 80 of the picture, two levels per row.
        assert image[0, 0, 0].item() * 255 == pytest.approx(81, abs=3)
        assert image[0, -1, 0].item() * 255 == pytest.approx(157, abs=3)


def test_pictures_of_fewer_bits():
    levels = Pictures(Shapes(1, 32), 32).levels(0)
    image = Pictures(Shapes(1, 32), 32, bits=5)[0]
    assert torch.equal(image, torch.floor(levels.float() / 8) / 31)  # as NVAE's pre_process has it
    assert torch.equal(Pictures(Shapes(1, 32), 32)[0], levels.float() / 255)


def test_generated_pictures_differ_and_repeat():
    images = Pictures(Shapes(3, 32, seed=5), 32)
    assert torch.equal(images[1], Pictures(Shapes(3, 32, seed=6), 32)[0])
    assert not torch.equal(images[0], images[1])
    assert images.first(10).shape == (3, 3, 32, 32)


def write_lmdb(path, values):
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    with lmdb.open(str(path), map_size=10**7) as file, file.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def encoded(pixels, form):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, lossless=True)
    return file.getvalue()


def test_nvae_lmdb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    for name in ("train", "validation"):
        write_lmdb(tmp_path / f"{name}.lmdb", {str(i).encode(): picture.tobytes() for i, picture in enumerate(pixels)})
    images = Pictures(celeba_hq(tmp_path)[1], 8)
    assert [
        np.array_equal(images.levels(i).permute(1, 2, 0).numpy(), picture) for i, picture in enumerate(pixels)
    ] == 12 * [True]
    assert len(images) == 12


def test_lsun_lmdb(tmp_path):
    """Encoded pictures under keys that are any bytes, in the order of the keys; without 20,000 of them, half are held
    out.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    keys = [b"\xff\x00", b"10", b"9", b"b", b"\x00"]
    values = {
        key: encoded(picture, form)
        for key, picture, form in zip(keys, pixels, ["WEBP", "PNG", "WEBP", "PNG", "WEBP"], strict=True)
    }
    write_lmdb(tmp_path / "church_outdoor_train_lmdb", values)
    sets = [Pictures(part, 8) for part in lsun_churches(tmp_path)]
    found = [images.levels(i).permute(1, 2, 0).numpy() for images in sets for i in range(len(images))]
    assert np.array_equal(found, pixels[[4, 1, 2, 3, 0]])
    assert [len(images) for images in sets] == [2, 3]


def test_a_missing_lmdb_is_named(tmp_path):
    pytest.importorskip("lmdb", reason="lmdb is not installed")
    with pytest.raises(FileNotFoundError, match="there is no folder .*church_outdoor_train_lmdb"):
        lsun_churches(tmp_path)


@pytest.mark.parametrize(
    ("source", "name", "held_out"),
    [(cifar10, "uoft-cs/cifar10", "test"), (celeba_hq, "mattymchen/celeba-hq", "validation")],
)
def test_pictures_of_folders_go_before_a_download(tmp_path, monkeypatch, source, name, held_out):
    """And are shuffled, as the first by name may all show the same."""
    asked = []

    class Splits(dict):
        def shuffle(self, seed):
            return {split: [*pictures, f"shuffled by {seed}"] for split, pictures in self.items()}

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Splits({"train": [1], held_out: [2]})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert source(tmp_path) == ([1], [2])
    (tmp_path / "train").mkdir()
    assert source(tmp_path) == ([1, "shuffled by 0"], [2, "shuffled by 0"])
    assert asked == [((name,), {"cache_dir": str(tmp_path)}), (("imagefolder",), {"data_dir": str(tmp_path)})]


def test_pictures_of_folders_and_of_the_hub_with_the_real_package(tmp_path, monkeypatch):
    """Instead of the Hub a folder of one Parquet file per split, with the columns of the Hub's CIFAR-10."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    (tmp_path / "hub").mkdir()
    for split, picture in zip(("train", "test"), pixels, strict=True):
        (tmp_path / "folders" / split).mkdir(parents=True)
        (tmp_path / "folders" / split / "0.png").write_bytes(encoded(picture, "PNG"))
        rows = {"img": [{"bytes": encoded(picture, "PNG"), "path": None}], "label": [1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / f"{split}-0.parquet")
    monkeypatch.setattr("recipe_data.CIFAR10", str(tmp_path / "hub"))
    for data in ("folders", "download"):
        found = [Pictures(part, 32).levels(0).permute(1, 2, 0).numpy() for part in cifar10(tmp_path / data)]
        assert np.array_equal(found, pixels)


# Estimates.


def test_estimate(tmp_path, capsys):
    main(
        [
            "cifar10-nvae",
            "--smoke",
            "--estimate",
            *backbone_options("cifar10-nvae"),
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
            "--batches",
            "1",
            "3",
        ]
    )
    figures = json.loads((tmp_path / "estimate.json").read_text())
    assert [cost["batch"] for cost in figures["measured"]] == [1, 3]
    assert figures["extrapolated"]["seconds per iteration"] > 0
    assert "50,000 samples" in capsys.readouterr().out


def test_extrapolation_is_the_stated_sum():
    prior = load_prior_of_two_steps()
    found = [BatchCost(1, 2.0, 1.0, 0.5, 100.0 * 2**30), BatchCost(2, 4.0, 2.0, 1.0, 150.0 * 2**30)]
    costs = extrapolate(prior, found, 10)
    assert costs["seconds per gradient and image"] == 2.0
    assert costs["seconds per iteration"] == pytest.approx((2 * 4.0 + 2.0) * 5)
    assert costs["seconds per sample"] == pytest.approx((3 * 2 * 4.0 + 1.0) / 2)
    assert costs["GiB"] - costs["GiB of weights"] == pytest.approx(150 + 8 * 50)


def load_prior_of_two_steps():
    from backbones import RandomBackbone

    from hvae_ebm_prior import LangevinConfig

    return DiffusionEBMPrior(RandomBackbone([(2,)]), langevin=LangevinConfig(steps=2))


def test_durations_in_words():
    assert [duration(s) for s in (3.14159, 600, 3 * 3600, 30 * 86400)] == ["3.14 s", "10 min", "3 h", "30 days"]


@pytest.mark.skipif("NVAE_REPO" not in os.environ, reason="NVAE_REPO does not point to a clone")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("recipe", FUNCTIONS)
def test_official_code(recipe, tmp_path):
    """With random weights, and with those of a checkpoint in NVAE's format."""
    arguments = {
        **RECIPES[recipe].backbone,
        **TINY,
        "dataset": "cifar10" if RECIPES[recipe].image_size == 32 else "celeba_64",
    }
    torch.manual_seed(1)
    weights = official_nvae(os.environ["NVAE_REPO"], arguments).state_dict()
    torch.save({"args": argparse.Namespace(**arguments), "state_dict": weights}, tmp_path / "checkpoint.pt")
    starts = []
    for checkpoint in ([], [str(tmp_path / "checkpoint.pt")]):
        main([recipe, *checkpoint, "--smoke", "--device", "cpu", "--out", str(tmp_path), "--export", "2"])
        prior = load_prior(tmp_path)
        assert prior.sample(1, generator=seed(0)).shape[-1] == min(RECIPES[recipe].image_size, 64)
        starts.append(prior.backbone.model.prior_ftr0)
    assert torch.equal(starts[1], weights["prior_ftr0"])
    assert not torch.equal(starts[0], weights["prior_ftr0"])
