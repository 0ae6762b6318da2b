"""Statistics that miners collect as pytorch-metric-learning's do: distances, or similarities."""

import torch
from torch import Tensor

from .._ops.listed_triplets import distances
from .mined_triplets import Selected


def _in_units(d: Tensor, mined: Selected) -> Tensor:
    """Distances for a euclidean miner, else the similarities that d negates."""
    return d if mined.similarity.startswith("euclidean") else -d


def extremes(mined: Selected) -> dict[str, float]:
    """The easiest and the hardest of the selected pairs and triplets; without those that do not exist."""
    lists = tuple(mined)
    pos_anchors, positives, neg_anchors, negatives = (
        lists if len(lists) == 4 else (*lists[:2], lists[0], lists[2])
    )
    with torch.no_grad():
        d_p = distances(mined.embeddings, mined.ref_emb, pos_anchors, positives, mined.similarity)
        d_n = distances(mined.embeddings, mined.ref_emb, neg_anchors, negatives, mined.similarity)
    stats = {}
    if len(d_p) and len(d_n) and "all" not in (mined.selection.positives, mined.selection.negatives):
        stats |= {"easiest_triplet": (d_p - d_n).min(), "hardest_triplet": (d_p - d_n).max()}
    if len(d_p):
        stats |= {"easiest_pos_pair": d_p.min(), "hardest_pos_pair": d_p.max()}
    if len(d_n):
        stats |= {"easiest_neg_pair": d_n.max(), "hardest_neg_pair": d_n.min()}
    return {name: _in_units(value, mined).item() for name, value in stats.items()}


def _sums(mined: Selected) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[N]`` float64 each: a row's number of positives and of negatives, and the sums of their distances."""
    parts = [[mined.embeddings.new_zeros(0, dtype=torch.float64)] * 4]  # of no rows
    for begin, s, positive, negative in mined.blocks(measured=True):
        masks = mined.without_self_pairs(begin, positive), negative
        d = _in_units(-s, mined).double()
        parts.append([m.sum(1).double() for m in masks] + [torch.where(m, d, 0.0).sum(1) for m in masks])
    return tuple(torch.cat(blocks) for blocks in zip(*parts, strict=True))


def average_triplet(mined: Selected) -> dict[str, float]:
    """Means over all triplets of the batch, of P positives and Q negatives a row: P Q triplets."""
    p, q, sum_p, sum_q = _sums(mined)
    triplets = (p * q).sum()
    pos, neg = (q * sum_p).sum() / triplets, (p * sum_q).sum() / triplets
    gap = neg - pos if mined.similarity.startswith("euclidean") else pos - neg
    return {
        "avg_triplet_margin": gap.item(),
        "pos_pair_dist": pos.item(),
        "neg_pair_dist": neg.item(),
    }


def average_pairs(mined: Selected) -> dict[str, float]:
    """Means over all positive and all negative pairs of the batch; 0 where there is none."""
    p, q, sum_p, sum_q = (row_values.sum() for row_values in _sums(mined))
    return {
        "pos_pair_dist": (sum_p / p.clamp(min=1)).item(),
        "neg_pair_dist": (sum_q / q.clamp(min=1)).item(),
    }
