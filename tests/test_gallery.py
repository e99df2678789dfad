"""The gallery: every picture has its command and a file, and the script draws them."""

import re
import sys
from pathlib import Path

import conditional
import pytest
import quickstart
from helpers import read_strips

sys.path.append(str(Path(__file__).parent.parent / "docs"))
import make_pictures

ROOT = Path(__file__).parent.parent


def test_every_picture_of_the_gallery_has_its_command():
    page = (ROOT / "docs" / "gallery.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(images/(\w+)\.png\)", page)
    assert sorted(["before_and_after", *shown]) == sorted(make_pictures.PICTURES)
    assert re.findall(r"make_pictures\.py (\w+)", page.replace("`hole edited`", "")) == [
        *shown[:1],
        "concept",
        *shown[1:],
    ]


def test_no_picture_of_the_docs_is_left_over():
    """All are shown somewhere."""
    pages = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
    assert [p.name for p in (ROOT / "docs" / "images").iterdir() if f"images/{p.name}" not in pages] == []


def test_the_script_draws_all_pictures(tmp_path, monkeypatch):
    """Of an untrained prior, few images each."""
    quickstart.make_prior(coupling=conditional.COUPLING).save_pretrained(tmp_path / "prior")
    monkeypatch.setattr(conditional, "INPAINTING", conditional.LangevinConfig(steps=2, step_size=0.03))
    given = ["--prior", str(tmp_path / "prior"), "--count", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", *given])
    make_pictures.main()
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"concept", *make_pictures.PICTURES}
    rows = {name: len(read_strips(tmp_path / "out" / f"{name}.png")) for name in ("conditional", "interpolated")}
    assert rows == {"conditional": 10, "interpolated": 4}


def test_a_picture_that_there_is_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", "nothing"])
    with pytest.raises(SystemExit):
        make_pictures.main()
    assert "expected some of concept, before_and_after" in capsys.readouterr().err
