"""The ranking losses in float64, row by row, as their papers write them, with their derivatives."""

from dataclasses import dataclass

import numpy as np
from oracle.pairs import _gradients, _numbers, _similarities, _through_norm, _unit, sigmoid


@dataclass
class RankingTruth:
    losses: np.ndarray  # [N] of the rows, weighted
    loss: float  # after the reduction
    grad_emb: np.ndarray  # [N, D]
    grad_ref: np.ndarray | None  # [M, D], None when the rows are ranked among themselves
    by_params: dict[str, float]  # the derivatives by temperatures
    weights: np.ndarray  # [N, M] dL / ds


def _ranks(positives, s, temperature):
    """``[P]`` ranks of positives among all of s, ``[P, n]`` what each adds, and its derivative by s."""
    steps = sigmoid((s[None, :] - s[positives][:, None]) / temperature)
    slopes = steps * sigmoid(-(s[None, :] - s[positives][:, None]) / temperature) / temperature
    for j, column in enumerate(positives):
        steps[j, column] = slopes[j, column] = 0.0
    return 1 + steps.sum(1), slopes


def _by_similarities(positives, slopes, by_rank):
    """Of a function of ranks, by s: a rank rises with the other columns and falls with its own."""
    derivative = by_rank @ slopes
    np.add.at(derivative, positives, -by_rank * slopes.sum(1))
    return derivative


def smooth_ap(s, is_positive, temperature=0.01):
    positives = np.flatnonzero(is_positive)
    ranks, slopes = _ranks(positives, s, temperature)
    among = slopes * is_positive
    pos_ranks = _ranks(np.arange(len(positives)), s[positives], temperature)[0]
    count = len(positives)
    by_s = -_by_similarities(positives, slopes, -pos_ranks / ranks**2 / count)
    by_s -= _by_similarities(positives, among, 1 / ranks / count)
    by_temperature = -(by_s * s).sum() / temperature
    return 1 - (pos_ranks / ranks).mean(), by_s, {"temperature": by_temperature}


def recall_at_k(s, is_positive, ks=(1, 2, 4, 8, 16), temperature=0.01, temperature_k=1.0):
    positives = np.flatnonzero(is_positive)
    ranks, slopes = _ranks(positives, s, temperature)
    x = (np.asarray(ks, dtype=np.float64)[:, None] - ranks) / temperature_k
    slope = sigmoid(x) * sigmoid(-x)
    by_s = -_by_similarities(positives, slopes, -slope.mean(0) / temperature_k / len(positives))
    by_params = {
        "temperature": -(by_s * s).sum() / temperature,
        "temperature_k": (slope * x).mean() / temperature_k,
    }
    return 1 - sigmoid(x).mean(), by_s, by_params


def fast_ap(s, is_positive, num_bins=10):
    """Histograms of squared distances, of which each is spread over the two nearest of num_bins + 1 edges."""
    squares, width = 2 - 2 * s, 4 / num_bins
    edges = np.arange(num_bins + 1) * width
    apart = squares[:, None] - edges
    pulses = np.maximum(1 - np.abs(apart) / width, 0.0)  # [n, edges]
    slopes = np.where(pulses > 0, -np.sign(apart), 0.0) / width  # by the squared distance
    here = (pulses * is_positive[:, None]).sum(0)
    pos_below, below = here.cumsum(), pulses.sum(0).cumsum()
    some = here * pos_below > 0
    safe = np.where(some, below, 1.0)
    count = is_positive.sum()
    loss = 1 - (np.where(some, here * pos_below, 0.0) / safe).sum() / count
    # By the histogram at an edge: directly, and by all running sums from there on.
    later = lambda x: np.where(some, x, 0.0)[::-1].cumsum()[::-1]  # noqa: E731
    by_here = np.where(some, pos_below / safe, 0.0) + later(here / safe)
    by_all = later(-here * pos_below / safe**2)
    by_edge = slopes * (by_all + np.where(is_positive[:, None], by_here, 0.0))
    return loss, 2 * by_edge.sum(1) / count, {}


ROWS = {"smooth_ap": smooth_ap, "recall_at_k": recall_at_k, "fast_ap": fast_ap}


def ranking_truth(
    loss,
    embeddings,
    labels,
    *,
    ref_emb=None,
    ref_labels=None,
    self_index=None,
    num_valid_refs=None,
    similarity="cosine",
    reduction="mean_valid",
    upstream=None,
    row_weights=None,
    **params,
):
    """Loss and gradients. ``upstream [N]`` is the gradient of the rows' losses for ``reduction="none"``."""
    square = ref_emb is None
    q = _numbers(embeddings)
    r = q if square else _numbers(ref_emb)
    row_labels = labels.cpu().numpy()
    col_labels = row_labels if square else ref_labels.cpu().numpy()
    n, m = len(q), len(r)
    normalize, distance = similarity in ("cosine", "euclidean"), similarity.startswith("euclidean")
    (x, q_length), (y, r_length) = (_unit(p) if normalize else (p, None) for p in (q, r))
    s = _similarities(x, y, q, r, similarity, None)
    own = np.arange(n) if square else np.full(n, -1) if self_index is None else self_index.cpu().numpy()
    valid_columns = np.arange(m) < (m if num_valid_refs is None else int(num_valid_refs))
    losses, weights, all_params = np.zeros(n), np.zeros((n, m)), [{} for _ in range(n)]
    valid = np.zeros(n, dtype=bool)
    for i in range(n):
        columns = np.flatnonzero(valid_columns & (np.arange(m) != own[i]))
        is_positive = col_labels[columns] == row_labels[i]
        valid[i] = is_positive.any()
        if valid[i]:
            losses[i], weights[i, columns], all_params[i] = ROWS[loss](s[i, columns], is_positive, **params)
    counts = {"mean": n, "mean_valid": valid.sum(), "mean_nonzero": (losses != 0).sum()}
    scale = 1 / max(counts.get(reduction, 1), 1)
    factors = np.ones(n) if row_weights is None else _numbers(row_weights)
    per_row = scale * factors * (np.ones(n) if upstream is None else _numbers(upstream))
    weights = weights * per_row[:, None]
    grad_x, grad_y = _gradients(weights, x, y, distance)
    if square:
        grad_x = grad_x + grad_y
    if normalize:
        grad_x, grad_y = _through_norm(grad_x, x, q_length), _through_norm(grad_y, y, r_length)
    names = {name for found in all_params for name in found}
    by_params = {
        name: sum(w * found.get(name, 0.0) for w, found in zip(per_row, all_params, strict=True))
        for name in names
    }
    total = float((losses * factors).sum() * scale)
    return RankingTruth(losses * factors, total, grad_x, None if square else grad_y, by_params, weights)
