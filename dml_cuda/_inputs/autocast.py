"""Autocast: the losses compute in full precision and return float32, or float64 of float64."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Evaluated at import: torch.compile of PyTorch 2.11 cannot trace is_autocast_available.
_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def is_on(device: torch.device) -> bool:
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)


def result_dtype(embeddings: Tensor, wide: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a loss of these: theirs, or ``wide``; under autocast float32 at least."""
    dtype = embeddings.dtype if wide is None else wide
    is_wide = dtype in (torch.float32, torch.float64)
    return dtype if is_wide or not is_on(embeddings.device) else torch.float32


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that points of a dtype are computed in."""
    return dtype if dtype == torch.float64 else torch.float32


def off(device: torch.device) -> AbstractContextManager:
    """A context that disables autocast, which would round similarities to its dtype."""
    return torch.autocast(device.type, enabled=False) if is_on(device) else nullcontext()
