"""The losses in plain PyTorch: the readable truth that the kernels are proved against.

Every function stores the whole N x M matrix of similarities and leaves the gradient to autograd. Use
it to check the formulas against the papers, for double backward, and on devices without a kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import check_batch, check_options
from .formulas import Circle, Formula, MultiSimilarity

TINY_NORM = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """Each row over its length; a zero row, and its gradient, stays zero."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    is_zero = norm <= TINY_NORM
    return torch.where(is_zero, 0.0, x / torch.where(is_zero, 1.0, norm))


def _similarities(embeddings: Tensor, ref_emb: Tensor, similarity: str) -> Tensor:
    """``[N, M]`` cosine similarities or dot products. A zero row has similarity and gradient 0."""
    if similarity == "dot":
        return embeddings @ ref_emb.T
    return unit_rows(embeddings) @ unit_rows(ref_emb).T


def _pairs(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks ``[N, M]`` of positive and negative pairs; a point is no pair with itself."""
    rows = labels.long()  # the unsigned types do not compare with the signed ones
    columns = rows if ref_labels is None else ref_labels.long()
    same = rows[:, None] == columns[None, :]
    positive = same.clone()
    if ref_labels is None:
        positive.fill_diagonal_(False)
    return positive, ~same


def mine(s: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The multi-similarity miner: hard positives and negatives, relative to each row's hardest other."""
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


def without_self(positive: Tensor, self_ref: Tensor) -> Tensor:
    """Takes from the mask ``[N, M]`` each row's pair with ``self_ref`` ``[N]``, its own column (or -1)."""
    columns = torch.arange(positive.shape[1], device=positive.device)
    return positive & (columns[None, :] != self_ref[:, None])


def first_columns(mask: Tensor, ref_count: Tensor) -> Tensor:
    """Takes from the mask ``[N, M]`` the columns from ``ref_count`` on."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) < ref_count)


def listed(indices: Sequence[Tensor], n: int, m: int) -> tuple[Tensor, Tensor]:
    """Masks ``[N, M]`` of the pairs listed as anchors, positives, anchors, negatives."""
    masks = []
    for rows, cols in (indices[:2], indices[2:]):
        mask = torch.zeros(n, m, dtype=torch.bool, device=rows.device)
        masks.append(mask.index_put((rows.long(), cols.long()), torch.ones_like(rows, dtype=torch.bool)))
    return masks[0], masks[1]


def _logsumexp(logits: Tensor, keep: Tensor, plus_one: bool) -> Tensor:
    """``log(sum_kept exp(logits))`` by row, or ``log(1 + sum ..)``; -inf, or 0, where none is kept."""
    logits = torch.where(keep, logits, float("-inf"))
    if plus_one:
        logits = torch.cat([logits.new_zeros(len(logits), 1), logits], dim=1)
        return torch.logsumexp(logits, dim=1)
    some = keep.any(dim=1)
    # A row of -inf alone would give NaN gradients: give it a harmless row, then put -inf in its place.
    value = (
        torch.logsumexp(torch.where(some[:, None], logits, 0.0), dim=1) if logits.shape[1] else logits.sum(1)
    )
    return torch.where(some, value, float("-inf"))


def reduce(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """One number from the rows' losses ``[N]``; ``valid`` marks the rows with a kept pair."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / max(len(losses), 1)
    counted = losses != 0 if reduction == "mean_nonzero" else valid
    return total / counted.sum().clamp(min=1)


def pair_loss(
    formula: Formula,
    embeddings: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    self_ref: Tensor | None = None,
    ref_count: Tensor | None = None,
    indices: Sequence[Tensor] | None = None,
    similarity: str = "cosine",
    reduction: str = "mean",
) -> Tensor:
    """The loss that ``formula`` makes of a batch.

    ``self_ref`` ``[N]`` names for each row the row of ``ref_emb`` that is the same point (or -1): mining
    sees that pair, the loss does not. Only the first ``ref_count`` rows of ``ref_emb`` take part.
    ``indices`` lists the pairs (anchors, positives, anchors, negatives) instead of ``labels``.
    """
    columns = embeddings if ref_emb is None else ref_emb
    s = _similarities(embeddings, columns, similarity)
    if indices is not None:
        positive, negative = listed(indices, *s.shape)
    else:
        positive, negative = _pairs(labels, ref_labels)
        if ref_count is not None:
            positive, negative = (first_columns(mask, ref_count) for mask in (positive, negative))
        if epsilon is not None:
            positive, negative = mine(s, positive, negative, epsilon)
        if self_ref is not None:
            positive = without_self(positive, self_ref)
    lse_pos = _logsumexp(formula.positive_logits(s), positive, formula.plus_one)
    lse_neg = _logsumexp(formula.negative_logits(s), negative, formula.plus_one)
    return reduce(formula.row_losses(lse_pos, lse_neg), (positive | negative).any(dim=1), reduction)


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    similarity: str = "cosine",
    reduction: str = "mean",
) -> Tensor:
    """As :func:`dml_cuda.functional.multi_similarity_loss`, in plain PyTorch."""
    labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
    check_options(similarity, reduction, epsilon)
    return pair_loss(
        MultiSimilarity(alpha, beta, base),
        embeddings,
        labels,
        epsilon=epsilon,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        similarity=similarity,
        reduction=reduction,
    )


def circle_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    m: float = 0.4,
    gamma: float = 80.0,
    detach_weights: bool = True,
    epsilon: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    similarity: str = "cosine",
    reduction: str = "mean_nonzero",
) -> Tensor:
    """As :func:`dml_cuda.functional.circle_loss`, in plain PyTorch."""
    labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
    check_options(similarity, reduction, epsilon)
    return pair_loss(
        Circle(m, gamma, detach_weights),
        embeddings,
        labels,
        epsilon=epsilon,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        similarity=similarity,
        reduction=reduction,
    )
