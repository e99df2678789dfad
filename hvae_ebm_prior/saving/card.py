"""The model card of a saved prior: README.md with the Hub's metadata, how it was made, and the code to use it."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..backbone.text import hidden_characters, visible
from .config import Metric, PriorConfig, settings_in_words
from .extras import install_command, where

LIBRARY = "hvae-ebm-prior"
TASK = "unconditional-image-generation"
TAGS = ("hierarchical-vae", "energy-based-model", "diffusion", "prior")
PAPER = "https://arxiv.org/abs/2405.13910"
NO_LICENSE = "No licence was given; ask its author before you use it."


@dataclass(frozen=True)
class Card:
    """What a prior's author adds to its model card.

    Attributes:
        title: the card's heading; None for one made of the prior's class and its backbone's.
        base_model: the backbone on the Hub, as owner/name.
        datasets: what it was trained on, as on the Hub.
        license: identifier as on the Hub, such as "mit".
        description: a paragraph of your own, Markdown.
        load_backbone: a line or two of Python that make `backbone`, for the code of the card.

    Raises:
        TypeError, ValueError: something else than texts, or control characters in them.
    """

    title: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    description: str = ""
    load_backbone: str = "backbone = ...  # your trained model, or its adapter"

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str):
            raise TypeError(f"card: datasets: expected a list of names, got the text {self.datasets!r}")
        names = {
            name: getattr(self, name) for name in ("title", "base_model", "license", "description", "load_backbone")
        }
        names |= {f"datasets[{i}]": each for i, each in enumerate(self.datasets)}
        for name, text in names.items():
            if not isinstance(text, str | None):
                raise TypeError(f"card: {name}: expected a text, got {type(text).__name__}")
            several_lines = "\r\n\t" if name in ("description", "load_backbone") else ""
            if set(hidden_characters(text or "")) - set(several_lines):
                raise ValueError(f"card: {name}: expected a text without control characters, got {text!r:.80}")


def write_card(
    config: PriorConfig,
    card: Card,
    *,
    repo_id: str = "path/or/repository",
    samples: str | None = None,
    tensors: bool = False,
) -> str:
    """The text of README.md.

    Args:
        config: the prior's settings, training and metrics.
        card: what its author adds.
        repo_id: where it can be loaded from.
        samples: name of the file of the sample grid, if there is one.
        tensors: whether the model's data are plain tensors, not images.

    Returns:
        The card: YAML metadata between lines of dashes, then Markdown.

    Raises:
        ValueError: a card that could not be read again.
    """
    title = card.title or f"{config.kind} for {config.family}"
    dataset = (card.datasets or ["unknown"])[0]
    results = [
        EvalResult(
            task_type="other" if tensors else TASK,
            dataset_type=dataset,
            dataset_name=each.dataset or dataset,
            metric_type=each.name.lower().replace(" ", "-"),
            metric_name=f"{each.name} ({each.features})" if each.features else each.name,
            metric_value=each.value,
        )
        for each in config.metrics
    ]
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=None if tensors else TASK,
        tags=list(TAGS),
        base_model=card.base_model,
        base_model_relation="adapter" if card.base_model else None,
        datasets=list(card.datasets) or None,
        license=card.license,
        model_name=title if results else None,
        eval_results=results or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {in_markdown(title)}",
        card.description,
        introduction(config),
        f"![Samples from the model's Gaussian prior, above, and from this one, below]({samples})" if samples else "",
        use_section(config, card, repo_id, tensors),
        settings_section(config),
        metrics_section(config.metrics),
        limits_section(card),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    check_card(text, data)
    return text


def check_card(text: str, data: ModelCardData) -> None:
    """Raise ValueError unless the Hub, and whoever loads the card, reads these metadata in it."""
    try:
        text.encode()
        read = ModelCard(text).data.to_dict()
    except Exception as error:  # whatever the client and its YAML make of it
        raise ValueError(f"card: it could not be read again ({error})") from error
    if read != data.to_dict():
        wrong = next(name for name, value in data.to_dict().items() if read.get(name) != value)
        raise ValueError(f"card: {wrong} could not be read again: {read.get(wrong)!r:.200}")


def in_markdown(text: str) -> str:
    """A text from elsewhere so that a page shows it as it is: neither Markdown, HTML nor links are made of it."""
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(mark, entity)
    return re.sub(r"[\\`*{}\[\]#|~!$@:^]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", r"\\\g<0>", visible(text))


def introduction(config: PriorConfig) -> str:
    """A paragraph on what the prior is."""
    return (
        f"A learned prior for a trained hierarchical VAE ({in_markdown(config.family)}). It takes the place of the "
        "model's Gaussian prior, which does not match where the encoder puts the data, so that samples get better; the "
        "model itself is unchanged and not part of this repository. Made with "
        f"`{LIBRARY}` {in_markdown(config.library)}, after [Cui & Han, ICML 2024]({PAPER})."
    )


def use_section(config: PriorConfig, card: Card, repo_id: str, tensors: bool) -> str:
    """How to install the library, and code that loads the prior and draws samples."""
    module = "hvae_ebm_prior.baselines" if config.kind in ("NCPPrior", "JointEBMPrior") else "hvae_ebm_prior"
    networks = ", energy=networks" if config.energy is None else ""
    what, shape = ("data", "(16, ...)") if tensors else ("images", "(16, C, H, W) in [0, 1]")
    lines = [
        f"from {module} import {config.kind}",
        "",
        card.load_backbone,
        f"prior = {config.kind}.from_pretrained({quoted(repo_id)}, backbone=backbone{networks})",
        f"{what} = prior.sample(16)  # {shape}",
    ]
    if config.coupling:
        name = next(iter(config.coupling.sets))
        lines.append(f"{what} = prior.sample(16, labels={{{quoted(name)}: 0}})")
    return "\n".join(
        ["## Use", "", f"Install `{LIBRARY}`{where()}:", "", f"    {install_command()}", "", "```python", *lines, "```"]
    )


def quoted(text: str) -> str:
    """A text as Python's source, between double quotes."""
    return visible(json.dumps(text, ensure_ascii=False))


def settings_section(config: PriorConfig) -> str:
    """Settings and training, as a list."""
    shapes = config.backbone.latent_shapes
    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    lines = [f"{len(shapes)} latent layers, {sum(math.prod(shape) for shape in shapes)} dimensions: {sizes}"]
    lines += [f"`{name}`: {in_markdown(words)}" for name, words in settings_in_words(config).items()]
    if config.training:
        lines.append(f"trained for {config.training.iterations} iterations in {config.training.seconds:.0f} s")
        settings = ", ".join(f"{name} = {value}" for name, value in config.training.settings.items())
        lines.append(f"with {in_markdown(settings)}" if settings else "")
    return "\n".join(["## Settings and training", "", *(f"- {line}" for line in lines if line)])


def metrics_section(metrics: Sequence[Metric]) -> str:
    """Figures of quality, as a table; empty without any."""
    if not metrics:
        return ""
    cells = [(each.name, f"{each.value:.4g}", each.features, each.dataset) for each in metrics]
    rows = [f"| {' | '.join(map(in_markdown, row))} |" for row in cells]
    return "\n".join(["## Figures", "", "| | | features | images |", "|---|---|---|---|", *rows])


def limits_section(card: Card) -> str:
    """What the prior cannot do, and on which terms it may be used."""
    terms = f"License: {in_markdown(card.license)}." if card.license else NO_LICENSE
    return (
        "## Limits\n\nIt works with the backbone that it was trained for, and no other: loading it onto another one "
        "fails. It cannot be better than that model's reconstructions, and it reproduces what is in its training "
        f"images, whatever is wrong with them.\n\n{terms}"
    )


def amend_card(text: str, card: Card, *, written_for: str, repo_id: str) -> str:
    """A model card with more of what its author says.

    Args:
        text: of README.md, as `write_card` wrote it, or as it was edited since.
        card: title, model, data sets and licence replace those that are there; what is None or empty, and the rest, is
            left alone.
        written_for: the `repo_id` that it was written with.
        repo_id: the repository that it goes to.

    Returns:
        The text.
    """
    found = ModelCard(text)
    if card.base_model:
        found.data["base_model"], found.data["base_model_relation"] = card.base_model, "adapter"
    if card.datasets:
        found.data["datasets"] = list(card.datasets)
    body = found.text.replace(f".from_pretrained({quoted(written_for)}", f".from_pretrained({quoted(repo_id)}")
    if card.license:
        found.data["license"] = card.license
        terms = re.compile(rf"^(License: .*|{re.escape(NO_LICENSE)})$", re.MULTILINE)
        body = terms.sub(lambda _: f"License: {in_markdown(card.license or '')}.", body, count=1)
    if card.title:
        body = re.sub(r"^# .*$", lambda _: f"# {in_markdown(card.title or '')}", body, count=1, flags=re.MULTILINE)
    return f"---\n{found.data.to_yaml()}\n---\n{body}"
