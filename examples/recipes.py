"""The paper's benchmarks: a prior for an official NVAE of CIFAR-10, CelebA-64, CelebA-HQ-256 or LSUN-Church-64, or for
a 3-layer HVAE of CIFAR-10.

    python examples/recipes.py cifar10-nvae checkpoint.pt --repo ~/NVAE --data-dir ~/data --out out/cifar10
    python examples/recipes.py cifar10-nvae --repo ~/NVAE --estimate        # its time and memory on this machine
    python examples/recipes.py cifar10-nvae --repo ~/NVAE --smoke           # all of it in seconds, on generated images

docs/recipes.md says what to download. The folder `--out` gets prior.safetensors and results.json, from which
`load_prior` makes the prior again, samples.png, and images for `hvae-ebm-prior evaluate`.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_backbones import (
    HVAE_CIFAR10,
    HVAE_TINY,
    NVAE_CELEBA64,
    NVAE_CELEBAHQ256,
    NVAE_CHURCH64,
    NVAE_CIFAR10,
    TINY,
    official_nvae,
)
from recipe_data import ATTRIBUTES, SOURCES, Pictures, Shapes, category_names
from recipe_estimate import duration, report_costs
from safetensors.torch import load_file, save_file
from train_hvae import train as train_hvae

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, LabelSet, TrainingRecord
from hvae_ebm_prior.adapters import HVAE, HVAEAdapter, HVAEConfig, NVAEAdapter, freeze, recalibrate_batch_norm
from hvae_ebm_prior.backbone import NoiseTransform
from hvae_ebm_prior.cli.loading import load_function
from hvae_ebm_prior.control import sample_in_turn
from hvae_ebm_prior.presets import PRESETS, Preset
from hvae_ebm_prior.saving.files import write_atomically, write_json
from hvae_ebm_prior.saving.grid import save_grid

SAVE_EVERY = 500
SMOKE_IMAGES = 16


@dataclass(frozen=True)
class Labels:
    """A label set of a recipe.

    Attributes:
        column: of the data's rows.
        layers: the part of the layers that it is bound to, from 0, the top, to 1, the bottom.
    """

    column: str
    layers: tuple[float, float] = (0.0, 1.0)

    def of(self, count: int) -> tuple[int, ...]:
        """Indices of the layers, out of `count`; one at least."""
        start, end = (round(part * count) for part in self.layers)
        start = min(start, count - 1)
        return tuple(range(start, max(end, start + 1)))


@dataclass(frozen=True)
class Recipe:
    """One benchmark.

    Attributes:
        data: key of `recipe_data.SOURCES`.
        image_size: height and width.
        images: number of training images, for the estimate.
        backbone: architecture of the NVAE of the benchmark, or the shape of the HVAE, which is trained first.
        preset: settings with `--preset paper`.
        epochs: passes over the images with these; the learning rate is then 4 to 5 % of what it was at first.
        recalibrate: estimate batch norm anew, as the published code does.
        published: Fréchet distances of the paper.
        labels: label sets by name, with `--conditional`.
    """

    data: str
    image_size: int
    images: int
    backbone: Mapping[str, Any] | HVAEConfig
    preset: str
    epochs: int
    recalibrate: bool
    published: Mapping[str, float | None]
    labels: Mapping[str, Labels] = field(default_factory=dict)


def published(gaussian: float, reconstructions: float | None, ours: float) -> dict[str, float | None]:
    """Fréchet distances of the paper, None where it gives none."""
    return {"Gaussian prior": gaussian, "reconstructions": reconstructions, "EBM diffusion prior": ours}


CLASSES = {"class": Labels("label")}
# What is global at the top, what is local below.
FACES = {
    name: Labels(column, layers)
    for name, column, layers in zip(
        ("gender", "smile", "hair"), ATTRIBUTES, ((0.0, 0.2), (0.2, 0.6), (0.6, 1.0)), strict=True
    )
}
RECIPES = {
    "cifar10-nvae": Recipe(
        "cifar10", 32, 50_000, NVAE_CIFAR10, "paper-cifar10", 30, True, published(37.73, 0.68, 8.93), CLASSES
    ),
    # The paper shows pictures of this one (Figure 4), and no distances.
    "celeba64-nvae": Recipe("celeba", 64, 162_770, NVAE_CELEBA64, "lsun-church64", 30, False, {}, FACES),
    "celebahq256-nvae": Recipe(
        "celeba-hq", 256, 27_000, NVAE_CELEBAHQ256, "paper-celebahq256", 150, False, published(30.25, 1.64, 8.78)
    ),
    "lsun-church64-nvae": Recipe(
        "lsun-churches", 64, 116_227, NVAE_CHURCH64, "lsun-church64", 30, False, published(38.13, 2.45, 7.34)
    ),
    "cifar10-hvae": Recipe(
        "cifar10", 32, 50_000, HVAE_CIFAR10, "cifar10-hvae", 30, False, published(81.44, None, 35.13), CLASSES
    ),
}


@dataclass(frozen=True)
class Run:
    """What a prior was made with; `load_prior` reads it from results.json.

    Attributes:
        recipe: key of `RECIPES`.
        preset: "paper" or "default".
        repo: clone of NVAE.
        checkpoint: file of the backbone.
        loader: file.py:function that returns an NVAE instead.
        output: "sample" or "mean" of p(x | z) as the image of an NVAE.
        save_memory: keep no activations inside the NVAE's cells.
        smoke: tiny and short.
        seed: of all randomness.
        device: where it runs.
        categories: names of the categories of the label sets that the prior is coupled to; none for a prior without.
    """

    recipe: str
    preset: str
    repo: str | None
    checkpoint: str | None
    loader: str | None
    output: str
    save_memory: bool
    smoke: bool
    seed: int
    device: str
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = make_parser().parse_args(arguments)
    given = [each.name for each in dataclasses.fields(Run) if each.name != "categories"]
    run = Run(**{name: getattr(options, name) for name in given})
    options.out = options.out or Path("out") / run.recipe
    options.out.mkdir(parents=True, exist_ok=True)
    if options.estimate:
        estimate(run, options.out, options.batches)
    else:
        train(run, options)


def train(run: Run, options: argparse.Namespace) -> None:
    """Make data, backbone and prior, fit, write the files, and draw samples from the prior that they hold."""
    recipe = RECIPES[run.recipe]
    out = options.out
    generator = torch.Generator().manual_seed(run.seed)
    sources = load_sources(run, options.data_dir)
    training_set, held_out = (Pictures(source, image_size(run)) for source in sources)
    if options.conditional:
        if not recipe.labels:
            raise ValueError(f"{run.recipe}: --conditional: its images have no labels")
        names = {name: category_names(sources[0], labels.column) for name, labels in recipe.labels.items()}
        run = replace(run, categories=names)
    if isinstance(recipe.backbone, HVAEConfig):
        make_hvae(run, training_set, held_out, out, options.hvae_epochs)
        adapter = load_backbone(run, out)
    else:
        adapter = load_backbone(run, None)
        training_set.bits = held_out.bits = bits_of(adapter)
        if recipe.recalibrate:
            adapter = recalibrated(run, adapter, out)
        adapter = frozen(run, adapter)
    export(out / "held_out.npy", held_out, options.export, lambda i: (255 * held_out[i]).round().byte())
    export(out / "training.npy", training_set, options.export, training_set.levels)

    prior, preset = make_prior(run, adapter)
    training = replace(preset.training, batch_size=options.batch_size or preset.training.batch_size)
    if run.preset == "paper" and not run.smoke:
        training = replace(training, iterations=recipe.epochs * max(1, len(training_set) // training.batch_size))
    training = replace(training, iterations=options.iterations or training.iterations)
    history: list[TrainingRecord] = []

    def follow(prior: DiffusionEBMPrior, record: TrainingRecord) -> None:
        history.append(record)
        if record.iteration % SAVE_EVERY == 0:
            save()
            gaps = ", ".join(f"{gap:.1f}" for gap in record.gaps)
            print(
                f"iteration {record.iteration}: loss {record.loss:.2f}, energy gap per t {gaps}, "
                f"{duration(record.seconds)}",
                flush=True,
            )

    def save() -> None:
        write_atomically(out / "prior.safetensors", lambda path: save_file(prior.state_dict(), path))
        write_json(out / "results.json", results_of_run(run, preset, training, prior, history))

    training_set.columns = {name: recipe.labels[name].column for name in run.categories}
    try:
        prior.fit(training_set, training=training, callback=follow, generator=generator)
    except KeyboardInterrupt:
        print("stopped; what is learned so far is kept", file=sys.stderr)
    finally:
        save()

    count = 2 if run.smoke else 8
    images = held_out.first(count).to(prior.device)
    prior.release()
    prior = load_prior(out)
    with torch.no_grad():
        rows = {
            "held-out images": images,
            "reconstructions": prior.decode(prior.encode(images, generator=generator)),
            "Gaussian prior": prior.decode(torch.randn(count, prior.dim, generator=generator).to(prior.device)),
            "ours": prior.sample(count, generator=generator),
            **labelled_rows(prior, run, count, generator),
        }
    write_atomically(out / "samples.png", lambda path: save_grid(path, list(rows.values()), list(rows)))
    loader = shlex.quote(f"{os.path.relpath(__file__)}:load_prior")
    folder, images, reference = (shlex.quote(str(out / name)) for name in ("", "held_out.npy", "training.npy"))
    print(
        f"{out} written. Next:\n\n    hvae-ebm-prior evaluate {loader} {folder} --images {images} "
        f"--reference {reference} --features inception --device {run.device}"
    )


def labelled_rows(
    prior: DiffusionEBMPrior, run: Run, count: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Samples under every category of the only label set; of several sets, the last category of each in turn, with the
    layers of those before held (Figure 4).
    """
    if len(run.categories) < 2 or prior.coupling is None:
        return {
            each: prior.sample(count, labels={name: each}, generator=generator)
            for name, categories in run.categories.items()
            for each in categories
        }
    sets = prior.coupling.sets
    stages = [({name: names[-1]}, sets[name].layers or ()) for name, names in run.categories.items()]
    states = sample_in_turn(prior, count, stages, generator=generator)
    return {f"{name}: {run.categories[name][-1]}": prior.decode(u) for name, u in zip(sets, states, strict=True)}


def load_prior(folder: str | Path) -> DiffusionEBMPrior:
    """The prior that a recipe left in a folder, on the device it was trained on if there is one; for `hvae-ebm-prior
    sample`, `evaluate` and others.

    Args:
        folder: what `--out` was.

    Returns:
        The prior.

    Raises:
        OSError, ValueError: a file is missing or does not fit.
    """
    folder = Path(folder)
    run = Run(**json.loads((folder / "results.json").read_text())["run"])
    adapter = load_backbone(run, folder)
    prior, _ = make_prior(run, adapter if isinstance(adapter, HVAEAdapter) else frozen(run, adapter))
    prior.load_state_dict(load_file(folder / "prior.safetensors"))
    return prior


def load_sources(run: Run, folder: Path) -> tuple[Any, Any]:
    """Training and held-out pictures."""
    if run.smoke:
        return tuple(Shapes(SMOKE_IMAGES, image_size(run), seed=first) for first in (0, SMOKE_IMAGES))
    return SOURCES[RECIPES[run.recipe].data](folder.expanduser())


def image_size(run: Run) -> int:
    """Height and width of a run's images."""
    return min(RECIPES[run.recipe].image_size, 64) if run.smoke else RECIPES[run.recipe].image_size


def load_backbone(run: Run, folder: Path | None, *, random: bool = False) -> Any:
    """The adapter of a run's backbone on its device.

    Args:
        run: the run.
        folder: where a run has left its HVAE, or the batch norm statistics of its NVAE.
        random: random weights, without a checkpoint.

    Returns:
        The adapter; that of an NVAE is not folded yet.

    Raises:
        ValueError: there is no clone of NVAE or no checkpoint.
    """
    recipe = RECIPES[run.recipe]
    device = torch.device(run.device if torch.cuda.is_available() or not run.device.startswith("cuda") else "cpu")
    torch.manual_seed(run.seed)  # weights of models without a checkpoint
    if isinstance(recipe.backbone, HVAEConfig):
        model = HVAE(hvae_config(run)) if folder is None else HVAE.load(folder / "hvae.safetensors")
        return HVAEAdapter(model.to(device, memory_format=torch.channels_last))
    if run.loader is not None:
        nvae = load_function(run.loader)(*([run.checkpoint] if run.checkpoint else []))
    elif run.checkpoint is None and not (random or run.smoke):
        raise ValueError(
            f"{run.recipe}: expected a checkpoint after its name, a file that NVAE's train.py wrote; "
            "docs/recipes.md says where to find one"
        )
    else:
        small = {**TINY, "dataset": "celeba_64"} if image_size(run) == 64 else TINY
        nvae = official_nvae(
            run.repo, {**recipe.backbone, **(small if run.smoke else {})}, None if random else run.checkpoint
        )
    if folder is not None and recipe.recalibrate:
        nvae.load_state_dict(load_file(folder / "batch_norm.safetensors"), strict=False)
    # On its device before the adapter is made, which takes the device from it.
    noise = torch.Generator().manual_seed(run.seed)
    return NVAEAdapter(nvae.to(device).eval(), output=run.output, checkpoint=run.save_memory, generator=noise)


def make_hvae(run: Run, training_set: Pictures, held_out: Pictures, out: Path, epochs: int) -> None:
    """Write hvae.safetensors: the given checkpoint, or a model trained here."""
    target = out / "hvae.safetensors"

    def save(model: HVAE) -> None:
        write_atomically(target, model.save)

    if run.checkpoint is not None:
        save(HVAE.load(run.checkpoint))
        return
    torch.manual_seed(run.seed)
    train_hvae(
        HVAE(hvae_config(run)).to(run.device, memory_format=torch.channels_last),
        training_set.first(len(training_set)),
        held_out.first(2000),
        epochs=1 if run.smoke else epochs,
        batch_size=8 if run.smoke else 128,
        learning_rate=1e-3,
        report=lambda line: print(line, flush=True),
        after_epoch=save,
        generator=torch.Generator(run.device).manual_seed(run.seed),
    )


def hvae_config(run: Run) -> HVAEConfig:
    """Shape of a run's HVAE."""
    return HVAE_TINY if run.smoke else HVAE_CIFAR10


def recalibrated(run: Run, adapter: NVAEAdapter, out: Path) -> NVAEAdapter:
    """The adapter after batch norm statistics of Gaussian samples at temperature 1, kept in batch_norm.safetensors."""
    generator = torch.Generator().manual_seed(run.seed)
    recalibrate_batch_norm(
        adapter, 1.0, iterations=2 if run.smoke else 500, batch_size=4 if run.smoke else 25, generator=generator
    )
    weights = adapter.model.state_dict()
    statistics = {name: weights[name] for name in weights if name.endswith(("running_mean", "running_var"))}
    write_atomically(out / "batch_norm.safetensors", lambda path: save_file(statistics, path))
    return adapter


def frozen(run: Run, adapter: NVAEAdapter) -> NVAEAdapter:
    """The adapter of the same NVAE with constants folded."""
    return NVAEAdapter(
        freeze(adapter.model), output=adapter.output, checkpoint=adapter.checkpoint, generator=adapter.generator
    )


def bits_of(adapter: NVAEAdapter) -> int:
    """Bits per colour that an NVAE was trained on."""
    return int(getattr(adapter.model, "num_bits", 8))


def settings(run: Run) -> Preset:
    """The preset of a run."""
    recipe = RECIPES[run.recipe]
    preset, paper = PRESETS[recipe.preset if run.preset == "paper" else run.preset], PRESETS[recipe.preset]
    # Batches of the published size in both cases: what fits depends on the backbone.
    preset = replace(preset, training=replace(preset.training, batch_size=paper.training.batch_size))
    if run.smoke:
        training = replace(
            preset.training, iterations=2, batch_size=4, activity_images=min(preset.training.activity_images, 8)
        )
        energy = replace(preset.energy, width=8, vector_width=16)
        preset = Preset(preset.schedule, replace(preset.langevin, steps=2), energy, training)
    return preset


def make_prior(run: Run, adapter: Any) -> tuple[DiffusionEBMPrior, Preset]:
    """An untrained prior of a run, and its settings."""
    preset = settings(run)
    torch.manual_seed(run.seed)  # initial weights of the energies
    coupling = None
    if run.categories:
        layers, labels = len(NoiseTransform(adapter).latent_shapes), RECIPES[run.recipe].labels
        # As in the paper at t = 0 alone, or as this library's default.
        coupling = Coupling(
            {name: LabelSet(tuple(each), labels[name].of(layers)) for name, each in run.categories.items()},
            levels=(0,) if run.preset == "paper" else None,
            networks=replace(preset.energy, spectral_norm=False, architecture="default"),
        )
    prior = DiffusionEBMPrior(
        adapter, schedule=preset.schedule, langevin=preset.langevin, energy=preset.energy, coupling=coupling
    )
    return prior, preset


def results_of_run(
    run: Run, preset: Preset, training: Any, prior: DiffusionEBMPrior, history: list[TrainingRecord]
) -> dict[str, Any]:
    """The contents of results.json."""
    last = history[-100:]
    means = {}
    for name in ("loss", "gradient_norm") if last else ():
        means[name] = float(np.mean([getattr(record, name) for record in last]))
    return {
        "run": dataclasses.asdict(run),
        "settings": {name: str(value) for name, value in {**vars(preset), "training": training}.items()},
        "dimensions": prior.dim,
        "layers": len(prior.latent_shapes),
        "iterations": len(history),
        "training_seconds": history[-1].seconds if history else 0.0,
        "means_of_the_last_iterations": {"iterations": len(last), **means},
        "published_frechet_distances": dict(RECIPES[run.recipe].published),
        "torch": torch.__version__,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def export(path: Path, pictures: Pictures, count: int, levels: Callable[[int], torch.Tensor]) -> None:
    """Write the first images as uint8 (N, 3, size, size)."""
    count = min(count, len(pictures))
    array = np.empty((count, 3, pictures.size, pictures.size), np.uint8)
    for i in range(count):
        array[i] = levels(i).numpy()
    write_atomically(path, lambda scratch: np.save(scratch, array))


def estimate(run: Run, out: Path, batches: list[int] | None) -> None:
    """Print what the run would cost on this machine, and write it to estimate.json."""
    if run.preset != "paper":
        raise ValueError(
            "--estimate counts gradients of joint chains, which the default prior does not take: leave "
            "out --preset, or time ten iterations"
        )
    recipe = RECIPES[run.recipe]
    adapter = load_backbone(run, None, random=True)
    prior, preset = make_prior(run, adapter if isinstance(adapter, HVAEAdapter) else frozen(run, adapter))
    del adapter
    print(f"{run.recipe}, preset {run.preset}", flush=True)
    batch, epoch = preset.training.batch_size, recipe.images // preset.training.batch_size
    iterations = recipe.epochs * epoch if run.preset == "paper" else preset.training.iterations
    sizes = batches or ([1, batch] if prior.device.type == "cuda" else [1, 2])
    figures = report_costs(prior, image_size(run), sorted(set(sizes)), batch, epoch, iterations)
    write_json(out / "estimate.json", {"run": dataclasses.asdict(run), **figures})


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument(
        "checkpoint", nargs="?", help="the trained backbone's file; without one, the HVAE is trained first"
    )
    parser.add_argument(
        "--preset",
        choices=["paper", "default"],
        default="paper",
        help="the paper's settings, or this library's own (%(default)s)",
    )
    parser.add_argument(
        "--repo", default=os.environ.get("NVAE_REPO"), help="your clone of NVAE (the environment variable NVAE_REPO)"
    )
    parser.add_argument(
        "--loader",
        help="file.py:function that returns an NVAE, given the checkpoint if there is one; instead of --repo",
    )
    parser.add_argument(
        "--output",
        choices=["sample", "mean"],
        default="sample",
        help="what of p(x | z) is an NVAE's image (%(default)s)",
    )
    parser.add_argument(
        "--conditional", action="store_true", help="couple the prior to labels: CIFAR-10's classes, CelebA's attributes"
    )
    parser.add_argument(
        "--save-memory", action="store_true", help="keep no activations inside the NVAE's cells: a third more time"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder where images are, or are downloaded to (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="folder to write (out/RECIPE)")
    parser.add_argument("--iterations", type=int, help="optimiser steps (those of the recipe)")
    parser.add_argument("--batch-size", type=int, help="images per step (those of the recipe)")
    parser.add_argument("--hvae-epochs", type=int, default=100, help="of the HVAE's own training (%(default)s)")
    parser.add_argument(
        "--export",
        type=int,
        default=10_000,
        help="images to write for the evaluation, held-out and training (%(default)s)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="generated images, a tiny backbone without a checkpoint, two iterations"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="measure a few steps with random weights, and print time and memory of the whole",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", help="batch sizes to measure (1 and 2; on a GPU 1 and that of the recipe)"
    )
    return parser


if __name__ == "__main__":
    main()
