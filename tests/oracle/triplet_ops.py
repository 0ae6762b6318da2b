"""Triplets one by one, in float64. Nothing here imports dml_cuda, and no trick is shared with the kernels."""

import math

import numpy as np
import torch

INF = math.inf
TERMS = "hinge", "softplus", "margin"
POSITIVES = "all", "hardest", "easiest"
NEGATIVES = "all", "hardest", "easiest", "semihard", "drawn"
SIMILARITIES = "cosine", "dot", "euclidean", "euclidean_raw"
# The gap d_n - d_p of the triplets that TripletMarginMiner keeps, by type_of_triplets.
INTERVALS = {
    "no miner": (-INF, INF),
    "all": (-INF, 0.2),
    "hard": (-INF, 0.0),
    "semihard": (0.0, 0.2),
    "easy": (0.2, INF),
}


def params(margin=0.1, gap=(-INF, INF), pos=(-INF, INF), neg=(-INF, INF), cutoff=0.5, nonzero=1.4, dim=8):
    return [margin, *gap, *pos, *neg, cutoff, nonzero, float(dim)]


def uniform(seed, i, k):
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    x = mix((mix((seed + gamma * (i + 1)) & mask) + gamma * (k + 1)) & mask)
    return ((x >> 40) + 0.5) * 2.0**-24


def draw_weights(d, cutoff, nonzero, dim):
    """As pytorch-metric-learning's DistanceWeightedMiner has them, of one row's negatives."""
    d = np.maximum(d, cutoff)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = (2 - dim) * np.log(d) - (dim - 3) / 2 * np.log(1 - 0.25 * d**2)
    possible = np.isfinite(logs) & (d < nonzero)
    if not possible.any():
        return np.zeros_like(d)
    return np.where(possible, np.exp(np.where(possible, logs, 0) - logs[possible].max()), 0.0)


def chosen(rule, d, columns, d_pos=None, u=None, numbers=None):
    """The column of ``columns`` that a rule takes, or None."""
    if rule == "semihard":
        columns = [j for j in columns if d[j] > d_pos]
        rule = "nearest"
    if not columns:
        return None
    if rule == "drawn":
        weights = draw_weights(d[columns], *numbers[7:10])
        sums = np.cumsum(weights)
        return columns[int(np.argmax(sums > u * sums[-1]))] if sums[-1] > 0 else None
    order = [d[j] for j in columns]
    return columns[order.index({"nearest": min, "farthest": max}[rule](order))]


def row_pairs(d, i, labels, ref_labels, own, numbers):
    same = [j for j in range(len(ref_labels)) if ref_labels[j] == labels[i] and j != own]
    other = [j for j in range(len(ref_labels)) if ref_labels[j] != labels[i]]
    low, high = numbers[3:5], numbers[5:7]
    return [j for j in same if low[0] <= d[j] <= low[1]], [j for j in other if high[0] <= d[j] <= high[1]]


def row_triplets(d, i, pos, neg, seed, positives, negatives, numbers):
    if positives != "all" and pos:
        pos = [chosen("farthest" if positives == "hardest" else "nearest", d, pos)]
    for k, p in enumerate(pos):
        if negatives == "all":
            found = neg
        else:
            rule = {"hardest": "nearest", "easiest": "farthest"}.get(negatives, negatives)
            n = chosen(rule, d, neg, d[p], seed is not None and uniform(seed, i, k), numbers)
            found = [] if n is None else [n]
        for n in found:
            if numbers[1] < d[n] - d[p] <= numbers[2]:
                yield p, n


def triplet_truth(d, labels, ref_labels, own, row_params, seed, term, positives, negatives, numbers):
    """Sums [N], counts [N, 2], dL/ds [N, M] and the derivative by each row's beta or margin [N], of distances
    [N, M]. row_params: None, the rows' beta of the term margin, or the rows' margins of the others."""
    n_rows = len(labels)
    sums, counts, by_param = np.zeros(n_rows), np.zeros((n_rows, 2), np.int64), np.zeros(n_rows)
    weights = np.zeros(d.shape)
    for i in range(n_rows):
        pos, neg = row_pairs(d[i], i, labels, ref_labels, own[i], numbers)
        for p, n in row_triplets(d[i], i, pos, neg, seed, positives, negatives, numbers):
            counts[i, 1] += 1
            if term == "margin":
                of_pos = d[i, p] - row_params[i] + numbers[0]
                of_neg = row_params[i] - d[i, n] + numbers[0]
                sums[i] += max(of_pos, 0) + max(of_neg, 0)
                counts[i, 0] += int(of_pos > 0) + int(of_neg > 0)
                weights[i, p] -= of_pos > 0
                weights[i, n] += of_neg > 0
                by_param[i] += float(of_neg > 0) - float(of_pos > 0)
                continue
            violation = d[i, p] - d[i, n] + (numbers[0] if row_params is None else row_params[i])
            if term == "hinge":
                value, derivative = max(violation, 0), float(violation > 0)
            else:
                value, derivative = np.logaddexp(0, violation), 1 / (1 + np.exp(-violation))
            sums[i] += value
            counts[i, 0] += value > 0
            weights[i, p] -= derivative
            weights[i, n] += derivative
            by_param[i] += derivative
    return sums, counts, weights, by_param


def unit_rows(x):
    """A row of zeros stays, without a gradient."""
    zero = (x == 0).all(dim=1, keepdim=True)
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, x).norm(dim=1, keepdim=True))


def similarities(x, y, similarity):
    """[N, M], differentiable; the distance's derivative at 0 is 0."""
    if similarity in ("cosine", "euclidean"):
        x, y = unit_rows(x), unit_rows(y)
    if similarity in ("cosine", "dot"):
        return x @ y.T
    square = (x[:, None] - y[None]).square().sum(-1)
    return -torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
