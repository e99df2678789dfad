"""The command `evaluate`: its options, its table, and the record of everything the figures depend on."""

import argparse
import dataclasses
import hashlib
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.validation import check_count, check_temperature
from ..chains.streams import seeded
from ..evaluation.features import Extractor, custom_extractor, inception_extractor
from ..evaluation.metrics import SEED, SPLITS, SUBSET_SIZE
from ..evaluation.protocol import METRICS, TEMPERATURES, EvaluationRow, SampledPrior, check_metrics, evaluate
from ..evaluation.reference import Reference, load_reference, make_reference, save_reference
from ..evaluation.table import table
from ..saving.digest import digest_images, digest_weights, tensor_bytes
from ..saving.extras import installed
from ..saving.files import write_json
from .loading import FORM, Commands, add_loader, load_function, load_prior
from .options import add_images, add_json, add_out, out_file, print_json, read_given, say_written

# What `evaluate` asks of a prior, see `SampledPrior`.
PRIOR = ("sample", "encode", "decode", "dim", "device", "dtype")
# Real data sets hold a few duplicates; more than this share means that the held-out images are not held out.
OVERLAP = 0.1


def add_evaluate(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "evaluate",
        help="how good are the samples? FID, KID, precision, closure",
        description="Compare samples with real images, beside reconstructions and the Gaussian prior under the same "
        "protocol. Prints a table and writes a record as JSON.",
    )
    what = "your trained DiffusionEBMPrior, or another prior with sample, encode and decode"
    add_loader(command, what, saved=True)
    images = add_images(command, {"images": "held-out images; as many samples of each prior are drawn"})
    reference = images.add_mutually_exclusive_group(required=True)
    reference.add_argument(
        "--reference", metavar="IMAGES", help="real images to compare with, as a rule those trained on"
    )
    reference.add_argument(
        "--statistics",
        metavar="FILE",
        help="instead, their statistics: what --save-statistics wrote, or file.npz with mu and sigma (FD alone)",
    )
    command.add_argument(
        "--save-statistics",
        metavar="FILE",
        help="write the reference's statistics to this file, for --statistics of the next run",
    )
    command.add_argument(
        "--features",
        default="inception",
        help=f"inception, or a function that returns one of images to features, as {FORM} (%(default)s)",
    )
    command.add_argument(
        "--weights", help="Inception's weights file (that in torch.hub's cache, where it is downloaded if need be)"
    )
    command.add_argument(
        "--metrics",
        nargs="*",
        choices=METRICS,
        help="besides the Fréchet distance; none at all needs no torch-fidelity (all)",
    )
    command.add_argument(
        "--temperatures",
        nargs="*",
        type=float,
        default=TEMPERATURES,
        help="of the Gaussian prior, to choose its best (0.9 0.8 0.7 0.6 0.5)",
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=250,
        help="images decoded and given to the extractor at a time (%(default)s)",
    )
    add_out(command, "evaluate.json", "the figures, and all that they depend on")
    add_json(command, "the table; they are what --out holds")
    command.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluate a prior, print the table and write the record."""
    prior = load_prior(options)
    missing = [name for name in PRIOR if not hasattr(prior, name)]
    if missing:
        raise TypeError(
            f"loader: expected a function that returns a prior with {', '.join(PRIOR)}; "
            f"{type(prior).__name__} lacks {', '.join(missing)}"
        )
    check_count(options.batch_size, "batch_size")
    for temperature in options.temperatures:
        check_temperature(temperature)
    images = read_given(options, "images", prior)
    check_metrics(options.metrics, len(images))
    if options.weights is not None and options.features != "inception":
        raise ValueError(f"weights: they are Inception's; {options.features} loads its own")
    extractor = find_extractor(options.features, options.weights, prior.device)
    reference = find_reference(options, images, extractor, prior)
    # Decoders that draw pixels from torch's global generators are seeded too.
    with seeded(options.seed, prior.device):
        rows = evaluate(
            prior,
            images,
            reference,
            extractor,
            temperatures=options.temperatures,
            metrics=options.metrics,
            name="prior",
            chunk_size=options.batch_size,
            generator=torch.Generator().manual_seed(options.seed),
        )
    out = out_file(options.out, "evaluate.json")
    figures = record(options, prior, images, extractor, reference, rows)
    write_json(out, figures)
    if options.json:
        print_json(figures)
    else:
        print(table(rows, extractor.distance))
        print(
            f"{len(images)} images a row, against {reference.images or 'an unknown number of'} real ones; "
            f"{extractor.name}; seed {options.seed}"
        )
    say_written(*([options.save_statistics] if options.save_statistics is not None else []), out)


def find_extractor(name: str, weights: str | None, device: torch.device | str) -> Extractor:
    """The extractor of a name given as `--features`, with Inception's weights given as `--weights`."""
    if name == "inception":
        return inception_extractor(weights, device)
    return custom_extractor(name, load_function(name, "features")(), device)


def find_reference(options: argparse.Namespace, images: Tensor, extractor: Extractor, prior: Any) -> Reference:
    """The statistics that `--reference` or `--statistics` names, saved if asked."""
    if options.reference is None:
        if options.save_statistics is not None:
            raise ValueError("save-statistics: expected --reference, of whose images they are to be worked out")
        reference = load_reference(options.statistics, extractor)
        check_held_out(images, len(images) if reference.digest == digest_images(images) else 0)
        return reference
    real = read_given(options, "reference", prior)
    check_held_out(images, count_shared(images, real))
    reference = make_reference(real, extractor, prior.device, options.batch_size)
    if options.save_statistics is not None:
        path = Path(options.save_statistics).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_reference(reference, path)
    return reference


def check_held_out(images: Tensor, shared: int) -> None:
    """Raise ValueError if too many of the images, `shared` of them, are among those of the reference."""
    if shared > OVERLAP * len(images):
        raise ValueError(
            f"images: expected held-out ones, but {shared} of {len(images)} are among those of the reference"
        )


def count_shared(images: Tensor, others: Tensor) -> int:
    """How many of `images` (N, C, H, W) are also, pixel by pixel, among `others`."""
    digests = {hashlib.sha256(tensor_bytes(image)).digest() for image in others}
    return sum(hashlib.sha256(tensor_bytes(image)).digest() in digests for image in images)


def record(
    options: argparse.Namespace,
    prior: SampledPrior,
    images: Tensor,
    extractor: Extractor,
    reference: Reference,
    rows: Sequence[EvaluationRow],
) -> dict[str, Any]:
    """Figures of all rows, and all that they depend on."""
    figures = [dataclasses.asdict(row) | {"closure": None if math.isnan(row.closure) else row.closure} for row in rows]
    adapter = getattr(prior, "backbone", None)
    versions = {name: installed(name) for name in ("hvae-ebm-prior", "torch", "torch-fidelity", "numpy")}
    return {
        "distance": extractor.distance,
        "rows": figures,
        "images": {"file": options.images, "count": len(images), "sha256": digest_images(images)},
        "reference": {
            "file": options.reference or options.statistics,
            "count": reference.images,
            "sha256": reference.digest,
        },
        "features": {
            "name": extractor.name,
            "sha256": extractor.digest,
            "reference": reference.extractor or "not known",
        },
        "prior": {
            "loader": options.loader,
            "checkpoint": options.checkpoint,
            "type": type(prior).__name__,
            "sha256": digest_weights(prior) if isinstance(prior, nn.Module) else None,
            "weights": "as the loader returned them; "
            "those that DiffusionEBMPrior.fit leaves are the moving average of training",
        },
        "decoder": {
            "adapter": adapter and type(adapter).__name__,
            "output": getattr(adapter, "output", "the adapter's own"),
        },
        "seed": options.seed,
        "temperature": 1.0,
        "temperatures_tried_for_gaussian": list(options.temperatures),
        "batch_size": options.batch_size,
        "device": str(prior.device),
        "torch_fidelity": {
            "seed": SEED,
            "kid_subsets": 100,
            "kid_subset_size": min(SUBSET_SIZE, len(images), reference.images or SUBSET_SIZE),
            "neighbours": 3,
            "splits": SPLITS,
        },
        "versions": versions | {"python": platform.python_version()},
    }
