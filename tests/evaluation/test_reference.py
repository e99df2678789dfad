"""Statistics of real images: saved, loaded, refused."""

import numpy as np
import pytest
import torch
from helpers import seed

from hvae_ebm_prior.evaluation.features import Extractor
from hvae_ebm_prior.evaluation.metrics import frechet_distance, moments
from hvae_ebm_prior.evaluation.reference import load_reference, make_reference, save_reference

FLAT = Extractor(lambda x: x.flatten(1), "mine:flat", "abc")
IMAGES = torch.rand(30, 1, 2, 2, generator=seed(0))


def test_what_is_loaded_is_what_was_saved(tmp_path):
    made = make_reference(IMAGES, FLAT, torch.device("cpu"), chunk_size=7)
    save_reference(made, tmp_path / "statistics.safetensors")
    loaded = load_reference(tmp_path / "statistics.safetensors", FLAT)
    assert torch.equal(loaded.features, made.features)
    assert all(
        torch.equal(a, b) and a.dtype == torch.float64 for a, b in zip(loaded.moments, made.moments, strict=True)
    )
    assert (loaded.images, loaded.digest, loaded.extractor, loaded.extractor_digest) == (
        30,
        made.digest,
        "mine:flat",
        "abc",
    )
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    "other",
    [
        Extractor(FLAT.compute, "mine:flat", "abd"),
        Extractor(FLAT.compute, "mine:flat"),
        Extractor(FLAT.compute, "a:b", "abc"),
    ],
)
def test_statistics_of_another_extractor_are_refused(tmp_path, other):
    save_reference(make_reference(IMAGES, FLAT, torch.device("cpu")), tmp_path / "statistics.safetensors")
    with pytest.raises(ValueError, match=r"another extractor: mine:flat \(weights abc\)"):
        load_reference(tmp_path / "statistics.safetensors", other)


def test_moments_of_npz_files(tmp_path):
    features = IMAGES.flatten(1)
    np.savez(tmp_path / "moments.npz", mu=features.numpy().mean(0), sigma=np.cov(features.numpy().T))
    loaded = load_reference(tmp_path / "moments.npz", FLAT)
    assert loaded.features is loaded.images is loaded.extractor is None
    assert frechet_distance(features + 1, loaded.moments) == pytest.approx(
        frechet_distance(features + 1, moments(features)), rel=1e-5
    )
    with pytest.raises(ValueError, match="a name such as statistics.safetensors"):
        save_reference(loaded, tmp_path / "again.safetensors")
    with pytest.raises(ValueError, match="expected as many as the reference has, 4, got 3"):
        frechet_distance(features[:, :3], loaded.moments)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros(3))
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "other.safetensors").write_text("nothing")
    for name, message in (
        ("other.npz", "mu"),
        ("shapes.npz", r"got \(3,\) and \(3,\)"),
        ("no.npz", "mu"),
        ("other.safetensors", "save-statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reference(tmp_path / name, FLAT)
    with pytest.raises(FileNotFoundError):
        load_reference(tmp_path / "nowhere.safetensors", FLAT)
