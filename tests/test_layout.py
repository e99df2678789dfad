"""The rules of the package: imports flow one way, nothing happens at import, and the adapters have one name."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hvae_ebm_prior
import hvae_ebm_prior.adapters

PACKAGE = Path(hvae_ebm_prior.__file__).parent
# Each module may import those before it; modules of one rank do not know each other.
RANKS = [
    ["kernels", "extras", "torchvision_stand_in"],
    ["schedule", "backbone", "streams", "validation", "files", "metrics", "processes", "loading", "typed_json"],
    ["energy", "langevin", "sampling", "registry", "elbo", "features", "lock", "weights_file", "sharing"],
    ["execution", "coupling", "metropolis", "latent_prior", "reference"],
    ["density", "fingerprint"],
    ["chain", "cache_files"],
    ["recovery", "posterior_cache"],
    ["prior", "batches", "observation"],
    ["checkpoint"],
    ["gradients"],
    ["training", "composition", "memory", "evaluation", "diagnosis", "transitions", "likelihood", "ood"],
    ["control", "pictures", "presets", "testing", "image_data", "callbacks"],
    ["layerwise"],
    ["baselines"],
    ["comparison", "prior_config"],
    ["commands", "contenders", "card"],
    ["report", "train_command"],
    ["trials", "hub"],
    ["hub_commands", "demo"],
    ["cli"],
    ["__init__", "adapters"],
]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is imported: not inside functions, not for type checking alone."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("hvae_ebm_prior.")}
        elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node)):
            pending += node.body
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    name = Path(path.relative_to(PACKAGE).parts[0]).stem
    rank = next(i for i, names in enumerate(RANKS) if name in names)
    allowed = {name for names in RANKS[:rank] for name in names}
    assert imports(path) <= allowed | ({name} if path.parent != PACKAGE else set())


def test_core_never_imports_adapters():
    code = "import sys, hvae_ebm_prior; sys.exit(any('hvae_ebm_prior' in name and 'adapters' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_required_packages_are_imported():
    code = (
        "import sys, hvae_ebm_prior.adapters, hvae_ebm_prior.evaluation, hvae_ebm_prior.presets, hvae_ebm_prior.testing, hvae_ebm_prior.cli\n"
        "import hvae_ebm_prior.likelihood, hvae_ebm_prior.baselines, hvae_ebm_prior.demo\n"
        "optional = {'matplotlib', 'scipy', 'sklearn', 'triton', 'torchvision', 'accelerate', 'PIL', 'datasets', 'torch_fidelity', 'gradio'}\n"
        "sys.exit(', '.join(optional & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_files_stay_small():
    core = ("schedule", "backbone", "energy", "langevin", "latent_prior", "density", "prior")
    assert sum(len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in core) <= 1550
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
