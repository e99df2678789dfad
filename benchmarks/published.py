"""The published code's Langevin loop, restated in plain PyTorch, and a count of PyTorch's operations."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvae_ebm_prior import DiffusionSchedule, LangevinConfig
from hvae_ebm_prior.backbone.transform import drive

SCHEDULE = DiffusionSchedule.ddpm(3)
LANGEVIN = LangevinConfig(steps=10, step_size=3e-5, integrator="euler", step_rule="published", kernel_at_top=False)


def published_chain(
    adapter: Any, energies: list[torch.nn.Module], u_next: list[Tensor], t: Tensor, steps: int
) -> list[Tensor]:
    """The published loop: u + s/2 grad (log p0 + log kernel) + grad f / 2 + sqrt(s) noise.

    The step is s = b^2 sigma_bar_t / sigma_bar_0 sigma_{t+1}^2.
    """
    u = [part.clone() for part in u_next]
    for _ in range(steps):
        size = [
            LANGEVIN.step_size
            * SCHEDULE.sigma_bar[i].item()
            / SCHEDULE.sigma_bar[0].item()
            * SCHEDULE.sigma[i + 1].item() ** 2
            for i in t.tolist()
        ]
        s = torch.tensor(size, device=t.device)
        alpha, sigma = SCHEDULE.alpha.to(t.device)[t + 1], SCHEDULE.sigma.to(t.device)[t + 1]
        with torch.enable_grad():
            u = [part.detach().requires_grad_() for part in u]
            latents: list[Tensor] = []

            def draw(i: int, mean: Tensor, std: Tensor, latents: list[Tensor] = latents, u: list[Tensor] = u) -> Tensor:
                latents.append(mean + std * u[i])
                return latents[-1]

            _, features = drive(adapter, len(t), draw)
            adapter.decode(features)
            f = sum(network(z, t).sum() for network, z in zip(energies, latents, strict=True))
            first = torch.autograd.grad(f, u)
            quadratic = sum(
                (
                    -(part**2).flatten(1).sum(1) / 2
                    - ((alpha[:, None] * part.flatten(1) - below.flatten(1)) ** 2).sum(1) / (2 * sigma**2)
                ).sum()
                for part, below in zip(u, u_next, strict=True)
            )
            second = torch.autograd.grad(quadratic, u)
        shape = [(len(t), *[1] * (part.ndim - 1)) for part in u]
        u = [
            part.detach() + 0.5 * a + 0.5 * s.view(size) * b + s.sqrt().view(size) * torch.randn_like(part)
            for part, a, b, size in zip(u, first, second, shape, strict=True)
        ]
    return u


class Count(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(
            returned.alias_info is not None and not returned.alias_info.is_write
            for returned in function._schema.returns
        )
        if not views and "detach" not in str(function):
            self.calls += 1
        return function(*args, **(kwargs or {}))
