"""What rows make of their positives alone: columns are sorted by label, so that a row's positives are one run
of them, and listed for a block of rows at a time.

For formulas that are made of others: their negatives are summed by a kernel over all pairs, and the few
positives here. A block is computed as listed pairs are, and again in backward: memory is bounded by a block.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from .._inputs.batch import Batch
from ..losses._formula import Pairs, Part
from ..reference.pairs import normalizes
from .autograd import call, no_second_derivative, register_derivative
from .centers import through_norm, unit_and_inverse
from .fake import fake_kernel
from .listed_pairs import ListedPairs, SortedPairs, similarities
from .python_ops import python_op

_BLOCK = 1 << 18  # pairs that are listed at once, if they are of several rows

# The losses of rows from their positives, a number of each row and, of a square batch, of each column, and
# parameters; by the name of the formula.
OfPositives = Callable[[Pairs, Tensor, Tensor | None, Tensor], Part]
_FORMULAS: dict[str, OfPositives] = {}


def register(formula: str, of_positives: OfPositives) -> None:
    """Names what :func:`positive_rows` computes."""
    _FORMULAS[formula] = of_positives


class _Sides(NamedTuple):
    """Rows and columns by label; ``ref_labels`` is None where they are the same points."""

    labels: Tensor  # [N] int64
    ref_labels: Tensor | None  # [M]
    self_index: Tensor | None  # [N]
    num_valid_refs: Tensor | None

    def blocks(self) -> Iterator[tuple[slice, SortedPairs]]:
        """Yields rows and the list of their positives, rows numbered from 0: every row that has any once."""
        col_labels, cols = (self.labels if self.ref_labels is None else self.ref_labels).sort(stable=True)
        starts = torch.searchsorted(col_labels, self.labels)
        lengths = torch.searchsorted(col_labels, self.labels, right=True) - starts
        up_to = lengths.cumsum(0).tolist()  # the pairs of the rows so far
        begin, listed = 0, 0
        while begin < len(up_to):
            end = max(bisect_right(up_to, listed + _BLOCK), begin + 1)
            if up_to[end - 1] > listed:
                rows = slice(begin, end)
                yield rows, self._pairs(rows, cols, starts[rows], lengths[rows])
            begin, listed = end, up_to[end - 1]

    def _pairs(self, block: slice, cols: Tensor, starts: Tensor, lengths: Tensor) -> SortedPairs:
        rows = torch.repeat_interleave(lengths)  # row k as often as it has pairs
        shift = starts - (lengths.cumsum(0) - lengths)
        cols_of_pairs = cols[torch.arange(len(rows), device=rows.device) + shift[rows]]
        kept = self._kept(rows + block.start, cols_of_pairs)
        if kept is not None:
            rows, cols_of_pairs = rows[kept], cols_of_pairs[kept]
        offsets = torch.searchsorted(rows, torch.arange(len(lengths) + 1, device=rows.device))
        fresh = torch.ones_like(rows, dtype=torch.bool)
        return SortedPairs(rows, cols_of_pairs, offsets, fresh, len(cols), self.ref_labels is None)

    def _kept(self, rows: Tensor, cols: Tensor) -> Tensor | None:
        """Which of some pairs of one label count; None for all."""
        if self.ref_labels is None:
            return rows != cols
        kept = None if self.self_index is None else self.self_index[rows] != cols
        if self.num_valid_refs is None:
            return kept
        valid = cols < self.num_valid_refs
        return valid if kept is None else kept & valid


def _points(points: Tensor, similarity: str) -> tuple[Tensor, Tensor | None]:
    """As similarities take them, and 1 / their length where they are normalised."""
    points = points.to(_autocast.computed_dtype(points.dtype))
    return unit_and_inverse(points) if normalizes(similarity) else (points.contiguous(), None)


def _block(x: Tensor, rows: slice) -> Tensor:
    """Some rows of ``x``; itself for all of them."""
    return x if rows == slice(0, len(x)) else x[rows]


def _part(
    formula: str,
    pairs: SortedPairs,
    s: Tensor,
    of_rows: Tensor,
    of_columns: Tensor | None,
    params: Tensor,
) -> Part:
    return _FORMULAS[formula](ListedPairs(s, pairs, True), of_rows, of_columns, params)


_BATCH = (
    "Tensor embeddings, Tensor? ref_emb, Tensor of_rows, Tensor? of_columns, Tensor params, Tensor labels, "
    "Tensor? ref_labels, Tensor? self_index, Tensor? num_valid_refs, str formula, str similarity"
)


@python_op(f"positive_rows({_BATCH}) -> (Tensor, Tensor, Tensor)")
def _op(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    of_rows: Tensor,
    of_columns: Tensor | None,
    params: Tensor,
    labels: Tensor,
    ref_labels: Tensor | None,
    self_index: Tensor | None,
    num_valid_refs: Tensor | None,
    formula: str,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of Part: losses ``[N]``, float32 or float64, and two counts ``[N]`` int64."""
    x, _ = _points(embeddings, similarity)
    y = x if ref_emb is None else _points(ref_emb, similarity)[0]
    losses = x.new_zeros(len(x))
    counts, nonzero = (torch.zeros_like(labels) for _ in range(2))
    for rows, pairs in _Sides(labels, ref_labels, self_index, num_valid_refs).blocks():
        s = similarities(_block(x, rows), y, pairs, similarity)
        part = _part(formula, pairs, s, of_rows[rows], of_columns, params)
        losses[rows], counts[rows], nonzero[rows] = part
    return losses, counts, nonzero


@fake_kernel("positive_rows")
def _fake(a):
    losses = a.embeddings.new_empty(a.embeddings.shape[0], dtype=_autocast.computed_dtype(a.embeddings.dtype))
    return losses, torch.empty_like(a.labels), torch.empty_like(a.labels)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd within an op, where it is off."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@python_op(
    f"positive_rows_backward(Tensor grad_losses, {_BATCH}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _op_backward(
    grad_losses: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    of_rows: Tensor,
    of_columns: Tensor | None,
    params: Tensor,
    labels: Tensor,
    ref_labels: Tensor | None,
    self_index: Tensor | None,
    num_valid_refs: Tensor | None,
    formula: str,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients by the first five arguments of the op; ``[0]`` for one that is absent."""
    x, x_inverse = _points(embeddings, similarity)
    y, y_inverse = (x, x_inverse) if ref_emb is None else _points(ref_emb, similarity)
    grad_x, grad_rows, grad_params = (torch.zeros_like(z) for z in (x, of_rows, params))
    grad_y = grad_x if ref_emb is None else torch.zeros_like(y)
    grad_columns = x.new_zeros(0) if of_columns is None else torch.zeros_like(of_columns)
    for rows, pairs in _Sides(labels, ref_labels, self_index, num_valid_refs).blocks():
        s = similarities(_block(x, rows), y, pairs, similarity)
        leaves = [
            z if z is None else z.detach().requires_grad_() for z in (s, of_rows[rows], of_columns, params)
        ]
        with _autograd():
            losses = _part(formula, pairs, *leaves).losses
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad(losses, wanted, grad_losses[rows], materialize_grads=True)
        by_s, grad_rows[rows], *by_columns, by_params = found
        for gradient in by_columns:
            grad_columns += gradient
        grad_params += by_params
        by_x, by_y = _through_similarities(by_s, s, _block(x, rows), y, pairs, similarity)
        grad_x[rows] += by_x
        grad_y += by_y
    if x_inverse is not None:
        grad_x = through_norm(grad_x, x, x_inverse)
        grad_y = grad_y if ref_emb is None else through_norm(grad_y, y, y_inverse)
    by_ref = x.new_zeros(0) if ref_emb is None else grad_y.to(ref_emb.dtype)
    return grad_x.to(embeddings.dtype), by_ref, grad_rows, grad_columns, grad_params


def _through_similarities(
    by_s: Tensor, s: Tensor, x: Tensor, y: Tensor, pairs: SortedPairs, similarity: str
) -> tuple[Tensor, Tensor]:
    """The gradients by the points, from those by the similarities; of unit rows but for what is along them,
    which :func:`through_norm` takes out."""
    distances = similarity.startswith("euclidean")
    # d s / dx = (x - y) / s of s = -|x - y|; 0 at 0.
    weights = torch.where(s == 0, 0.0, -by_s / torch.where(s == 0, 1.0, s)) if distances else by_s
    order, offsets = torch.ops.dml_cuda.column_order.default(pairs.cols, y.shape[0])
    of_columns = weights[order]
    sums = torch.ops.dml_cuda.pair_sums.default
    by_x = sums(weights, y, pairs.cols, pairs.offsets)
    by_y = sums(of_columns, x, pairs.rows[order], offsets)
    if distances and not normalizes(similarity):
        for points, gradient, w, at in ((x, by_x, weights, pairs.offsets), (y, by_y, of_columns, offsets)):
            total = torch.segment_reduce(w, "sum", offsets=at, initial=0)
            gradient.addcmul_(points, total[:, None], value=-1)
    return by_x, by_y


@fake_kernel("positive_rows_backward")
def _fake_backward(a):
    inputs = a.embeddings, a.ref_emb, a.of_rows, a.of_columns, a.params
    none = (a.grad_losses.new_empty(0) for _ in inputs)
    return tuple(next(none) if point is None else torch.empty_like(point) for point in inputs)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_losses, *_):
    saved = ctx.saved_tensors
    with _autocast.off(grad_losses.device):
        grads = call("positive_rows_backward", grad_losses, *saved, *ctx.options)
    found = (None if point is None else grad for point, grad in zip(saved[:5], grads, strict=True))
    return *found, *(None,) * 6


register_derivative("positive_rows", _backward, _setup_context)
register_derivative("positive_rows_backward", no_second_derivative)


def positive_rows(
    formula: str,
    similarity: str,
    batch: Batch,
    of_rows: Tensor,
    of_columns: Tensor | None,
    params: list[float | Tensor],
) -> Part:
    """The losses of the rows of a :class:`Batch` from their positives, and how many they have.

    ``of_rows`` ``[N]`` and ``of_columns`` ``[M]`` go to what ``formula`` was registered with.
    """
    values = torch.stack([of_rows.new_zeros(()) + value for value in params])
    ref_labels = None if batch.ref_labels is None else batch.ref_labels.long()
    sides = batch.labels.long(), ref_labels, batch.self_index, batch.num_valid_refs
    numbers = of_rows, of_columns, values
    points = batch.embeddings, batch.ref_emb
    return Part(*call("positive_rows", *points, *numbers, *sides, formula, similarity))
