"""Every block of Python on every page runs, one after the other, on stand-ins for what a reader brings: a tiny model, a
few images, and training of one step. Pages whose code is run as it stands, elsewhere: your_own_vae and the first part
of faq (test_docs.py), cookbook (test_cookbook.py).
"""

import ast
import re
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from torch import nn

import hvae_ebm_prior
from hvae_ebm_prior import Coupling, DiffusionEBMPrior, EnergyConfig, LabelSet, LangevinConfig, TrainingConfig
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, HVAEConfig
from hvae_ebm_prior.baselines import FlowMatchingPrior, JointEBMPrior, MultiStagePrior, NCPPrior
from hvae_ebm_prior.evaluation import comparison
from hvae_ebm_prior.presets import PRESETS
from hvae_ebm_prior.training.callbacks import TensorBoard

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"your_own_vae.md", "faq.md", "cookbook.md"}
BLOCKS = {
    page: blocks
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (blocks := re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
}
RUN = [page for page in BLOCKS if page.name not in ELSEWHERE]
# What a test cannot do as it stands there: GPUs, services, packages that are not there, names of the Hub, long chains.
INSTEAD = {
    "README.md": {'"me/my-prior", backbone': '"my-prior", backbone'},
    "baselines.md": {"stages=4": "stages=2"},
    "comparison.md": {
        "Candidate(DiffusionEBMPrior": "Candidate(make_their_prior",
        "seconds=600": "iterations=1",
        '"600 seconds", [0, 1, 2]': '"1 iterations", [0, 1, 2]',
    },
    "control.md": {"steps=60": "steps=2", "DiffusionEBMPrior(model,": "DiffusionEBMPrior(other_prior.backbone,"},
    "gallery.md": {
        "steps=60": "steps=2",
        'HVAE.load("examples/data/hvae.safetensors")': "model",
        'DiffusionEBMPrior.from_pretrained("examples/data/prior", backbone=model)': "prior",
    },
    "hub.md": {'"me/my-prior", backbone': '"my-prior", backbone'},
    "hvae.md": {
        'HVAE.load("examples/data/hvae.safetensors")': "model",
        "image_channels=3, image_size=32, latent_channels=(32, 16, 8), widths=(64, 64, 48)": (
            "image_size=8, latent_channels=(2, 2, 1), widths=(8, 8, 8)"
        ),
    },
    "logging.md": {', Trackio("my-prior")': "", ", Trackio": "", "20_000": "1"},
    "performance.md": {"NVAEAdapter(freeze(model))": "MyAdapter(model)"},
    "prior.md": {"20_000": "1"},
    "scaling.md": {"cuda:{os.environ.get('LOCAL_RANK', 0)}": "cpu"},
    "transitions.md": {"prior, 64, steps=100": "prior, 2, steps=60", "steps=50, particles=4": "steps=2, particles=2"},
}
TINY = {"energy": EnergyConfig(width=8, vector_width=8), "langevin": LangevinConfig(steps=2)}


class Blocks(nn.Module):
    """A model as README's adapter takes one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_prior = nn.Conv2d(4, 2, 1)

        def prior(self, h):
            mean, log_std = self.to_prior(h).chunk(2, dim=1)
            return mean, log_std.exp()

        def forward(self, h, z):
            return h + z

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(4, 8, 8))
        self.blocks = nn.ModuleList([self.Block(), self.Block(), self.Block()])

    def posterior_sample(self, images):
        return [images + 0.1 * torch.randn_like(images) for _ in self.blocks]

    def output(self, h):
        return torch.sigmoid(h[:, :1])


def make_model():
    torch.manual_seed(0)
    return HVAE(HVAEConfig(image_size=8, widths=(8, 8, 8), latent_channels=(2, 2, 1)))


def bring(page):
    """What the reader of a page has."""
    model = Blocks() if page == "README.md" else make_model()
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sets = {"control.md": {"class": ("cup", "hat", "bag"), "smile": 2}, "gallery.md": {"class": CLOTHES}}.get(page)
    coupling = Coupling({name: LabelSet(kinds) for name, kinds in sets.items()}) if sets else None
    prior = DiffusionEBMPrior(make_model(), coupling=coupling, **TINY)
    plain = DiffusionEBMPrior(prior.backbone, coupling=coupling, **TINY)
    u = torch.randn(8, prior.dim, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(24) % 3
    return {
        **{"torch": torch, "model": model, "MyAdapter": HVAEAdapter, "HVAE": HVAE, "load_model": make_model},
        **{"prior": prior, "other_prior": plain, "make_their_prior": lambda model: DiffusionEBMPrior(model, **TINY)},
        **{"images": images, "photos": images[:4], "held_out": images[12:], "outliers": 1 - images, "seen": images[:1]},
        **{"train_images": images[:16], "test_images": images[16:], "features": lambda x: x.flatten(1)[:, :3]},
        **{"labels": classes, "classes": classes, "smiles": torch.arange(24.0) % 2, "u": u, "u_a": u, "u_b": -u},
        **{"log_likelihood": lambda x: -(x - 0.5).square().flatten(1).sum(1), "load_my_classifier": None},
        **{"DiffusionEBMPrior": DiffusionEBMPrior, "EnergyConfig": EnergyConfig, "TrainingConfig": TrainingConfig},
        **{"PRESETS": PRESETS, "JointEBMPrior": JointEBMPrior, "TensorBoard": TensorBoard},
    }


CLOTHES = ("sandal", "bag", "sneaker", "ankle boot")


def fewer_samples(sample):
    @wraps(sample)
    def run(self, n, **given):
        return sample(self, min(n, 4), **given)

    return run


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Training takes one step of a few images, whatever the page says; nothing is uploaded."""

    few = {"iterations": 1, "batch_size": 8, "activity_images": 8}

    def shortened(fit):
        def run(self, data, **given):
            training = replace(given.pop("training", None) or TrainingConfig(), **few)
            return fit(self, data, **{**given, **{name: few[name] for name in few if name in given}}, training=training)

        return run

    for kind in (DiffusionEBMPrior, JointEBMPrior, NCPPrior, MultiStagePrior, FlowMatchingPrior):
        monkeypatch.setattr(kind, "fit", shortened(kind.fit))
    for kind in (DiffusionEBMPrior, NCPPrior, JointEBMPrior):
        monkeypatch.setattr(kind, "sample", fewer_samples(kind.sample))
    monkeypatch.setattr(DiffusionEBMPrior, "push_to_hub", lambda self, *_, **__: None)
    monkeypatch.setattr(comparison, "TIMED", 2)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")
def test_blocks_of_a_page_run(page, quick):
    # README shows how the adapter is used before it shows the adapter.
    blocks = sorted(BLOCKS[page], key=lambda block: not block.startswith("class MyAdapter"))
    code = "\n".join(blocks)
    for there, here in INSTEAD.get(page.name, {}).items():
        assert there in code, f"{page.name} no longer says {there}"
        code = code.replace(there, here)
    exec(compile(code, page.name, "exec"), names := bring(page.name))
    for name in ("x", "u"):
        assert torch.isfinite(names.get(name, torch.zeros(1))).all()


def test_every_page_with_code_is_run_somewhere():
    assert {page.name for page in BLOCKS} - {page.name for page in RUN} == ELSEWHERE
    assert set(INSTEAD) <= {page.name for page in RUN}
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    assert "```python" not in "".join(faq.split("\n## ")[2:])  # of the first part alone


INDENTED = [
    (page.name, block)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if re.search(r"^    (from \w|import )|^    \w+ = (\w*[pP]rior|DiffusionEBMPrior)[.(]", block, flags=re.MULTILINE)
]


@pytest.mark.parametrize(("page", "block"), INDENTED, ids=[name for name, _ in INDENTED])
def test_code_without_a_fence_can_be_parsed_and_imports_what_there_is(page, block):
    """Indented code, which leans on data, clones of others or a GPU: its grammar, and its names of this library."""
    tree = ast.parse("if True:\n" + (block if block.strip() else "    pass"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hvae_ebm_prior"):
            module = __import__(node.module, fromlist=["_"])
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            kind = getattr(hvae_ebm_prior, node.func.id, None)
            fields = getattr(kind, "__dataclass_fields__", None)
            if fields is not None:
                assert {each.arg for each in node.keywords} <= set(fields)
