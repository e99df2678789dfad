"""Batch norm statistics at the temperature one samples at.

A model trained at temperature 1 has batch norm statistics of temperature 1. NVAE's authors estimate them anew, from the
model's own samples at the lower temperature, before they sample there (`set_bn` of its evaluate.py); in half precision
that is known to end in NaN images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hvae_ebm_prior.backbone.lock import backbone_modules
from hvae_ebm_prior.backbone.transform import BackboneAdapter, NoiseTransform
from hvae_ebm_prior.chains.streams import draw_key, open_streams


@torch.no_grad()
def recalibrate_batch_norm(
    adapter: BackboneAdapter,
    temperature: float,
    *,
    iterations: int = 500,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
) -> Callable[[], None]:
    """Estimate the decoder's batch norm statistics anew, in float32, as means over batches of samples at `temperature`.

    Args:
        adapter: the backbone, as trained: not folded by `freeze`, in float32.
        temperature: factor on the std of the latents.
        iterations: number of batches.
        batch_size: samples per batch.
        generator: source of the noise; None takes torch's default generator.

    Returns:
        A function that puts the former statistics back.

    Raises:
        ValueError: there is no batch norm, the model is not in float32, a number is not positive, or a statistic came
            out not finite, in which case the former ones are back.
    """
    if not (temperature > 0 and iterations > 0 and batch_size > 1):
        raise ValueError(
            f"expected temperature > 0, iterations > 0 and batch_size > 1, got {temperature}, {iterations} and "
            f"{batch_size}"
        )
    modules = {module: name for root in backbone_modules(adapter) for name, module in root.named_modules()}
    norms: list[Any] = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError(
            "no batch norm with running statistics in this backbone; recalibrate before `freeze`, which folds it away"
        )
    wrong = next((norm.running_mean.dtype for norm in norms if norm.running_mean.dtype != torch.float32), None)
    if wrong is not None:
        raise ValueError(
            f"recalibration needs a model in float32, got batch norm in {wrong}: half precision ends in NaN images"
        )
    former = {
        norm: (norm.training, norm.momentum, {name: value.clone() for name, value in norm.named_buffers()})
        for norm in norms
    }

    def undo() -> None:
        for norm in norms:
            restore(norm, former[norm][2])

    transform = NoiseTransform(adapter)
    streams = open_streams(draw_key(generator), range(batch_size), transform.device, transform.dtype)
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the plain mean over batches
        with torch.autocast(transform.device.type, enabled=False):
            for _ in range(iterations):
                transform.decode(temperature * streams.normal(transform.dim))
        for norm in norms:
            if norm.num_batches_tracked == 0:  # the encoder's, which samples do not meet
                restore(norm, former[norm][2])
            elif not bool(torch.isfinite(norm.running_mean).all() & torch.isfinite(norm.running_var).all()):
                raise ValueError(
                    f"the batch norm statistics of {modules[norm]} are not finite at temperature {temperature}; "
                    "check the weights"
                )
    except BaseException:
        undo()
        raise
    finally:
        for norm, (training, momentum, _) in former.items():
            norm.training, norm.momentum = training, momentum
    return undo


@torch.no_grad()
def restore(norm: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Put a module's former statistics back in place."""
    for name, value in statistics.items():
        norm.get_buffer(name).copy_(value)
