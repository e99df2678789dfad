"""The site: pages in Markdown (MyST), the reference from the docstrings. `python -m sphinx -W --keep-going docs
build/site` builds it.
"""

import argparse
import os
import re
import tomllib
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

from hvae_ebm_prior import __version__
from hvae_ebm_prior.cli import make_parser

project, author, release = "hvae-ebm-prior", "the authors of hvae-ebm-prior", __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

html_theme, html_title = "furo", f"hvae-ebm-prior {release}"
html_show_copyright = False
html_static_path, html_css_files, html_js_files = ["_static"], ["site.css"], ["copy.js"]
# Formulas are MathML, made while the site is built: every browser of today shows it by itself, without a network.
html_math_renderer = "mathml"
# The repository, at the head and foot of every page once it has an address.
HERE = Path(__file__).parent
urls = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
if "Repository" in urls:
    html_theme_options = {
        "source_repository": urls["Repository"],
        "source_branch": "main",
        "source_directory": "docs/",
        "footer_icons": [{"name": "Repository", "url": urls["Repository"], "html": "Repository", "class": ""}],
    }

# Markdown: formulas between dollars, and links to headings as on GitHub.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# In docstrings single backticks are code; where the reference has the name, they are a link as well. Missing names are
# therefore no errors.
nitpicky, default_role = True, "py:obj"
nitpick_ignore_regex = [("py:obj", r".*")]
# Other projects' names have no page here, and the build fetches none.
nitpick_ignore_regex += [("py:class", r"(torch|collections|pathlib|gradio)\..+")]
# What only an adapter's own methods hand to each other has no place in the reference.
nitpick_ignore_regex += [("py:class", r"hvae_ebm_prior_adapters\..+")]
# Names in quoted annotations, which only type checkers resolve.
nitpick_ignore_regex += [("py:class", r"Tensor|Dataset|Labels|Callback|Condition")]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autosummary_generate = False


def as_rst(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Our docstrings are plain text: what is indented by four after a blank line stands as it is, and elsewhere bars
    and stars mean themselves.
    """
    text: list[str] = []
    block = None
    for number, (before, line) in enumerate(pairwise(["", *lines])):
        indent = len(line) - len(line.lstrip())
        if block is not None and line and indent <= block:
            block = None
        if block is None and not before and indent >= 4:
            # The head of a table may stand further right than its rows.
            block = max(0, min(len(each) - len(each.lstrip()) for each in takewhile(str.strip, lines[number:])) - 4)
            text += [" " * block + "::", ""]
        if block is None:
            kept = r"(`[^`]*`|(?<!\S)\*\w+\*(?=\W))"  # code, and an emphasised word
            line = re.sub(kept + r"|([|*])", lambda found: found[1] or "\\" + found[2], line)
            line = re.sub(r"`([A-Z]\w+)`", r"`.\1`", line)  # a class, wherever it is
        text.append(line)
    lines[:] = text


def shorter_signature(
    app: Sphinx, what: str, name: str, thing: object, options: object, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Protocols are not called; a default that is made anew for each object is no name that Python can parse."""
    if getattr(thing, "_is_protocol", False):
        return "", None
    return None if signature is None else (signature.replace("<factory>", "..."), returns)


class CommandHelp(SphinxDirective):
    """What every command says to --help."""

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "92"
        parser = make_parser()
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        sections = [nodes.literal_block(text=parser.format_help(), language="text")]
        for name, command in commands.choices.items():
            section = nodes.section(
                "",
                nodes.title(text=name),
                nodes.literal_block(text=command.format_help(), language="text"),
                ids=[f"command-{name}"],
            )
            sections.append(section)
        return sections


def draw_formula(translator: Any, node: nodes.Element) -> None:
    """A formula as MathML; one that cannot be read is a warning, and so an error of the build."""
    # Of a bar over a letter with an index docutils makes a letter with the index right under it.
    barred = r"<munderover>(\s*<mi>.</mi>)(.*?)(<mo[^>]*>ˉ</mo>\s*)</munderover>"
    try:
        drawn = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
        drawn = re.sub(barred, r"<msub><mover>\1\3</mover>\2</msub>", drawn, flags=re.DOTALL)
        translator.body.append(drawn)
    except MathError as error:
        getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


class NameLinks(SphinxPostTransform):
    """Code that names something public, as `EnergyConfig(context=False)` or `prior.sample`, is a link to its page."""

    default_priority = 5  # before references are resolved

    def run(self, **_: Any) -> None:
        """Wrap what names something in a reference to it."""
        if "links" not in self.env.temp_data:
            self.env.temp_data["links"] = link_targets(self.env.get_domain("py").objects)
        for literal in list(self.document.findall(nodes.literal)):
            parent = literal.parent
            found = re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", literal.astext(), flags=re.DOTALL)
            target = found and self.env.temp_data["links"].get(found[1])
            if target and not isinstance(parent, pending_xref | nodes.reference | nodes.title):
                options = {"refdomain": "py", "reftype": "obj", "reftarget": target, "refdoc": self.env.docname}
                reference = pending_xref("", refexplicit=True, refspecific=False, **options)
                literal.replace_self(reference)
                reference += literal


def link_targets(documented: dict[str, Any]) -> dict[str, str]:
    """What code may say -> the full name in the reference: classes, their members, functions of several words, members
    of a prior as `prior.sample`; none that stands for two things.
    """
    places: dict[str, set[str]] = {}
    for name, entry in documented.items():
        parts = name.split(".")
        own, owner = parts[-1], parts[-2] if len(parts) > 1 else ""
        if entry.aliased:
            continue
        short = [own] if own[0].isupper() or (entry.objtype == "function" and "_" in own) else []
        short += [f"{owner}.{own}"] if owner[:1].isupper() else []
        short += [f"prior.{own}"] if owner == "DiffusionEBMPrior" else []
        for each in (name, *short):
            places.setdefault(each, set()).add(name)
    return {each: min(names) for each, names in places.items() if len(names) == 1}


def places_in_paper() -> dict[str, list[str]]:
    """Full name -> equations, algorithms and experiments that docs/paper_to_code.md has it for."""
    places: dict[str, list[str]] = {}
    for line in (HERE / "paper_to_code.md").read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        for name in re.findall(r"\{py:\w+\}`~([\w.]+)`", line) if len(cells) > 2 else ():
            if (place := cells[1].strip()).split()[0] in ("Eq.", "Alg.", "Figure", "Figures", "Table"):
                places.setdefault(name, []).append(place)
    return {name: list(dict.fromkeys(found)) for name, found in places.items()}


def add_places_in_paper(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """The last line of what stands in the paper leads to its equation."""
    if name in PLACES:
        found = "; ".join(f":doc:`{place} </paper_to_code>`" for place in PLACES[name])
        lines += ["", f"*In the paper:* {found}.", ""]


PLACES = places_in_paper()


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(draw_formula, None), block_renderers=(draw_formula, None))
    app.connect("autodoc-process-docstring", add_places_in_paper, priority=600)  # after napoleon
    app.add_post_transform(NameLinks)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorter_signature)
    app.add_directive("command-help", CommandHelp)
