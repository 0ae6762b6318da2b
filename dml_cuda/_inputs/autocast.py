"""Autocast: the losses compute in full precision and return float32."""

from contextlib import AbstractContextManager, nullcontext

import torch

# Evaluated at import: torch.compile of PyTorch 2.11 cannot trace is_autocast_available.
_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def is_on(device: torch.device) -> bool:
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)


def off(device: torch.device) -> AbstractContextManager:
    """A context that disables autocast, which would round similarities to its dtype."""
    return torch.autocast(device.type, enabled=False) if is_on(device) else nullcontext()
