"""The command `diagnose`: is there a prior hole, and in which layers?"""

import argparse

import torch

from ..backbone.registry import find_adapter
from ..density.gaussian import GaussianPrior
from ..evaluation.diagnosis import describe_layers, layer_table
from .loading import Commands, add_loader, load_model
from .options import add_images, read_given


def add_diagnose(commands: Commands) -> None:
    """The command and its options."""
    command = commands.add_parser(
        "diagnose",
        help="is there a prior hole, and in which layers?",
        description="Encode images with your model and print, layer by layer, whether its prior matches where they "
        "come to lie.",
    )
    add_loader(command, "your model or an adapter of it")
    add_images(command, {"images": "real images that the model was not trained on"}, limit=500)
    command.add_argument("--draws", type=int, default=8, help="posterior draws per image (%(default)s)")
    command.set_defaults(run=run_diagnose)


def run_diagnose(options: argparse.Namespace) -> None:
    """Print the table of the layers."""
    adapter = find_adapter(load_model(options))
    generator = torch.Generator().manual_seed(options.seed)
    images = read_given(options, "images", GaussianPrior(adapter))
    print(layer_table(describe_layers(adapter, images, draws=options.draws, generator=generator)))
