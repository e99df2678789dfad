"""The rules of the package: imports flow one way, nothing happens at import, and the adapters have one name."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

import hvae_ebm_prior
import hvae_ebm_prior.adapters

PACKAGE = Path(hvae_ebm_prior.__file__).parent
# Rooms and modules at the top; each may import from those before it, at run time, inside functions and for types alike.
ORDER = [
    "processes",
    *("backbone", "energies", "chains", "density", "saving", "training"),
    *("prior", "presets", "control"),
    *("baselines", "evaluation"),
    *("ood", "likelihood", "transitions", "testing", "callbacks", "posterior_cache"),
    *("cli", "demo"),
    *("adapters", "__init__", "__main__"),
]
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    path, found = FILES[name], set()
    package = name.split(".") if path.name == "__init__.py" and path.parent != PACKAGE else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hvae_ebm_prior":
            base = node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("hvae_ebm_prior.")]
            found |= {each.removeprefix("hvae_ebm_prior.") for each in names}
            continue
        else:
            continue
        for alias in node.names:
            whole = ".".join(filter(None, [*base, alias.name]))
            found.add(whole if whole in FILES else ".".join(filter(None, base)))
    return found - {name}


def place(name: str) -> int:
    return ORDER.index(name.split(".")[0])


@pytest.mark.parametrize("name", FILES)
def test_imports_flow_one_way(name):
    """From rooms before its own, and from its own room."""
    later = [each for each in imports(name) if place(each) > place(name)]
    assert later == []


def test_rooms_have_no_circles():
    """Modules can be ordered so that each imports earlier ones alone."""
    waiting = {name: imports(name) for name in FILES}
    while waiting:
        ready = [name for name, wanted in waiting.items() if not wanted & waiting.keys()]
        assert ready, f"a circle among {sorted(waiting)}"
        for name in ready:
            del waiting[name]


def test_rooms_say_what_they_are_for():
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) <= 11
    assert len(list(PACKAGE.glob("*.py"))) <= 14
    for room in rooms:
        assert re.search(
            r"[Mm]ay import|Imports nothing", ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        )


def test_core_never_imports_adapters(imported):
    core, _ = imported
    assert "hvae_ebm_prior.chains.kernels" in core
    assert not any("hvae_ebm_prior" in name and "adapters" in name for name in core)


def test_only_required_packages_are_imported(imported):
    _, everything = imported
    assert {"hvae_ebm_prior_adapters", "hvae_ebm_prior.cli.demo", "torch"} <= everything
    optional = {
        *("matplotlib", "scipy", "sklearn", "triton", "torchvision", "accelerate", "PIL", "datasets"),
        *("torch_fidelity", "gradio"),
    }
    assert not optional & everything


def test_adapters_are_one_module_under_two_names():
    import hvae_ebm_prior_adapters

    assert hvae_ebm_prior.adapters.HVAEAdapter is hvae_ebm_prior_adapters.HVAEAdapter
    assert set(hvae_ebm_prior.adapters.__all__) == set(hvae_ebm_prior_adapters.__all__)


def test_the_version_has_one_place():
    """`__version__`; what is installed says the same, the changelog begins with it, and it is the one to cite."""
    assert importlib.metadata.version("hvae-ebm-prior") == hvae_ebm_prior.__version__
    changes = (PACKAGE.parent / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, flags=re.MULTILINE)[1] == hvae_ebm_prior.__version__
    cited = yaml.safe_load((PACKAGE.parent / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (hvae_ebm_prior.__version__, "Apache-2.0")


# What makes tensors on PyTorch's default device, and of its default type.
MAKERS = {"randint", "randperm", "arange", "as_tensor"}
TYPED = {"rand", "randn", "zeros", "ones", "full", "empty", "linspace", "logspace", "tensor", "eye", "normal"}
# Networks, which `make_network` builds under defaults of its own, and a model.
MADE_BY_DEFAULT = {
    *("energies/networks.py", "energies/context.py", "energies/published.py", "baselines/latent_unet.py", "hvae.py"),
}


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.parent / "adapters" / "hvae_ebm_prior_adapters"])
def test_devices_and_types_are_explicit(folder):
    unclear = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        for node in [] if name in MADE_BY_DEFAULT else ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(r"torch\.\w+", function := ast.unparse(node.func)):
                wanted = (
                    {"device", "dtype"} if function[6:] in TYPED else {"device"} if function[6:] in MAKERS else set()
                )
                if missing := wanted - {keyword.arg for keyword in node.keywords}:
                    unclear.append(f"{name}:{node.lineno}: {function} without {' and '.join(sorted(missing))}")
    assert unclear == []


def test_files_stay_small():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
