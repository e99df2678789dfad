"""Small backbones for tests: random ones of any shape, and one whose T is the identity."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn


class RandomBackbone:
    """Every layer's mean and std are random smooth functions of all latents above; images carry nothing."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32, hidden: int = 8
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes = [torch.Size(shape).numel() for shape in shapes]
            self.model = nn.ModuleDict(
                {
                    "heads": nn.ModuleList(nn.Linear(hidden, 2 * size) for size in sizes),
                    "inputs": nn.ModuleList(nn.Linear(size, hidden) for size in sizes),
                    "tail": nn.Sequential(nn.Dropout(0.5), nn.Linear(hidden, 4)),
                }
            ).to(dtype)
            self.start = torch.randn(1, hidden, dtype=dtype)
        self.shapes = list(shapes)
        self.tail_ran = 0

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
        h = self.start.expand(batch_size, -1)
        for shape, head, project in zip(self.shapes, self.model["heads"], self.model["inputs"], strict=True):
            mean, log_std = head(torch.tanh(h)).chunk(2, dim=1)
            z = yield mean.unflatten(1, shape), torch.exp(0.5 * torch.tanh(log_std)).unflatten(1, shape)
            h = h + torch.tanh(project(z.flatten(1)))
        self.tail_ran += 1
        return h

    def infer(self, images: Tensor) -> list[Tensor]:
        return [torch.randn(len(images), *shape, dtype=self.start.dtype) for shape in self.shapes]

    def decode(self, features: Tensor) -> Tensor:
        return torch.sigmoid(self.model["tail"](features)).reshape(-1, 1, 2, 2)


class Seeing(RandomBackbone):
    """The same with posteriors that depend on the images, so that training depends on which images it sees."""

    def infer(self, images: Tensor) -> list[Tensor]:
        return [noise + 4 * images.flatten(1)[:, : noise.shape[1]] - 2 for noise in super().infer(images)]


class IdentityBackbone:
    """Layers of standard normals, so that z = u. Images (N, 1, 1, D) hold the latents, squeezed into [0, 1] by (z + 10)
    / 20.
    """

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.shapes, self.dtype = shapes, dtype

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
        latents = []
        for shape in self.shapes:
            zeros = torch.zeros(batch_size, *shape, dtype=self.dtype)
            latents.append((yield zeros, torch.ones_like(zeros)))
        return torch.cat([z.flatten(1) for z in latents], dim=1)

    def infer(self, images: Tensor) -> list[Tensor]:
        flat = (20 * images - 10).flatten(1).split([torch.Size(shape).numel() for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(flat, self.shapes, strict=True)]

    def decode(self, features: Tensor) -> Tensor:
        return ((features + 10) / 20).clamp(0, 1)[:, None, None]


def images_of(z: Tensor) -> Tensor:
    """Images of an `IdentityBackbone` that hold the latents `z`, (N, D)."""
    return ((z + 10) / 20)[:, None, None]


class Pair(IdentityBackbone):
    """z_1 ~ N(0, 1), z_2 | z_1 ~ N(z_1, 1/4)."""

    def top_down(self, batch_size):
        zeros = torch.zeros(batch_size, 1)
        z_1 = yield zeros, zeros + 1
        z_2 = yield z_1, zeros + 0.5
        return torch.cat((z_1, z_2), dim=1)


# What the data of a Pair are: z_1 ~ N(.5, .8^2), z_2 | z_1 ~ N(.6 z_1 + .1, .4^2).
TRUTH = ((0.5, 0.8), (0.6, 0.1, 0.4))


def minimize_batch_loss(prior, u, *, steps, seed):
    """Learn from all of the posterior noise `u` at once, under noise that stays the same."""
    optimizer = torch.optim.LBFGS(prior.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = prior.batch_loss(u, None, torch.Generator().manual_seed(seed)).total.mean()
        loss.backward()
        return loss

    optimizer.step(closure)


class Quadratic(nn.Module):
    """f(z) = w . z + v . z^2 with learnable w, v: the tilted Gaussian is still Gaussian, so everything has a closed
    form.
    """

    def __init__(self, size: int, w: float = 0.0, v: float = 0.0) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.full((size,), w)), nn.Parameter(torch.full((size,), v))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        z = z.flatten(1)
        return (self.w * z + self.v * z**2).sum(1)
