"""Losses that are no function of one row's similarities, in float64: the papers' formulas, pair by pair.

Derivatives are those of autograd. Nothing here imports dml_cuda.
"""

import math

import torch


def unit(points):
    return points / points.norm(dim=1, keepdim=True).clamp(min=1e-300)


def measured(x, y, similarity):
    """``[N, M]`` similarities; a distance with its sign turned."""
    if similarity in ("cosine", "euclidean"):
        x, y = unit(x), unit(y)
    if similarity in ("cosine", "dot"):
        return x @ y.T
    squares = (x[:, None] - y).square().sum(2)
    return -torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


def pairs_of(labels, ref_labels=None):
    """Masks ``[N, M]`` of positives and negatives."""
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)
    positive = same & ~torch.eye(len(labels), dtype=torch.bool) if ref_labels is None else same
    return positive, ~same


def lifted_structure(s, positive, negative, neg_level, pos_level, square=True):
    """``(losses [N] of rows' positives, their number [N])``; the levels are margins of similarities."""
    losses, counts = [], []
    for i in range(len(s)):
        total = s.new_zeros(())
        for j in positive[i].nonzero()[:, 0].tolist():
            logits = s[i][negative[i]] - neg_level
            if square:
                logits = torch.cat([logits, s[j][negative[j]] - neg_level])
            context = torch.logsumexp(logits, 0) if len(logits) else s.new_zeros(())
            hinge = torch.relu(context + pos_level - s[i, j])
            total = total + (hinge.square() / 2 if negative.any() else 0 * hinge)
        losses.append(total)
        counts.append(int(positive[i].sum()))
    return torch.stack(losses), torch.tensor(counts)


def ranked_list(s, positive, negative, margin, Tn, imbalance, level, Tp):
    """``[N]``; the level of the similarity beyond which negatives are too near."""
    losses = []
    for i in range(len(s)):
        parts = []
        for excess, temperature in (
            (level + margin - s[i][positive[i]], Tp),
            (s[i][negative[i]] - level, Tn),
        ):
            excess = excess[excess > 0]
            weights = torch.exp(temperature * excess)
            parts.append((weights * excess).sum() / (weights.sum() + 1e-5 * s.shape[1]))
        losses.append((1 - imbalance) * parts[0] + imbalance * parts[1])
    return torch.stack(losses)


def sub_center_arc_face(x, weights, labels, sub_centers, margin, scale):
    """``[N]``; weights ``[D, C K]``, margin in degrees."""
    cosines = (unit(x) @ unit(weights.T).T).unflatten(1, (-1, sub_centers)).amax(2)
    return _cross_entropy(scale * cosines, labels, lambda i, c: scale * _turned(cosines[i, c], margin))


def _turned(cosine, margin):
    angle, theta = math.radians(margin), torch.acos(cosine)
    beyond = torch.cos(theta) - angle * math.sin(angle)
    return torch.cos(theta + angle) if theta <= math.pi - angle else beyond


def sphere_face(x, weights, labels, margin, scale):
    """``[N]``; weights ``[D, C]``."""
    cosines, norms = unit(x) @ unit(weights.T).T, x.norm(dim=1)

    def own(i, c):
        theta = torch.acos(cosines[i, c])
        k = math.floor(float(theta) * margin / math.pi)
        return scale * norms[i] * ((-1) ** k * torch.cos(margin * theta) - 2 * k)

    return _cross_entropy(scale * norms[:, None] * cosines, labels, own)


def _cross_entropy(logits, labels, own):
    losses = []
    for i, c in enumerate(labels.tolist()):
        if not 0 <= c < logits.shape[1]:
            losses.append(0 * logits[i].sum())
            continue
        row = [own(i, c) if k == c else logits[i, k] for k in range(logits.shape[1])]
        losses.append(torch.logsumexp(torch.stack(row), 0) - row[c])
    return torch.stack(losses)
