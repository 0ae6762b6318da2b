"""The losses of triplets given as lists of indices, at the cost of the triplets, or of the pairs, listed."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from .._inputs.traced import is_traced
from ..reference.pairs import full_precision, similarity_matrix
from ..reference.triplets import Terms, recomputed
from .autograd import call
from .devices import has_kernel
from .listed_pairs import SortedPairs, of_rows, similarities, sort_pairs

_AREA = 1 << 20  # triplets of listed pairs that are looked at together
# On a CPU: so many pairs are multiplied as a matrix in the time that one triplet of a list takes otherwise.
_PAIRS_PER_TRIPLET = 16


class Triplets(NamedTuple):
    """Triplets as lists."""

    anchors: Tensor  # [T]
    positives: Tensor  # [T]
    negatives: Tensor  # [T]
    there: Tensor | None = None  # [T] bool, False for one that does not count; None where all do
    ascending: bool = True  # whether the anchors are known to ascend


def _segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """``[N]`` the sum of each segment, in float64: one may be long; integers exactly."""
    if values.dtype == torch.long:
        return torch.nn.functional.pad(values.cumsum(0), (1, 0))[offsets].diff()
    total = torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0)
    return total.to(values.dtype)


def _in_order(listed: Triplets) -> Triplets:
    """In the order of their anchors."""
    if listed.ascending:
        return listed
    can_look = listed.anchors.device.type == "cpu" and not is_traced(listed.anchors)
    if can_look and bool((listed.anchors[1:] >= listed.anchors[:-1]).all()):
        return listed
    anchors, order = torch.sort(listed.anchors, stable=True)
    there = None if listed.there is None else listed.there[order]
    return Triplets(anchors, listed.positives[order], listed.negatives[order], there)


class _Points:
    """Points that pairs of are measured: by the kernels of listed pairs, each of them; or, where a list on a
    CPU is longer than that of all pairs, all of them once (the gradients that a pair listed often gets are
    then added in the order of the list); or, for reference, by the matrix of PyTorch."""

    def __init__(self, embeddings: Tensor, ref_emb: Tensor | None, similarity: str, fused: bool) -> None:
        self.x = full_precision(embeddings, similarity)
        self.y = self.x if ref_emb is None else full_precision(ref_emb, similarity)
        self.similarity, self.fused = similarity, fused
        self._matrix: Tensor | None = None

    def distances(self, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """``[P]`` of pairs of ascending rows of ``x`` and columns; NaN for an index out of range."""
        n, m = x.shape[0], self.y.shape[0]
        outside = (rows < 0) | (rows >= n) | (cols < 0) | (cols >= m)
        rows = rows.clamp(0, max(n - 1, 0))
        many = x.device.type == "cpu" and len(rows) >= n * m > 0
        if many or not self.fused:
            every = self._every(x)
            if len(every) == 0:
                return torch.full_like(rows, torch.nan, dtype=x.dtype) + x.sum() * 0
            return torch.where(outside, torch.nan, every.gather(0, rows * m + cols.clamp(0, m - 1)))
        return self._listed(x, rows, torch.where(outside, m, cols))

    def _listed(self, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        offsets = torch.searchsorted(rows, torch.arange(x.shape[0] + 1, device=rows.device))
        fresh = torch.ones_like(rows, dtype=torch.bool)
        pairs = SortedPairs(rows, cols, offsets, fresh, self.y.shape[0])
        return -similarities(x, self.y, pairs, self.similarity)

    def _every(self, x: Tensor) -> Tensor:
        """``[N M]`` of all pairs, row by row; those of the rows themselves are computed once."""
        if x is self.x and self._matrix is not None:
            return self._matrix
        if self.fused:
            n, m = x.shape[0], self.y.shape[0]
            # Copies: of one row or column, flatten gives a view with a stride of 0.
            rows = torch.arange(n, device=x.device)[:, None].expand(n, m).contiguous().flatten()
            cols = torch.arange(m, device=x.device).expand(n, m).contiguous().flatten()
            every = self._listed(x, rows, cols)
        else:
            every = -similarity_matrix(x, self.y, self.similarity).flatten()
        if x is self.x:
            self._matrix = every
        return every


def _is_long(listed: Triplets, n: int, m: int) -> bool:
    """Whether all pairs of n rows and m columns cost less than those of the triplets, one by one."""
    on_cpu = listed.anchors.device.type == "cpu"
    return on_cpu and n * m > 0 and listed.anchors.shape[0] * _PAIRS_PER_TRIPLET >= n * m


def _long_sums(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    listed: Triplets,
    similarity: str,
    terms: Terms,
    row_params: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if ref_emb is not None and ref_emb.dtype != embeddings.dtype:
        wider = torch.promote_types(embeddings.dtype, ref_emb.dtype)
        embeddings, ref_emb = embeddings.to(wider), ref_emb.to(wider)
    wanted = [x is not None and x.requires_grad for x in (embeddings, ref_emb, row_params)]
    save = torch.is_grad_enabled() and any(wanted)
    how = terms.kind, terms.margin, similarity, save, save and wanted[1]
    return call("triplet_list_loss", embeddings, ref_emb, *listed[:4], row_params, *how)[:2]


def triplet_sums(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    listed: Triplets,
    similarity: str,
    terms: Terms,
    row_params: Tensor | None,
    swap: bool,
    fused: bool,
    each: bool = True,
) -> tuple[Tensor, Tensor]:
    """Each row's loss ``[N]`` and counts ``[N, 2]``, as the op ``triplet_loss`` has them. ``each`` tells that
    the gradient of every row is wanted, not only that of their sum."""
    columns = embeddings if ref_emb is None else ref_emb
    if fused and not (swap or each) and _is_long(listed, embeddings.shape[0], columns.shape[0]):
        with _autocast.off(embeddings.device):
            return _long_sums(embeddings, ref_emb, listed, similarity, terms, row_params)
    with _autocast.off(embeddings.device):
        points = _Points(embeddings, ref_emb, similarity, fused)
        anchors, positives, negatives, there, _ = _in_order(listed)
        n = embeddings.shape[0]
        if there is not None and len(points.y) == 0:  # no column that an absent triplet could name
            return points.x.sum(1) * 0 + points.y.sum() * 0, anchors.new_zeros(n, 2)
        if there is None:
            there = torch.ones_like(anchors, dtype=torch.bool)
        else:  # what does not count must still be some pair
            positives, negatives = (torch.where(there, index, 0) for index in (positives, negatives))
        d_p, d_n = (points.distances(points.x, anchors, cols) for cols in (positives, negatives))
        if swap:
            rows, order = torch.sort(positives, stable=True)
            between = points.distances(points.y, rows, negatives[order])
            d_n = torch.minimum(d_n, torch.empty_like(between).index_copy(0, order, between))
        rows = anchors.clamp(0, max(n - 1, 0))
        losses, active, considered = terms.each(
            d_p, d_n, there, None if row_params is None else of_rows(row_params, rows)
        )
        offsets = torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))
        counts = torch.stack([_segment_sums(each.long(), offsets) for each in (active, considered)], dim=1)
        return _segment_sums(losses, offsets), counts


def crossed_sums(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    pairs: tuple[Tensor, Tensor, Tensor, Tensor],
    similarity: str,
    terms: Terms,
    row_params: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`triplet_sums`, of every triplet that a listed positive makes with a listed negative of the
    same anchor: no triplet is listed. Waits for the device, to know how many there are."""
    with _autocast.off(embeddings.device):
        points = _Points(embeddings, ref_emb, similarity, fused)
        n, m = points.x.shape[0], points.y.shape[0]
        pos, neg = (sort_pairs(*pairs[k : k + 2], n, m) for k in (0, 2))
        found = [points.distances(points.x, each.rows, each.cols) for each in (pos, neg)]
        offsets = [each.offsets for each in (pos, neg)]
        both = (offsets[0].diff() > 0) & (offsets[1].diff() > 0)
        (rows,) = both.nonzero(as_tuple=True)
        losses, counts = points.x.new_zeros(n), points.x.new_zeros(n, 2, dtype=torch.long)
        if len(rows) == 0:
            return losses + points.x.sum() * 0 + points.y.sum() * 0, counts
        most = [int(each.diff()[rows].max()) for each in offsets]

        def padded(kind: int, d: Tensor, some: Tensor, places: range) -> tuple[Tensor, Tensor]:
            """``[B, K]`` the distances of some rows' pairs, from one place in their lists to another."""
            begin, end = offsets[kind][some, None], offsets[kind][some + 1, None]
            at = begin + torch.arange(places.start, places.stop, device=begin.device)
            return d[at.clamp(max=len(d) - 1)], at < end

        def part(d_p, d_n, row_params, some, places) -> tuple[Tensor, Tensor]:
            d_p, has_p = padded(0, d_p, some, places)
            d_n, has_n = padded(1, d_n, some, range(most[1]))
            own = None if row_params is None else of_rows(row_params, some)
            kept = has_p[:, :, None] & has_n[:, None, :]
            return terms.sums(d_p[:, :, None], d_n[:, None, :], kept, own)

        panel = max(1, _AREA // most[1])
        for some in rows.split(max(1, _AREA // (most[0] * most[1]))):
            for begin in range(0, most[0], panel):
                places = range(begin, min(begin + panel, most[0]))
                more = recomputed(part, *found, row_params, some, places)
                losses = losses.index_add(0, some, more[0])
                counts = counts.index_add(0, some, more[1])
        return losses, counts


def distances(
    embeddings: Tensor, ref_emb: Tensor | None, rows: Tensor, cols: Tensor, similarity: str
) -> Tensor:
    """``[P]`` the negated similarities of listed pairs, rows ascending."""
    points = _Points(embeddings, ref_emb, similarity, has_kernel(embeddings.device))
    return points.distances(points.x, rows, cols)
