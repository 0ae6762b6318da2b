"""The losses of triplets as their papers write them: a loop over every triplet, in float64."""

import numpy as np

INF = float("inf")


def distances(x, y, similarity):
    """``[N, M]``; of cosine and dot product the negated similarity."""
    x, y = (np.asarray(each, dtype=np.float64) for each in (x, y))
    if similarity in ("cosine", "euclidean"):
        x, y = (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-300) for each in (x, y))
    if similarity.startswith("euclidean"):
        return np.sqrt(((x[:, None] - y[None]) ** 2).sum(2))
    return -(x @ y.T)


def pairs(labels, ref_labels=None, self_index=None):
    """Lists of each row's positives and of its negatives."""
    columns = labels if ref_labels is None else ref_labels
    own = np.arange(len(labels)) if ref_labels is None else self_index
    for i, label in enumerate(labels):
        positives = [j for j in np.flatnonzero(columns == label) if own is None or j != own[i]]
        yield positives, list(np.flatnonzero(columns != label))


def every_triplet(labels, ref_labels=None, self_index=None):
    for i, (positives, negatives) in enumerate(pairs(labels, ref_labels, self_index)):
        yield from ((i, p, n) for p in positives for n in negatives)


def hardest(d, i, columns, largest):
    """The first of the farthest, or of the nearest."""
    if not len(columns):
        return None
    best = (max if largest else min)(d[i, j] for j in columns)
    return next(j for j in columns if d[i, j] == best)


def selected(d, found, positives, negatives, pos_range=(-INF, INF), neg_range=(-INF, INF)):
    """The triplets that strategies choose, from :func:`pairs`."""
    for i, (ps, ns) in enumerate(found):
        if positives != "all":
            ps = [p for p in ps if pos_range[0] <= d[i, p] <= pos_range[1]]
        if negatives != "all":
            ns = [n for n in ns if neg_range[0] <= d[i, n] <= neg_range[1]]
        if positives == "semihard":
            n = hardest(d, i, ns, negatives == "easiest")
            p = None if n is None else hardest(d, i, [p for p in ps if d[i, p] < d[i, n]], True)
            yield from [(i, p, n)] if p is not None else []
            continue
        ps = ps if positives == "all" else [hardest(d, i, ps, positives == "hardest")] if ps else []
        for p in ps:
            if negatives == "semihard":
                n = hardest(d, i, [n for n in ns if d[i, n] > d[i, p]], False)
                chosen = [] if n is None else [n]
            elif negatives == "all":
                chosen = ns
            else:
                chosen = [hardest(d, i, ns, negatives == "easiest")] if ns else []
            yield from ((i, p, n) for n in chosen)


def terms(kind, d_p, d_n, margin, beta=None):
    """The terms of one triplet."""
    if kind == "margin":
        return max(d_p - beta + margin, 0.0), max(beta - d_n + margin, 0.0)
    if kind == "softplus":
        return (np.logaddexp(0.0, d_p - d_n + margin),)
    return (max(d_p - d_n + margin, 0.0),)


def sums(d, triplets, kind, margin, beta=None, between=None):
    """Each row's loss and, for each row, how many terms are above 0, and how many triplets there are. With
    ``between``, distances of columns to columns, the swap."""
    losses, counts = np.zeros(len(d)), np.zeros((len(d), 2), dtype=np.int64)
    for i, p, n in triplets:
        d_n = d[i, n] if between is None else min(d[i, n], between[p, n])
        found = terms(kind, d[i, p], d_n, margin, None if beta is None else beta[i])
        losses[i] += sum(found)
        counts[i] += sum(t > 0 for t in found), 1
    return losses, counts


def log_weights(d, dim, cutoff, nonzero_loss_cutoff):
    """Of a negative at distance d: Wu et al., section 4; -inf where it is never drawn."""
    d = max(d, cutoff)
    if d >= min(nonzero_loss_cutoff, 2.0):
        return -INF
    return -((dim - 2) * np.log(d) + (dim - 3) / 2 * np.log(1 - d * d / 4))
