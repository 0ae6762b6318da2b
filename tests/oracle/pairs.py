"""The losses in float64, row by row: the papers' formulas and their derivatives written out.

Nothing here imports dml_cuda or uses autograd, and no trick is shared with the kernels: a row's kept
similarities go in, its loss and its derivatives come out.
"""

import inspect
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Part:
    """A sum that is averaged on its own. A unit is the row, or, where ``pairs`` is given, a pair.

    Losses that are logarithms log(1 + x), of pairs or of the row, count as 0 where 1 + x is 1 in its dtype.
    """

    loss: float
    pairs: int | None = None
    nonzero: int | None = None  # of the pairs, where they are no logarithms
    logarithms: np.ndarray | None = None


@dataclass
class Row:
    """The loss of a row, and its derivatives by the similarities of its kept pairs.

    Positives belong to the first part, negatives to the last.
    """

    parts: list[Part]
    by_pos: np.ndarray
    by_neg: np.ndarray


@dataclass
class Truth:
    losses: np.ndarray  # [N] of the rows
    loss: float  # after the reduction; or [4], not yet divided
    grad_emb: np.ndarray  # [N, D]
    grad_ref: np.ndarray | None  # [M, D], None when the rows are paired among themselves
    kept: np.ndarray  # [N, M] bool: the pairs that count
    weights: np.ndarray  # [N, M] dL / ds


def log_sum_exp(logits, plus_one=False):
    """And the share of each logit in the sum."""
    if plus_one:
        value, shares = log_sum_exp(np.append(logits, 0.0))
        return value, shares[:-1]
    if len(logits) == 0:
        return -np.inf, logits
    top = logits.max()
    exponentials = np.exp(logits - top)
    return top + np.log(exponentials.sum()), exponentials / exponentials.sum()


def softplus(x):
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    return np.where(x >= 0, 1.0, np.exp(-np.abs(x))) / (1.0 + np.exp(-np.abs(x)))


def multi_similarity(pos, neg, alpha=2.0, beta=50.0, base=0.5):
    pull, pos_shares = _log_one_plus(-alpha * (pos - base))
    push, neg_shares = _log_one_plus(beta * (neg - base))
    part = Part(pull / alpha + push / beta, logarithms=np.array([pull, push]))
    return Row([part], -pos_shares, neg_shares)


def _log_one_plus(logits):
    """log(1 + sum exp) without losing a small sum beside the 1."""
    if len(logits) == 0 or logits.max() <= 0:
        total = np.exp(logits).sum()
        return np.log1p(total), np.exp(logits) / (1 + total)
    return log_sum_exp(logits, plus_one=True)


def circle(pos, neg, m=0.4, gamma=80.0, detach_weights=True):
    if len(pos) == 0 or len(neg) == 0:
        return Row([Part(0.0)], 0 * pos, 0 * neg)
    weight_pos, weight_neg = np.maximum(1 + m - pos, 0.0), np.maximum(neg + m, 0.0)
    pull, pos_shares = log_sum_exp(-gamma * weight_pos * (pos - (1 - m)))
    push, neg_shares = log_sum_exp(gamma * weight_neg * (neg - m))
    derivative_pos, derivative_neg = -gamma * weight_pos, gamma * weight_neg
    if not detach_weights:  # the product rule's other half: d relu(1 + m - s) = -1, d relu(s + m) = 1
        derivative_pos = derivative_pos + gamma * (pos - (1 - m)) * (weight_pos > 0)
        derivative_neg = derivative_neg + gamma * (neg - m) * (weight_neg > 0)
    open_ = sigmoid(pull + push)
    return Row(
        [Part(softplus(pull + push))],
        open_ * pos_shares * derivative_pos,
        open_ * neg_shares * derivative_neg,
    )


def contrastive(pos, neg, pos_margin=0.0, neg_margin=1.0):
    pulled, pushed = np.maximum(pos_margin - pos, 0.0), np.maximum(neg - neg_margin, 0.0)
    parts = [Part(hinges.sum(), len(hinges), np.count_nonzero(hinges != 0)) for hinges in (pulled, pushed)]
    return Row(parts, -1.0 * (pulled > 0), 1.0 * (pushed > 0))


def binomial_deviance(pos, neg, alpha=2.0, beta=40.0, base=0.5):
    pull, push = -alpha * (pos - base), beta * (neg - base)
    p, n = max(len(pos), 1), max(len(neg), 1)
    loss = softplus(pull).sum() / p + softplus(push).sum() / n
    return Row([Part(loss)], -alpha * sigmoid(pull) / p, beta * sigmoid(push) / n)


def nt_xent(pos, neg, temperature=0.07):
    if len(neg) == 0:
        return Row([Part(0.0, len(pos), 0)], 0 * pos, 0 * neg)
    others, shares = log_sum_exp(neg / temperature)
    logits = others - pos / temperature
    losses, wrong = softplus(logits), sigmoid(logits)
    part = Part(losses.sum(), len(pos), logarithms=losses)
    return Row([part], -wrong / temperature, wrong.sum() * shares / temperature)


def sup_con(pos, neg, temperature=0.1):
    if len(pos) == 0:
        return Row([Part(0.0)], 0 * pos, 0 * neg)
    every, shares = log_sum_exp(np.concatenate([pos, neg]) / temperature)
    loss = np.mean(every - pos / temperature)
    by_pos, by_neg = shares[: len(pos)] - 1 / len(pos), shares[len(pos) :]
    return Row([Part(loss)], by_pos / temperature, by_neg / temperature)


def lifted_structure(pos, neg, neg_margin=1.0, pos_margin=0.0):
    pull, pos_shares = log_sum_exp(pos_margin - pos) if len(pos) else (0.0, pos)
    push, neg_shares = log_sum_exp(neg - neg_margin) if len(neg) else (0.0, neg)
    is_open = float(pull + push > 0)
    return Row([Part(max(pull + push, 0.0))], -is_open * pos_shares, is_open * neg_shares)


def nca(pos, neg, softmax_scale=1.0):
    """A negative scale, that of distances, multiplies their squares."""
    if len(pos) == 0 or len(neg) == 0:
        return Row([Part(0.0, int(len(pos) > 0), logarithms=np.zeros(0))], 0 * pos, 0 * neg)
    power = 2 if softmax_scale < 0 else 1
    pull, pos_shares = log_sum_exp(softmax_scale * pos**power)
    push, neg_shares = log_sum_exp(softmax_scale * neg**power)
    loss, wrong = softplus(push - pull), sigmoid(push - pull)
    by_pos, by_neg = (power * softmax_scale * s ** (power - 1) for s in (pos, neg))
    part = Part(loss, 1, logarithms=np.array([loss]))
    return Row([part], -wrong * pos_shares * by_pos, wrong * neg_shares * by_neg)


def tuplet_margin(pos, neg, margin=5.73, scale=64.0):
    if len(neg) == 0:
        return Row([Part(0.0, len(pos), 0)], 0 * pos, 0 * neg)
    angle, sine = np.deg2rad(margin), np.sqrt(np.maximum((1 - pos) * (1 + pos), 0.0))
    turned = np.cos(angle) * pos + np.sin(angle) * sine
    across = np.divide(pos, sine, out=0 * pos, where=sine > 0)
    derivative = np.cos(angle) - np.sin(angle) * across
    others, shares = log_sum_exp(scale * neg)
    logits = others - scale * turned
    losses, wrong = softplus(logits), sigmoid(logits)
    part = Part(losses.sum(), len(pos), logarithms=losses)
    return Row([part], -scale * wrong * derivative, scale * wrong.sum() * shares)


def ranked_list(pos, neg, level=-1.2, temperature=10.0, floor=0.01):
    """The mean excess of the negatives beyond the level, weighted by its exponential."""
    excess = neg - level
    weight = np.where(excess > 0, np.exp(temperature * excess), 0.0)
    total = weight.sum() + floor
    mean = (weight * excess).sum() / total
    return Row([Part(mean)], 0 * pos, weight * (1 + temperature * (excess - mean)) / total)


def margin_softmax(pos, neg, scale=64.0, margin=0.0, cosine=1.0, sine=0.0):
    """psi(theta) = cos(theta + angle) - margin of the own class, monotone beyond pi - angle."""
    if len(pos) == 0 or len(neg) == 0:
        return Row([Part(0.0)], 0 * pos, 0 * neg)
    angle, theta = np.arctan2(sine, cosine), np.arccos(np.clip(pos, -1.0, 1.0))
    falls = theta <= np.pi - angle
    turned = np.where(np.abs(pos) <= 1, np.cos(theta + angle), cosine * pos)  # a dot product is no cosine
    psi = np.where(falls, turned, pos - angle * np.sin(angle)) - margin
    across = np.divide(pos, np.sin(theta), out=0 * pos, where=np.sin(theta) > 0)
    derivative = np.where(falls, cosine + sine * across, 1.0)
    pull, pos_shares = log_sum_exp(-scale * psi)
    push, neg_shares = log_sum_exp(scale * neg)
    loss, wrong = softplus(pull + push), sigmoid(pull + push)
    return Row(
        [Part(loss, logarithms=np.array([loss]))],
        -scale * wrong * pos_shares * derivative,
        scale * wrong * neg_shares,
    )


def proxy_anchor(pos, neg, margin=0.1, alpha=32.0):
    pull, pos_shares = _log_one_plus(-alpha * (pos - margin))
    push, neg_shares = _log_one_plus(alpha * (neg + margin))
    parts = [
        Part(pull, int(len(pos) > 0), logarithms=np.array([pull])),
        Part(push, 1, logarithms=np.array([push])),
    ]
    return Row(parts, -alpha * pos_shares, alpha * neg_shares)


def siglip(pos, neg, scale=10.0, bias=-10.0):
    pull, push = -(scale * pos + bias), scale * neg + bias
    loss = softplus(pull).sum() + softplus(push).sum()
    return Row([Part(loss)], -scale * sigmoid(pull), scale * sigmoid(push))


def negatives_lse(pos, neg, temperature=0.07):
    if len(neg) == 0:
        return Row([Part(0.0)], 0 * pos, 0 * neg)
    value, shares = log_sum_exp(neg / temperature)
    return Row([Part(value)], 0 * pos, shares / temperature)


ROWS = {
    "multi_similarity": multi_similarity,
    "circle": circle,
    "contrastive": contrastive,
    "binomial_deviance": binomial_deviance,
    "nt_xent": nt_xent,
    "sup_con": sup_con,
    "lifted_structure": lifted_structure,
    "nca": nca,
    "tuplet_margin": tuplet_margin,
    "ranked_list": ranked_list,
    "margin_softmax": margin_softmax,
    "proxy_anchor": proxy_anchor,
    "siglip": siglip,
    "negatives_lse": negatives_lse,
}
# Distances where the similarity is one, with its sign turned.
MARGINS = ("base", "pos_margin", "neg_margin", "softmax_scale")
REPEATS = ("contrastive", "nt_xent", "tuplet_margin")  # a pair that is listed twice counts twice


def _unit(points):
    largest = np.abs(points).max(axis=1, initial=0.0, keepdims=True)
    scaled = points / np.where(largest > 0, largest, 1.0)  # of which no square overflows
    norm = np.linalg.norm(scaled, axis=1, keepdims=True)
    length = norm * largest
    return np.where(length > 1e-12, scaled / np.where(norm > 0, norm, 1.0), 0.0), length


def _through_norm(gradient, unit, length):
    along = (unit * gradient).sum(axis=1, keepdims=True)
    return np.where(length > 1e-12, (gradient - along * unit) / np.where(length > 0, length, 1.0), 0.0)


def _similarities(x, y, q, r, similarity, rounded):
    """``[N, M]``; ``rounded`` imitates products of coordinates in a narrower type."""
    if rounded is None:
        if not similarity.startswith("euclidean"):
            return x @ y.T
        squares = np.array([((row - y) ** 2).sum(axis=1) for row in x]).reshape(len(x), len(y))
        return -np.sqrt(squares)
    products = rounded(q) @ rounded(r).T
    if similarity in ("cosine", "euclidean"):
        products = products / _unit(q)[1] / _unit(r)[1].T
    if not similarity.startswith("euclidean"):
        return products
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * products
    return -np.sqrt(np.maximum(squares, 0.0))


def mined(s, positives, negatives, epsilon):
    """The columns of one row that the multi-similarity miner keeps."""
    if epsilon is None:
        return positives, negatives
    if len(positives) == 0 or len(negatives) == 0:
        return positives[:0], negatives[:0]
    return (
        positives[s[positives] - epsilon < s[negatives].max()],
        negatives[s[negatives] + epsilon > s[positives].min()],
    )


def _columns(i, s, row_labels, col_labels, own, mine_self_pair, epsilon):
    """The kept positives and negatives of row i. ``own`` is the column of the row itself, if any."""
    every = np.arange(s.shape[1])
    same = col_labels == row_labels[i]
    positives, negatives = every[same], every[~same]
    if not mine_self_pair:
        positives, negatives = positives[positives != own], negatives[negatives != own]
    positives, negatives = mined(s[i], positives, negatives, epsilon)
    return positives[positives != own], negatives


def _listed(i, indices, repeats):
    lists = [cols[rows == i] for rows, cols in (indices[:2], indices[2:])]
    return lists if repeats else [np.unique(cols) for cols in lists]


def _numbers(x):
    return None if x is None else x.detach().double().cpu().numpy()


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
    indices=None,
    self_index=None,
    mine_self_pair=True,
    rounded=None,
    levels=False,
    undivided=None,
    **options,
):
    """Loss and gradients.

    ``upstream [N]`` is the gradient of the rows' losses for ``reduction="none"``; ``indices`` are listed
    pairs; ``self_index [N]`` the columns that are the rows themselves; ``levels`` says that margins of
    distances come as levels of the similarity, as the kernels take them.
    """
    square = ref_emb is None
    q = _numbers(embeddings)
    r = q if square else _numbers(ref_emb)
    if indices is None:
        row_labels = labels.cpu().numpy()
        col_labels = row_labels if square else ref_labels.cpu().numpy()
    else:
        indices = [index.cpu().numpy() for index in indices]
    n, m = len(q), len(r)
    normalize = similarity in ("cosine", "euclidean")
    (x, q_length), (y, r_length) = (_unit(p) if normalize else (p, None) for p in (q, r))
    distance = similarity.startswith("euclidean")
    if distance and not levels:
        defaults = {name: p.default for name, p in inspect.signature(ROWS[loss]).parameters.items()}
        margins = {name: value for name, value in (defaults | options).items() if name in MARGINS}
        options |= {name: -value for name, value in margins.items()}
    s = _similarities(x, y, q, r, similarity, rounded)
    own = np.arange(n) if square else np.full(n, -1) if self_index is None else self_index.cpu().numpy()

    rows, kept = [], np.zeros((n, m), dtype=bool)
    places = []
    for i in range(n):
        if indices is None:
            positives, negatives = _columns(
                i, s, row_labels, col_labels, own[i], mine_self_pair and not square, epsilon
            )
        else:
            positives, negatives = _listed(i, indices, loss in REPEATS)
        rows.append(ROWS[loss](s[i, positives], s[i, negatives], **options))
        places.append((positives, negatives))
        kept[i, positives] = kept[i, negatives] = True

    parts = len(rows[0].parts) if rows else 0
    losses = np.array([[part.loss for part in row.parts] for row in rows]).reshape(n, parts)
    counted = "mean" if reduction == "sum" else reduction
    counts = [_count(rows, k, kept, losses, counted, embeddings.dtype) for k in range(parts)]
    if undivided is not None:
        scale = undivided
    else:
        scale = [1.0 if reduction in ("sum", "none") else 1 / max(u, 1) for u in counts]
    per_row = np.ones(n) if upstream is None else _numbers(upstream)
    weights = np.zeros((n, m))
    for i, (row, (positives, negatives)) in enumerate(zip(rows, places, strict=True)):
        np.add.at(weights[i], positives, per_row[i] * scale[0] * row.by_pos)
        np.add.at(weights[i], negatives, per_row[i] * scale[parts - 1] * row.by_neg)

    grad_x, grad_y = _gradients(weights, x, y, distance)
    if square:
        grad_x = grad_x + grad_y
    if normalize:
        grad_x = _through_norm(grad_x, x, q_length)
        grad_y = _through_norm(grad_y, y, r_length)
    if undivided is None:
        total = float(sum(losses[:, k].sum() * scale[k] for k in range(parts)))
    else:
        two = [0.0] * (2 - parts)
        total = np.array([*losses.sum(axis=0), *two, *counts, *two])
    return Truth(losses.sum(axis=1), total, grad_x, None if square else grad_y, kept, weights)


def _count(rows, k, kept, losses, reduction, dtype):
    """What a mean divides part k by: a number of rows or of pairs."""
    if reduction == "none":
        return 1
    parts = [row.parts[k] for row in rows]
    if reduction == "mean_nonzero" and any(part.logarithms is not None for part in parts):
        computed = np.float64 if dtype == torch.float64 else np.float32
        found = [() if part.logarithms is None else part.logarithms for part in parts]
        counts = [
            np.count_nonzero(1 + np.expm1(logs).astype(computed) != 1) for logs in map(np.asarray, found)
        ]
        return sum(counts if parts[0].pairs is not None else np.minimum(counts, 1))
    if parts[0].pairs is not None:
        return sum(part.nonzero if reduction == "mean_nonzero" else part.pairs for part in parts)
    if reduction == "mean":
        return len(rows)
    return (losses[:, k] != 0).sum() if reduction == "mean_nonzero" else kept.any(axis=1).sum()


def _gradients(weights, x, y, distance):
    """By x and by y, as if they were different points. At distance 0 the gradient is 0."""
    if not distance:
        return weights @ y, weights.T @ x
    grad_x, grad_y = np.zeros_like(x), np.zeros_like(y)
    for i, row in enumerate(x):
        apart = y - row
        d = np.sqrt((apart**2).sum(axis=1))
        pull = np.where(d > 0, weights[i] / np.where(d > 0, d, 1.0), 0.0)[:, None] * apart
        grad_x[i] += pull.sum(axis=0)
        grad_y -= pull
    return grad_x, grad_y


def mining_margin(embeddings, labels, ref_emb, ref_labels, epsilon, *, similarity="cosine", rounded=None):
    """How far the pair nearest to its mining threshold is from it: nearer than rounding, nobody can tell."""
    if epsilon is None:
        return np.inf
    square = ref_emb is None
    q = _numbers(embeddings)
    r = q if square else _numbers(ref_emb)
    x, y = (_unit(p)[0] if similarity in ("cosine", "euclidean") else p for p in (q, r))
    s = _similarities(x, y, q, r, similarity, rounded)
    row_labels = labels.cpu().numpy()
    col_labels = row_labels if square else ref_labels.cpu().numpy()
    margin = np.inf
    for i in range(len(q)):
        own = i if square else -1
        pos, neg = _columns(i, s, row_labels, col_labels, own, True, None)
        if len(pos) and len(neg):
            to_pos = np.abs(s[i, pos] - epsilon - s[i, neg].max()).min()
            margin = min(margin, to_pos, np.abs(s[i, neg] + epsilon - s[i, pos].min()).min())
    return margin
