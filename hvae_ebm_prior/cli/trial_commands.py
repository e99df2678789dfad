"""The commands `compare` and `ablate`: their options, tables and plot."""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backbone.registry import find_adapter
from ..density.gaussian import GaussianPrior
from ..evaluation.candidates import ablations, candidates
from ..evaluation.comparison import (
    GAUSSIAN,
    RECONSTRUCTION,
    Budget,
    Candidate,
    FrechetMetric,
    compare,
    comparison_table,
    run_key,
)
from ..evaluation.pictures import save_progress
from ..presets import PRESETS
from ..saving.files import write_atomically
from .evaluate_command import find_extractor
from .loading import FORM, Commands, add_loader, load_model
from .options import add_images, add_json, add_out, out_file, print_json, read_given, say_written

# What each command trains, its help in a line and in full, and the preset that stands for ours.
TRIALS = {
    "compare": (
        candidates,
        "our prior beside baselines, on your model and for equal work",
        "Train our prior and baselines on your model, for an equal time and equal gradients, and see which is best.",
        "default",
    ),
    "ablate": (
        ablations,
        "our prior with one thing changed at a time",
        "Train our prior with one thing changed at a time: K, T, integrator, space, schedule, batch, moving average.",
        "joint-recovery",
    ),
}


# With fewer optimiser steps the order of priors is that of chance.
FEWEST = 100


def add_trials(commands: Commands) -> None:
    """Both commands and their options."""
    for name, (available, text, description, preset) in TRIALS.items():
        description += " Goes on where it was interrupted."
        command = commands.add_parser(name, help=text, description=description)
        add_loader(command, "your trained model or an adapter of it", seed=False)
        sources = {
            "train": "images to train on; they are the reference of the Fréchet distance too",
            "images": "held-out images; as many samples of each prior are drawn",
        }
        add_images(command, sources, required=sources)
        command.add_argument(
            "--features",
            nargs="+",
            default=["inception"],
            help=f"one or more: inception, or a function that returns one of images to features, as {FORM}",
        )
        command.add_argument(
            "--weights", help="Inception's weights file (that in torch.hub's cache, where it is downloaded if need be)"
        )
        command.add_argument("--seconds", type=float, help="train each for so many seconds")
        command.add_argument(
            "--gradients", type=int, help="and, or instead, for so many gradients of the networks for a batch"
        )
        command.add_argument("--iterations", type=int, help="and, or instead, for so many optimiser steps")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (0 1 2)")
        command.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(available())}")
        command.add_argument("--preset", choices=PRESETS, default=preset, help="settings of ours (%(default)s)")
        add_out(
            command, f"{name}.json", "all runs, of which those that are there are not repeated", "tables and a plot go"
        )
        add_json(command, "the tables: every run, as in --out")
        command.set_defaults(run=run_trials)


def run_trials(options: argparse.Namespace) -> None:
    """Train and measure what was asked for; print the tables and write them, the results and the plot."""
    adapter = find_adapter(load_model(options))
    available = TRIALS[options.command][0](PRESETS[options.preset])
    unknown = [name for name in options.only or () if name not in available]
    if unknown:
        raise ValueError(f"only: expected some of {', '.join(available)}; got {', '.join(unknown)}")
    chosen = {name: available[name] for name in options.only or available}
    limits = {name: getattr(options, name) for name in ("seconds", "gradients", "iterations")}
    budgets = [Budget(**{name: limit}) for name, limit in limits.items() if limit is not None]
    if not budgets:
        raise ValueError("budget: expected at least one of --seconds, --gradients, --iterations")
    shown = GaussianPrior(adapter)
    train, images = (read_given(options, name, shown) for name in ("train", "images"))
    extractors = [find_extractor(name, options.weights, options.device) for name in options.features]
    features = {extractor.name: extractor for extractor in extractors}
    metric = FrechetMetric(images, train, features, options.device)
    runs_file = out_file(options.out, f"{options.command}.json")
    tables_file, plot_file = (runs_file.with_suffix(ending) for ending in (".md", ".png"))
    for name in ("iterations", "gradients"):
        if (limits[name] or FEWEST) < FEWEST:
            warn_of_few(Budget(**{name: limits[name]}))
    runs = compare(
        adapter,
        chosen,
        train,
        metric,
        budgets=budgets,
        seeds=options.seeds,
        path=runs_file,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    tables = [comparison_table(runs, chosen, str(budget), options.seeds) for budget in budgets]
    text = "\n\n".join(f"{budget} each:\n\n{table}" for budget, table in zip(budgets, tables, strict=True))
    if options.json:
        print_json({"runs": runs})
    else:
        print(text)
    write_atomically(tables_file, lambda scratch: scratch.write_text(text + "\n"))
    draw_progress(plot_file, runs, chosen, budgets[0], options.seeds, extractors[0].name)
    for budget in budgets:
        if budget.seconds is not None and fewest_steps(runs, chosen, budget, options.seeds) < FEWEST:
            warn_of_few(budget)
    say_written(runs_file, tables_file, plot_file)


def warn_of_few(budget: Budget) -> None:
    """Say on stderr that a budget is too small to tell priors apart."""
    print(
        f"warning: {budget} are far too few to compare anything: below {FEWEST} optimiser steps nothing has learned "
        "much, and the order of the rows is that of chance",
        file=sys.stderr,
        flush=True,
    )


def fewest_steps(
    runs: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, Candidate], budget: Budget, seeds: list[int]
) -> float:
    """The smallest number of optimiser steps that the budget has paid for; infinite where nothing was trained."""
    trained = [name for name, candidate in chosen.items() if candidate.training]
    steps = [runs[run_key(name, str(budget), seed)]["iterations"] for name in trained for seed in seeds]
    return min(steps, default=math.inf)


def draw_progress(
    path: Path,
    runs: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, Candidate],
    budget: Budget,
    seeds: list[int],
    features: str,
) -> None:
    """Quality against training time of one budget's runs, under one extractor; what has no such curve is a level, the
    mean over its runs.
    """
    curves = {
        name: [runs[run_key(name, str(budget), seed)]["curve"] for seed in seeds]
        for name, candidate in chosen.items()
        if candidate.training
    }
    untrained = [name for name, candidate in chosen.items() if not candidate.training]
    levels = {
        name: statistics.mean(runs[run_key(name, "none", seed)]["distances"][features] for seed in seeds)
        for name in (GAUSSIAN, RECONSTRUCTION, *untrained)
    }
    # Of an extractor in a file its name in words, without the file's.
    words = features.rpartition(":")[2].replace("_", " ")
    write_atomically(path, lambda scratch: save_progress(scratch, curves, levels, f"Fréchet distance, {words}"))
