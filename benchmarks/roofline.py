"""What the machine could do at best: measured ceilings, and the least work that a case needs."""

from functools import cache

import torch

from .cases import Case
from .measure import make_clock

_SIZES = {"cpu": (2048, 256 << 20), "cuda": (8192, 4 << 30)}  # side of the matmul, bytes of the copy
_RUNS = 5


@cache
def matmul_ceiling(device: str, dtype: str, precision: str) -> float:
    """Flop/s of a big matmul; the precision must be the one in force."""
    side, _ = _SIZES[device]
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    clock = make_clock(device)
    out = a @ b
    seconds = min(clock.time(lambda: torch.mm(a, b, out=out)) for _ in range(_RUNS))
    return 2 * side**3 / seconds


@cache
def copy_ceiling(device: str) -> float:
    """Byte/s of a big copy, reads and writes counted."""
    _, size = _SIZES[device]
    source, target = (torch.ones(size // 2, dtype=torch.uint8, device=device) for _ in range(2))
    clock = make_clock(device)
    seconds = min(clock.time(lambda: target.copy_(source)) for _ in range(_RUNS))
    return 2 * source.numel() / seconds


def roofline(case: Case, seconds: float, device: str) -> dict:
    """Where a fused time stands between the work it does and what the machine could do.

    With ``N^2 D`` as the unit: a dense implementation multiplies for 2 (forward) and 4 (backward). The
    symmetric form needs 1 and 2, and 1 more where backward computes the similarities again. Nothing is
    taken off for tiles that mining emptied, so a separated batch may beat the floor.
    """
    unit = case.n**2 * case.d
    needed, recompute, dense = (3, 1, 6) if case.backward else (1, 0, 2)
    bytes_per_pass = case.n * case.d * getattr(torch, case.dtype).itemsize
    moved = bytes_per_pass * (3 if case.backward else 1)  # read, read again, gradient written
    flops_ceiling = matmul_ceiling(device, case.dtype, case.precision)
    floor = max(needed * unit / flops_ceiling, moved / copy_ceiling(device))
    return {
        "tflops_without_recompute": needed * unit / seconds / 1e12,
        "tflops_with_recompute": (needed + recompute) * unit / seconds / 1e12,
        "tflops_dense_equivalent": dense * unit / seconds / 1e12,
        "ceiling_tflops": flops_ceiling / 1e12,
        "ceiling_gbytes_per_s": copy_ceiling(device) / 1e9,
        "floor_s": floor,
        "fraction_of_floor": floor / seconds,
    }
