"""Other people's image files: what is trained on is what a viewer shows, and what cannot be read is named."""

import io
import os
import struct
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from helpers import seed

from hvae_ebm_prior.training.array_data import load_images, split_array
from hvae_ebm_prior.training.image_data import BrokenImageError, open_images

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
SHAPE = (3, 16, 16)


def save(path, pixels=None, **options):
    """A picture of 16x16 pixels, of noise unless they are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = (torch.rand(16, 16, 3, generator=seed(0)) * 255).byte().numpy()
    pillow.fromarray(pixels).save(path, **options)
    return path


def hub(monkeypatch, pictures):
    """A data set of the Hub that holds these pictures."""
    rows = type("Rows", (list,), {"features": {"image": type("Image", (), {})()}})({"image": each} for each in pictures)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: rows))
    return "hf:someone/things"


TOP_WHITE = np.repeat(np.array([255] * 8 + [0] * 8, np.uint8), 48).reshape(16, 16, 3)


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_photos_are_turned_as_viewers_show_them(where, tmp_path, monkeypatch):
    """Orientation 6, a camera held upright: the stored top is the right of what is seen."""
    exif = pillow.Exif()
    exif[0x112] = 6
    path = save(tmp_path / "photo.png", TOP_WHITE, exif=exif)
    source = str(tmp_path) if where == "folder" else hub(monkeypatch, [pillow.open(path)])
    image = open_images(source, SHAPE)[0]
    assert torch.equal(image[:, :, 8:], torch.ones(3, 16, 8))
    assert torch.equal(image[:, :, :8], torch.zeros(3, 16, 8))


@pytest.mark.parametrize(("background", "expected"), [("white", 1.0), ("black", 0.0), ("#ff0000", (1.0, 0.0, 0.0))])
def test_transparent_pixels_show_the_background_and_that_is_said(background, expected, tmp_path):
    hidden = np.zeros((16, 16, 4), np.uint8)
    hidden[..., 0] = 255
    hidden[:, 8:, 3] = 255
    save(tmp_path / "a.png", hidden)
    with pytest.warns(RuntimeWarning, match=f"a.png has transparent pixels: they are shown on {background}"):
        image = open_images(str(tmp_path), SHAPE, background=background)[0]
    expected = torch.tensor(expected).expand(3)
    assert torch.equal(image[:, :, :8], expected[:, None, None].expand(3, 16, 8))
    assert torch.equal(image[:, 0, 8], torch.tensor([1.0, 0.0, 0.0]))
    # A palette with a transparent entry is the same thing.
    palette = pillow.fromarray(np.zeros((16, 16), np.uint8), mode="P")
    palette.putpalette([255, 0, 0] * 256)
    (tmp_path / "p").mkdir()
    palette.save(tmp_path / "p" / "a.png", transparency=0)
    with pytest.warns(RuntimeWarning, match="transparent pixels"):
        image = open_images(str(tmp_path / "p"), SHAPE, background=background)[0]
    assert torch.equal(image, expected[:, None, None].expand(SHAPE))


def test_transparency_is_said_once(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png", np.zeros((16, 16, 4), np.uint8))
    with pytest.warns(RuntimeWarning, match="a.png has transparent pixels") as said:
        images = open_images(str(tmp_path), SHAPE)
    assert len(said) == 1
    # Warnings are errors here, so the others have none.
    assert all(torch.equal(images[i], torch.ones(SHAPE)) for i in range(3))


def test_opaque_pictures_with_an_alpha_channel_are_as_they_are(tmp_path):
    opaque = np.full((16, 16, 4), 255, np.uint8)
    opaque[..., 1] = 51
    save(tmp_path / "a.png", opaque)
    assert torch.equal(open_images(str(tmp_path), SHAPE)[0][1], torch.full((16, 16), 0.2))


def test_linked_folders_are_followed_once(tmp_path):
    """A link to a folder elsewhere, another to the same, and one that leads back."""
    save(tmp_path / "data" / "a" / "1.png")
    for name in ("2.png", "3.png"):
        save(tmp_path / "other" / name)
    for link in ("b", "c"):
        os.symlink(tmp_path / "other", tmp_path / "data" / link)
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "loop")
    images = open_images(str(tmp_path / "data"), SHAPE)
    assert [name.removeprefix(f"{tmp_path}/data/") for name in images.names] == ["a/1.png", "b/2.png", "b/3.png"]


def test_hidden_files_and_folders_are_no_images(tmp_path):
    save(tmp_path / "good.png")
    for junk in (".ipynb_checkpoints/good-checkpoint.png", ".Trash/old.png", ".hidden.png"):
        save(tmp_path / junk)
    (tmp_path / "._good.png").write_bytes(b"resource fork")
    (tmp_path / "Thumbs.db").write_bytes(b"thumbnails")
    (tmp_path / "x.png").mkdir()
    assert open_images(str(tmp_path), SHAPE).names == [str(tmp_path / "good.png")]


def whole_png():
    file = io.BytesIO()
    pillow.fromarray((torch.rand(16, 16, 3, generator=seed(1)) * 255).byte().numpy()).save(file, "png")
    return file.getvalue()


def damaged_chunk():
    """A PNG whose second chunk has no name that there could be."""
    data = whole_png()
    return data[:37] + b"\x00\xff\x00\x01" + data[41:]


def cut(kind):
    file = io.BytesIO()
    pillow.fromarray((torch.rand(16, 16, 3, generator=seed(1)) * 255).byte().numpy()).save(file, kind)
    return file.getvalue()[: len(file.getvalue()) // 2]


def bomb():
    """A PNG that claims 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return whole_png()[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole_png()[33:]


BROKEN = {
    "half.jpg": lambda: cut("jpeg"),
    "half.webp": lambda: cut("webp"),
    "half.png": lambda: cut("png"),
    "chunk.png": damaged_chunk,
    "bomb.png": bomb,
    "text.png": lambda: b"<!doctype html>",
    "empty.png": lambda: b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named_or_left_out(name, tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "z.png")
    (tmp_path / name).write_bytes(BROKEN[name]())
    images = open_images(str(tmp_path), SHAPE)
    with pytest.raises(BrokenImageError, match=rf"{name}: cannot be read as an image .*--skip-broken"):
        images[1]
    with pytest.warns(RuntimeWarning, match=rf"1 of 3 images cannot be decoded and are left out: .*{name}"):
        images = open_images(str(tmp_path), SHAPE, skip_broken=True)
    assert images.indices == [0, 2]
    assert torch.equal(images[1], open_images(str(tmp_path), SHAPE)[2])


def test_only_broken_images_are_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(BrokenImageError, match="none of the 1 images can be decoded"):
        open_images(str(tmp_path), SHAPE, skip_broken=True)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("C:/x.npy", ("C:/x.npy", "")),
        ("C:/x.npz:images", ("C:/x.npz", "images")),
        ("a.npz:b:c", ("a.npz", "b:c")),
        ("x.npz", ("x.npz", "")),
        ("folder.npz:y/x.npy", ("folder.npz", "y/x.npy")),
    ],
)
def test_names_of_arrays_split_off_the_end(source, parts):
    assert split_array(source) == parts


def test_a_drive_letter_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:").mkdir()
    pixels = np.arange(2 * 16 * 16, dtype=np.float32).reshape(2, 16, 16) / 512
    np.save("C:/x.npy", pixels)
    assert torch.equal(open_images("C:/x.npy", (1, 16, 16))[:, 0], torch.from_numpy(pixels))
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save("x.npy", pixels)
    assert len(load_images("~/x.npy")) == 2


def lying_header():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 1000, 1000)})
    return file.getvalue()


def whole_archive():
    file = io.BytesIO()
    np.savez(file, a=np.zeros((40, 8, 8), np.uint8))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.npy", b""),
        ("c.npz", b"PK"),
        ("half.npz", whole_archive()[:1500]),
        ("page.npy", b"<!doctype html><title>404</title>"),
        ("page.npz", b"<!doctype html><title>404</title>"),
        ("lies.npy", lying_header()),
        ("pickle.npy", b"\x80\x04N."),
    ],
)
def test_broken_arrays_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: expected a file that numpy.save or numpy.savez wrote"):
        load_images(str(tmp_path / name) + (":a" if name.endswith(".npz") else ""))


def test_masks_of_zeros_and_ones_are_noticed(tmp_path):
    np.save(tmp_path / "mask.npy", np.eye(8, dtype=np.uint8)[None])
    with pytest.warns(RuntimeWarning, match=r"mask.npy: bytes that are 0 and 1 alone in 1 images"):
        images = load_images(str(tmp_path / "mask.npy"))
    assert images.max().item() == pytest.approx(1 / 255)
