"""Small backbones for tests: random ones of any shape, and one whose T is the identity."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn

from hvae_ebm_prior.backbone.transform import LayerState


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
        return [z for z, _, _ in self.infer_with_posterior(images)]

    def infer_with_posterior(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        pixels = [images.flatten(1)[:, : shape[0]] for shape in self.shapes]
        means = [
            4 * seen.reshape(*seen.shape, *[1] * (len(shape) - 1)).expand(-1, *shape) - 2
            for seen, shape in zip(pixels, self.shapes, strict=True)
        ]
        noises = super().infer(images)
        return [(noise + mean, mean, torch.ones_like(mean)) for noise, mean in zip(noises, means, strict=True)]


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


class ExactGaussian(nn.Module):
    """The exact energy with context of a layer whose noise is N(slope mean + offset, std^2) given those above, each
    dimension alike; where the mean is noisy, that of `above`, the mean and std that it has without noise.
    """

    context = True

    def __init__(self, slope: float, offset: float, std: float, above: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.slope, self.offset, self.std, self.above = slope, offset, std, above

    def forward(self, state: LayerState, angles: Tensor) -> Tensor:
        phi, phi_above = angles[:, :1], angles[:, 1:]
        mean, std = self.above
        spread = (phi_above.cos() * std) ** 2 + phi_above.sin() ** 2
        weight = std**2 * phi_above.cos() / spread.clamp(min=1e-12)
        clean = torch.where(
            phi_above > 0, mean + weight * (state.mean.flatten(1) - phi_above.cos() * mean), state.mean.flatten(1)
        )
        unknown = torch.where(phi_above > 0, std**2 * (1 - weight * phi_above.cos()), 0.0)
        centre = phi.cos() * (self.slope * clean + self.offset)
        variance = phi.cos() ** 2 * (self.std**2 + self.slope**2 * unknown) + phi.sin() ** 2
        u = state.u.flatten(1)
        return (u**2 / 2 - (u - centre) ** 2 / (2 * variance) - variance.log() / 2).sum(1)


# The noise of a Pair's data: u_1 = z_1, u_2 = (z_2 - z_1) / .5 with the mean z_1 of its layer.
PAIR_ENERGIES = (ExactGaussian(0.0, 0.5, 0.8), ExactGaussian(-0.8, 0.2, 0.8, above=(0.5, 0.8)))


class ExactMixture(nn.Module):
    """The exact energy with context of a mixture of round Gaussians: weights (K,), centres (K, d), and std."""

    context = True

    def __init__(self, weights: Sequence[float], centres: Sequence[Sequence[float]], std: float) -> None:
        super().__init__()
        self.weights, self.centres, self.std = torch.tensor(weights), torch.tensor(centres), std

    def forward(self, state: LayerState, angles: Tensor) -> Tensor:
        phi = angles[:, :1]
        u = state.u.flatten(1)
        variance = (phi.cos() * self.std) ** 2 + phi.sin() ** 2
        squares = (u[:, None] - phi.cos()[:, None] * self.centres.to(u)).square().sum(2)
        log_parts = self.weights.to(u).log() - squares / (2 * variance) - u.shape[1] / 2 * variance.log()
        return log_parts.logsumexp(1) + u.square().sum(1) / 2

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.centres[chosen] + self.std * torch.randn(n, self.centres.shape[1], generator=generator)
