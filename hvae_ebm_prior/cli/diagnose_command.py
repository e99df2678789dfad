"""The command `diagnose`: is there a prior hole, and in which layers?"""

import argparse

import torch

from ..backbone.registry import find_adapter
from ..evaluation.adapter_check import MISTAKES, fault_list, find_faults
from ..evaluation.diagnosis import describe_layers, layer_table
from ..training.image_data import IMAGES, load_images
from .loading import Commands, add_loader, load_model


def add_diagnose(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "diagnose",
        help="is there a prior hole, and in which layers?",
        description="Check the adapter of your model, encode images with it and print, layer by layer, whether its "
        "prior matches where they come to lie.",
    )
    add_loader(command, "your model or an adapter of it")
    command.add_argument("--images", required=True, help=f"{IMAGES}, held out")
    command.add_argument(
        "--limit", type=int, default=500, help="use so many images from the start of the file (%(default)s)"
    )
    command.add_argument(
        "--samples",
        help="samples that the model's own code has drawn, at least 64, as --images: they alone show a wrong std",
    )
    command.add_argument("--draws", type=int, default=8, help="posterior draws per image (%(default)s)")
    command.set_defaults(run=run_diagnose)


def run_diagnose(options: argparse.Namespace) -> None:
    """Print what is wrong with the adapter, and the table of the layers."""
    adapter = find_adapter(load_model(options))
    generator = torch.Generator().manual_seed(options.seed)
    images = load_images(options.images)[: options.limit]
    samples = load_images(options.samples) if options.samples else None
    # The table does not depend on whether the adapter is checked.
    checks = torch.Generator().manual_seed(options.seed)
    faults = list(find_faults(adapter, images, samples=samples, generator=checks))
    try:
        reports = describe_layers(adapter, images, draws=options.draws, generator=generator)
    except MISTAKES as error:
        if faults:  # of which the error follows
            raise ValueError(fault_list(adapter, faults)) from error
        raise
    if faults:
        print(fault_list(adapter, faults), end="\n\n")
    print(layer_table(reports))
