"""VAE, LVAE and BIVA of github.com/JakobHavtorn/hvae-oodd (Havtorn et al. 2021): deep VAEs of stages, with vector and
spatial latents mixed.

Skip connections hand every stage the features of the one above, so that a layer depends on all latents above it. A
stage of BIVA below the top has two latents, first the top-down one, then the bottom-up one. The model lists its stages
bottom to top; layers here go top to bottom.
"""

from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae_ebm_prior.chains.streams import seeded

from .walk import run, single


class LadderAdapter:
    """Adapter of hvae-oodd's `VAE`, `LVAE` and `BIVA`.

    Args:
        model: the trained `DeepVAE`.
        checkpoint: keep no activations inside stages for the backward pass: less memory, more time.
    """

    needs = ("stages", "likelihood", "n_latents", "skip_stochastic", "infer", "generate")
    output = "mean"  # `decode` gives the mean of p(x | z), as `hvae-ebm-prior evaluate` records

    def __init__(self, model: nn.Module, *, checkpoint: bool = False) -> None:
        self.model: Any = model
        self.checkpoint = checkpoint

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Any]:
        d, skips = None, None
        dtype = self._dtype()
        for stage in reversed(self.model.stages):
            if hasattr(stage, "td_stochastic"):
                top_down = (yield prior_of(stage.td_stochastic, d, batch_size)).to(dtype)
                condition = d if stage.bu_condition is None else stage.bu_condition(top_down, aux=d)
                bottom_up = (yield prior_of(stage.bu_stochastic, condition, batch_size)).to(dtype)
                z = stage.z_proj(torch.cat((top_down, bottom_up), dim=1))
            else:
                z = (yield prior_of(stage.stochastic, d, batch_size)).to(dtype)
                z = stage.p_projection(z) if hasattr(stage, "p_projection") else stage.z_proj(z)
            d, skips = run(below, stage, z, skips if self.model.skip_stochastic else None, checkpoint=self.checkpoint)
        return d

    def infer(self, images: Tensor) -> list[Tensor]:
        return [z for z, _ in self.infer_with_density(images)]

    def infer_with_density(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        # As the model's forward does, but for the images' likelihood, which is not defined for every image in [0, 1].
        _, stages = self.model.generate(self.model.infer(self._inputs(images)), n_prior_samples=len(images))
        return [
            (single(stage.q.z), single(stage.q.dist.log_prob(stage.q.z)).flatten(1).sum(1))
            for stage in reversed(stages)
        ]

    def decode(self, features: Tensor) -> Tensor:
        return single(self._observe(features, None)[1].mean).clamp(0, 1)

    def log_likelihood(self, features: Tensor, images: Tensor) -> Tensor:
        try:
            return single(self._observe(features, self._inputs(images))[0])
        except ValueError as error:  # of a distribution whose support is left
            kind = type(self.model.likelihood).__name__
            raise ValueError(
                f"images: expected what {kind} has a likelihood for; binarise them, as for its training? {error}"
            ) from error

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _inputs(self, images: Tensor) -> Tensor:
        images = images.to(self._dtype())
        return images if self.model.lambda_init is None else self.model.lambda_init(images)

    def _observe(self, features: Tensor, images: Tensor | None) -> tuple[Any, Any]:
        """The likelihood module's log p(x | z) of `images`, if any, and its data."""
        if self.model.pad is not None:
            features = F.pad(features, self.model.unpad)
        # It draws a sample beside its mean, and has nothing but a sample for mixtures: under a seed of its own.
        with seeded(0, features.device):
            return self.model.likelihood(x_p=features, x=images)


def below(stage: Any, z: Tensor, skips: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """A stage's features and skip outputs from its latent and the skip outputs of the stage above."""
    # The published module takes its inputs off the list.
    return stage.p_deterministic(z, None if skips is None else list(skips))


def prior_of(stochastic: Any, condition: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and std of a stochastic module given the features above; without any, of the top prior."""
    _, data = stochastic(condition, inference=False, sample=False, n_prior_samples=batch_size)
    return single(data.dist.mean), single(data.dist.stddev)
