"""The site: pages in Markdown (MyST), the reference from the docstrings. `python -m sphinx -W --keep-going docs
build/site` builds it.
"""

import argparse
import os
import re
from itertools import pairwise, takewhile

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hvae_ebm_prior import __version__
from hvae_ebm_prior.cli import make_parser

project, author, release = "hvae-ebm-prior", "the authors of hvae-ebm-prior", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]

html_theme, html_title = "furo", f"hvae-ebm-prior {release}"
html_show_copyright = False
html_static_path, html_css_files = ["_static"], ["site.css"]

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


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorter_signature)
    app.add_directive("command-help", CommandHelp)
