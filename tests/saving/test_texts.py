"""Texts that people read: nothing in them is obeyed by terminals and pages, and what is written can be read again."""

import math

import numpy as np
import pytest
import torch
from backbones import RandomBackbone
from helpers import TINY
from huggingface_hub import ModelCard
from test_saving import SHAPES, SMALL, make_prior

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, LabelSet
from hvae_ebm_prior.backbone.text import hidden_characters, visible
from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.saving.card import Card, in_markdown
from hvae_ebm_prior.saving.config import Metric, TrainingSummary
from hvae_ebm_prior.saving.folder import load_config
from hvae_ebm_prior.saving.typed_json import InvalidPrior

HIDDEN = [
    "\x1b[31m",
    "\r",
    "\n",
    "\t",
    "\x00",
    "\x7f",
    "\x9b",
    "\u202e",
    "\u2066",
    "\u2028",
    "\ufeff",
    "\u200b",
    "\ud800",
]
SHOWN = ["grün", "خانه\u200cها", "👩\u200d🔬", "e\u0301", "日本語\u3000", "a b"]


@pytest.mark.parametrize("text", HIDDEN)
def test_hidden_characters_are_found_and_shown(text):
    assert hidden_characters(f"a{text}b") == text[0]
    assert visible(f"a{text}b") == f"a{text[0].encode('unicode_escape').decode()}{text[1:]}b"
    with pytest.raises(ValueError, match="without control characters"):
        LabelSet(("cup", f"hat{text}"))
    with pytest.raises(ValueError, match="card: title: expected a text without control characters"):
        Card(title=f"a{text}")


@pytest.mark.parametrize("text", SHOWN)
def test_what_languages_are_written_with_stays(text, tmp_path):
    assert not hidden_characters(text)
    assert visible(text) == text
    make_prior(coupling=Coupling({"kind": LabelSet((text, "b"))}, networks=SMALL)).save_pretrained(tmp_path)
    assert load_config(tmp_path).coupling.sets["kind"].categories == (text, "b")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("a | b", r"a \| b"),
        ("[x](javascript:y)", r"\[x\](javascript\:y)"),
        ("`code` *b* _i_ ~s~ &amp; # h", r"\`code\` \*b\* \_i\_ \~s\~ &amp;amp; \# h"),
        ("https://x.y www.x.y a@b.c", r"https\://x.y www\.x.y a\@b.c"),
        ("step_size = 0.15", "step_size = 0.15"),
        ("__b__ a__b", r"\_\_b\_\_ a\_\_b"),
        ("a\u202eb", r"a\\u202eb"),
        ("$x$ !y ^z", r"\$x\$ \!y \^z"),
    ],
)
def test_names_are_no_markdown(text, shown):
    assert in_markdown(text) == shown


def test_the_card_shows_names_as_they_are(tmp_path):
    evil = "<script>x</script> | [b](http://c) `d`"
    prior = make_prior(coupling=Coupling({"kind": LabelSet((evil, "b"))}, networks=SMALL))
    prior.trained = TrainingSummary(3, 1.0, {"objective": evil})
    folder = tmp_path / 'a"); evil("b'
    metrics = [Metric(evil, 3.5, evil, evil)]
    prior.save_pretrained(folder, metrics=metrics, card=Card(title=evil, license="mit", datasets=[evil]))
    text = (folder / "README.md").read_text()
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body
    assert "](http://c" not in body
    row = next(line for line in body.splitlines() if line.startswith("| &lt;script"))
    assert row.replace(r"\|", "").count("|") == 5
    assert r'from_pretrained("a\"); evil(\"b", backbone=backbone)' in body
    read = ModelCard(text)
    assert read.data.datasets == [evil]
    assert read.data.eval_results[0].metric_value == 3.5
    assert read.data.model_name == evil


def test_cards_that_cannot_be_read_again_are_refused(tmp_path, monkeypatch):
    make_prior().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("hvae_ebm_prior.saving.card.ModelCardData.to_yaml", lambda self: "license: [")
    with pytest.raises(ValueError, match="card: it could not be read again"):
        make_prior(energy=TINY).save_pretrained(tmp_path)
    monkeypatch.setattr("hvae_ebm_prior.saving.card.ModelCardData.to_yaml", lambda self: "license: other")
    with pytest.raises(ValueError, match="card: library_name could not be read again: None"):
        make_prior(energy=TINY).save_pretrained(tmp_path, card=Card(license="mit"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"datasets": "digits"}, TypeError, "datasets: expected a list of names, got the text 'digits'"),
        ({"datasets": [3]}, TypeError, r"datasets\[0\]: expected a text, got int"),
        ({"license": 3}, TypeError, "license: expected a text, got int"),
        ({"license": "mit\n---"}, ValueError, "license: expected a text without control"),
        ({"description": "a\x1b[2K"}, ValueError, "description: expected a text without control"),
        ({"description": "a\ud800"}, ValueError, "description: expected a text without control"),
    ],
)
def test_what_is_no_card_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        Card(**values)


def test_descriptions_have_lines():
    assert Card(description="a\r\n\nb\tc").description == "a\r\n\nb\tc"


@pytest.mark.parametrize("value", [np.float32(3.5), np.float64(3.5), np.array(3.5), torch.tensor(3.5), np.int64(7) / 2])
def test_figures_of_any_kind_are_numbers(value, tmp_path):
    make_prior().save_pretrained(tmp_path, metrics=[Metric("FD", value)])
    assert load_config(tmp_path).metrics == (Metric("FD", 3.5),)
    assert ModelCard((tmp_path / "README.md").read_text()).data.eval_results[0].metric_value == 3.5


@pytest.mark.parametrize("value", [None, torch.ones(2), [1.0]])
def test_what_is_no_figure_is_refused(value):
    with pytest.raises(TypeError, match="metric 'FD': expected a number, got"):
        Metric("FD", value)


@pytest.mark.parametrize("wrong", [math.nan, 1e30])
def test_weights_that_could_not_be_loaded_are_not_saved(wrong, tmp_path):
    make_prior().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    prior = make_prior()
    next(prior.parameters()).data.fill_(wrong)
    with pytest.raises(InvalidPrior, match=r"model.safetensors: energies\.0\.\S+ holds"):
        prior.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_prior_of_21841_categories_can_be_saved(tmp_path, capsys):
    names = tuple(f"n{i:08}, a name of common length" for i in range(21_841))
    prior = DiffusionEBMPrior(RandomBackbone(SHAPES), energy=SMALL)
    prior.couple(Coupling({"class": LabelSet(names, layers=(1,))}, networks=SMALL))
    prior.save_pretrained(tmp_path)
    assert load_config(tmp_path).coupling.sets["class"].categories == names
    assert main(["info", str(tmp_path)]) == 0
    assert f"{names[19]}, and 21821 more\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="names of at most 1000 characters"):
        LabelSet(("a", "b" * 1001))


def test_settings_larger_than_the_reader_takes_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("hvae_ebm_prior.saving.typed_json.LARGEST_FILE", 500)
    with pytest.raises(InvalidPrior, match=r"config.json: expected at most 500 bytes, got \d+"):
        make_prior().save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_info_refuses_what_would_be_obeyed(tmp_path, capsys):
    make_prior().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"RandomBackbone"', '"VAE\\u001b[2K\\u202e"'))
    assert main(["info", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "config.json.family: expected a text of at most 1000 characters, without control characters" in printed.err
    assert "\x1b" not in printed.err
    assert "\u202e" not in printed.err


def test_a_damaged_header_is_quoted_safely(tmp_path, capsys):
    make_prior().save_pretrained(tmp_path)
    header = '{"x\x1b[2K":{"dtype":"F\x1b[2K\u202e","shape":[1],"data_offsets":[0,4]}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InvalidPrior, match="no safetensors file") as raised:
        DiffusionEBMPrior.from_pretrained(tmp_path, backbone=RandomBackbone(SHAPES))
    assert not hidden_characters(str(raised.value))
