"""The command `diagnose`: is there a prior hole, and in which layers?"""

import argparse
from dataclasses import asdict

import torch

from ..backbone.registry import find_adapter
from ..density.gaussian import GaussianPrior
from ..evaluation.adapter_check import MISTAKES, fault_list, find_faults
from ..evaluation.diagnosis import describe_layers, layer_table
from .loading import Commands, add_loader, load_model
from .options import add_images, add_json, print_json, read_given


def add_diagnose(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "diagnose",
        help="is there a prior hole, and in which layers?",
        description="Check the adapter of your model, encode images with it and print, layer by layer, whether its "
        "prior matches where they come to lie.",
    )
    add_loader(command, "your model or an adapter of it")
    sources = {
        "images": "real images that the model was not trained on",
        "samples": "samples that the model's own code has drawn, at least 64: they alone show a wrong std",
    }
    add_images(command, sources, limit=500)
    command.add_argument("--draws", type=int, default=8, help="posterior draws per image (%(default)s)")
    add_json(command, "the table")
    command.set_defaults(run=run_diagnose)


def run_diagnose(options: argparse.Namespace) -> None:
    """Print what is wrong with the adapter, and the table of the layers."""
    adapter = find_adapter(load_model(options))
    generator = torch.Generator().manual_seed(options.seed)
    shown = GaussianPrior(adapter)
    images = read_given(options, "images", shown)
    samples = read_given(options, "samples", shown) if options.samples else None
    shown.release()
    # The table does not depend on whether the adapter is checked.
    checks = torch.Generator().manual_seed(options.seed)
    faults = list(find_faults(adapter, images, samples=samples, generator=checks))
    try:
        reports = describe_layers(adapter, images, draws=options.draws, generator=generator)
    except MISTAKES as error:
        if faults:  # of which the error follows
            raise ValueError(fault_list(adapter, faults)) from error
        raise
    if options.json:
        layers = [asdict(report) | {"has_hole": report.has_hole} for report in reports]
        print_json({"faults": faults, "layers": layers})
        return
    if faults:
        print(fault_list(adapter, faults), end="\n\n")
    print(layer_table(reports))
    if samples is None:
        print("Whether stds are the model's own shows against samples of its own alone: --samples")
    elif not faults:
        print(f"{len(samples)} samples of the model's own agree with the adapter's layers.")
