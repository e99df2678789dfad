"""The model card of a saved prior: README.md with the Hub's metadata, how it was made, and the code to use it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from ..extras import install_command, where
from .config import Measured, PriorConfig, settings_in_words

LIBRARY = "hvae-ebm-prior"
TASK = "unconditional-image-generation"
TAGS = ("hierarchical-vae", "energy-based-model", "diffusion", "prior")
PAPER = "https://arxiv.org/abs/2405.13910"


@dataclass(frozen=True)
class Card:
    """What only you know about a prior, for its model card.

    Attributes:
        title: the card's heading; None for one made of the prior's class and its backbone's.
        base_model: the backbone on the Hub, as owner/name.
        datasets: what it was trained on, as on the Hub.
        license: identifier as on the Hub, "mit" say.
        description: a paragraph of your own.
        load_backbone: a line or two of Python that make `backbone`, for the code of the card.
    """

    title: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    description: str = ""
    load_backbone: str = "backbone = ...  # your trained model, or its adapter"


def write_card(
    config: PriorConfig, card: Card, *, repo_id: str = "path/or/repository", samples: str | None = None
) -> str:
    """The text of README.md.

    Args:
        config: what the prior is.
        card: what its author says of it.
        repo_id: where it can be loaded from.
        samples: name of the file of the sample grid, if there is one.

    Returns:
        The card: YAML metadata between lines of dashes, then Markdown.
    """
    title = card.title or f"{config.kind} for {config.family}"
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=(card.datasets or ["unknown"])[0],
            dataset_name=each.dataset or (card.datasets or ["unknown"])[0],
            metric_type=each.name.lower().replace(" ", "-"),
            metric_name=f"{each.name} ({each.features})" if each.features else each.name,
            metric_value=each.value,
        )
        for each in config.metrics
    ]
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=TASK,
        tags=list(TAGS),
        base_model=card.base_model,
        base_model_relation="adapter" if card.base_model else None,
        datasets=list(card.datasets) or None,
        license=card.license,
        model_name=title if results else None,
        eval_results=results or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", card.description, introduction(config), grid(samples)]
    parts += [usage(config, card, repo_id), facts(config), measured(config.metrics), limits(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def introduction(config: PriorConfig) -> str:
    """What it is, in a paragraph."""
    return (
        f"A learned prior for a trained hierarchical VAE (`{config.family}`). It takes the place of the model's Gaussian prior, which does not match "
        "where the encoder puts the data, so that samples get better; the model itself is unchanged and not part of this repository. Made with "
        f"`{LIBRARY}` {config.library}, after [Cui & Han, ICML 2024]({PAPER})."
    )


def grid(samples: str | None) -> str:
    """The picture of samples."""
    return f"![Samples from the model's Gaussian prior, above, and from this one, below]({samples})" if samples else ""


def usage(config: PriorConfig, card: Card, repo_id: str) -> str:
    """Code that loads it."""
    module = {"NCPPrior": "hvae_ebm_prior.baselines", "JointEBMPrior": "hvae_ebm_prior.baselines"}.get(
        config.kind, "hvae_ebm_prior"
    )
    own = ", energy=networks" if config.energy is None else ""
    lines = [f"from {module} import {config.kind}", "", card.load_backbone]
    lines += [
        f'prior = {config.kind}.from_pretrained("{repo_id}", backbone=backbone{own})',
        "images = prior.sample(16)  # (16, C, H, W) in [0, 1]",
    ]
    if config.coupling:
        name = next(iter(config.coupling.sets))
        lines.append(f'images = prior.sample(16, labels={{"{name}": 0}})')
    return "\n".join(
        ["## Use", "", f"Install `{LIBRARY}`{where()}:", "", f"    {install_command()}", "", "```python", *lines, "```"]
    )


def facts(config: PriorConfig) -> str:
    """Settings and training, as a list."""
    shapes = config.backbone.latent_shapes
    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    lines = [f"{len(shapes)} latent layers, {sum(math.prod(shape) for shape in shapes)} dimensions: {sizes}"]
    lines += [f"`{name}`: {words}" for name, words in settings_in_words(config).items()]
    if config.training:
        lines.append(f"trained for {config.training.iterations} iterations in {config.training.seconds:.0f} s")
        lines.append(", ".join(f"{name} = {value}" for name, value in config.training.settings.items()))
    return "\n".join(["## Settings and training", "", *(f"- {line}" for line in lines if line)])


def measured(metrics: Sequence[Measured]) -> str:
    """Figures of quality, as a table."""
    if not metrics:
        return ""
    rows = [f"| {each.name} | {each.value:.4g} | {each.features} | {each.dataset} |" for each in metrics]
    return "\n".join(["## Figures", "", "| | | features | images |", "|---|---|---|---|", *rows])


def limits(card: Card) -> str:
    """What it cannot do, and on which terms it may be used."""
    terms = f"License: {card.license}." if card.license else "No licence was given; ask its author before you use it."
    return (
        "## Limits\n\nIt works with the backbone that it was trained for, and no other: loading it onto another one fails. It cannot be better than "
        f"that model's reconstructions, and it reproduces what is in its training images, whatever is wrong with them.\n\n{terms}"
    )
