"""VDVAE (Child 2021; the attributes of github.com/openai/vdvae's `VAE`): features at several resolutions, one latent
per block, down to 1x1.

    (mean, log_std, residual) = prior(x),    x <- x + residual + z_proj(z),    x <- resnet(x)

A block's x are its resolution's features: those of the last block there, the learned bias at the first, or zero; a
mixin adds a coarser resolution's.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .logistic_mixture import draw_mixture, mixture_log_likelihood, mixture_mean
from .walk import Walk, posterior_draws, posteriors, priors, run, single

# Shift and scale of pixels 0..255 by dataset, (x + shift) * scale, as in the published data.py; that of ffhq_1024 is
# given there for [0, 1].
NORMALISATIONS = {
    "cifar10": (-120.63838, 1 / 64.16736),
    "imagenet32": (-116.2373, 1 / 69.37404),
    "imagenet64": (-115.92961967, 1 / 69.37404),
    "ffhq_256": (-112.8666757481, 1 / 69.84780273),
    "ffhq_1024": (-0.4387 * 255, 1 / (0.2743 * 255)),
}


class BlockState(NamedTuple):
    """The features that a block's latent is conditioned on, and its prior's mean and log-std."""

    block: Any
    features: Tensor
    mean: Tensor
    log_std: Tensor


class VDVAEAdapter:
    """Adapter of a VDVAE.

    Args:
        model: the trained `VAE`, or a fork with its attributes; load its EMA weights for samples.
        shift: added to pixels 0..255 before `scale`; None takes the published one of the dataset that `model.H.dataset`
            names.
        scale: factor after `shift`; None likewise.
        output: "mean" or "sample" of p(x | z) as the image.
        checkpoint: keep no activations inside blocks for the backward pass: less memory, more time.
        generator: source of the noise of samples; None takes torch's global generators.

    Raises:
        ValueError: the normalisation is not given and the dataset is not a published one, or `output` is neither "mean"
            nor "sample".
    """

    needs = ("encoder.enc_blocks", "decoder.dec_blocks", "decoder.bias_xs", "decoder.out_net", "H.image_size")

    def __init__(
        self,
        model: nn.Module,
        *,
        shift: float | None = None,
        scale: float | None = None,
        output: str = "mean",
        checkpoint: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if output not in ("mean", "sample"):
            raise ValueError(f'output: expected "mean" or "sample", got {output!r}')
        self.model: Any = model
        if shift is None or scale is None:
            dataset = getattr(self.model.H, "dataset", None)
            if dataset not in NORMALISATIONS:
                raise ValueError(
                    f"shift and scale: the model's dataset {dataset!r} is none of {', '.join(NORMALISATIONS)}; "
                    "give both, as in the data.py it was trained with: pixels x in 0..255 enter as (x + shift) * scale"
                )
            published_shift, published_scale = NORMALISATIONS[dataset]
            shift = published_shift if shift is None else shift
            scale = published_scale if scale is None else scale
        self.shift = shift
        self.scale = scale
        self.output = output
        self.checkpoint = checkpoint
        self.generator = generator

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
        return priors(self._walk(batch_size), lambda state: (single(state.mean), single(state.log_std).exp()))

    def infer(self, images: Tensor) -> list[Tensor]:
        return [z for z, _ in self.infer_with_density(images)]

    def infer_with_density(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        return posterior_draws(self._walk(len(images)), self._posterior(images))

    def infer_with_posterior(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        return posteriors(self._walk(len(images)), self._posterior(images))

    def _posterior(self, images: Tensor) -> Callable[[int, BlockState], tuple[Tensor, Tensor]]:
        """Mean and std of a block's posterior, from the block's number and state."""
        # The encoder takes NHWC.
        pixels = (images.permute(0, 2, 3, 1) * 255 + self.shift) * self.scale
        activations = self.model.encoder(pixels.to(self.model.decoder.bias_xs[0].dtype))

        def posterior(_: int, state: BlockState) -> tuple[Tensor, Tensor]:
            merged = torch.cat((state.features, activations[state.block.base]), dim=1)
            mean, log_std = single(state.block.enc(merged)).chunk(2, dim=1)
            return mean, log_std.exp()

        return posterior

    def decode(self, features: Tensor) -> Tensor:
        parameters = self._mixture(features)
        return mixture_mean(parameters) if self.output == "mean" else draw_mixture(parameters, self.generator)

    def log_likelihood(self, features: Tensor, images: Tensor) -> Tensor:
        if getattr(self.model.H, "dataset", None) != "ffhq_256":
            return mixture_log_likelihood(self._mixture(features), images)
        # Trained on pixels 0..255 rounded down to multiples of 8.
        rounded = ((images * 255).round() / 8).floor() * 8 / 255
        return mixture_log_likelihood(self._mixture(features), rounded, levels=32)

    def _mixture(self, features: Tensor) -> Tensor:
        decoder = self.model.decoder
        # `final_fn` is a lambda, which copies of the model share; its two parameters are the copy's own.
        return single(decoder.out_net.out_conv(features * decoder.gain + decoder.bias))

    def _walk(self, batch_size: int) -> Walk[BlockState]:
        decoder = self.model.decoder
        # The published decoder changes its features in place: a new dict per walk.
        features: dict[int, Tensor] = {bias.shape[2]: bias.expand(batch_size, -1, -1, -1) for bias in decoder.bias_xs}
        like = decoder.bias_xs[0]
        for block in decoder.dec_blocks:
            size = block.base
            width = block.widths[size]
            x = features[size] if size in features else like.new_zeros(batch_size, width, size, size)
            if block.mixin is not None:
                x = x + F.interpolate(features[block.mixin][:, :width], scale_factor=size // block.mixin)
            parts = run(block.prior, x, checkpoint=self.checkpoint)
            mean, log_std, residual = parts.split([block.zdim, block.zdim, width], dim=1)
            z = yield BlockState(block, x, mean, log_std)
            # `z_fn` is a lambda around `z_proj`; see `decode`.
            x = x + residual + block.z_proj(z.to(x.dtype))
            features[size] = run(block.resnet, x, checkpoint=self.checkpoint)
        return features[self.model.H.image_size]
