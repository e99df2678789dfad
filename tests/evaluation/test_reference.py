"""Statistics of real images: saved, loaded, refused."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from helpers import seed
from safetensors import safe_open
from safetensors.torch import save_file

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


def lying_header(shape):
    """A .npy file of eight bytes whose header claims a shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(8)


def npz(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            file = io.BytesIO()
            np.save(file, data) if isinstance(data, np.ndarray) else file.write(data)
            archive.writestr(f"{name}.npy", file.getvalue())


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(3), -EYE, "without negative eigenvalues, got -1 beside -1"),
        (np.zeros(3), np.diag([1.0, 1.0, -0.01]), "without negative eigenvalues, got -0.01 beside 1"),
        (
            np.zeros(3),
            EYE + np.triu(np.full((3, 3), 0.1), 1),
            "symmetric covariance .* got one with a difference of 0.1",
        ),
        (np.zeros(3), EYE * np.nan, r"expected a covariance \(sigma\) of finite"),
        (np.array([0, np.inf, 0]), EYE, r"expected a mean \(mu\) of finite"),
        (np.zeros(4), EYE, r"got \(4,\) and \(3, 3\)"),
        (np.zeros(0), np.zeros((0, 0)), r"got \(0,\) and \(0, 0\)"),
        (np.zeros((3, 1)), EYE, r"got \(3, 1\) and \(3, 3\)"),
        (np.zeros(3), EYE * 1j, "floating-point numbers, got float64 and complex128"),
        (np.array(["a", "b", "c"]), EYE, "floating-point numbers, got <U1"),
        (np.zeros(3), lying_header((10**8, 10**8)), "sigma"),
        (np.zeros(3), lying_header((3, 3)), "sigma"),
        (lying_header((10**15,)), EYE, "mu"),
    ],
)
def test_moments_that_are_none_are_refused(tmp_path, mu, sigma, message):
    npz(tmp_path / "moments.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=rf"moments\.npz: .*{message}"):
        load_reference(tmp_path / "moments.npz", FLAT)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_of_moments_is_none_of_that(tmp_path, dtype):
    """Of fewer images than features, so that most eigenvalues are 0 but for rounding."""
    features = torch.randn(5, 40, generator=seed(1)).numpy().astype(dtype)
    centred = features - features.mean(0)
    np.savez(tmp_path / "moments.npz", mu=features.mean(0), sigma=(centred.T @ centred / dtype(4)).astype(dtype))
    mean, covariance = load_reference(tmp_path / "moments.npz", FLAT).moments
    assert mean.dtype == covariance.dtype == torch.float64
    np.testing.assert_allclose(covariance.numpy(), np.cov(features.T), rtol=1e-4, atol=1e-5)


def changed(path, about=None, **tensors):
    """The statistics in a file with some of them changed."""
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        origin = json.loads(file.metadata()["reference"])
    save_file(kept | tensors, path, {"reference": json.dumps(origin | (about or {}))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"covariance": -torch.eye(4)}, "without negative eigenvalues"),
        ({"covariance": torch.eye(4)}, "not those of its features"),
        ({"mean": torch.zeros(4)}, "not those of its features"),
        ({"mean": torch.zeros(4, dtype=torch.long)}, r"expected a mean \(mu\) of finite floating-point"),
        ({"features": torch.rand(29, 4)}, r"expected features \(30, 4\), got \(29, 4\)"),
        ({"features": torch.rand(30, 5)}, r"expected features \(30, 4\), got \(30, 5\)"),
        ({"features": torch.full((30, 4), torch.nan)}, "features of finite"),
        ({"about": {"images": 31}}, r"expected features \(31, 4\)"),
        ({"about": {"extractor": 3}}, "reference.extractor: expected"),
        ({"about": {"extractor": "a\x1b[2K"}}, "reference.extractor: expected"),
        ({"about": {"more": 3}}, "unknown field 'more'"),
    ],
)
def test_changed_statistics_are_refused(tmp_path, changes, message):
    save_reference(make_reference(IMAGES, FLAT, torch.device("cpu")), tmp_path / "statistics.safetensors")
    changed(tmp_path / "statistics.safetensors")
    assert load_reference(tmp_path / "statistics.safetensors", FLAT).images == 30
    changed(tmp_path / "statistics.safetensors", **changes)
    with pytest.raises(ValueError, match=rf"statistics\.safetensors: .*{message}"):
        load_reference(tmp_path / "statistics.safetensors", FLAT)
