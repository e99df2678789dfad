"""How well control works: conditional and composed samples, held attributes, inpainting, classification.

    .venv/bin/python benchmarks/control.py examples/data/prior
    .venv/bin/python benchmarks/control.py examples/data/prior --part observations --samples 64
    .venv/bin/python benchmarks/control.py examples/data/prior --part steps --samples 12

print Markdown tables, mean, and range over several priors, and write benchmarks/control.json. Accuracy is the share of
samples that the example's classifier, which is no part of the prior, assigns to the label that was asked for;
"relative" is over its accuracy on reconstructions of test images.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from classifier import load_classifier
from conditional import INPAINTING, hidden_half
from fashion_mnist import load_subset
from quickstart import load_prior
from transitions import spread

from hvae_ebm_prior import NOT, DiffusionEBMPrior, Label, LangevinConfig
from hvae_ebm_prior.control import resample
from hvae_ebm_prior.evaluation import frechet_distance, in_chunks
from hvae_ebm_prior.evaluation.protocol import closure

RESULTS = Path(__file__).with_suffix(".json")
FOOTWEAR = (5, 7, 9)


def measure_labels(prior: DiffusionEBMPrior, n: int, seed: int) -> dict[str, float]:
    """Conditional and composed samples, held attributes, classification, by `n` samples, a quarter of it for some."""
    g, classifier = torch.Generator().manual_seed(seed), load_classifier()
    train = load_subset("train")[0]
    test, labels = (part[:n] for part in load_subset("test"))
    target = in_chunks(classifier.features, train)
    figures = {}

    def predict(images: Tensor) -> Tensor:
        return in_chunks(classifier, images).argmax(1)

    def distance(images: Tensor) -> float:
        return frechet_distance(in_chunks(classifier.features, images), target)

    def share(images: Tensor, classes: tuple[int, ...]) -> float:
        return torch.isin(predict(images), torch.tensor(classes)).float().mean().item()

    reconstructions = in_chunks(lambda x: prior.decode(prior.encode(x, generator=g)), test)
    bound = (predict(reconstructions) == labels).float().mean().item()
    gaussian = distance(in_chunks(prior.decode, torch.randn(n, prior.dim, generator=g)))
    best = distance(reconstructions)
    figures["classifier's accuracy on reconstructions"] = bound
    found = prior.classify(test, generator=g)["class"].argmax(1)
    figures["accuracy of `classify` on test images"] = (found == labels).float().mean().item()

    free = prior.sample_noise(n, generator=g)
    images = in_chunks(prior.decode, free)
    figures["FD of unconditional samples"] = distance(images)
    figures["closure of unconditional samples"] = closure(distance(images), gaussian, best)
    wanted = torch.arange(n) % 10
    for guidance in (1.0, 2.0, 4.0):
        made = prior.sample(n, labels={"class": wanted}, guidance=guidance, generator=g)
        accuracy = (predict(made) == wanted).float().mean().item()
        figures[f"guidance {guidance:g}: accuracy"] = accuracy
        figures[f"guidance {guidance:g}: relative accuracy"] = accuracy / bound
        figures[f"guidance {guidance:g}: FD"] = distance(made)
        figures[f"guidance {guidance:g}: closure"] = closure(distance(made), gaussian, best)

    few = n // 4
    either = Label("class", "sandal") | Label("class", "bag")
    figures["sandal OR bag: share of either"] = share(prior.sample(few, labels=either, guidance=4, generator=g), (5, 8))
    shoes = Label("class", "sandal") | Label("class", "sneaker") | Label("class", "ankle boot")
    figures["unconditional: share of footwear"] = share(images, FOOTWEAR)
    figures["NOT footwear: share of footwear"] = share(
        prior.sample(few, labels=NOT(shoes), guidance=4, generator=g), FOOTWEAR
    )

    labelled = prior.sample_noise(few, labels={"class": wanted[:few]}, guidance=4, generator=g)
    before = predict(in_chunks(prior.decode, labelled))
    figures["guidance 4: accuracy on those whose layers are held"] = (before == wanted[:few]).float().mean().item()
    for hold in ((0,), (0, 1)):
        after = predict(in_chunks(prior.decode, resample(prior, labelled, hold, generator=g)))
        figures[f"layers {hold} held, the others resampled: accuracy"] = (after == wanted[:few]).float().mean().item()
        figures[f"layers {hold} held, the others resampled: share that the classifier takes for another class"] = (
            (before != after).float().mean().item()
        )
    return figures


def measure_observations(prior: DiffusionEBMPrior, n: int, seed: int) -> dict[str, float]:
    """Inpainting and denoising of `n` test images; errors are squared, means over pixels."""
    g, real = torch.Generator().manual_seed(seed), load_subset("test")[0][:n]
    middle = real.shape[2] // 2

    def errors(images: Tensor) -> tuple[float, float]:
        """Of the upper half, and of the lower one."""
        squares = (images - real).square()
        return squares[:, :, :middle].mean().item(), squares[:, :, middle:].mean().item()

    start = time.process_time()
    inpainted = errors(prior.posterior_sample(hidden_half(real), n, langevin=INPAINTING, generator=g))
    seconds = (time.process_time() - start) / n
    with torch.no_grad():
        reconstructed = errors(prior.decode(prior.encode(real, generator=g)))
    free = errors(prior.sample(n, generator=g))
    noisy = (real + 0.3 * torch.randn(real.shape, generator=g)).clamp(0, 1)

    def log_likelihood(x: Tensor) -> Tensor:
        return -((x - noisy) ** 2).flatten(1).sum(1) / (2 * 0.3**2)

    denoised = prior.posterior_sample(log_likelihood, n, langevin=INPAINTING, generator=g)
    return {
        "inpainting: processor seconds per image": seconds,
        "inpainting: error of the half that is seen": inpainted[0],
        "inpainting: the same of reconstructions": reconstructed[0],
        "inpainting: the same of unconditional samples": free[0],
        "inpainting: error of the hidden half": inpainted[1],
        "inpainting: the same half of unconditional samples": free[1],
        "inpainting: ratio of the two": inpainted[1] / free[1],
        "denoising: error of noisy images (std .3)": (noisy - real).square().mean().item(),
        "denoising: error of posterior samples": (denoised - real).square().mean().item(),
    }


def measure_steps(prior: DiffusionEBMPrior, n: int, seed: int) -> dict[str, float]:
    """Squared errors of the half that is seen of `n` test images, by the observation's std and the chains' steps."""
    real = load_subset("test")[0][:n]
    figures = {}
    for std, steps, size in ((0.1, 30, 0.1), (0.1, 60, 0.03), (0.05, 60, 0.03), (0.1, 200, 0.01), (0.05, 200, 0.01)):
        chains = LangevinConfig(steps=steps, step_size=size)
        g = torch.Generator().manual_seed(seed)
        images = prior.posterior_sample(hidden_half(real, std), n, langevin=chains, generator=g)
        seen = (images - real)[:, :, : real.shape[2] // 2]
        figures[f"std {std:g}, {steps} steps of {size:g}"] = seen.square().mean().item()
    return figures


PARTS = {"labels": measure_labels, "observations": measure_observations, "steps": measure_steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("priors", nargs="+", type=Path, help="folders written by examples/conditional.py, one per seed")
    parser.add_argument("--part", choices=PARTS, default="labels", help="what is measured (%(default)s)")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    found = []
    for seed, path in enumerate(args.priors):
        found.append(PARTS[args.part](load_prior(path), args.samples, seed))
        print(path, json.dumps(found[-1], indent=1), file=sys.stderr, flush=True)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report[args.part] = {"samples": args.samples, "torch": torch.__version__, "priors": found}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print("| | |\n|---|---|")
    for name in found[0]:
        values = [figures[name] for figures in found]
        print(f"| {name} | {spread(values, 3)} |")


if __name__ == "__main__":
    main()
