"""The losses of pairs given as lists of indices, at the cost of the pairs listed.

The similarities of the listed pairs, and what their weights add to the gradients, are kernels of their own
(``pair_products``, ``pair_sums``), as is the log-sum-exp of each row's pairs; the formulas between are
elementwise. Nothing here waits for the device.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _autocast
from .formulas import Formula
from .ops import call
from .pairs import full_precision
from .reference import reduce


class SortedPairs(NamedTuple):
    """Pairs of one kind, sorted by row, then column."""

    rows: Tensor  # [P] ascending
    cols: Tensor  # [P]
    offsets: Tensor  # [N + 1], where each row's pairs begin
    fresh: Tensor  # [P] bool, False for the repetition of a pair

    def logits(self, values: Tensor) -> Tensor:
        """-inf for repetitions, so that each pair counts once."""
        return torch.where(self.fresh, values, -float("inf"))


def sort_pairs(rows: Tensor, cols: Tensor, n: int, m: int) -> SortedPairs:
    """Sorts pairs of ``n`` rows and ``m`` columns.

    An index out of range is an error on the CPU; elsewhere it becomes column ``m``, which is none: its
    similarity is NaN.
    """
    return SortedPairs(*torch.ops.dml_cuda.pair_sort.default(rows, cols, n, m))


def similarities(x: Tensor, y: Tensor, pairs: SortedPairs) -> Tensor:
    """``[P]``, differentiable, from points as ``full_precision`` makes them."""
    return call("pair_products", x, y, pairs.rows, pairs.cols, pairs.offsets)


def measured_pairs(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    indices: tuple[Tensor, Tensor, Tensor, Tensor],
    similarity: str,
) -> tuple[tuple[Tensor, Tensor], tuple[SortedPairs, SortedPairs]]:
    """The similarities of the positives and of the negatives, and the sorted pairs that they are of."""
    x = full_precision(embeddings, similarity)
    y = x if ref_emb is None else full_precision(ref_emb, similarity)
    pos, neg = (sort_pairs(*indices[k : k + 2], x.shape[0], y.shape[0]) for k in (0, 2))
    return (similarities(x, y, pos), similarities(x, y, neg)), (pos, neg)


def reduced_loss(
    formula: Formula, found: tuple[Tensor, Tensor], pairs: tuple[SortedPairs, SortedPairs], reduction: str
) -> Tensor:
    """The loss from what ``measured_pairs`` gives."""
    logsumexp = partial(call, "segment_logsumexp")
    (s_pos, s_neg), (pos, neg) = found, pairs
    lse_pos = logsumexp(pos.logits(formula.positive_logits(s_pos)), pos.offsets, formula.plus_one)
    lse_neg = logsumexp(neg.logits(formula.negative_logits(s_neg)), neg.offsets, formula.plus_one)
    some = (pos.offsets.diff() > 0) | (neg.offsets.diff() > 0)
    return reduce(formula.row_losses(lse_pos, lse_neg), some, reduction)


def pair_loss(
    formula: Formula,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    indices: tuple[Tensor, Tensor, Tensor, Tensor],
    similarity: str,
    reduction: str,
) -> Tensor:
    """The loss of the listed pairs, float32 or float64."""
    with _autocast.off(embeddings.device):
        found, pairs = measured_pairs(embeddings, ref_emb, indices, similarity)
        return reduced_loss(formula, found, pairs, reduction)
