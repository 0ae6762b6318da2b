"""Whether the numbers of a tensor can be looked at."""

import torch
from torch import Tensor


def is_traced(x: Tensor) -> bool:
    """Whether values cannot be read: under a compiler, under a torch.func transform, or on meta."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_meta
