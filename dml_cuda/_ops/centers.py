"""What heads with several centres a class share: a block of classes at a time, recomputed in backward.

Within a block the centres are ordered [K, classes], so that sums and maxima over k run over whole vectors.
"""

import torch
from torch import Tensor

from ..reference.pairs import TINY_NORM

# Logits of rows and centres that are there at once: so many as stay in a CPU's cache, and so many that a GPU
# is busy for longer than the host with launching them.
_BLOCK = 1 << 19
_GPU_BLOCK = 1 << 24


def blocks(x: Tensor, classes: int, per_class: int) -> list[tuple[int, int]]:
    most = _BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    step = max(1, min(classes, most // max(1, len(x) * per_class)))
    return [(start, min(start + step, classes)) for start in range(0, classes, step)]


def unit_and_inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows, and 1 / their length: 0, with a gradient of 0, for a row of zeros."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = length <= TINY_NORM
    inverse = torch.where(is_zero, 0.0, 1 / torch.where(is_zero, 1.0, length))
    return x * inverse, inverse


def through_norm(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    along = (gradient * unit).sum(-1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1).mul_(inverse)


class CenterBlock:
    """The centres of the classes from ``start`` to ``stop``, and how the rows see them."""

    def __init__(self, centers: Tensor, start: int, stop: int, per_class: int, dtype: torch.dtype) -> None:
        self.start, self.stop, self.per_class = start, stop, per_class
        # As rows: the centres may be the columns of a matrix.
        rows = centers[start * per_class : stop * per_class].to(dtype).contiguous()
        rows = rows.view(-1, per_class, centers.shape[1])
        unit, self.inverse = unit_and_inverse(rows.transpose(0, 1))
        self.unit = unit.contiguous()  # [K, classes, D]
        self.flat = self.unit.flatten(0, 1)

    def own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where in this block the rows' classes are ``[N, 1]``, and which are here at all."""
        place = (labels - self.start)[:, None]
        here = (place >= 0) & (place < self.stop - self.start)
        return torch.where(here, place, 0), here
