"""Which of PyTorch's functions draw random numbers, while others' code runs."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name


class Draws(TorchFunctionMode):
    """Inside, the names of PyTorch's functions that draw from its global generators are kept.

    Args:
        device: whose generator is looked at, beside that of the CPU.

    Attributes:
        names: of the functions.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = random_state(self.device)
        result = func(*args, **(kwargs or {}))
        if random_state(self.device) != before and (name := resolve_name(func)) not in self.names:
            self.names.append(name or str(func))
        return result


def random_state(device: torch.device) -> bytes:
    """State of the global generators of the CPU and of a CUDA or XPU `device`."""
    states = [torch.get_rng_state()]
    if device.type in ("cuda", "xpu"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)
