"""The ranks of a row's positives in plain PyTorch, which the kernels are tested against.

The N P M differences of similarities are computed a block of rows at a time, and again in backward.
"""

import torch
from torch import Tensor

from .._inputs.traced import is_traced
from .pairs import MaskedPairs
from .triplets import AREA, listed_positives, recomputed


def _most_positives(pos: MaskedPairs) -> int:
    """The largest number of positives of a row; synchronises with the device."""
    if is_traced(pos.s):
        return pos.s.shape[1]
    return int(pos.count.max()) if len(pos.count) else 0


def soft_ranks(
    pos: MaskedPairs, neg: MaskedPairs, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``[N, P]`` the rank of each positive among all columns of its row, its rank among the positives, and a
    mask of the positives that exist; P is the largest number of them.

    A column k adds sigmoid((s_k - s_j) / temperature) to the rank of positive j, which begins at 1.
    """
    most = _most_positives(pos)

    def block(s: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns, exists = listed_positives(positive, most)
        steps = torch.sigmoid((s[:, None, :] - s.gather(1, columns)[:, :, None]) / temperature)
        others = torch.arange(s.shape[1], device=s.device) != columns[:, :, None]
        pos_ranks = 1 + torch.where(positive[:, None, :] & others, steps, 0.0).sum(2)
        return pos_ranks + torch.where(negative[:, None, :], steps, 0.0).sum(2), pos_ranks, exists

    n, m = pos.s.shape
    step = max(n, 1) if is_traced(pos.s) else max(1, AREA // max(1, m * most))
    blocks = [
        recomputed(block, *rows)
        for rows in zip(*(x.split(step) for x in (pos.s, pos.keep, neg.keep)), strict=True)
    ]
    return tuple(map(torch.cat, zip(*blocks, strict=True)))


def mean_of_positives(terms: Tensor, exists: Tensor, count: Tensor) -> Tensor:
    """``[N]`` the mean of ``[N, P]`` terms over the positives that exist, 0 where there is none."""
    return torch.where(exists, terms, 0.0).sum(1) / count.clamp(min=1)
