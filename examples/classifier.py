"""A small Fashion-MNIST classifier whose features serve the Fréchet distance of the examples.

    python examples/classifier.py --full /usr/share/datasets/fashion-mnist

trains it on all 60,000 images (about 3 minutes on 2 cores) and writes examples/data/classifier.safetensors.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fashion_mnist import load_full
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "data" / "classifier.safetensors"


class Classifier(nn.Module):
    """Three convolutional stages, then 64 features and 10 logits."""

    def __init__(self) -> None:
        super().__init__()

        def stage(channels_in: int, channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels_in, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.SiLU(),
                nn.MaxPool2d(2),
            )

        self.stages = nn.Sequential(stage(1, 24), stage(24, 48), stage(48, 96))
        self.embedding = nn.Linear(96 * 9, 64)
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """64 features, (N, 64), of images (N, 1, 28, 28) in [0, 1]."""
        return F.silu(self.embedding(self.stages(images - 0.5).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def load_classifier() -> Classifier:
    """The committed classifier, in eval mode."""
    model = Classifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def classifier_features() -> Callable[[Tensor], Tensor]:
    """Its features, as `--features examples/classifier.py:classifier_features` of the commands evaluate and compare
    takes them.
    """
    return load_classifier().features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", required=True, help="folder of the four IDX files")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, labels = load_full(args.full, "train")
    test_images, test_labels = load_full(args.full, "test")
    model = Classifier()
    steps = args.epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for epoch in range(args.epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(128)[: steps // args.epochs]:
            flip = torch.rand(len(batch), 1, 1, 1) < 0.5
            x = torch.where(flip, images[batch].flip(-1), images[batch])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = torch.cat([model(x).argmax(1) for x in test_images.split(1000)]) == test_labels
        print(
            f"epoch {epoch + 1}: training loss {loss.item():.3f}, test accuracy {right.float().mean().item():.4f}",
            flush=True,
        )
    save_file(model.state_dict(), WEIGHTS)
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
