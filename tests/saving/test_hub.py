"""Priors on the Hub: the stock client against a stand-in on loopback."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from backbones import Pair, RandomBackbone
from helpers import check_strip, read_strips, seed
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from test_saving import FIXTURE, SHAPES
from two_processes import free_port

from hvae_ebm_prior import DiffusionEBMPrior, EnergyConfig, LangevinConfig
from hvae_ebm_prior.cli.hub_commands import complete_card
from hvae_ebm_prior.cli.main import main, make_parser
from hvae_ebm_prior.saving.card import Card
from hvae_ebm_prior.saving.config import Metric

# The client's own, of the library under it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
FILES = {"config.json", "model.safetensors", "README.md"}


def make_prior() -> DiffusionEBMPrior:
    torch.manual_seed(0)
    prior = DiffusionEBMPrior(Pair((1,), (1,)), langevin=LangevinConfig(steps=2), energy=EnergyConfig(vector_width=4))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(std=0.3)
    return prior


def draw(prior: DiffusionEBMPrior) -> torch.Tensor:
    return prior.sample(3, generator=seed(1))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, where the client looks for the Hub, with a right token and an empty cache."""
    with HubServer().running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_pushed_and_loaded_it_draws_the_same(hub):
    prior = make_prior()
    address = prior.push_to_hub("me/prior", samples=0, commit_message="The first")
    assert address.startswith(f"{hub.address}/me/prior/commit/")
    assert hub.repositories["me/prior"].commits[address.rpartition("/")[2]].keys() > FILES
    torch.testing.assert_close(
        draw(DiffusionEBMPrior.from_pretrained("me/prior", backbone=Pair((1,), (1,)))), draw(prior), rtol=0, atol=0
    )


def test_the_card_is_valid_and_says_where_the_prior_is(hub, tmp_path):
    card = Card(base_model="me/vae", datasets=["digits"], license="mit", description="A prior of digits.")
    make_prior().push_to_hub("me/prior", samples=4, card=card, metrics=[Metric("FD", 3.5, "classifier", "digits")])
    files = hub.repositories["me/prior"].commits[hub.repositories["me/prior"].heads["main"]]
    text = files["README.md"].decode()
    read = ModelCard(text)
    read.validate()
    assert "POST /api/validate-yaml" in hub.requests
    assert read.data.base_model == "me/vae"
    assert read.data.to_dict()["base_model_relation"] == "adapter"
    assert read.data.library_name == "hvae-ebm-prior"
    assert read.data.pipeline_tag == "unconditional-image-generation"
    assert [(result.metric_name, result.metric_value, result.dataset_name) for result in read.data.eval_results] == [
        ("FD (classifier)", 3.5, "digits")
    ]
    assert 'from_pretrained("me/prior"' in text
    assert "(samples.png)" in text
    (tmp_path / "samples.png").write_bytes(files["samples.png"])
    strips = read_strips(tmp_path / "samples.png")
    assert len(strips) == 2
    prior, generator = make_prior(), seed(0)
    with torch.no_grad():
        check_strip(strips[0], prior.decode(torch.randn(4, prior.dim, generator=generator)))
    check_strip(strips[1], prior.sample(4, generator=generator))


def test_the_card_may_say_nothing(hub):
    make_prior().push_to_hub("me/prior", samples=0)
    read = ModelCard(
        hub.repositories["me/prior"].commits[hub.repositories["me/prior"].heads["main"]]["README.md"].decode()
    )
    read.validate()
    assert read.data.base_model is None
    assert read.data.eval_results is None
    assert "samples.png" not in read.text


def test_private_branch_subfolder_and_pull_request(hub):
    prior, backbone = make_prior(), Pair((1,), (1,))
    prior.push_to_hub("me/prior", private=True, samples=0, revision="next", subfolder="small")
    repository = hub.repositories["me/prior"]
    assert repository.private
    assert not FILES & repository.commits[repository.heads["main"]].keys()
    loaded = DiffusionEBMPrior.from_pretrained("me/prior", backbone=backbone, revision="next", subfolder="small")
    torch.testing.assert_close(draw(loaded), draw(prior), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DiffusionEBMPrior.from_pretrained("me/prior", backbone=backbone, revision="next")
    assert prior.push_to_hub("me/prior", samples=0, create_pr=True).endswith("/discussions/1")
    assert not FILES & repository.commits[repository.heads["main"]].keys()
    assert repository.commits[repository.heads["refs/pr/1"]].keys() > FILES
    with pytest.raises(RepositoryNotFoundError):
        DiffusionEBMPrior.from_pretrained("me/prior", backbone=backbone, token=False)


def test_wrong_token_uploads_nothing(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        make_prior().push_to_hub("me/prior", token="hf_wrong", samples=0)
    assert not hub.repositories
    assert not hub.stored


def test_missing_revision_and_repository(hub):
    make_prior().push_to_hub("me/prior", samples=0)
    with pytest.raises(RevisionNotFoundError):
        DiffusionEBMPrior.from_pretrained("me/prior", backbone=Pair((1,), (1,)), revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        DiffusionEBMPrior.from_pretrained("me/other", backbone=Pair((1,), (1,)))


def test_interrupted_upload_leaves_the_repository_as_it_was_and_can_be_repeated(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    prior = make_prior()
    prior.push_to_hub("me/prior", samples=0)
    before = dict(hub.repositories["me/prior"].heads)
    with torch.no_grad():
        next(prior.parameters()).add_(1.0)
    hub.cut_uploads = 1000
    with pytest.raises(ConnectionError, match="nothing was committed, so try again"):
        prior.push_to_hub("me/prior", samples=0)
    assert hub.repositories["me/prior"].heads == before
    hub.cut_uploads = 1  # the client tries again by itself
    prior.push_to_hub("me/prior", samples=0)
    torch.testing.assert_close(
        draw(DiffusionEBMPrior.from_pretrained("me/prior", backbone=Pair((1,), (1,)))), draw(prior), rtol=0, atol=0
    )


def test_no_hub_is_said(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        make_prior().save_pretrained(tmp_path / "saved")
        assert main(["push", str(tmp_path / "saved"), "me/prior"]) == 2
        assert "the Hub could not be reached" in capsys.readouterr().err
        assert main(["pull", "me/prior", str(tmp_path / "pulled")]) == 2
        assert capsys.readouterr().err.startswith("hvae-ebm-prior: ")


def test_offline_with_a_warm_cache(hub, monkeypatch):
    prior, backbone = make_prior(), Pair((1,), (1,))
    prior.push_to_hub("me/prior", samples=0)
    with pytest.raises(LocalEntryNotFoundError):
        DiffusionEBMPrior.from_pretrained("me/prior", backbone=backbone, local_files_only=True)
    DiffusionEBMPrior.from_pretrained("me/prior", backbone=backbone)
    hub.requests.clear()
    loaded = DiffusionEBMPrior.from_pretrained("me/prior", backbone=backbone, local_files_only=True)
    assert not hub.requests
    torch.testing.assert_close(draw(loaded), draw(prior), rtol=0, atol=0)


def test_only_the_files_of_a_prior_are_downloaded(hub, tmp_path):
    prior = make_prior()
    prior.push_to_hub("me/prior", samples=0)
    repository = hub.repositories["me/prior"]
    files = repository.commits[repository.heads["main"]]
    repository.commit("main", files | {"evil.pkl": b"x", "../outside.json": b"x", "modeling.py": b"raise SystemExit"})
    main(["pull", "me/prior", str(tmp_path / "here" / "prior")])
    assert {path.name for path in (tmp_path / "here" / "prior").iterdir() if path.is_file()} == FILES
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"prior"}


def test_the_commands(hub, tmp_path, capsys):
    make_prior().save_pretrained(tmp_path / "saved", metrics=[Metric("FD", 3.5, "classifier", "digits")])
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    assert main(["push", str(tmp_path / "saved"), "me/prior", "--message", "by hand"]) == 0
    assert f"{hub.address}/me/prior/commit/" in capsys.readouterr().out
    assert "notes.txt" not in hub.repositories["me/prior"].commits[hub.repositories["me/prior"].heads["main"]]
    assert main(["pull", "me/prior", str(tmp_path / "pulled")]) == 0
    assert "DiffusionEBMPrior for Pair" in capsys.readouterr().err
    for where in ("me/prior", str(tmp_path / "pulled")):
        assert main(["info", where]) == 0
        printed = capsys.readouterr().out
        assert "2 layers, 2 dimensions" in printed
        assert "3.5" in printed
    assert main(["pull", "me/prior", str(tmp_path / "other"), "--revision", "v9"]) == 2
    assert "Revision Not Found" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "me/prior"]) == 2
    assert "expected a saved prior" in capsys.readouterr().err


def test_a_fresh_process_with_nothing_but_the_environment(hub, tmp_path):
    """As a user's: the client finds the Hub and its cache by itself; then without the Hub."""
    prior = make_prior()
    prior.push_to_hub("me/prior", samples=0)
    code = """
        import json, torch
        from backbones import Pair
        from huggingface_hub import constants
        from hvae_ebm_prior import DiffusionEBMPrior
        for constants.HF_HUB_OFFLINE in (False, True):
            prior = DiffusionEBMPrior.from_pretrained("me/prior", backbone=Pair((1,), (1,)))
            images = prior.sample(3, generator=torch.Generator().manual_seed(1))
            print(json.dumps(images.flatten().tolist()), flush=True)
            if not constants.HF_HUB_OFFLINE:
                input()
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        hub.requests.clear()
        online = process.stdout.readline()
        assert hub.requests
        hub.requests.clear()
        offline, _ = process.communicate("\n")
    assert not hub.requests
    assert process.returncode == 0
    assert json.loads(online) == json.loads(offline) == draw(prior).flatten().tolist()


@pytest.fixture
def olah(tmp_path):
    """Olah, a Hub-compatible download server that others wrote, over a git repository with the fixture's prior."""
    program = os.environ.get("OLAH_CLI") or shutil.which("olah-cli")
    if not program or not shutil.which("git"):
        pytest.skip("olah-cli (PyPI: olah, in an environment of its own; OLAH_CLI names it) or git is not installed")
    repository = tmp_path / "mirror" / "models" / "me" / "prior"
    shutil.copytree(FIXTURE, repository)
    identity = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=repository, check=True)
    port = free_port()
    (tmp_path / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\n'
        f'repos-path = "{tmp_path}/repos"\nmirrors-path = ["{tmp_path}/mirror"]\n'
        f'log-path = "{tmp_path}/logs"\n[accessibility]\noffline = true\n'
    )
    with subprocess.Popen(
        [program, "--config", str(tmp_path / "olah.toml")],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def test_a_server_of_others_serves_it(olah, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", olah)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", olah + "/{repo_id}/resolve/{revision}/{filename}")
    prior = DiffusionEBMPrior.from_pretrained("me/prior", backbone=RandomBackbone(SHAPES))
    expected = load_file(FIXTURE / "expected.safetensors")
    torch.testing.assert_close(prior.energy(expected["u"], 1), expected["energy"])
    with pytest.raises(HfHubHTTPError):
        DiffusionEBMPrior.from_pretrained("me/prior", backbone=RandomBackbone(SHAPES), revision="v9")


def test_what_is_said_for_the_card_is_pushed_and_what_was_said_stays(hub, tmp_path):
    """Also in a card that was edited by hand; the code in it loads from where it is."""
    folder = tmp_path / "saved"
    card = Card(datasets=["digits"], description="A prior of digits.")
    make_prior().save_pretrained(folder, card=card, metrics=[Metric("FD", 3.5, "classifier", "digits")])
    path = folder / "README.md"
    path.write_text(path.read_text().replace("## Limits", "## By hand\n\nMore.\n\n## Limits"))

    def push(*options):
        assert main(["push", str(folder), "me/prior", *options]) == 0
        read = ModelCard(
            hub.repositories["me/prior"].commits[hub.repositories["me/prior"].heads["main"]]["README.md"].decode()
        )
        read.validate()
        return read

    first = push("--license", "mit", "--base-model", "me/vae")
    assert (first.data.license, first.data.base_model, first.data.datasets) == ("mit", "me/vae", ["digits"])
    assert "License: mit." in first.text
    assert "No licence" not in first.text
    assert 'DiffusionEBMPrior.from_pretrained("me/prior", ' in first.text
    second = push("--license", "apache-2.0", "--title", "Digits", "--dataset", "mnist", "usps")
    assert (second.data.license, second.data.base_model, second.data.datasets) == (
        "apache-2.0",
        "me/vae",
        ["mnist", "usps"],
    )
    assert "License: apache-2.0." in second.text
    assert [line for line in second.text.splitlines() if line.startswith("# ")] == ["# Digits"]
    assert [(each.metric_value, each.dataset_name) for each in second.data.eval_results] == [(3.5, "digits")]
    for kept in ("A prior of digits.", "## By hand\n\nMore."):
        assert kept in second.text
    assert str(push()) == str(second)
    path.unlink()
    assert push("--license", "mit").data.license == "mit"
    path.unlink()
    (tmp_path / "secret").write_text("mine")
    path.symlink_to(tmp_path / "secret")
    complete_card(folder, make_parser().parse_args(["push", str(folder), "me/prior", "--license", "mit"]))
    assert path.is_symlink()
    assert (tmp_path / "secret").read_text() == "mine"
