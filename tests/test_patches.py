"""Patches of photographs: where each came from is written in its colours."""

import sys

import numpy as np
import patches
import pytest
from PIL import Image

# Multiples of the stride, so that patches end at both borders.
WIDTH, HEIGHT, STRIDE = 240, 64, 16


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["patches.py", *map(str, arguments)])
    patches.main()


def photograph():
    """Red is the column, green the row."""
    levels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    levels[..., 0], levels[..., 1] = np.arange(WIDTH), np.arange(HEIGHT)[:, None]
    return Image.fromarray(levels)


def corners(folder):
    """First and last column and row of every patch."""
    found = []
    for path in sorted(folder.iterdir()):
        levels = np.asarray(Image.open(path))
        assert levels.shape == (32, 32, 3)
        found.append((*map(int, levels[0, 0, :2]), *map(int, levels[-1, -1, :2])))
    return found


def test_patches_of_both_parts_share_no_pixel(tmp_path, monkeypatch, capsys):
    source = tmp_path / "photographs"
    source.mkdir()
    photograph().save(source / "a.png")
    (source / "notes.txt").write_text("no photograph")
    out = tmp_path / "patches"
    run(monkeypatch, source, "--height", HEIGHT, "--stride", STRIDE, "--out", out)
    expected = {
        part: [(x, y, x + 31, y + 31) for y in (0, 16, 32) for x in columns]
        for part, columns in (("train", range(0, 161, 16)), ("test", (192, 208)))
    }
    assert {part: corners(out / part) for part in expected} == expected
    assert "33 patches to train on, 6 held out" in capsys.readouterr().out


def test_photographs_are_upright_and_of_one_height(tmp_path, monkeypatch):
    picture = photograph().rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    picture.save(tmp_path / "a.png", exif=exif)
    run(monkeypatch, tmp_path / "a.png", "--height", 32, "--out", tmp_path / "out")
    found = corners(tmp_path / "out" / "train")
    # Half the height: columns count up twice as fast, in one row of patches from the left border to .8 of 120.
    assert [left // 2 for left, *_ in found] == [*range(0, 65, 8)]


def test_what_is_missing_or_in_the_way_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(monkeypatch, tmp_path / "nowhere", "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        run(monkeypatch, tmp_path / "empty", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="empty"):
        run(monkeypatch, tmp_path, "--out", tmp_path / "empty")
