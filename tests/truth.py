"""The losses by brute force: float64, one pair at a time, straight from the papers' formulas.

Nothing here imports dml_cuda or uses autograd, and no trick is shared with the kernels: it is slow, and
there is nothing in it to get wrong twice in the same way.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Truth:
    losses: np.ndarray  # [N] of the rows
    loss: float  # after the reduction
    grad_emb: np.ndarray  # [N, D]
    grad_ref: np.ndarray | None  # [M, D], None when the rows are paired among themselves
    kept: np.ndarray  # [N, M] bool: the pairs that count


def _log_one_plus_sum_exp(logits):
    top = max([0.0, *logits])
    if top == 0.0:
        return math.log1p(math.fsum(math.exp(z) for z in logits))
    return top + math.log(math.exp(-top) + math.fsum(math.exp(z - top) for z in logits))


def _log_sum_exp(logits):
    top = max(logits)
    return top + math.log(math.fsum(math.exp(z - top) for z in logits))


def multi_similarity_row(pos, neg, alpha=2.0, beta=50.0, base=0.5):
    """Loss of one row and its derivatives by the similarities of its kept pairs."""
    pull = [-alpha * (s - base) for s in pos]
    push = [beta * (s - base) for s in neg]
    lse_pull, lse_push = _log_one_plus_sum_exp(pull), _log_one_plus_sum_exp(push)
    loss = lse_pull / alpha + lse_push / beta
    return loss, [-math.exp(z - lse_pull) for z in pull], [math.exp(z - lse_push) for z in push]


def circle_row(pos, neg, m=0.4, gamma=80.0, detach_weights=True):
    """As above; a row with one kind of pair only has no loss."""
    if not pos or not neg:
        return 0.0, [0.0] * len(pos), [0.0] * len(neg)
    weight_pos = [max(0.0, 1 + m - s) for s in pos]
    weight_neg = [max(0.0, s + m) for s in neg]
    z_pos = [-gamma * w * (s - (1 - m)) for s, w in zip(pos, weight_pos, strict=True)]
    z_neg = [gamma * w * (s - m) for s, w in zip(neg, weight_neg, strict=True)]
    lse_pos, lse_neg = _log_sum_exp(z_pos), _log_sum_exp(z_neg)
    total = lse_pos + lse_neg
    loss = max(total, 0.0) + math.log1p(math.exp(-abs(total)))
    sigmoid = 1 / (1 + math.exp(-total)) if total >= 0 else math.exp(total) / (1 + math.exp(total))
    slope_pos = [-gamma * w for w in weight_pos]
    slope_neg = [gamma * w for w in weight_neg]
    if not detach_weights:  # the product rule's other half: d relu(1 + m - s) = -1, d relu(s + m) = 1
        slope_pos = [
            k + gamma * (s - (1 - m)) * (w > 0) for k, s, w in zip(slope_pos, pos, weight_pos, strict=True)
        ]
        slope_neg = [
            k + gamma * (s - m) * (w > 0) for k, s, w in zip(slope_neg, neg, weight_neg, strict=True)
        ]
    by_pos = [sigmoid * math.exp(z - lse_pos) * k for z, k in zip(z_pos, slope_pos, strict=True)]
    by_neg = [sigmoid * math.exp(z - lse_neg) * k for z, k in zip(z_neg, slope_neg, strict=True)]
    return loss, by_pos, by_neg


ROWS = {"multi_similarity": multi_similarity_row, "circle": circle_row}


def _unit(points):
    norm = np.array([math.sqrt(math.fsum(v * v for v in q)) for q in points])
    unit = np.array([q / length if length > 1e-12 else 0 * q for q, length in zip(points, norm, strict=True)])
    return unit.reshape(points.shape), norm


def _through_norm(gradient, unit, norm):
    rows = [
        (g - (x @ g) * x) / length if length > 1e-12 else 0 * g
        for g, x, length in zip(gradient, unit, norm, strict=True)
    ]
    return np.array(rows).reshape(gradient.shape)


def _kept_columns(s, positives, negatives, epsilon):
    """The columns of one row that count, by the multi-similarity miner's rule."""
    if epsilon is None:
        return positives, negatives
    if not positives or not negatives:
        return [], []
    hardest_negative = max(s[j] for j in negatives)
    hardest_positive = min(s[j] for j in positives)
    return (
        [j for j in positives if s[j] - epsilon < hardest_negative],
        [j for j in negatives if s[j] + epsilon > hardest_positive],
    )


def brute_force(
    loss,
    embeddings,
    labels,
    *,
    ref_emb=None,
    ref_labels=None,
    epsilon=None,
    similarity="cosine",
    reduction="none",
    upstream=None,
    **options,
):
    """Loss and gradient. ``upstream [N]`` is the gradient of the rows' losses for ``reduction="none"``."""
    square = ref_emb is None
    q = embeddings.detach().double().numpy()
    r = q if square else ref_emb.detach().double().numpy()
    row_labels = labels.tolist()
    col_labels = row_labels if square else ref_labels.tolist()
    n, m = len(q), len(r)
    x, q_norm = _unit(q) if similarity == "cosine" else (q, None)
    y, r_norm = _unit(r) if similarity == "cosine" else (r, None)

    losses, kept = np.zeros(n), np.zeros((n, m), dtype=bool)
    derivatives = np.zeros((n, m))
    for i in range(n):
        s = [float(x[i] @ y[j]) for j in range(m)]
        positives = [j for j in range(m) if row_labels[i] == col_labels[j] and not (square and i == j)]
        negatives = [j for j in range(m) if row_labels[i] != col_labels[j]]
        positives, negatives = _kept_columns(s, positives, negatives, epsilon)
        losses[i], by_pos, by_neg = ROWS[loss](
            [s[j] for j in positives], [s[j] for j in negatives], **options
        )
        for j, w in zip(positives + negatives, by_pos + by_neg, strict=True):
            kept[i, j], derivatives[i, j] = True, w

    counts = {
        "mean": n,
        "mean_nonzero": int((losses > 0).sum()),
        "mean_valid": int(kept.any(axis=1).sum()),
        "sum": 1,
        "none": 1,
    }
    scale = 1 / max(counts[reduction], 1)
    per_row = np.full(n, scale)
    if upstream is not None:
        per_row = per_row * upstream.detach().double().numpy()

    grad_x, grad_y = np.zeros_like(x), np.zeros_like(y)
    for i in range(n):
        for j in np.flatnonzero(derivatives[i]):
            w = per_row[i] * derivatives[i, j]
            grad_x[i] += w * y[j]
            grad_y[j] += w * x[i]
    if square:
        grad_x = grad_x + grad_y
    if similarity == "cosine":
        grad_x = _through_norm(grad_x, x, q_norm)
        grad_y = _through_norm(grad_y, y, r_norm)
    return Truth(losses, math.fsum(losses) * scale, grad_x, None if square else grad_y, kept)
