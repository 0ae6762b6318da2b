"""The losses in plain PyTorch: the readable truth that the kernels are proved against.

Every function stores the whole N x M matrix of similarities and leaves the gradient to autograd. Use
it to check the formulas against the papers, for double backward, and on devices without a kernel.
"""

import torch
from torch import Tensor

from ._arguments import check_arguments

_TINY_NORM = 1e-12


def _similarities(embeddings: Tensor, ref_emb: Tensor, similarity: str) -> Tensor:
    """``[N, M]`` cosine similarities or dot products. A zero row has similarity and gradient 0."""
    if similarity == "dot":
        return embeddings @ ref_emb.T

    def unit(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        is_zero = norm <= _TINY_NORM
        return torch.where(is_zero, 0.0, x / torch.where(is_zero, 1.0, norm))

    return unit(embeddings) @ unit(ref_emb).T


def _pairs(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks ``[N, M]`` of positive and negative pairs; a point is no pair with itself."""
    rows = labels.long()  # the unsigned types do not compare with the signed ones
    columns = rows if ref_labels is None else ref_labels.long()
    same = rows[:, None] == columns[None, :]
    positive = same.clone()
    if ref_labels is None:
        positive.fill_diagonal_(False)
    return positive, ~same


def _mine(s: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
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


def _kept_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    similarity: str,
    epsilon: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities ``[N, M]``, and the masks of the positives and negatives that count."""
    s = _similarities(embeddings, embeddings if ref_emb is None else ref_emb, similarity)
    positive, negative = _pairs(labels, ref_labels)
    if epsilon is not None:
        positive, negative = _mine(s, positive, negative, epsilon)
    return s, positive, negative


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


def _reduce(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """One number from the rows' losses ``[N]``; ``valid`` marks the rows with a kept pair."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    count = {
        "mean": lambda: torch.tensor(len(losses), device=losses.device),
        "mean_nonzero": lambda: (losses != 0).sum(),
        "mean_valid": lambda: valid.sum(),
    }[reduction]()
    return total / count.clamp(min=1)


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
    check_arguments(embeddings, labels, ref_emb, ref_labels, similarity, reduction, epsilon)
    s, positive, negative = _kept_pairs(embeddings, labels, ref_emb, ref_labels, similarity, epsilon)
    pull = _logsumexp(-alpha * (s - base), positive, plus_one=True) / alpha
    push = _logsumexp(beta * (s - base), negative, plus_one=True) / beta
    return _reduce(pull + push, (positive | negative).any(dim=1), reduction)


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
    check_arguments(embeddings, labels, ref_emb, ref_labels, similarity, reduction, epsilon)
    s, positive, negative = _kept_pairs(embeddings, labels, ref_emb, ref_labels, similarity, epsilon)
    fixed = s.detach() if detach_weights else s
    lse_pos = _logsumexp(-gamma * torch.relu(1 + m - fixed) * (s - (1 - m)), positive, plus_one=False)
    lse_neg = _logsumexp(gamma * torch.relu(fixed + m) * (s - m), negative, plus_one=False)
    both = positive.any(dim=1) & negative.any(dim=1)
    # softplus, by logaddexp: torch's own softplus drops the last digits above 20.
    total = torch.where(both, lse_pos + lse_neg, 0.0)
    losses = torch.where(both, torch.logaddexp(total, torch.zeros_like(total)), 0.0)
    return _reduce(losses, (positive | negative).any(dim=1), reduction)
