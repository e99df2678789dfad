"""What is constant in a frozen backbone, worked out once instead of at every step of every chain.

- Weight normalisation becomes plain weights: NVAE's own (recomputed at every forward pass) and PyTorch's.
- Batch norm in eval mode is the affine map y = scale x + shift. It goes into the convolution before it, or into one
  without padding after it (padding pads with zeros, not with shifts); elsewhere it stays an affine map.
- NVAE's swish becomes PyTorch's fused SiLU.
- Weights are laid out channels last, which convolutions prefer on most devices.
"""

import copy
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm

from hvae_ebm_prior.chains.execution import replace_parametrizations

from .nvae import is_fused_batch_norm, make_portable


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` for use as a frozen backbone: the same function in eval mode, faster.

    Recalibrate batch norm before, as nothing of it is left afterwards. Cells of an NVAE fork that do not compute what
    NVAE's do are noticed, by a comparison on random features, and left as they are.

    Args:
        model: the trained model; it is not changed.

    Returns:
        The copy, in eval mode without parameter gradients, for the same adapter.
    """
    model = make_portable(frozen_copy(model))
    with torch.no_grad():
        for module in list(model.modules()):
            plain_weights(module)
        for module in list(model.modules()):
            if is_nvae_cell(module):
                fold_cell(module)
        fold_children(model)
    for name in ("all_log_norm", "all_conv_layers", "all_bn_layers"):  # what NVAE's training regularises, unfolded
        if isinstance(getattr(model, name, None), list):
            setattr(model, name, [])
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Affine(nn.Module):
    """scale x + shift per channel: batch norm in eval mode.

    Args:
        scale: (C,).
        shift: (C,).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1))
        self.register_buffer("shift", shift.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode; weights that modules compute and keep as attributes are copied without their graph."""
    derived = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in derived}).eval()


def plain_weights(module: nn.Module) -> None:
    """Replace PyTorch's parametrised and weight-normalised parameters by their values."""
    if parametrize.is_parametrized(module):
        replace_parametrizations(module, {name: getattr(module, name) for name in module.parametrizations})  # type: ignore[union-attr]
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)


def is_nvae_cell(module: Any) -> bool:
    """Whether `module` is an NVAE cell, which applies its `_ops` one after the other."""
    return (
        isinstance(getattr(module, "_ops", None), nn.ModuleList)
        and hasattr(module, "cell_type")
        and getattr(module, "_num_nodes", 0) > 0
    )


def fold_cell(cell: Any) -> None:
    """Fold all operations of an NVAE cell into the first, if that computes the same."""
    operations = list(cell._ops)
    folded = nn.Sequential(*fused(layer for operation in operations for layer in layers_of(operation, nvae=True)))
    inputs = (getattr(layer, "num_features", 0) or getattr(layer, "in_channels", 0) for layer in cell._ops.modules())
    channels = next(size for size in inputs if size)
    features = torch.randn(
        *(2, channels, 8, 8), generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32
    ).to(next(cell.parameters()))
    expected = features
    for operation in operations:
        expected = operation(expected)
    actual = folded(features)
    tolerance = 1e-3 * float(expected.abs().max())
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-2, atol=tolerance):
        warnings.warn(
            f"freeze: a cell of type {cell.cell_type!r} computes something else than NVAE's and is left as it is",
            stacklevel=3,
        )
        return
    cell._ops[0] = folded
    for i in range(1, len(operations)):
        cell._ops[i] = nn.Identity()


def fold_children(module: nn.Module) -> None:
    """Replace every child whose layers are known by its folded layers, and look inside the others."""
    for name, child in list(module.named_children()):
        layers = layers_of(child, nvae=False)
        folded = fused(layers)
        if [id(layer) for layer in folded] == [id(layer) for layer in layers_of_plain(child)]:
            fold_children(child)
        else:
            for layer in folded:
                fold_children(layer)
            setattr(module, name, folded[0] if len(folded) == 1 else nn.Sequential(*folded))


def layers_of_plain(module: nn.Module) -> list[nn.Module]:
    """`module`, or the layers of a (nested) Sequential, as they are."""
    if type(module) is nn.Sequential and not has_hooks(module):
        return [layer for child in module for layer in layers_of_plain(child)]
    return [module]


def layers_of(module: Any, *, nvae: bool) -> list[nn.Module]:
    """The layers that `module` applies one after the other, with constants worked out; `[module]` where that is not
    known.

    Args:
        module: any module.
        nvae: also open the operations of NVAE's cells, known by their attributes.

    Returns:
        New layers where something was worked out, else the module's own.
    """
    if has_hooks(module):
        return [module]
    if type(module) is nn.Sequential:
        return [layer for child in module for layer in layers_of(child, nvae=nvae)]
    if isinstance(module, nn.Conv2d) and hasattr(module, "normalize_weight"):
        return [convolution(module, module.normalize_weight(), module.bias)]
    if is_fused_batch_norm(module):
        return [affine(module), nn.SiLU()]
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and module.track_running_stats:
        return [affine(module)]
    if nvae:
        children = dict(module.named_children())
        if set(children) in ({"bn"}, {"conv"}):  # NVAE's SyncBatchNorm; ConvBNSwish and InvertedResidual
            return layers_of(next(iter(children.values())), nvae=True)
        if "conv_0" in children and hasattr(module, "upsample"):
            norm = children.get("bn_act") or children.get("bn")
            layers: list[nn.Module] = layers_of(norm, nvae=True) if norm is not None else []
            if "bn_act" not in children:
                layers.append(nn.ELU())
            if module.upsample:
                layers.append(nn.UpsamplingNearest2d(scale_factor=2))
            return layers + layers_of(children["conv_0"], nvae=True)
    return [module]


def has_hooks(module: nn.Module) -> bool:
    """Whether code of others runs around the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fused(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """`layers` with every affine map put into the convolution before or after it, where that is exact."""
    result: Sequence[nn.Module] = list(layers)
    while True:
        for i, (first, second) in enumerate(pairwise(result)):
            merged = merge(first, second)
            if merged is not None:
                result = [*result[:i], merged, *result[i + 2 :]]
                break
        else:
            return list(result)


def merge(first: nn.Module, second: nn.Module) -> nn.Conv2d | None:
    """One convolution that does both, or None."""
    if is_plain_convolution(first) and isinstance(second, Affine):
        bias = second.shift.flatten()
        if first.bias is not None:
            bias = first.bias * second.scale.flatten() + bias
        return convolution(first, first.weight * second.scale.reshape(-1, 1, 1, 1), bias)
    if isinstance(first, Affine) and is_plain_convolution(second):
        # Padding would have to pad with the shift; with groups, weights see only some of the channels.
        if second.groups > 1 or second.padding not in (0, (0, 0)):
            return None
        bias = (second.weight * first.shift).sum((1, 2, 3)) + (0 if second.bias is None else second.bias)
        return convolution(second, second.weight * first.scale, bias)
    return None


def is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether `module` is PyTorch's own convolution, without hooks."""
    return type(module) is nn.Conv2d and not has_hooks(module)


def convolution(like: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """PyTorch's convolution of the shape of `like` with these weights."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    settings: dict[str, Any] = {name: getattr(like, name) for name in names}
    new = nn.Conv2d(**settings, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new


def affine(norm: Any) -> Affine:
    """Batch norm in eval mode as an affine map."""
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
    shift = -norm.running_mean * scale + (0 if norm.bias is None else norm.bias)
    return Affine(scale.detach(), shift.detach())
