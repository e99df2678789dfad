"""How much of the prior hole is in the dimensions that a prior learns? Those that `fit` counts as inactive stay
Gaussian.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/activity.py hvae_ebm_prior.adapters:HVAE.load \
        examples/data/hvae.safetensors

prints, layer by layer, how many dimensions are active and the mean activity of these, and Fréchet distances to the
training images, by the example's classifier, of reconstructions, of Gaussian samples, and of images whose active
dimensions are those of the posterior and the others Gaussian: about the best that a prior of the active ones can do,
or less, as layers below inactive dimensions are then not those that go with their noise. --iterations trains a prior of
the active ones too.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from classifier import load_classifier
from fashion_mnist import load_subset
from torch import Tensor

from hvae_ebm_prior import DiffusionEBMPrior, TrainingConfig
from hvae_ebm_prior.cli.loading import load_function
from hvae_ebm_prior.evaluation.features import extract
from hvae_ebm_prior.evaluation.metrics import frechet_distance, moments
from hvae_ebm_prior.evaluation.protocol import closure
from hvae_ebm_prior.training.activity import measure_activity
from hvae_ebm_prior.training.batches import Batches

CPU = torch.device("cpu")
CHUNK = 100


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", help="module:function or file.py:function of the backbone's adapter or model")
    parser.add_argument("checkpoint", nargs="?", help="what it is given")
    parser.add_argument("--count", type=int, default=1000, help="images (%(default)s)")
    parser.add_argument("--activity-images", type=int, default=1024, help="as of TrainingConfig (%(default)s)")
    parser.add_argument("--iterations", type=int, default=0, help="of the score, for a prior's row (none)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    prior = DiffusionEBMPrior(load_function(args.loader)(*([args.checkpoint] if args.checkpoint else [])))
    train, test = load_subset("train")[0], load_subset("test")[0][: args.count]
    generator = torch.Generator().manual_seed(args.seed)
    measure_activity(prior, Batches(train, 32, generator), args.activity_images, generator)
    layers = [network.activity for network in prior.energies]
    print("| layer | active dimensions | their mean activity |\n|---|---|---|")
    for i, activity in enumerate(layers):
        active = activity[activity > 0]
        print(f"| {i} | {len(active)} of {activity.numel()} | {active.mean().item() if len(active) else 0:.2f} |")
    u = torch.cat([prior.encode(part, generator=generator) for part in test.split(CHUNK)])
    noise = torch.randn(u.shape, generator=generator, device=CPU)
    active = prior.join([(activity > 0)[None] for activity in layers])
    features = load_classifier().features
    target = moments(extract(features, train, CPU)[0])

    def distance(u: Tensor) -> float:
        images = torch.cat([prior.decode(part) for part in u.split(CHUNK)])
        return frechet_distance(extract(features, images, CPU)[0], target)

    kinds = {"reconstructions": u, "Gaussian": noise, "active of the posterior": torch.where(active, u, noise)}
    distances = {name: distance(each) for name, each in kinds.items()}
    if args.iterations:
        training = TrainingConfig(iterations=args.iterations, activity_images=0)
        prior.fit(train, training=training, objective="score", generator=generator)
        distances["ours"] = distance(prior.sample_noise(len(test), generator=generator))
    print("\n| | FD | closure |\n|---|---|---|")
    for name, found in distances.items():
        print(f"| {name} | {found:.2f} | {closure(found, distances['Gaussian'], distances['reconstructions']):.2f} |")


if __name__ == "__main__":
    main()
