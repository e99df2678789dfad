"""Backbones are frozen while priors hold them, and as they were once the last prior has let go."""

from collections.abc import Callable

from torch import nn

from .transform import BackboneAdapter

# What priors hold frozen, by id: the module or parameter, the flag to restore, and how many hold it.
_held: dict[int, tuple[nn.Module | nn.Parameter, bool, int]] = {}


def lock(adapter: BackboneAdapter) -> Callable[[], None]:
    """Put the modules behind `adapter` in eval mode without parameter gradients.

    Args:
        adapter: the backbone; its modules are itself, or the values (or lists, tuples and dicts of values) of its
            attributes.

    Returns:
        A function that restores every training flag and requires_grad; where several priors froze a part, the last call
        does.
    """
    modules = {id(m): m for root in backbone_modules(adapter) for m in root.modules()}
    parameters = {id(p): p for module in modules.values() for p in module.parameters(recurse=False)}
    for module in modules.values():
        _hold(module, module.training)
        module.training = False
    for parameter in parameters.values():
        _hold(parameter, parameter.requires_grad)
        parameter.requires_grad_(False)

    def release() -> None:
        for key in (*modules, *parameters):
            part, flag, holders = _held.pop(key)
            if holders > 1:
                _held[key] = part, flag, holders - 1
            elif isinstance(part, nn.Module):
                part.training = flag
            else:
                # Garbage is collected at any moment, also inside a functorch transform, where requires_grad_() raises.
                part.requires_grad = flag

    return release


def check_autograd(adapter: BackboneAdapter) -> None:
    """Raise ValueError where the backbone's weights cannot take part in autograd, which chains need."""
    for module in backbone_modules(adapter):
        for name, parameter in module.named_parameters():
            if parameter.is_inference():
                raise ValueError(
                    f"backbone: its {name} was made under torch.inference_mode(), where no gradient can go through it; "
                    "build or load the model outside"
                )


def _hold(part: nn.Module | nn.Parameter, flag: bool) -> None:
    _, original, holders = _held.get(id(part), (part, flag, 0))
    _held[id(part)] = part, original, holders + 1


def backbone_modules(adapter: BackboneAdapter) -> list[nn.Module]:
    """The modules behind an adapter."""
    if isinstance(adapter, nn.Module):
        return [adapter]
    values: list[object] = []
    for value in getattr(adapter, "__dict__", {}).values():
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
        else:
            values.append(value)
    return [value for value in values if isinstance(value, nn.Module)]
