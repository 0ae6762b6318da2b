"""Triplets drawn uniformly, a fixed number for each anchor."""

import torch
from torch import Tensor

from .._ops.listed_triplets import Triplets
from .._ops.triplets import Rows, show_nonfinite


def random_triplets(rows: Rows, per_anchor: int) -> Triplets:
    """``per_anchor`` triplets for each row, positive and negative drawn uniformly and independently.

    Uses torch's generator and O((N + M) log M + triplets) time: sorted by label, the columns of a class are
    contiguous. Does not synchronise. The triplets of a row without a positive or a negative are marked as
    absent.
    """
    labels, columns = rows.labels.long(), rows.labels if rows.ref_labels is None else rows.ref_labels
    n, m, device = len(labels), len(columns), labels.device
    anchors = torch.arange(n, device=device).repeat_interleave(per_anchor, output_size=n * per_anchor)
    if m == 0:
        none = torch.zeros_like(anchors)
        return Triplets(anchors, none, none, none.bool())
    count = torch.full((), m, device=device) if rows.num_valid_refs is None else rows.num_valid_refs.view(())
    index = torch.arange(m, device=device)
    by_label, order = torch.sort(columns.long(), stable=True)
    if rows.num_valid_refs is not None:  # invalid columns last
        order = order[torch.sort((order >= count).long(), stable=True).indices]
        last = by_label.new_full((), torch.iinfo(torch.long).max)
        by_label = torch.where(index < count, columns.long()[order], last)
    begin, end = (torch.searchsorted(by_label, labels, right=side) for side in (False, True))
    end = torch.minimum(end, count)
    self_index = index[:n] if rows.ref_emb is None else rows.self_index
    if self_index is None:
        self_rank = torch.full_like(begin, -1)
    else:  # the rank of the row's own column in that order, -1 if it is not among its positives
        self_rank = torch.empty_like(order).index_copy(0, order, index)[self_index.clamp(min=0)]
        is_positive = (self_index >= 0) & (self_rank >= begin) & (self_rank < end)
        self_rank = torch.where(is_positive, self_rank, -1)
    positives, negatives = end - begin - (self_rank >= 0).long(), count - (end - begin)

    def draw(limit: Tensor) -> Tensor:
        """``[N, K]`` integers below ``limit`` ``[N]``."""
        drawn = torch.rand(n, per_anchor, dtype=torch.float64, device=device) * limit[:, None]
        return drawn.long()

    p = begin[:, None] + draw(positives)
    p = p + ((self_rank >= 0)[:, None] & (p >= self_rank[:, None])).long()  # skips the row itself
    q = draw(negatives)
    q = torch.where(q >= begin[:, None], q + (end - begin)[:, None], q)
    exists = ((positives > 0) & (negatives > 0)).repeat_interleave(per_anchor, output_size=n * per_anchor)
    p, q = (show_nonfinite(rows, order[ranks.flatten().clamp(0, m - 1)]) for ranks in (p, q))
    return Triplets(anchors, p, q, exists)
