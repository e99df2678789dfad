"""Pages whose code runs as it stands, and links between pages."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_bring_your_own_vae(monkeypatch, capsys):
    """The page's blocks, one after the other: the adapter passes the check, and the prior gives images."""
    page = ROOT / "docs" / "your_own_vae.md"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    assert names["x"].shape == (16, 1, 28, 28)
    assert [report.dimensions for report in names["reports"]] == [8, 98]
    assert all(report.has_hole for report in names["reports"])
    printed = capsys.readouterr().out.splitlines()
    # The page shows what is printed: the same layers, and KLs that do not depend on the machine by much.
    shown = [line.split() for line in page.read_text().splitlines() if re.match(r"\s+\d  \S+\s+\d+\s+\d+\.\d+", line)]
    got = [line.split() for line in printed if re.match(r"\s+\d  \S+", line)]
    assert [line[:3] for line in shown] == [line[:3] for line in got]
    assert [float(line[3]) for line in got] == pytest.approx([float(line[3]) for line in shown], rel=0.2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        assert not target or target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", page.read_text()):
        if target.startswith("http"):
            continue
        text = (page.parent / target if target else page).read_text()
        headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")]
        assert anchor in headings
