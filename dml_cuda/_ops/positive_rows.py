"""What rows make of their positives alone, without listing them: rows and columns are sorted by label, so the
positives of neighbouring rows lie in one narrow block of the matrix of similarities.

For formulas that are made of others: their negatives are summed by a kernel over all pairs, and the few
positives here. Each block is computed in plain PyTorch, and again in backward: memory is bounded by a block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from ..losses._formula import Pairs, Part
from ..reference.pairs import MaskedPairs, full_precision, similarity_matrix
from .autograd import call, no_second_derivative, register_derivative

_ROWS = 256  # rows of a block
_BLOCK = 1 << 22  # most similarities in memory at once

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

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields rows ``[R]``, columns ``[C]`` and the mask ``[R, C]`` of their positives. Every row that has
        a positive is in one block."""
        columns = self.labels if self.ref_labels is None else self.ref_labels
        row_labels, rows = self.labels.sort(stable=True)
        col_labels, cols = (row_labels, rows) if self.ref_labels is None else columns.sort(stable=True)
        starts = torch.searchsorted(col_labels, row_labels).tolist()
        ends = torch.searchsorted(col_labels, row_labels, right=True).tolist()
        begin = 0
        while begin < len(starts):
            end = min(begin + _ROWS, len(starts))
            while end > begin + 1 and (end - begin) * (ends[end - 1] - starts[begin]) > _BLOCK:
                end = begin + (end - begin) // 2
            these, those = rows[begin:end], cols[starts[begin] : ends[end - 1]]
            if len(those):
                yield these, those, self._positive(these, those)
            begin = end

    def _positive(self, rows: Tensor, cols: Tensor) -> Tensor:
        if self.ref_labels is None:
            return (self.labels[rows][:, None] == self.labels[cols]) & (rows[:, None] != cols)
        positive = self.labels[rows][:, None] == self.ref_labels[cols]
        if self.self_index is not None:
            positive = positive & (self.self_index[rows][:, None] != cols)
        return positive if self.num_valid_refs is None else positive & (cols < self.num_valid_refs)


def _part(formula, similarity, columns, x, y, of_rows, of_columns, params, positive) -> Part:
    s = similarity_matrix(x, y, similarity)
    pairs = MaskedPairs(s, positive, of_columns is not None, columns)
    return _FORMULAS[formula](pairs, of_rows, of_columns, params)


@torch.library.custom_op("dml_cuda::positive_rows", mutates_args=())
def _op(
    x: Tensor,
    y: Tensor | None,
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
    """The fields of Part: losses ``[N]``, in the type of ``x``, and two counts ``[N]`` int64."""
    losses = x.new_zeros(len(x))
    counts, nonzero = (torch.zeros_like(labels) for _ in range(2))
    columns = x if y is None else y
    for rows, cols, positive in _Sides(labels, ref_labels, self_index, num_valid_refs).blocks():
        there = None if of_columns is None else of_columns[cols]
        points = x[rows], columns[cols], of_rows[rows], there, params
        part = _part(formula, similarity, len(columns), *points, positive)
        losses[rows], counts[rows], nonzero[rows] = part
    return losses, counts, nonzero


@_op.register_fake
def _(x, y, of_rows, of_columns, params, labels, *rest):
    return x.new_empty(x.shape[0]), torch.empty_like(labels), torch.empty_like(labels)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd within an op, where it is off."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@torch.library.custom_op("dml_cuda::positive_rows_backward", mutates_args=())
def _op_backward(
    grad_losses: Tensor,
    x: Tensor,
    y: Tensor | None,
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
    inputs = x, y, of_rows, of_columns, params
    grads = [x.new_zeros(0) if point is None else torch.zeros_like(point) for point in inputs]
    grad_x, grad_y, grad_rows, grad_columns, grad_params = grads
    columns, by_columns = (x, grad_x) if y is None else (y, grad_y)
    for rows, cols, positive in _Sides(labels, ref_labels, self_index, num_valid_refs).blocks():
        there = None if of_columns is None else of_columns[cols]
        leaves = [x[rows], columns[cols], of_rows[rows], there, params]
        leaves = [leaf if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
        with _autograd():
            losses = _part(formula, similarity, len(columns), *leaves, positive).losses
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(losses, wanted, grad_losses[rows], materialize_grads=True))
        for grad, at, leaf in zip(
            (grad_x, by_columns, grad_rows, grad_columns), (rows, cols, rows, cols), leaves, strict=False
        ):
            if leaf is not None:
                grad[at] += next(found)  # each index once: not atomic
        grad_params += next(found)
    return tuple(grads)


@_op_backward.register_fake
def _(grad_losses, x, y, of_rows, of_columns, params, *rest):
    inputs = x, y, of_rows, of_columns, params
    return tuple(x.new_empty(0) if point is None else torch.empty_like(point) for point in inputs)


_op_backward.register_autograd(no_second_derivative)


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
    batch,
    of_rows: Tensor,
    of_columns: Tensor | None,
    params: list[float | Tensor],
) -> Part:
    """The losses of the rows of a :class:`Batch` from their positives, and how many they have.

    ``of_rows`` ``[N]`` and ``of_columns`` ``[M]`` go to what ``formula`` was registered with.
    """
    x = full_precision(batch.embeddings, similarity)
    y = None if batch.ref_emb is None else full_precision(batch.ref_emb, similarity)
    values = torch.stack([x.new_zeros(()) + value for value in params])
    ref_labels = None if batch.ref_labels is None else batch.ref_labels.long()
    sides = batch.labels.long(), ref_labels, batch.self_index, batch.num_valid_refs
    return Part(*call("positive_rows", x, y, of_rows, of_columns, values, *sides, formula, similarity))
