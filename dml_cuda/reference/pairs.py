"""The pair losses in plain PyTorch, which the kernels are tested against.

Every function materialises the N x M matrix of similarities and leaves the gradient to autograd. Use
``backend="reference"`` of the losses to compare formulas with papers, for double backward, and on devices
without a kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._inputs.traced import is_traced
from ..losses._formula import Formula, Pairs, joined, log_one_plus, reduce, softplus, sums_and_counts

TINY_NORM = 1e-12
NEAR = 2.0**-8  # |x - y|^2 below this fraction of |x|^2 + |y|^2 is computed from differences
_BLOCK = 1 << 22  # elements of differences in memory at once


def unit_rows(x: Tensor) -> Tensor:
    """Each row divided by its L2 norm; a zero row has value and gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    is_zero = norm <= TINY_NORM
    return torch.where(is_zero, 0.0, x / torch.where(is_zero, 1.0, norm))


def normalizes(similarity: str) -> bool:
    """Whether a similarity, as the ops name it, normalises rows."""
    return similarity in ("cosine", "euclidean")


def full_precision(embeddings: Tensor, similarity: str) -> Tensor:
    """``[N, D]`` contiguous, at least float32, with unit rows if the similarity normalises."""
    points = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return (unit_rows(points) if normalizes(similarity) else points).contiguous()


def squared_distances(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``[P]`` squared distances of the pairs (x[rows], y[cols]), from differences of coordinates."""
    pairs, dim = len(rows), x.shape[1]
    step = max(1, dim if is_traced(x) else _BLOCK // max(pairs, 1))
    squares = x.new_zeros(pairs)
    for begin in range(0, dim, step):
        panel = slice(begin, begin + step)
        squares = squares + (x[:, panel][rows] - y[:, panel][cols]).square().sum(1)
    return squares


def negated_root(squares: Tensor, near: Tensor, exact: Tensor) -> Tensor:
    """-sqrt(squares), with gradient 0 at 0: squared distances as similarities.

    If ``near``, the value is that of ``exact`` and the derivative that of ``squares``.
    """
    squares = torch.where(near, exact + (squares - squares.detach()), squares)
    is_zero = squares <= 0
    return torch.where(is_zero, 0.0, -torch.sqrt(torch.where(is_zero, 1.0, squares)))


def _negated_distances(x: Tensor, y: Tensor) -> Tensor:
    """``[N, M]`` -|x_i - y_j|, from |x|^2 + |y|^2 - 2 x.y.

    Near pairs would lose digits to cancellation: their value, though not their gradient, is computed from
    differences of coordinates.
    """
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = lengths - 2 * (x @ y.T)
    with torch.no_grad():
        near = squares < NEAR * lengths
        if is_traced(x):  # no shape may depend on values
            exact = (x[:, None] - y).square().sum(2)
        else:
            rows, cols = near.nonzero(as_tuple=True)
            exact = squares.index_put((rows, cols), squared_distances(x, y, rows, cols))
    return negated_root(squares, near, exact)


def similarity_matrix(x: Tensor, y: Tensor, similarity: str) -> Tensor:
    """``[N, M]`` similarities of points from :func:`full_precision`."""
    return _negated_distances(x, y) if similarity.startswith("euclidean") else x @ y.T


def _similarities(embeddings: Tensor, ref_emb: Tensor, similarity: str) -> Tensor:
    """``[N, M]`` similarities; the cosine with a zero row and its gradient are 0."""
    if normalizes(similarity):
        embeddings, ref_emb = unit_rows(embeddings), unit_rows(ref_emb)
    return similarity_matrix(embeddings, ref_emb, similarity)


def _pairs(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks ``[N, M]`` of positive and negative pairs, without the diagonal if ``ref_labels`` is None."""
    rows = labels.long()  # unsigned and signed dtypes do not compare
    columns = rows if ref_labels is None else ref_labels.long()
    same = rows[:, None] == columns[None, :]
    positive = same.clone()
    if ref_labels is None:
        positive.fill_diagonal_(False)
    return positive, ~same


def mine(s: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The multi-similarity rule: masks ``[N, M]`` of the kept positives and negatives."""
    s = s.detach()
    inf = float("inf")
    if s.shape[1] == 0:
        return positive, negative
    max_neg = torch.where(negative, s, -inf).amax(dim=1, keepdim=True)
    min_pos = torch.where(positive, s, inf).amin(dim=1, keepdim=True)
    both = positive.any(1, keepdim=True) & negative.any(1, keepdim=True)
    # Written as "not the opposite", so that a NaN keeps its pair and reaches the loss.
    keep_positive = positive & both & ~(s >= max_neg + epsilon)
    keep_negative = negative & both & ~(s <= min_pos - epsilon)
    return keep_positive, keep_negative


def without_self(positive: Tensor, self_index: Tensor) -> Tensor:
    """The mask ``[N, M]`` without each row's pair with the column ``self_index`` ``[N]`` (-1 for none)."""
    columns = torch.arange(positive.shape[1], device=positive.device)
    return positive & (columns[None, :] != self_index[:, None])


def first_columns(mask: Tensor, num_valid_refs: Tensor) -> Tensor:
    """The mask ``[N, M]`` without the columns from ``num_valid_refs`` on."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) < num_valid_refs)


def listed(indices: Sequence[Tensor], n: int, m: int) -> tuple[Tensor, Tensor]:
    """``[N, M]`` int64, how often each pair is listed as anchors, positives, anchors, negatives."""
    times = []
    for rows, cols in (indices[:2], indices[2:]):
        zero, one = rows.new_zeros(n, m, dtype=torch.long), torch.ones_like(rows, dtype=torch.long)
        times.append(zero.index_put((rows.long(), cols.long()), one, accumulate=True))
    return times[0], times[1]


class MaskedPairs(Pairs):
    """Pairs as a matrix: similarities ``[N, M]``, and a mask ``[N, M]`` or how often each pair counts."""

    def __init__(self, s: Tensor, keep: Tensor, square: bool = False, columns: int | None = None) -> None:
        self.s, self.square = s, square
        self.columns = s.shape[1] if columns is None else columns
        self.times = None if keep.dtype == torch.bool else keep
        self.keep = keep if self.times is None else keep > 0
        self.count = keep.sum(1)

    def spread(self, of_rows: Tensor) -> Tensor:
        return of_rows[:, None]

    def spread_columns(self, of_columns: Tensor) -> Tensor:
        return of_columns[None, :]

    def lse(self, logits: Tensor, plus_one: bool = False) -> Tensor:
        if self.times is not None:
            logits = logits + torch.log(self.times.clamp(min=1).to(logits.dtype))
        logits = torch.where(self.keep, logits, float("-inf"))
        if plus_one:
            return log_one_plus(softplus(self._lse(logits)))
        return self._lse(logits)

    def _lse(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 0:
            return logits.sum(1) - float("inf")
        has_pairs = self.count > 0
        # logsumexp of a row of -inf has NaN gradients: replace the row by zeros, then its result by -inf.
        value = torch.logsumexp(torch.where(has_pairs[:, None], logits, 0.0), dim=1)
        return torch.where(has_pairs, value, float("-inf"))

    def sum(self, terms: Tensor) -> Tensor:
        terms = torch.where(self.keep, terms, 0.0)
        return (terms if self.times is None else terms * self.times).sum(1)

    def number(self, which: Tensor) -> Tensor:
        which = which & self.keep
        return (which if self.times is None else which * self.times).sum(1)


def pair_loss(
    formula: type[Formula],
    params: Sequence[float],
    embeddings: Tensor,
    labels: Tensor | None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    epsilon: float | None = None,
    self_index: Tensor | None = None,
    num_valid_refs: Tensor | None = None,
    mine_self_pair: bool = True,
    indices: Sequence[Tensor] | None = None,
    similarity: str = "cosine",
    reduction: str = "mean",
    return_sums: bool = False,
    both_directions: bool = False,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The loss of a batch by a formula.

    ``params`` come from ``formula.params``. ``self_index`` ``[N]`` is for each row the index in ``ref_emb``
    of the same point, or -1: the loss ignores that pair, and mining sees it if ``mine_self_pair``. Only the
    first ``num_valid_refs`` rows of ``ref_emb`` take part. ``indices`` are the pairs (anchors, positives,
    anchors, negatives) to use instead of ``labels``. ``similarity`` is as the ops name it. With
    ``return_sums`` the result is ``[4]``: parts 0 and 1 and their counts. With ``both_directions`` the rows
    of ``ref_emb`` have losses over those of ``embeddings`` too, as rows N to N + M. ``row_weights`` multiply
    the losses of the rows.
    """
    columns = embeddings if ref_emb is None else ref_emb
    s = _similarities(embeddings, columns, similarity)
    if indices is not None:
        positive, negative = listed(indices, *s.shape)
        if not formula.repeats:
            positive, negative = positive > 0, negative > 0
    else:
        positive, negative = _pairs(labels, ref_labels)
        if num_valid_refs is not None:
            positive, negative = (first_columns(mask, num_valid_refs) for mask in (positive, negative))
        if self_index is not None and not mine_self_pair:
            positive, negative = (without_self(mask, self_index) for mask in (positive, negative))
    directions = [(s, positive, negative)]
    if both_directions:
        directions.append((s.T, positive.T, negative.T))
    found = []
    for s, positive, negative in directions:
        if epsilon is not None and indices is None:
            positive, negative = mine(s, positive, negative, epsilon)
        if self_index is not None and indices is None:
            positive = without_self(positive, self_index)
        pos, neg = (MaskedPairs(s, mask, ref_emb is None) for mask in (positive, negative))
        found.append((formula.row(pos, neg, *params), formula.valid(pos, neg)))
    losses, valid = joined([losses for losses, _ in found]), torch.cat([valid for _, valid in found])
    nonzero = formula.is_nonzero(losses) if isinstance(losses, Tensor) else None
    return (sums_and_counts if return_sums else reduce)(losses, valid, reduction, nonzero, row_weights)
