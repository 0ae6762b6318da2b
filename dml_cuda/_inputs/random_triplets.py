"""Triplets drawn uniformly, so many for each anchor."""

import torch
from torch import Tensor

from .._ops.listed_triplets import Triplets
from .._ops.triplets import Rows


def random_triplets(rows: Rows, per_anchor: int) -> Triplets:
    """``per_anchor`` triplets for each row, positive and negative drawn uniformly and independently.

    By torch's generator, in O((N + M) log M + triplets): the columns of a class are a run of the columns in
    the order of their labels. Waits for nothing; a row without a positive or a negative has triplets that are
    not ``there``.
    """
    labels, columns = rows.labels.long(), rows.labels if rows.ref_labels is None else rows.ref_labels
    n, m, device = len(labels), len(columns), labels.device
    anchors = torch.arange(n, device=device).repeat_interleave(per_anchor, output_size=n * per_anchor)
    if m == 0:
        none = torch.zeros_like(anchors)
        return Triplets(anchors, none, none, none.bool())
    count = torch.full((), m, device=device) if rows.num_valid_refs is None else rows.num_valid_refs.view(())
    at = torch.arange(m, device=device)
    by_label, order = torch.sort(columns.long(), stable=True)
    if rows.num_valid_refs is not None:  # the others after all that exist
        order = order[torch.sort((order >= count).long(), stable=True).indices]
        last = by_label.new_full((), torch.iinfo(torch.long).max)
        by_label = torch.where(at < count, columns.long()[order], last)
    begin, end = (torch.searchsorted(by_label, labels, right=side) for side in (False, True))
    end = torch.minimum(end, count)
    own = at[:n] if rows.ref_emb is None else rows.self_index
    if own is None:
        place = torch.full_like(begin, -1)
    else:  # its place among the columns in that order
        place = torch.empty_like(order).index_copy(0, order, at)[own.clamp(min=0)]
        place = torch.where((own >= 0) & (place >= begin) & (place < end), place, -1)
    positives, negatives = end - begin - (place >= 0).long(), count - (end - begin)

    def draw(among: Tensor) -> Tensor:
        """``[N, K]`` a number below ``among`` ``[N]``."""
        drawn = torch.rand(n, per_anchor, dtype=torch.float64, device=device) * among[:, None]
        return drawn.long()

    p = begin[:, None] + draw(positives)
    p = p + ((place >= 0)[:, None] & (p >= place[:, None])).long()
    q = draw(negatives)
    q = torch.where(q >= begin[:, None], q + (end - begin)[:, None], q)
    there = ((positives > 0) & (negatives > 0)).repeat_interleave(per_anchor, output_size=n * per_anchor)
    p, q = (order[index.flatten().clamp(0, m - 1)] for index in (p, q))
    return Triplets(anchors, p, q, there)
