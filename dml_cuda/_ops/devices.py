"""Which devices the fused kernels are there for."""

import torch

from .. import _C
from .._warnings import warn_once

BUILT_FOR_CUDA = bool(_C.cuda_version)


def has_kernel(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and BUILT_FOR_CUDA)


def use_kernel(device: torch.device, backend: str, on_cuda: bool = True) -> bool:
    """Whether the option ``backend`` asks for them; raises RuntimeError if it insists and there is none.

    ``on_cuda``: whether the CUDA kernels know the formula, which one loaded without nvcc they do not.
    """
    if backend == "reference":
        return False
    if has_kernel(device) and (on_cuda or device.type != "cuda"):
        return True
    if backend == "fused":
        raise RuntimeError(
            f'backend: expected a device with a kernel for "fused", got embeddings on {device}; '
            "dml_cuda.build_info() tells what was built"
        )
    warn_once(f"dml_cuda has no kernel for {device.type}: using the reference")
    return False
