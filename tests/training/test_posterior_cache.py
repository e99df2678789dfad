"""The posterior cache: against closed forms, in training, interrupted, damaged, and of another backbone."""

import json
import math
import os
import re
import statistics
import sys

import pytest
import torch
from backbones import IdentityBackbone, Quadratic, RandomBackbone
from helpers import SMALL, TINY, seed
from safetensors.torch import load_file
from stand_ins import AutoEncoder, perturb
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hvae_ebm_prior import (
    Coupling,
    DiffusionEBMPrior,
    LabelSet,
    LangevinConfig,
    TrainingConfig,
)
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, HVAEConfig, NVAEAdapter
from hvae_ebm_prior.backbone.posterior import Posterior
from hvae_ebm_prior.baselines import GaussianPrior
from hvae_ebm_prior.saving.fingerprint import BackboneMismatch
from hvae_ebm_prior.training import posterior_cache
from hvae_ebm_prior.training.batches import Batches
from hvae_ebm_prior.training.cache_files import InvalidCache
from hvae_ebm_prior.training.posterior_cache import PosteriorCache, gaussian_noise


class Draws(IdentityBackbone):
    """q(u|x) is a product: mean x, std 0.5 + |x|/4 in every dimension of two layers; the adapter does not say so."""

    def __init__(self, size=2):
        super().__init__((size,), (1,))
        self.encoded = 0

    def statistics(self, images):
        means = IdentityBackbone.infer(self, images)
        return [(mean, 0.5 + mean.abs() / 4) for mean in means]

    def infer(self, images):
        self.encoded += len(images)
        return [mean + std * torch.randn(mean.shape) for mean, std in self.statistics(images)]


class Exact(Draws):
    """The same, and the adapter says so."""

    def posterior(self, images):
        return self.statistics(images)


def images_of(n, size=3, value=7):
    """Images (n, 1, 1, size) whose means are standard normal numbers."""
    return (torch.randn(n, 1, 1, size, generator=seed(value)) + 10) / 20


def means_of(images):
    return (20 * images - 10).flatten(1)


@pytest.fixture(params=[Draws, Exact])
def backbone(request):
    return request.param()


def test_draws_have_the_posteriors_mean_and_std(tmp_path):
    m, images = 1000, images_of(5)
    cache = PosteriorCache.build(GaussianPrior(Draws()), images, tmp_path, draws=m, batch_size=2, generator=seed())
    u = torch.stack([cache.noise(torch.arange(5), number) for number in range(m)])
    mean = means_of(images)
    std = 0.5 + mean.abs() / 4
    assert ((u.mean(0) - mean).abs() < 5 * std / math.sqrt(m)).all()
    assert ((u.std(0) / std - 1).abs() < 5 / math.sqrt(2 * m)).all()
    # One draw tells nothing of the next, nor of that of another image.
    residual = ((u - mean) / std).flatten(1)
    correlation = torch.corrcoef(residual.T) - torch.eye(15)
    assert correlation.abs().max() < 5 / math.sqrt(m)
    assert abs((residual[1:] * residual[:-1]).mean()) < 5 / math.sqrt(15 * m)


def test_the_gaussian_cache_holds_mean_and_std_and_draws_anew(tmp_path):
    images = images_of(5)
    cache = PosteriorCache.build(GaussianPrior(Exact()), images, tmp_path, generator=seed())
    mean = means_of(images)
    std = 0.5 + mean.abs() / 4
    held = load_file(tmp_path / "shard_00000.safetensors")
    torch.testing.assert_close(held["mean"], mean)
    torch.testing.assert_close(held["std"], std)
    rows = torch.arange(5).repeat(2000)
    first, second = (cache.noise(rows, 0, g).unflatten(0, (2000, 5)) for g in [seed(1)] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(cache.noise(rows, 0, seed(1)).unflatten(0, (2000, 5)), first)
    assert ((first.mean(0) - mean).abs() < 5 * std / math.sqrt(2000)).all()
    assert ((first.std(0) / std - 1).abs() < 5 / math.sqrt(4000)).all()
    # Score matching learns from them too.
    prior, chosen = GaussianPrior(Exact()), torch.tensor([3, 1])
    u, gaussians = Batches(cache, 2, seed(1)).noise_with_posterior(prior, chosen, 0, seed(2))
    assert torch.equal(u, cache.noise(chosen, 0, seed(2)))
    torch.testing.assert_close(gaussians, Posterior(mean[chosen], std[chosen]))


def hvae(layers):
    return perturb(HVAE(HVAEConfig(image_size=8, widths=(8,) * layers, latent_channels=(2,) * layers)))


@pytest.mark.parametrize(
    "adapter", [lambda: HVAEAdapter(hvae(1)), lambda: NVAEAdapter(perturb(AutoEncoder(1, 1)))], ids=["hvae", "nvae"]
)
def test_adapters_of_one_latent_know_their_posterior(adapter):
    torch.manual_seed(0)
    prior = GaussianPrior(adapter())
    shape = prior.decode(torch.zeros(1, prior.dim)).shape[1:]
    images = torch.rand(1, *shape, generator=seed())
    mean, std = gaussian_noise(prior, images)
    u = torch.cat([prior.encode(images.expand(100, *shape), generator=seed(i)) for i in range(20)])
    assert mean.abs().max() > 0.05
    assert ((u.mean(0) - mean[0]).abs() < 5.5 * std[0] / math.sqrt(2000)).all()
    assert ((u.std(0) / std[0] - 1).abs() < 5.5 / math.sqrt(4000)).all()


def test_adapters_of_several_latents_know_none():
    torch.manual_seed(0)
    for adapter in (HVAEAdapter(hvae(2)), NVAEAdapter(perturb(AutoEncoder(1, 2)))):
        prior = GaussianPrior(adapter)
        shape = prior.decode(torch.zeros(1, prior.dim)).shape[1:]
        assert gaussian_noise(prior, torch.rand(2, *shape)) is None


def test_a_posterior_that_is_not_that_of_infer_is_refused(tmp_path):
    class Wrong(Exact):
        def posterior(self, images):
            return [(mean, 0.9 * std) for mean, std in self.statistics(images)]

    with pytest.raises(ValueError, match="Wrong.posterior: expected mean and std of the u that `infer` draws"):
        PosteriorCache.build(GaussianPrior(Wrong(100)), images_of(64, 101), tmp_path, generator=seed())
    # Draws of its own are still to be had.
    assert (
        PosteriorCache.build(
            GaussianPrior(Wrong(100)), images_of(64, 101), tmp_path, draws=2, generator=seed()
        ).index.draws
        == 2
    )


def test_every_pass_takes_another_draw(tmp_path):
    images = images_of(12)
    cache = PosteriorCache.build(GaussianPrior(Draws()), images, tmp_path, draws=3, shard_size=200, generator=seed())
    held = torch.cat([load_file(path)["draws"] for path in sorted(tmp_path.glob("shard_*"))])
    prior, batches = GaussianPrior(Draws()), Batches(cache, 4, seed(1))
    for number in range(7):
        seen = {}
        for _ in range(3):
            rows, labels, epoch = next(batches)
            assert (epoch, labels) == (number, None)
            seen |= dict(zip(rows.tolist(), batches.noise(prior, rows, epoch, None), strict=True))
        assert all(torch.equal(u, held[i, number % 3]) for i, u in seen.items())
        assert sorted(seen) == list(range(12))


@pytest.mark.usefixtures("counters")
def test_training_from_the_cache_is_the_same_in_distribution(tmp_path):
    """The learned tilt of a one-dimensional prior, over seeds, from the encoder, the mean and std, and fresh draws."""
    images = images_of(32, 3)
    settings = TrainingConfig(
        iterations=12, batch_size=16, learning_rate=0.05, warmup=0, ema_decay=0.0, activity_images=0
    )
    found = {name: [] for name in ("encoder", "gaussian", "draws")}
    # Six passes over the data, each with a draw of its own.
    kinds = {"encoder": (Draws, None), "gaussian": (Exact, None), "draws": (Draws, 6)}
    for i in range(10):
        for k, (name, (backbone, draws)) in enumerate(kinds.items()):
            prior, data = (
                DiffusionEBMPrior(backbone(), energy=[Quadratic(2), Quadratic(1)], langevin=LangevinConfig(steps=2)),
                images,
            )
            if name != "encoder":
                data = PosteriorCache.build(
                    prior, images, tmp_path / f"{name}{i}", draws=draws, generator=seed(100 + i)
                )
            prior.fit(data, training=settings, generator=seed(1000 * k + i), progress=False)
            found[name].append(prior.energies[0].v.mean().item())
    spread = statistics.stdev(found["encoder"])
    assert spread > 0
    for name in ("gaussian", "draws"):
        assert statistics.mean(found[name]) == pytest.approx(
            statistics.mean(found["encoder"]), abs=4 * spread * math.sqrt(2 / 10)
        )
        assert 0.5 < statistics.stdev(found[name]) / spread < 2


@pytest.mark.parametrize("energy", [SMALL, TINY])
def test_training_runs_no_encoder_and_goes_on_bit_for_bit(energy, backbone, tmp_path):
    """With context, recovery begins at the tenth step, after the interruption."""

    def prior():
        torch.manual_seed(0)
        return DiffusionEBMPrior(backbone, energy=energy, langevin=LangevinConfig(steps=2))

    def stop(prior, record):
        if record.iteration == 7:
            raise InterruptedError

    cache = PosteriorCache.build(prior(), images_of(40), tmp_path / "cache", generator=seed())
    encoded, settings = (
        backbone.encoded,
        TrainingConfig(iterations=12, batch_size=8, activity_images=40, recovery_share=0.25),
    )
    whole = prior()
    whole.fit(cache, training=settings, generator=seed(3), progress=False)
    assert whole.energies[0].activity.lt(1).all()
    files = {
        "checkpoint_dir": tmp_path / "run",
        "checkpoint_every": 3,
        "resume": True,
        "training": settings,
        "progress": False,
    }
    with pytest.raises(InterruptedError):
        prior().fit(cache, callback=stop, generator=seed(3), **files)
    other = PosteriorCache.build(prior(), images_of(40), tmp_path / "other", generator=seed(1))
    if cache.index.draws:
        with pytest.raises(ValueError, match=r"another run: data\.digest is"):
            prior().fit(other, generator=seed(3), **files)
    again = prior()
    again.fit(PosteriorCache(tmp_path / "cache"), generator=seed(4), **files)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    assert backbone.encoded == encoded + (40 * 8 if cache.index.draws else 0) + (0 if cache.index.draws else 40)


LABELLED = {
    "tensor": (lambda images: images, torch.arange(10) % 3),
    "by name": (lambda images: images, {"b": torch.arange(10.0), "a": torch.arange(10) % 3}),
    "dataset": (lambda images: TensorDataset(images, torch.arange(10) % 3), None),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_kept_along(name, tmp_path):
    data, labels = LABELLED[name][0](images_of(10)), LABELLED[name][1]
    cache = PosteriorCache.build(
        GaussianPrior(Draws()), data, tmp_path, labels=labels, shard_size=80, batch_size=2, draws=2, generator=seed()
    )
    assert len(cache.index.shards) > 2
    rows = torch.tensor([7, 0, 9, 3, 7])
    found = cache.labels(rows)
    if isinstance(labels, dict):
        assert found.keys() == labels.keys()
        assert all(torch.equal(found[key], labels[key][rows]) for key in labels)
    else:
        assert torch.equal(found, rows % 3)
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(
        Draws(), energy=SMALL, langevin=LangevinConfig(steps=1), coupling=Coupling({"a": LabelSet(3)}, networks=SMALL)
    )
    if not isinstance(labels, dict):
        record = prior.fit(cache, iterations=1, batch_size=8, generator=seed(), progress=False)[0]
        assert record.cross_entropy == pytest.approx(math.log(3), rel=0.2)


class Augmented(Dataset):
    """Images with noise from torch's global generator."""

    def __len__(self):
        return 11

    def __getitem__(self, i):
        return 0.9 * images_of(11)[i] + 0.1 * torch.rand(1, 1, 3)


@pytest.mark.parametrize("data", [images_of(11), Augmented()], ids=["tensor", "augmented"])
def test_interrupted_building_goes_on(backbone, data, tmp_path, monkeypatch):
    arguments = {"shard_size": 160, "batch_size": 2}
    torch.manual_seed(5)
    whole = PosteriorCache.build(GaussianPrior(backbone), data, tmp_path / "whole", generator=seed(), **arguments)
    assert len(whole.index.shards) == (11 if whole.index.draws else 2)
    random, write, left = torch.get_rng_state(), posterior_cache.write_weights, [3 if whole.index.draws else 1]

    def interrupted(path, tensors):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(posterior_cache, "write_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PosteriorCache.build(GaussianPrior(backbone), data, tmp_path / "parts", generator=seed(), **arguments)
    with pytest.raises(InvalidCache, match=r"unfinished, with \d of \d+ shards; PosteriorCache.build goes on with it"):
        PosteriorCache(tmp_path / "parts")
    encoded = backbone.encoded
    parts = PosteriorCache.build(GaussianPrior(backbone), data, tmp_path / "parts", generator=seed(77), **arguments)
    if whole.index.draws:
        assert backbone.encoded - encoded == 8 * 8
    assert parts.digest == whole.digest
    assert torch.equal(torch.get_rng_state(), random)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert PosteriorCache.build(GaussianPrior(backbone), data, tmp_path / "parts", **arguments).digest == whole.digest
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draws": 3}, "draws differ: 2 there and 3 here"),
        ({"dtype": torch.float16}, "dtype differ: float32 there and float16 here"),
        ({"shard_size": 100}, "images per shard differ"),
        ({"labels": torch.zeros(8)}, "labels differ"),
        ({"data": images_of(9)}, "number of images differ: 8 there and 9 here"),
        ({"data": images_of(8, value=8)}, "first images differ"),
    ],
)
def test_a_folder_with_another_cache_is_refused(change, words, tmp_path):
    arguments = {"data": images_of(8), "draws": 2, "generator": seed()}
    PosteriorCache.build(GaussianPrior(Draws()), folder=tmp_path, **arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"holds a cache of something else, the {words}"):
        PosteriorCache.build(GaussianPrior(Draws()), folder=tmp_path, **{**arguments, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_backbone_is_refused(tmp_path):
    def prior(*backbone, **settings):
        return DiffusionEBMPrior(RandomBackbone(*backbone, **settings), energy=SMALL, langevin=LangevinConfig(steps=1))

    images = torch.rand(6, 1, 2, 2)
    shapes = [(2,), (3,)]
    cache = PosteriorCache.build(prior(shapes), images, tmp_path, draws=2, generator=seed())
    for other, words in (
        (prior(shapes, seed=1), "the Gaussian of layer 0 differs"),
        (prior([(2,)]), "2 latent layers, this one has 1"),
    ):
        for use in (
            lambda other=other: other.fit(cache, iterations=1),
            lambda other=other: PosteriorCache.build(other, images, tmp_path, draws=2),
        ):
            with pytest.raises(BackboneMismatch, match=words):
                use()
    prior(shapes).fit(cache, iterations=1, batch_size=4, generator=seed(), progress=False)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE = {
    "bit": (lambda folder: flip(folder / "shard_00001.safetensors"), r"shard_00001\.safetensors: the file is damaged"),
    "truncated": (
        lambda folder: os.truncate(folder / "shard_00001.safetensors", 40),
        r"shard_00001\.safetensors: this is no safetensors file",
    ),
    "missing": (
        lambda folder: (folder / "shard_00000.safetensors").unlink(),
        r"shard_00000\.safetensors: the file is missing",
    ),
    "swapped": (
        lambda folder: (folder / "shard_00000.safetensors").write_bytes(
            (folder / "shard_00001.safetensors").read_bytes()
        ),
        r"shard_00000\.safetensors: the file is damaged",
    ),
    "no index": (lambda folder: (folder / "index.json").unlink(), r"there is no index\.json"),
    "index truncated": (lambda folder: os.truncate(folder / "index.json", 100), r"index\.json: no JSON"),
    "index of another format": (lambda folder: change(folder / "index.json", format=9), "expected 1, got 9"),
    "index with other numbers": (lambda folder: change(folder / "index.json", images=1000), "shards"),
    "index with a stranger": (lambda folder: change(folder / "index.json", stranger=1), "unknown field"),
    "index with other draws": (
        lambda folder: change(folder / "index.json", draws=5),
        r"shard_00000\.safetensors: expected",
    ),
    "index with a path": (lambda folder: change(folder / "index.json", key="../x"), "invalid literal"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_when_a_cache_is_opened(name, tmp_path):
    damage, words = DAMAGE[name]
    PosteriorCache.build(GaussianPrior(Draws()), images_of(8), tmp_path, draws=2, shard_size=100, generator=seed())
    assert len(list(tmp_path.glob("shard_*"))) == 2
    damage(tmp_path)
    with pytest.raises(InvalidCache, match=words):
        PosteriorCache(tmp_path)


def test_shards_are_mapped_and_bounded(tmp_path):
    """A batch of a cache of 40 MB reads its own rows: memory that is not the file's hardly grows, and the file's by
    some pages.
    """
    size, images = 5000, images_of(40, 5001)
    cache = PosteriorCache.build(
        GaussianPrior(Draws(size)), images, tmp_path, draws=50, shard_size=2**24, generator=seed()
    )
    paths = sorted(tmp_path.glob("shard_*"))
    assert len(paths) == 3
    assert all(path.stat().st_size < 2**24 + 1000 for path in paths)
    if not sys.platform.startswith("linux"):
        pytest.skip("what is mapped is read from Linux's /proc")

    def resident():
        """Bytes in memory of this cache's files, and of all that is no file."""
        found, ours = 0, False
        with open("/proc/self/smaps") as lines:
            for line in lines:
                if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    ours = str(tmp_path) in line
                elif ours and line.startswith("Rss:"):
                    found += int(line.split()[1]) * 1024
        with open("/proc/self/status") as lines:
            return found, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    cache = PosteriorCache(tmp_path)
    mapped, own = resident()
    u = cache.noise(torch.tensor([30, 2]), 3)
    mapped_after, own_after = resident()
    assert u.shape == (2, 5001)
    # The system reads ahead, by some MB at most.
    assert mapped < mapped_after < 1e7
    assert own_after - own < 4e6


def test_half_precision_halves_the_size(tmp_path):
    sizes, noise = [], []
    for dtype in (torch.float32, torch.float16):
        cache = PosteriorCache.build(
            GaussianPrior(Draws()), images_of(50), tmp_path / str(dtype), draws=8, dtype=dtype, generator=seed()
        )
        sizes.append((tmp_path / str(dtype) / "shard_00000.safetensors").stat().st_size)
        noise.append(cache.noise(torch.arange(50), 1))
        assert noise[-1].dtype == dtype
    torch.testing.assert_close(noise[1].float(), noise[0], rtol=1e-3, atol=1e-3)
    assert sizes[1] < 0.6 * sizes[0]


def test_mistakes_are_explained(tmp_path):
    prior, images = GaussianPrior(Draws()), images_of(6)
    with pytest.raises(TypeError, match=r"data: expected images .* got DataLoader; of a DataLoader give its dataset"):
        PosteriorCache.build(prior, DataLoader(TensorDataset(images), batch_size=2), tmp_path)
    with pytest.raises(ValueError, match="labels: expected 6 of the images, one per image, got 5"):
        PosteriorCache.build(prior, images, tmp_path, labels=torch.zeros(5))
    with pytest.raises(ValueError, match="labels: they go with a tensor of images"):
        PosteriorCache.build(prior, TensorDataset(images), tmp_path, labels=torch.zeros(6))
    with pytest.raises(ValueError, match="draws: expected a positive integer, got 0"):
        PosteriorCache.build(prior, images, tmp_path, draws=0)
    with pytest.raises(ValueError, match="the dataset is empty"):
        PosteriorCache.build(prior, TensorDataset(images[:0]), tmp_path)
    assert not list(tmp_path.iterdir())
    cache = PosteriorCache.build(prior, images, tmp_path, draws=1)
    energies = DiffusionEBMPrior(Draws(), energy=SMALL, langevin=LangevinConfig(steps=1))
    with pytest.raises(ValueError, match="activity_images: .* build it with draws=2 or more"):
        energies.fit(cache, iterations=1, batch_size=2)
    energies.fit(cache, training=TrainingConfig(iterations=1, batch_size=2, activity_images=0), progress=False)


def test_nothing_is_printed_without_a_terminal(tmp_path, capsys):
    cache = PosteriorCache.build(GaussianPrior(Draws()), images_of(6), tmp_path, draws=2)
    DiffusionEBMPrior(Draws(), energy=SMALL, langevin=LangevinConfig(steps=1)).fit(cache, iterations=2, batch_size=2)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
