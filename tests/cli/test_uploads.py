"""The page towards strangers: where it is served, and what it takes of them."""

import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import seed
from test_demo import make_prior

from hvae_ebm_prior.chains.langevin import ChainDiverged
from hvae_ebm_prior.cli import demo_command, uploads
from hvae_ebm_prior.cli.demo import Settings, check_bounds, draw_both, vary
from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.cli.uploads import fit_image, read_upload

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What the command launches an app with."""
    (tmp_path / "mine.py").write_text("from test_demo import make_prior as load\n")
    given = {}

    class App:
        def launch(self, **options):
            given.update(options)

    monkeypatch.setattr(demo_command, "build_demo", lambda prior: App())
    return lambda *options: (main(["demo", f"{tmp_path / 'mine.py'}:load", *options]), given)


def test_the_page_is_served_to_this_machine_unless_asked(launched):
    assert launched() == (
        0,
        {"server_name": "127.0.0.1", "server_port": None, "share": False, "max_file_size": 10 * 2**20},
    )
    assert launched("--host", "0.0.0.0", "--port", "8000")[1]["server_name"] == "0.0.0.0"


def claimed(width, height):
    """A PNG whose header claims so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (claimed(4097, 4096), "pictures of at most 16777216 pixels, got 4097x4096"),
        (claimed(100_000, 100_000), "cannot be read"),  # where Pillow itself refuses
        (claimed(8, 8), "cannot be read"),
        (b"", "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (b"x" * (10 * 2**20 + 1), "files of at most 10485760 bytes, got 10485761"),
    ],
)
def test_uploads_are_looked_at_before_they_are_decoded(tmp_path, content, message):
    (tmp_path / "upload.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"upload: .*{message}"):
        read_upload(str(tmp_path / "upload.png"))


def test_an_upload_is_as_viewers_show_it(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = read_upload(str(tmp_path / "turned.png"))
    assert np.array_equal(read, np.rot90(pixels, -1))
    image = fit_image(make_prior(coupled=False), read)
    assert image.shape == (1, 1, 8, 8)
    assert image[..., 5:].min() > 0.95
    assert image[..., :3].max() < 0.05


def test_transparent_pixels_are_white_whatever_is_behind_them(tmp_path):
    pixels = np.full((4, 4, 4), (255, 0, 0, 0), np.uint8)
    pixels[0] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    read = read_upload(str(tmp_path / "picture.png"))
    assert read[0].tolist() == [[0, 0, 255]] * 4
    assert (read[1:] == 255).all()


def test_long_narrow_uploads_are_not_blown_up(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PIXELS", 8 * 8 * 100)
    prior = make_prior(coupled=False)
    assert fit_image(prior, np.full((1, 100, 3), 255, np.uint8)).min() == 1
    with pytest.raises(ValueError, match="101x1 pixels are too long and narrow"):
        fit_image(prior, np.zeros((1, 101, 3), np.uint8))


@pytest.mark.parametrize("value", [None, "1", [1]])
def test_what_is_no_number_is_said(value):
    with pytest.raises(TypeError, match=f"steps: expected a number, got {type(value).__name__}"):
        check_bounds("steps", value, 1, 2)


def test_pictures_that_are_not_finite_are_not_shown(monkeypatch):
    prior = make_prior(coupled=False)
    with pytest.raises(ValueError, match="1 of 1 hold NaN or infinite pixels"):
        vary(prior, Settings(2), [0], torch.full((1, 1, 8, 8), torch.nan))
    decode = prior.backbone.decode
    monkeypatch.setattr(prior.backbone, "decode", lambda features: decode(features) * torch.nan, raising=False)
    with pytest.raises(ChainDiverged, match="images are not finite"):
        vary(prior, Settings(2), [0], torch.rand(1, 1, 8, 8, generator=seed()))
    with pytest.raises(ChainDiverged, match="images are not finite"):
        draw_both(prior, Settings(2))
