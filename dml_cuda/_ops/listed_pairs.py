"""The losses of pairs given as lists of indices, at the cost of the pairs listed.

The similarities of the listed pairs, and what their weights add to the gradients, are kernels of their own
(``pair_products``, ``pair_sums``), as is the log-sum-exp of each row's pairs; the formulas between are
elementwise. Nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from .._inputs.traced import is_traced
from ..losses._formula import Formula, Losses, Pairs, log_one_plus, reduce
from ..reference.pairs import NEAR, full_precision, negated_root, squared_distances
from .autograd import call


class SortedPairs(NamedTuple):
    """Pairs of one kind, sorted by row, then column."""

    rows: Tensor  # [P] ascending
    cols: Tensor  # [P]
    offsets: Tensor  # [N + 1], where each row's pairs begin
    fresh: Tensor  # [P] bool, False for the repetition of a pair
    columns: int  # M
    square: bool = False  # whether column j is row j


def sort_pairs(rows: Tensor, cols: Tensor, n: int, m: int) -> SortedPairs:
    """Sorts pairs of ``n`` rows and ``m`` columns.

    An index out of range is an error on the CPU; elsewhere it becomes column ``m``, which is none: its
    similarity is NaN.
    """
    return SortedPairs(*torch.ops.dml_cuda.pair_sort.default(rows, cols, n, m), m)


def of_rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` of one dimension, with a gradient that is summed in the same order every time."""
    return torch.nn.functional.embedding(index, values[:, None])[:, 0]


def _negated_distances(x: Tensor, y: Tensor, pairs: SortedPairs, products: Tensor) -> Tensor:
    """As reference._negated_distances, of pairs."""
    rows, cols = pairs.rows, pairs.cols.clamp(max=max(y.shape[0] - 1, 0))  # a column out of range: NaN anyway
    of_x = x.square().sum(1)
    lengths = of_rows(of_x, rows) + of_rows(of_x if y is x else y.square().sum(1), cols)
    squares = lengths - 2 * products
    with torch.no_grad():
        near = squares < NEAR * lengths
        if x.device.type == "cpu" and not is_traced(x):
            (few,) = near.nonzero(as_tuple=True)
            exact = squares.index_put((few,), squared_distances(x, y, rows[few], cols[few]))
        else:  # the numbers cannot be looked at, or not without waiting
            exact = squared_distances(x, y, rows, cols)
    return negated_root(squares, near, exact)


def similarities(x: Tensor, y: Tensor, pairs: SortedPairs, similarity: str) -> Tensor:
    """``[P]``, differentiable, from points as ``full_precision`` makes them."""
    products = call("pair_products", x, y, pairs.rows, pairs.cols, pairs.offsets)
    if similarity.startswith("euclidean"):
        return _negated_distances(x, y, pairs, products)
    return products


class ListedPairs(Pairs):
    """Pairs of one kind and their similarities ``[P]``; a repetition counts only where the formula says
    so. ``rounds``: log(1 + sum) is 0 where 1 + sum is 1 in the dtype, as for the reference."""

    def __init__(self, s: Tensor, pairs: SortedPairs, repeats: bool, rounds: bool = False) -> None:
        self.rounds = rounds
        self.s, self.rows, self.cols, self.offsets = s, pairs.rows, pairs.cols, pairs.offsets
        self.columns, self.square = pairs.columns, pairs.square
        self.repeated = None if repeats else ~pairs.fresh
        self.count = self.number(torch.ones_like(pairs.fresh))

    def spread(self, of_rows: Tensor) -> Tensor:
        return of_rows[self.rows]

    def spread_columns(self, of_columns: Tensor) -> Tensor:
        last = max(self.columns - 1, 0)  # a column out of range: NaN anyway
        return of_columns[self.cols.clamp(max=last)]

    def lse(self, logits: Tensor, plus_one: bool = False) -> Tensor:
        if self.repeated is not None:
            logits = torch.where(self.repeated, float("-inf"), logits)
        value = call("segment_logsumexp", logits, self.offsets, plus_one)
        return log_one_plus(value) if plus_one and self.rounds else value

    def sum(self, terms: Tensor) -> Tensor:
        if self.repeated is not None:
            terms = torch.where(self.repeated, 0.0, terms)
        # In float64: a row may have many.
        total = torch.segment_reduce(terms.double(), "sum", offsets=self.offsets, initial=0)
        return total.to(terms.dtype)

    def number(self, which: Tensor) -> Tensor:
        if self.repeated is not None:
            which = which & ~self.repeated
        up_to = torch.nn.functional.pad(which.cumsum(0), (1, 0))
        return up_to[self.offsets].diff()


def measured_pairs(
    embeddings: Tensor, ref_emb: Tensor | None, indices: Sequence[Tensor], similarity: str
) -> tuple[tuple[Tensor, Tensor], tuple[SortedPairs, SortedPairs]]:
    """The similarities of the positives and of the negatives, and the sorted pairs that they are of."""
    x = full_precision(embeddings, similarity)
    y = x if ref_emb is None else full_precision(ref_emb, similarity)
    kinds = (sort_pairs(*indices[k : k + 2], x.shape[0], y.shape[0]) for k in (0, 2))
    pos, neg = (pairs._replace(square=ref_emb is None) for pairs in kinds)
    return (similarities(x, y, pos, similarity), similarities(x, y, neg, similarity)), (pos, neg)


def reduced_loss(
    formula: type[Formula],
    params: Sequence[float],
    found: tuple[Tensor, Tensor],
    pairs: tuple[SortedPairs, SortedPairs],
    reduction: str,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The loss from what ``measured_pairs`` gives."""
    rounds = reduction == "mean_nonzero"
    pos, neg = (ListedPairs(s, each, formula.repeats, rounds) for s, each in zip(found, pairs, strict=True))
    losses, valid = formula.row(pos, neg, *params), (pos.count + neg.count) > 0
    nonzero = formula.is_nonzero(losses) if isinstance(losses, Tensor) else None
    return reduce(losses, valid, reduction, nonzero, row_weights)


def losses(
    formula: type[Formula],
    params: Sequence[float | Tensor],
    embeddings: Tensor,
    ref_emb: Tensor | None,
    indices: Sequence[Tensor],
    similarity: str,
) -> Losses:
    """What the formula gives for the listed pairs, not yet reduced."""
    found, pairs = measured_pairs(embeddings, ref_emb, indices, similarity)
    kinds = (ListedPairs(s, each, formula.repeats) for s, each in zip(found, pairs, strict=True))
    return formula.row(*kinds, *params)


def pair_loss(
    formula: type[Formula],
    params: Sequence[float],
    embeddings: Tensor,
    ref_emb: Tensor | None,
    indices: Sequence[Tensor],
    similarity: str,
    reduction: str,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The loss of the listed pairs, float32 or float64."""
    with _autocast.off(embeddings.device):
        found, pairs = measured_pairs(embeddings, ref_emb, indices, similarity)
        return reduced_loss(formula, params, found, pairs, reduction, row_weights)
