"""Pages whose code runs as it stands, links between pages, and names that the reference must have."""

import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest
from stand_ins import AutoEncoder

import hvae_ebm_prior
from hvae_ebm_prior.adapters import NVAEAdapter
from hvae_ebm_prior.cli.main import main, make_parser
from hvae_ebm_prior.saving import extras

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    "steps", [{"range(600)": "range(150)", "iterations=20": "iterations=2"}, pytest.param({}, marks=pytest.mark.slow)]
)
def test_bring_your_own_vae(steps, monkeypatch, capsys):
    """The page's blocks, one after the other: the adapter passes the check, and the prior gives images. The page as
    it stands also shows the figures that it prints; with fewer steps, the same layers.
    """
    page = (ROOT / "docs" / "your_own_vae.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    for step, fewer in steps.items():
        assert code.count(step) == 1
        code = code.replace(step, fewer)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict = {}
    exec(compile(code, "your_own_vae.md", "exec"), names)
    assert names["x"].shape == (16, 1, 28, 28)
    assert [report.dimensions for report in names["reports"]] == [8, 98]
    assert all(report.has_hole for report in names["reports"])
    printed = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in page.splitlines() if re.match(r"\s+\d  \S+\s+\d+\s+\d+\.\d+", line)]
    got = [line.split() for line in printed if re.match(r"\s+\d  \S+", line)]
    assert [line[:3] for line in shown] == [line[:3] for line in got]
    if not steps:  # KLs, which do not depend on the machine by much
        assert [float(line[3]) for line in got] == pytest.approx([float(line[3]) for line in shown], rel=0.2)


def test_answers_in_the_users_words_run(monkeypatch, capsys):
    """The blocks of the page's first part, one after the other; every answer ends in some, or in a command, and that
    runs, on fewer images.
    """
    part = (ROOT / "docs" / "faq.md").read_text().split("\n## ")[1]
    answers = part.split("\n### ")[1:]
    assert all(re.search(r"(```|\n    hvae-ebm-prior [^\n]*)\n*$", answer) for answer in answers)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names = {"adapter": NVAEAdapter(AutoEncoder(1, 2))}
    for code in re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL):
        exec(compile(code.replace("iterations=50", "iterations=2"), "faq.md", "exec"), names)
    assert names["mixed"].shape == names["x"].shape == names["images"].shape
    # What the top layer of another image changes is more than what another draw of the same image does.
    again = names["prior"].decode(names["prior"].encode(names["images"]))
    assert (names["mixed"] - names["images"]).abs().mean() > 2 * (again - names["images"]).abs().mean()
    capsys.readouterr()
    (command,) = re.findall(r"\n    hvae-ebm-prior (diagnose [^\n]*)", part)
    assert main([*command.split(), "--limit", "40", "--draws", "4"]) == 0
    assert "classifier accuracy" in capsys.readouterr().out


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
        headings = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        ]
        assert anchor in headings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page):
    """Those of the library by its own parsers, those of scripts by their text."""
    text = page.read_text().replace("\\\n", " ")
    (actions,) = [action for action in make_parser()._actions if action.dest == "command"]
    for command, rest in re.findall(r"hvae-ebm-prior ([a-z]\w*)([^\n`]*)", text):
        known = actions.choices[command]._option_string_actions
        assert set(re.findall(r"--[a-z][\w-]*", rest)) <= set(known), command
    for script, rest in re.findall(r"python3? ([\w./]+\.py)([^\n`]*)", text):
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z][\w-]*", rest.split("#")[0]):
            assert f'"{option}"' in source, (script, option)


def rows(page, head):
    """Cells of the table that begins so."""
    table = page.split(head)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


def test_the_table_of_commands_is_that_of_the_parsers():
    """What each command must be given, and every option with the commands that have it."""
    page = (ROOT / "docs" / "api" / "commands.md").read_text()
    (actions,) = [action for action in make_parser()._actions if action.dest == "command"]
    given = {name: command.usage.split()[2:-1] for name, command in actions.choices.items()}
    assert {name.strip("`"): words.replace("\\", "").split() for name, words, _ in rows(page, "| command |")} == given
    options: dict[str, list[str]] = {}
    for name, command in actions.choices.items():
        for action in command._actions:
            if action.option_strings and action.dest != "help":
                value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
                options.setdefault(action.option_strings[-1] + value, []).append(name)
    table = {option.strip("`"): commands.split(", ") for option, commands, _ in rows(page, "| option |")}
    assert table == options


def test_pages_say_how_to_install_what_there_is():
    """Before the first release from a clone, not from an index; the page on it gives the command that the library
    gives.
    """
    pages = [*PAGES, *(path for path in (ROOT / "examples").rglob("*") if path.suffix in {".md", ".py", ".txt"})]
    if extras.SOURCE == ".":
        assert [
            page.name for page in pages if re.search(r"pip\d? install[^\n]*hvae-ebm-prior(?!/)", page.read_text())
        ] == []
    page = (ROOT / "docs" / "install.md").read_text()
    assert f"    {extras.install_command()}\n" in page
    assert f"`{extras.install_command('demo')}`" in page
    assert ("clone" in page.split("## ")[0]) == (extras.where() != "")


def test_the_table_of_extras_is_complete():
    table = (ROOT / "docs" / "install.md").read_text().split("| extra |")[1].split("\n\n")[0]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == sorted(declared)


@pytest.mark.parametrize("module", ["hvae_ebm_prior", "hvae_ebm_prior.adapters", "hvae_ebm_prior.baselines"])
def test_every_public_name_has_a_place_in_the_reference(module):
    directives = re.findall(
        r"^\.\. auto\w+:: (\S+)$",
        "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")),
        flags=re.MULTILINE,
    )
    places = [name.removeprefix(f"{module}.") for name in directives]
    assert {name: places.count(name) for name in pkgutil.resolve_name(module).__all__} == dict.fromkeys(
        pkgutil.resolve_name(module).__all__, 1
    )


def test_overview_of_the_reference_is_complete():
    table = (ROOT / "docs" / "api.md").read_text().split(".. autosummary::")[1].split("```")[0]
    assert sorted(table.split()) == sorted(hvae_ebm_prior.__all__)


def test_names_in_the_paper_to_code_map_exist():
    names = re.findall(r"\{py:\w+\}`~([\w.]+)`", (ROOT / "docs" / "paper_to_code.md").read_text())
    assert len(names) > 40
    for name in names:
        pkgutil.resolve_name(name)
