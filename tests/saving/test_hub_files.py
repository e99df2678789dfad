"""What a pull writes over, what a push takes, and what is downloaded first."""

import json
import shutil

import pytest
from backbones import Pair
from test_hub import FILES, draw, hub, make_prior  # noqa: F401

from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.saving import hub as client
from hvae_ebm_prior.saving.folder import load_config
from hvae_ebm_prior.saving.typed_json import InvalidPrior
from hvae_ebm_prior.training.learned_prior import LearnedPrior

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def change(repository, **files):
    """Commit files to a repository's main branch; None takes one away."""
    before = repository.commits[repository.heads["main"]]
    after = {name.replace("__", "."): data for name, data in files.items()}
    kept = {name: data for name, data in (before | after).items() if data is not None}
    repository.commit("main", kept)


@pytest.fixture
def pushed(hub):  # noqa: F811
    """A prior on the Hub, and its repository."""
    prior = make_prior()
    prior.push_to_hub("me/prior", samples=0)
    return prior, hub.repositories["me/prior"]


@pytest.mark.parametrize(
    "mine",
    [
        {"README.md": b"# My project"},
        {"README.md": b"# My project", "config.json": b'{"model_type": "bert"}'},
        {"model.safetensors": b"mine"},
        {"config.json": b"\xff"},
        {"samples.png": b"mine", "notes.txt": b"mine"},
    ],
)
def test_a_pull_overwrites_no_files_of_others(pushed, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for name, data in mine.items():
        (tmp_path / "project" / name).write_bytes(data)
    assert main(["pull", "me/prior", "."]) == 2
    printed = capsys.readouterr().err
    assert "nothing is overwritten: choose another folder" in printed
    assert printed.count("\n") == 1
    assert contents(tmp_path / "project") == mine


def test_a_pull_replaces_a_prior_as_one(pushed, hub, tmp_path, monkeypatch):  # noqa: F811
    prior, _ = pushed
    place = tmp_path / "place"
    place.mkdir()
    (place / "notes.txt").write_bytes(b"mine")
    assert main(["pull", "me/prior", str(place)]) == 0
    assert contents(place).keys() == FILES | {"notes.txt"}
    first = draw(LearnedPrior.from_pretrained(place, backbone=Pair((1,), (1,))))
    assert first.equal(draw(prior))
    next(prior.parameters()).data.add_(0.1)
    prior.push_to_hub("me/prior", samples=0)

    def killed(*_):
        raise KeyboardInterrupt

    # Between weights and settings.
    write, calls = client.write_atomically, []

    def once(path, make):
        calls.append(path.name)
        return write(path, make) if len(calls) == 1 else killed()

    with monkeypatch.context() as patch:
        patch.setattr(client, "write_atomically", once)
        with pytest.raises(KeyboardInterrupt):
            client.pull("me/prior", place)
    assert draw(LearnedPrior.from_pretrained(place, backbone=Pair((1,), (1,)))).equal(first)
    client.pull("me/prior", place)
    assert draw(LearnedPrior.from_pretrained(place, backbone=Pair((1,), (1,)))).equal(draw(prior))
    assert contents(place).keys() == FILES | {"notes.txt"}


def test_a_damaged_repository_is_not_put_over_a_good_prior(pushed, tmp_path):
    _, repository = pushed
    client.pull("me/prior", tmp_path)
    before = contents(tmp_path)
    change(repository, model__safetensors=b"damaged")
    with pytest.raises(InvalidPrior, match=r"model.safetensors: not the weights that config.json was written with"):
        client.pull("me/prior", tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "samples.png", "config.json"])
def test_links_are_not_pushed(hub, name, tmp_path, capsys):  # noqa: F811
    make_prior().save_pretrained(tmp_path / "saved")
    secret = tmp_path / "secret"
    path = tmp_path / "saved" / name
    shutil.move(path, secret) if path.exists() else secret.write_bytes(b"secret")
    path.symlink_to(secret)
    assert main(["push", str(tmp_path / "saved"), "me/prior"]) == 2
    assert f"{path}: a link to {secret}; put the file itself there" in capsys.readouterr().err
    assert "me/prior" not in hub.repositories


def test_a_mixed_folder_is_not_pushed(hub, tmp_path):  # noqa: F811
    make_prior().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(InvalidPrior, match="not the weights"):
        client.upload(tmp_path, "me/prior")
    assert not hub.repositories


def test_a_push_is_one_commit_of_a_priors_files(hub, tmp_path):  # noqa: F811
    make_prior().save_pretrained(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("notes.txt", "sub/config.json", ".model.previous.safetensors"):
        (tmp_path / name).write_bytes(b"mine")
    client.upload(tmp_path, "me/prior", subfolder="small")
    repository = hub.repositories["me/prior"]
    assert len(repository.commits) == 2  # with that which made it
    assert {path for path in repository.commits[repository.heads["main"]] if "/" in path} == {
        f"small/{name}" for name in FILES
    }


def downloads(hub):  # noqa: F811
    return [
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "/resolve/" in request
    ]


def test_info_takes_the_settings_alone(pushed, hub, capsys):  # noqa: F811
    size = len(pushed[1].commits[pushed[1].heads["main"]]["model.safetensors"])
    hub.requests.clear()
    assert main(["info", "me/prior"]) == 0
    assert f"weights       {size / 1e6:.1f} MB" in capsys.readouterr().out
    assert downloads(hub) == ["config.json"]


def test_info_of_a_folder_asks_no_hub(hub, tmp_path, capsys):  # noqa: F811
    make_prior().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert main(["info", str(tmp_path)]) == 2
    assert "there is no model.safetensors" in capsys.readouterr().err
    assert not hub.requests


def test_settings_are_read_before_weights_are_downloaded(pushed, hub, tmp_path, capsys):  # noqa: F811
    change(pushed[1], config__json=json.dumps({"schema": 99}).encode())
    for command in (["info", "me/prior"], ["pull", "me/prior", str(tmp_path / "here")]):
        hub.requests.clear()
        assert main(command) == 2
        assert "expected a schema from 1" in capsys.readouterr().err
        assert set(downloads(hub)) <= {"config.json"}
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "samples.png"])
def test_files_larger_than_any_priors_are_left_on_the_hub(pushed, hub, name, tmp_path, monkeypatch):  # noqa: F811
    change(pushed[1], **{name.replace(".", "__"): b"x" * 5000})
    monkeypatch.setitem(client.LARGEST, name, 4999)
    hub.requests.clear()
    with pytest.raises(InvalidPrior, match=f"me/prior: {name}: expected at most 4999 bytes, got 5000"):
        client.pull("me/prior", tmp_path / "here")
    assert not downloads(hub)
    assert not (tmp_path / "here").exists()


def test_loading_takes_settings_and_weights(pushed, hub):  # noqa: F811
    hub.requests.clear()
    loaded = LearnedPrior.from_pretrained("me/prior", backbone=Pair((1,), (1,)))
    assert draw(loaded).equal(draw(pushed[0]))
    assert sorted(downloads(hub)) == ["config.json", "model.safetensors"]


def test_a_repository_without_a_prior_is_said(pushed, tmp_path):
    change(pushed[1], config__json=None)
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
        client.pull("me/prior", tmp_path / "here")
    change(pushed[1], config__json=b"{}", model__safetensors=None)
    with pytest.raises(InvalidPrior, match="expected a schema"):
        load_config(client.fetch("me/prior"))
