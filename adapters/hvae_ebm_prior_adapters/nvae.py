"""NVAE (Vahdat & Kautz 2020; the attributes of github.com/NVlabs/NVAE's `AutoEncoder`): residual cells with latent
groups at several scales.

    z_0 ~ N(0, 1.01^2),    z_k ~ N(5 tanh(mean_k / 5), (exp(5 tanh(log_std_k / 5)) + .01)^2)
    (mean_k, log_std_k) = dec_sampler[k - 1](s_k)

with s_k the features above group k. Posteriors are residual (mean and log-std added to the prior's before the clamp) or
not, and may end in normalising flows: the latent is what the flows return.
"""

import math
import types
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hvae import soft_clamp
from .logistic_mixture import draw_mixture, image_noise, mixture_log_likelihood, mixture_mean
from .walk import Walk, drawn_by, normal_draw, posteriors, priors, run, single


class Group(NamedTuple):
    """The features that a latent group is conditioned on, and its prior's mean and log-std before the clamp."""

    features: Tensor
    mean: Tensor
    log_std: Tensor


class NVAEAdapter:
    """Adapter of an NVAE, any number of scales and groups, on CPU and CUDA.

    The model is used as it is, but for three things mended in place that change no result in eval mode: fused batch
    norm and swish also works off CUDA, masks of autoregressive convolutions follow their weights' device, and
    convolutions that initialise themselves from their first batch count as initialised.

    Args:
        model: the trained `AutoEncoder`, or a fork with its attributes.
        output: "mean" or "sample" of p(x | z) as the image.
        checkpoint: keep no activations inside cells for the backward pass: less memory, more time.
        generator: source of the noise of samples; None takes torch's global generators.

    Raises:
        ValueError: `output` is neither "mean" nor "sample".
    """

    needs = (
        "dec_tower",
        "enc_tower",
        "dec_sampler",
        "enc_sampler",
        "prior_ftr0",
        "z0_size",
        "image_conditional",
        "decoder_output",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        output: str = "mean",
        checkpoint: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if output not in ("mean", "sample"):
            raise ValueError(f'output: expected "mean" or "sample", got {output!r}')
        self.model: Any = make_portable(model)
        self.output = output
        self.checkpoint = checkpoint
        self.generator = generator

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
        return priors(self._walk(batch_size), lambda group: gaussian(group.mean, group.log_std))

    def infer(self, images: Tensor) -> list[Tensor]:
        return [z for z, _ in self.infer_with_density(images)]

    def infer_with_density(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        model, gaussian_of = self.model, self._posterior(images)

        def draw(k: int, group: Group) -> tuple[Tensor, Tensor]:
            mean, std, condition = gaussian_of(k, group)
            z, log_density = normal_draw(mean, std)
            for flow in model.nf_cells[k * model.num_flows : (k + 1) * model.num_flows]:
                z, log_det = flow(z.to(condition.dtype), condition)
                log_density = log_density - single(log_det).flatten(1).sum(1)
            return single(z), log_density

        return drawn_by(self._walk(len(images)), draw)

    def infer_with_posterior(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        if self.model.num_flows:
            return None
        gaussian_of = self._posterior(images)
        return posteriors(self._walk(len(images)), lambda k, group: gaussian_of(k, group)[:2])

    def _posterior(self, images: Tensor) -> Callable[[int, Group], tuple[Tensor, Tensor, Tensor]]:
        """Mean and std of a group's posterior before flows, and what the flows are conditioned on, from the group's
        number and state.
        """
        model = self.model
        place_masks(model)
        features, sides = self._encode(images)

        def posterior(k: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
            # The top group's posterior depends on the image alone, the others' on the features above them too.
            if k == 0:
                condition = model.enc0(features)
            else:
                combiner, side = sides[k - 1]
                condition = combiner(side, group.features)
            mean, log_std = model.enc_sampler[k](condition).chunk(2, dim=1)
            if k > 0 and model.res_dist:
                mean, log_std = group.mean + mean, group.log_std + log_std
            return *gaussian(mean, log_std), condition

        return posterior

    def posterior(self, images: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        model = self.model
        # With more groups, or flows, u is no Gaussian given the images alone.
        if len(model.enc_sampler) > 1 or model.num_flows:
            return None
        place_masks(model)
        mean, std = gaussian(*model.enc_sampler[0](model.enc0(self._encode(images)[0])).chunk(2, dim=1))
        prior_mean, prior_std = gaussian(torch.zeros_like(mean), torch.zeros_like(mean))
        return [((mean - prior_mean) / prior_std, std / prior_std)]

    def decode(self, features: Tensor) -> Tensor:
        logits = self._logits(features)
        images = self._observe(logits, self.model.decoder_output(logits))
        return images[..., 2:30, 2:30] if crops(self.model) else images

    def log_likelihood(self, features: Tensor, images: Tensor) -> Tensor:
        logits = self._logits(features)
        if crops(self.model):
            logits, images = (part[..., 2:30, 2:30] if part.shape[-1] == 32 else part for part in (logits, images))
        distribution = self.model.decoder_output(logits)
        if hasattr(distribution, "logit_probs"):
            return mixture_log_likelihood(logits, images, levels=round(getattr(distribution, "max_val", 255)) + 1)
        if isinstance(distribution, torch.distributions.Bernoulli):
            if bool(((images != 0) & (images != 1)).any()):
                raise ValueError(
                    "images: this NVAE's likelihood is of binary pixels, got values between 0 and 1; binarise them, as "
                    "for its training"
                )
            return distribution.log_prob(images).flatten(1).sum(1)
        # NVAE's pixels are in [-1, 1]; the density is that of pixels in [0, 1].
        log_density = torch.distributions.Normal(*normal_output(distribution)).log_prob(2 * images - 1) + math.log(2)
        return log_density.flatten(1).sum(1)

    def _logits(self, features: Tensor) -> Tensor:
        for cell in self.model.post_process:
            features = cell(features)
        return single(self.model.image_conditional(features))

    def _observe(self, logits: Tensor, distribution: Any) -> Tensor:
        """Mean or sample of p(x | z), by the kind of the model's output distribution."""
        draw = self.output == "sample"
        if hasattr(distribution, "logit_probs"):
            return draw_mixture(logits, self.generator) if draw else mixture_mean(logits)
        if isinstance(distribution, torch.distributions.Bernoulli):
            return (self._noise(torch.rand, logits) < distribution.mean).to(logits) if draw else distribution.mean
        mean, std = normal_output(distribution)
        values = mean + std * self._noise(torch.randn, mean) if draw else mean
        return (values.clamp(-1, 1) + 1) / 2

    def _noise(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        return image_noise(draw, len(like), tuple(like.shape[1:]), self.generator, like)

    def _walk(self, batch_size: int) -> Walk[Group]:
        """The decoder's tower; a tower without cells is the vanilla VAE, with one group and a stem of its own."""
        model = self.model
        features = model.prior_ftr0.unsqueeze(0).expand(batch_size, -1, -1, -1)
        zeros = features.new_zeros(batch_size, *model.z0_size)
        group = 0
        for cell in model.dec_tower:
            if cell.cell_type == "combiner_dec":
                mean, log_std = (zeros, zeros) if group == 0 else model.dec_sampler[group - 1](features).chunk(2, dim=1)
                z = yield Group(features, mean, log_std)
                features = run(cell, features, z.to(features.dtype), checkpoint=self.checkpoint)
                group += 1
            else:
                features = run(cell, features, checkpoint=self.checkpoint)
        if model.vanilla_vae:
            z = yield Group(features, zeros, zeros)
            features = model.stem_decoder(z.to(features.dtype))
        return features

    def _encode(self, images: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]]]:
        """Features of the images at the top, and each lower group's combiner with its side input, top to bottom."""
        model = self.model
        if crops(model) and images.shape[-1] == 28:
            images = F.pad(images, (2, 2, 2, 2))
        features = model.stem((2 * images - 1).to(model.prior_ftr0.dtype))
        for cell in model.pre_process:
            features = cell(features)
        sides: list[tuple[nn.Module, Tensor]] = []
        for cell in model.enc_tower:
            if cell.cell_type == "combiner_enc":
                sides.insert(0, (cell, features))
            else:
                features = cell(features)
        return features, sides


def gaussian(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """NVAE's clamped mean and std, at least in float32."""
    return soft_clamp(single(mean)), soft_clamp(single(log_std)).exp() + 1e-2


def normal_output(distribution: Any) -> tuple[Tensor, Tensor]:
    """Mean and std of a normal output, in [-1, 1]; raise TypeError for an output of an unknown kind."""
    if not hasattr(distribution, "dist"):
        kind = type(distribution).__name__
        raise TypeError(
            f"expected the model's output as Bernoulli, NormalDecoder or DiscMixLogistic, got {kind}; override "
            "`_observe` and `log_likelihood` for it"
        )
    return distribution.dist.mu, distribution.dist.sigma


def crops(model: Any) -> bool:
    """Whether the model works on 28-pixel images padded to 32."""
    return bool(getattr(model, "crop_output", False))


def make_portable(model: nn.Module) -> nn.Module:
    """Mend in place what keeps an NVAE from running off CUDA or would change its trained weights; see `NVAEAdapter`."""
    parts: list[Any] = list(model.modules())
    for module in parts:
        if is_fused_batch_norm(module):
            module.forward = types.MethodType(batch_norm_swish, module)
        if getattr(module, "data_init", False):
            module.init_done = True
    place_masks(model)
    return model


def place_masks(model: nn.Module) -> None:
    """Move the masks of autoregressive convolutions, which are no buffers, beside their weights, in their type."""
    for module in model.modules():
        mask = getattr(module, "mask", None)
        if isinstance(mask, Tensor) and isinstance(module, nn.Conv2d):
            module.mask = mask.to(module.weight)


def is_fused_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is NVAE's batch norm with swish, whose published forward works on CUDA alone."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).__name__ == "SyncBatchNormSwish"


def batch_norm_swish(module: Any, x: Tensor) -> Tensor:
    """Batch norm and swish on any device; processes that train together keep the published, synchronised forward."""
    if module.training and torch.distributed.is_available() and torch.distributed.is_initialized():
        return type(module).forward(module, x)
    # Batch norm as PyTorch does it, with its rule for the running statistics.
    return F.silu(nn.BatchNorm2d.forward(module, x))
