"""Which devices the fused kernels are there for."""

import torch

from . import _C
from ._warnings import warn_once


def has_kernel(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and bool(_C.cuda_version))


def use_kernel(device: torch.device, backend: str) -> bool:
    """Whether the option ``backend`` asks for them; raises RuntimeError if it insists and there is none."""
    if backend == "reference":
        return False
    if has_kernel(device):
        return True
    if backend == "fused":
        raise RuntimeError(
            f'backend: expected a device with a kernel for "fused", got embeddings on {device}; '
            "dml_cuda.build_info() tells what was built"
        )
    warn_once(f"dml_cuda has no kernel for {device.type}: using the reference")
    return False
