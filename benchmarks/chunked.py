"""The losses in plain PyTorch, a chunk of rows at a time: what one writes when the N x N matrix is too big.

Backward computes each chunk's similarities again instead of keeping them. That is what torch.utils.checkpoint
is for; it is written out here because resident memory still grew with N^2 under it when it was measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_cuda import CircleLoss, MultiSimilarityLoss
from dml_cuda.losses._formula import reduce
from dml_cuda.reference.pairs import MaskedPairs, mine

_ELEMENTS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 25}  # about the fastest of the powers of two
_FEWEST_ROWS = 64
_MODULES = {"multi_similarity": MultiSimilarityLoss(), "circle": CircleLoss()}  # with the default options


def _chunks(unit: Tensor):
    n = len(unit)
    rows = max(_FEWEST_ROWS, _ELEMENTS_PER_CHUNK[unit.device.type] // max(n, 1))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _kept_pairs(unit: Tensor, labels: Tensor, rows: slice, epsilon: float | None):
    """Similarities of ``rows`` to all rows, and the masks of the positives and negatives kept."""
    s = unit[rows] @ unit.T
    positive = labels[rows, None] == labels
    negative = ~positive
    positive.diagonal(rows.start).fill_(False)
    if epsilon is not None:
        positive, negative = mine(s, positive, negative, epsilon)
    return s, positive, negative


def _row_losses(loss: str, s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    call = _MODULES[loss].call
    return call.formula.row(MaskedPairs(s, positive), MaskedPairs(s, negative), *call.params)


class _RowLosses(torch.autograd.Function):
    """Each row's loss, and whether it kept a pair; backward computes a chunk again to differentiate it."""

    @staticmethod
    def forward(ctx, unit: Tensor, labels: Tensor, loss: str, epsilon: float | None):
        ctx.save_for_backward(unit, labels)
        ctx.options = loss, epsilon
        losses = unit.new_empty(len(unit))
        valid = torch.empty_like(losses, dtype=torch.bool)
        for rows in _chunks(unit):
            s, positive, negative = _kept_pairs(unit, labels, rows, epsilon)
            losses[rows] = _row_losses(loss, s, positive, negative)
            valid[rows] = (positive | negative).any(dim=1)
        ctx.mark_non_differentiable(valid)
        return losses, valid

    @staticmethod
    def backward(ctx, grad_losses: Tensor, _):
        unit, labels = ctx.saved_tensors
        loss, epsilon = ctx.options
        grad = torch.zeros_like(unit)
        for rows in _chunks(unit):
            s, positive, negative = _kept_pairs(unit, labels, rows, epsilon)
            with torch.enable_grad():
                s.requires_grad_()
                losses = _row_losses(loss, s, positive, negative)
            (grad_s,) = torch.autograd.grad(losses, s, grad_losses[rows])
            grad[rows] += grad_s @ unit
            grad.addmm_(grad_s.T, unit[rows])
        return grad, None, None, None


def chunked_loss(embeddings: Tensor, labels: Tensor, loss: str, epsilon: float | None) -> Tensor:
    """The loss of a batch with its default options, in memory that grows with N only."""
    losses, valid = _RowLosses.apply(F.normalize(embeddings, dim=1), labels, loss, epsilon)
    return reduce(losses, valid, _MODULES[loss].reduction)


@torch.no_grad()
def kept_share(embeddings: Tensor, labels: Tensor, epsilon: float | None) -> float:
    """The share of all pairs that mining keeps."""
    unit = F.normalize(embeddings, dim=1)
    kept = 0
    for rows in _chunks(unit):
        _, positive, negative = _kept_pairs(unit, labels, rows, epsilon)
        kept += int(positive.sum()) + int(negative.sum())
    return kept / (len(unit) * (len(unit) - 1))
