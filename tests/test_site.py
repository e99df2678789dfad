"""The site: formulas without a network, links from names to their pages and from there to the paper, and figures that
stand in two places.
"""

import re
import shutil
from pathlib import Path

import pytest

from hvae_ebm_prior import TrainingConfig
from hvae_ebm_prior.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGE = """# A page

Inline $\\bar\\sigma_0 = .07$ and `EnergyConfig(context=False)`, `prior.sample`, `fit`.

$$p(u_t) \\propto \\exp F(u_t, t)$$

```python
x = prior.sample(64)
```

```{toctree}
paper_to_code
reference
```
"""
REFERENCE = """# Reference

```{eval-rst}
.. autoclass:: hvae_ebm_prior.EnergyConfig

.. autoclass:: hvae_ebm_prior.DiffusionEBMPrior
   :members: sample
```
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site of three pages with the settings of ours; its folder."""
    sphinx = pytest.importorskip("sphinx.application")
    pytest.importorskip("furo")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    (source / "index.md").write_text(PAGE)
    (source / "reference.md").write_text(REFERENCE)
    (source / "paper_to_code.md").write_text("# Paper to code\n")
    shutil.copytree(ROOT / "docs" / "_static", source / "_static")
    sphinx.Sphinx(source, ROOT / "docs", built, built / "doctrees", "html", status=None).build()
    return built


@pytest.mark.filterwarnings("ignore")
def test_formulas_need_no_network(site):
    page = (site / "index.html").read_text()
    assert page.count("<math") == 2
    assert page.count('display="block"') == 1
    assert re.search(r"<msub>\s*<mover>\s*<mi>σ</mi>\s*<mo[^>]*>ˉ</mo>\s*</mover>\s*<mn>0</mn>\s*</msub>", page)
    assert "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//', page) == []
    assert "copy.js" in page


@pytest.mark.filterwarnings("ignore")
def test_names_lead_to_their_pages_and_these_to_the_paper(site):
    page = (site / "index.html").read_text()
    for target, text in (
        ("hvae_ebm_prior.EnergyConfig", "EnergyConfig(context=False)"),
        ("hvae_ebm_prior.DiffusionEBMPrior.sample", "prior.sample"),
    ):
        link = rf'<a [^>]*href="reference\.html#{re.escape(target)}"[^>]*><code[^>]*><span[^>]*>{re.escape(text)}<'
        assert re.search(link, page)
    assert re.search(r"<code[^>]*><span[^>]*>fit</span></code>", page)
    reference = (site / "reference.html").read_text()
    assert re.search(
        r'In the paper:</em> <a [^>]*href="paper_to_code\.html"[^>]*><span[^>]*>Alg\. 2, sampling', reference
    )
    assert "viewcode-link" in reference


def test_how_to_cite_is_the_same_everywhere():
    entries = [
        re.search(r"```bibtex\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)[1]
        for name in ("README.md", "docs/index.md")
    ]
    short, told, software = (
        dict(re.findall(r"(\w+) += \{+(.*?)\}+,?\n", entry)) for entry in (entries[0], *entries[1].split("@software"))
    )
    # The README has the main fields of the paper's alone.
    assert short
    assert short.items() <= told.items()
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cited["references"][0]
    assert told["title"] == paper["title"]
    assert told["author"] == " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    assert told["pages"] == f"{paper['start']}--{paper['end']}"
    assert (int(told["volume"]), int(told["year"]), told["url"]) == (paper["volume"], paper["year"], paper["url"])
    assert software["title"] == cited["title"]
    assert software["version"] == cited["version"]
    assert software["author"].lower() == cited["authors"][0]["name"].lower()


def test_iterations_by_the_number_of_images():
    table = (ROOT / "docs" / "presets.md").read_text().split("| images | iterations of `fit` |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \|$", table, flags=re.MULTILINE)
    assert len(rows) == 6
    for images, iterations in rows:
        said = int(iterations.replace(",", ""))
        assert TrainingConfig.for_images(int(images.replace(",", ""))).iterations == said


def test_every_preset_has_a_place_on_its_page():
    """Or, for those that only recipes take, on theirs."""
    pages = [(ROOT / "docs" / name).read_text() for name in ("presets.md", "recipes.md", "faq.md")]
    assert [name for name in PRESETS if not any(f'"{name}"' in page or f"`{name}`" in page for page in pages)] == []
