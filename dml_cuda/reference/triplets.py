"""The ops ``triplet_loss`` and ``select`` in plain PyTorch, which the kernels are tested against.

A triplet is an anchor i, a positive p and a negative n; distances d are negated similarities. The loss is
computed over all N P Q triplets, a block of rows at a time. Autograd computes the gradient and recomputes the
blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._inputs.traced import is_traced
from ..losses._formula import softplus
from .pairs import first_columns, full_precision, similarity_matrix, without_self

INF = float("inf")
AREA = 1 << 20  # triplets in memory at once
_GOLDEN = 0x9E3779B97F4A7C15


class Params(NamedTuple):
    """The ``params`` of the ops, by name."""

    margin: float
    gap_low: float
    gap_high: float
    pos_low: float
    pos_high: float
    neg_low: float
    neg_high: float
    cutoff: float
    nonzero_loss_cutoff: float
    dim: float


# --- Draws by distance


def _signed(x: int) -> int:
    """The int64 with the same bits."""
    return (x & (2**64 - 1)) - (x >> 63 << 64)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 interpreted as unsigned."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x


def uniform(seed: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
    """A float64 in (0, 1) with 24 random bits for each row and draw number."""
    x = _mix(_mix(seed + _signed(_GOLDEN) * (rows + 1)) + _signed(_GOLDEN) * (draws + 1))
    return (((x >> 40) & ((1 << 24) - 1)).double() + 0.5) * 2.0**-24


def distance_weights(d: Tensor, negative: Tensor, params: Params) -> Tensor:
    """``[..., M]`` weight of each negative at distance d, relative to the row's largest.

    One over the density of distances between points on the unit sphere, q(d) ~ d^(D - 2)
    (1 - d^2 / 4)^((D - 3) / 2), d from the cutoff on: Wu et al., ICCV 2017, section 4.
    """
    d = d.clamp(min=params.cutoff)
    logs = (2 - params.dim) * d.log() - (params.dim - 3) / 2 * (1 - d.square() / 4).log()
    drawn = negative & logs.isfinite() & (d < params.nonzero_loss_cutoff)
    logs = torch.where(drawn, logs, -INF)
    most = logs.amax(-1, keepdim=True) if logs.shape[-1] else logs.sum(-1, keepdim=True)
    weights = torch.where(drawn, (logs - torch.where(drawn.any(-1, keepdim=True), most, 0.0)).exp(), 0.0)
    unknown = negative & d.isnan()  # drawn instead of the others, so that a NaN reaches the loss
    return torch.where(unknown.any(-1, keepdim=True), unknown.to(weights.dtype), weights)


def _draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Columns drawn from weights ``[..., M]`` by numbers ``[..., K]`` in (0, 1), and whether any exists."""
    if weights.shape[-1] == 0:
        return torch.zeros_like(u, dtype=torch.long), torch.zeros_like(u, dtype=torch.bool)
    cumulative = weights.double().cumsum(-1)
    total = cumulative[..., -1:]
    cols = torch.searchsorted(cumulative, (u * total).contiguous(), right=True)
    return cols.clamp(max=weights.shape[-1] - 1), (total > 0).expand_as(cols)


# --- Selection of one column


def _extreme(d: Tensor, mask: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The first column with the largest or the smallest d under a mask, and whether the mask has any."""
    if d.shape[-1] == 0:
        exists = mask.any(-1)
        return exists.long(), exists
    if largest:
        return torch.where(mask, d, -INF).argmax(-1), mask.any(-1)
    return torch.where(mask, d, INF).argmin(-1), mask.any(-1)


def within(d: Tensor, low: float, high: float) -> Tensor:
    """Written as "not outside", so that the pair of a NaN is kept and the NaN reaches the loss."""
    return ~(d < low) & ~(d > high)


def _positive(rule: str, d: Tensor, positive: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """Each row's hardest or easiest positive, and whether it exists."""
    return _extreme(d, positive & within(d, params.pos_low, params.pos_high), rule == "hardest")


def _negative(rule: str, d: Tensor, negative: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """Each row's hardest or easiest negative, and whether it exists."""
    return _extreme(d, negative & within(d, params.neg_low, params.neg_high), rule == "easiest")


def _semihard_negative(d: Tensor, negative: Tensor, d_p: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """For each d_p ``[..., K]`` the nearest negative beyond it, and whether it exists."""
    d = d[..., None, :]
    beyond = (negative & within(d[..., 0, :], params.neg_low, params.neg_high))[..., None, :]
    return _extreme(d, beyond & ~(d <= d_p[..., None]), False)  # true for NaN


# --- Blocks of rows


class _Batch(NamedTuple):
    """Points as :func:`similarity_matrix` expects them, and what defines the pairs."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    labels: Tensor  # [N] int64
    ref_labels: Tensor  # [M] int64
    self_index: Tensor | None  # [N]
    num_valid_refs: Tensor | None
    similarity: str

    @classmethod
    def make(cls, embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, similarity):
        x = full_precision(embeddings, similarity)
        labels = labels.long()
        if ref_emb is None:
            self_index = torch.arange(x.shape[0], device=x.device)
            return cls(x, x, labels, labels, self_index, num_valid_refs, similarity)
        y = full_precision(ref_emb, similarity)
        return cls(x, y, labels, ref_labels.long(), self_index, num_valid_refs, similarity)

    def masks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[K, M]`` masks of the positives and the negatives of rows ``[K]``."""
        positive = self.labels[rows, None] == self.ref_labels
        negative = ~positive
        if self.num_valid_refs is not None:
            positive, negative = (first_columns(mask, self.num_valid_refs) for mask in (positive, negative))
        if self.self_index is not None:
            positive = without_self(positive, self.self_index[rows])
        return positive, negative

    def max_positives(self) -> int:
        """The largest number of positives of a row, at least 1; synchronises with the device."""
        if is_traced(self.x):
            return max(self.y.shape[0], 1)
        columns = self.ref_labels.sort().values
        sizes = torch.searchsorted(columns, self.labels, right=True) - torch.searchsorted(
            columns, self.labels
        )
        return max(int(sizes.max()), 1) if len(sizes) else 1


def listed_positives(positive: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``[B, P]`` the columns of a mask ``[B, M]`` in ascending order, and a mask of the valid ones."""
    listed = torch.sort(positive, dim=1, descending=True, stable=True)
    return listed.indices[:, :most], listed.values[:, :most]


class Terms(NamedTuple):
    """The loss of a triplet as a function of its distances."""

    kind: str  # "hinge", "softplus" or "margin", as in the op
    margin: float
    gap: tuple[float, float]

    def sums(
        self, d_p: Tensor, d_n: Tensor, kept: Tensor, row_params: Tensor | None, gap: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses ``[B]`` and counts ``[B, 2]`` of the triplets in the mask ``kept`` ``[B, P, Q]``.

        ``d_p`` and ``d_n`` broadcast to its shape; ``row_params`` is ``[B]``, the rows' beta of the kind
        ``"margin"``, else their margins instead of ``margin``; ``gap``, which must lie within the terms' gap,
        is ``d_n - d_p`` by default.
        """
        losses, active, considered = self.each(d_p, d_n, kept, row_params, gap)
        counts = torch.stack([active.sum((1, 2)), considered.sum((1, 2))], dim=1)
        return losses.sum((1, 2)), counts

    def each(
        self, d_p: Tensor, d_n: Tensor, kept: Tensor, row_params: Tensor | None, gap: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every triplet's loss, how many of its terms are above 0, and whether it counts."""
        low, high = self.gap
        gap = (d_n - d_p).detach() if gap is None else gap
        considered = kept & ~(gap <= low) & ~(gap > high)  # true for NaN
        if row_params is not None:
            row_params = row_params.view(-1, *(1,) * (kept.ndim - 1))
        if self.kind == "margin":
            beta = row_params
            pull, push = torch.relu(d_p - beta + self.margin), torch.relu(beta - d_n + self.margin)
            losses, active = pull + push, (pull > 0).long() + (push > 0)
        else:
            violation = d_p - d_n + (self.margin if row_params is None else row_params)
            losses = softplus(violation) if self.kind == "softplus" else torch.relu(violation)
            active = (losses > 0).long()
        losses = torch.where(considered, losses, 0.0)
        return losses, torch.where(considered, active, 0), considered


def recomputed(function, *arguments):
    """The function's result, recomputed in backward so that no intermediate tensor is saved."""
    if torch.is_grad_enabled() and not is_traced(arguments[0]):
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    self_index: Tensor | None,
    num_valid_refs: Tensor | None,
    row_params: Tensor | None,
    seed: Tensor | None,
    term: str,
    positives: str,
    negatives: str,
    params: list[float],
    similarity: str,
    swap: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each row's loss ``[N]`` and counts ``[N, 2]`` over its triplets, as the op returns them.

    With ``swap`` a negative's distance is the smaller of those to the anchor and to the positive.
    """
    limits = Params(*params)
    batch = _Batch.make(embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, similarity)
    terms = Terms(term, limits.margin, (limits.gap_low, limits.gap_high))
    n, m = batch.x.shape[0], batch.y.shape[0]
    most = batch.max_positives() if positives == "all" else 1
    wide = negatives in ("all", "semihard") or swap
    step = n if is_traced(batch.x) else max(1, AREA // max(1, m * (most if wide else 1)))
    panel = max(1, AREA // max(1, m)) if wide and not is_traced(batch.x) else max(1, most)

    def block(x: Tensor, y: Tensor, row_params: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        d = -similarity_matrix(x, y, similarity)
        fixed = d.detach()
        positive, negative = batch.masks(rows)
        if positives == "all":
            positive = positive & within(fixed, limits.pos_low, limits.pos_high)
            p, has_p = listed_positives(positive, most)
        else:
            p, has_p = (column[:, None] for column in _positive(positives, fixed, positive, limits))
        losses = x.new_zeros(len(rows)) if m else x.sum(1) * 0
        counts = x.new_zeros(len(rows), 2, dtype=torch.long)
        for begin in range(0, p.shape[1] if m else 0, panel):
            columns = slice(begin, begin + panel)
            part_losses, part_counts = part(
                d, y, negative, p[:, columns], has_p[:, columns], rows, begin, row_params
            )
            losses, counts = losses + part_losses, counts + part_counts
        return losses, counts

    def part(d, y, negative, p, has_p, rows, begin, row_params) -> tuple[Tensor, Tensor]:
        """Losses and counts of the triplets with the positives p ``[B, P]``."""
        fixed = d.detach()
        d_p = d.gather(1, p)
        if negatives == "all":
            near = within(fixed, limits.neg_low, limits.neg_high)
            n, has_n, d_n = None, (negative & near)[:, None, :], d[:, None, :]
        else:
            if negatives == "semihard":
                n, has_n = _semihard_negative(fixed, negative, d_p.detach(), limits)
            elif negatives == "drawn":
                draws = torch.arange(begin, begin + p.shape[1], device=p.device)
                u = uniform(seed, rows[:, None], draws)
                n, has_n = _draw(distance_weights(fixed, negative, limits), u)
            else:
                selected = _negative(negatives, fixed, negative, limits)
                n, has_n = (column[:, None].expand_as(p) for column in selected)
            d_n, has_n, n = d.gather(1, n)[:, :, None], has_n[:, :, None], n[:, :, None]
        gap = (d_n - d_p[:, :, None]).detach()
        if swap:
            between = -similarity_matrix(y[p.flatten()], y, similarity).view(*p.shape, y.shape[0])
            d_n = torch.minimum(d_n, between if n is None else between.gather(2, n))
        return terms.sums(d_p[:, :, None], d_n, has_p[:, :, None] & has_n, row_params, gap)

    losses, counts = [], []
    for rows in torch.arange(n, device=batch.x.device).split(max(1, step)):
        of_rows = None if row_params is None else row_params[rows]
        block_losses, block_counts = recomputed(block, batch.x[rows], batch.y, of_rows, rows)
        losses.append(block_losses)
        counts.append(block_counts)
    return torch.cat(losses), torch.cat(counts)


def select(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    self_index: Tensor | None,
    num_valid_refs: Tensor | None,
    seed: Tensor | None,
    rule: str,
    params: list[float],
    anchors: Tensor | None,
    positives: Tensor | None,
    similarity: str,
) -> tuple[Tensor, Tensor]:
    """The column that a rule selects for each row, or for each pair (anchors, positives), and its similarity,
    as the op returns them. The additional rule ``semihard_positive`` selects the farthest positive that is
    nearer than the column in ``positives``."""
    limits, kind = Params(*params), rule.rpartition("_")[0]
    cols, values = [], []
    with torch.no_grad():
        batch = _Batch.make(embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, similarity)
        all_rows = torch.arange(batch.x.shape[0], device=batch.x.device) if anchors is None else anchors
        draws = torch.zeros_like(all_rows)
        if anchors is not None:
            draws = torch.arange(len(anchors), device=anchors.device) - torch.searchsorted(anchors, anchors)
        step = len(all_rows) if is_traced(batch.x) else max(1, AREA // max(1, batch.y.shape[0]))
        for part in torch.arange(len(all_rows), device=batch.x.device).split(max(1, step)):
            rows = all_rows[part]
            s = similarity_matrix(batch.x[rows], batch.y, similarity)
            d = -s
            positive, negative = batch.masks(rows)
            if rule == "semihard_negative":
                col, exists = _semihard_negative(d, negative, d.gather(1, positives[part, None]), limits)
            elif rule == "semihard_positive":
                nearer = positive & within(d, limits.pos_low, limits.pos_high)
                col, exists = _extreme(d, nearer & ~(d >= d.gather(1, positives[part, None])), True)
            elif rule == "drawn_negative":
                u = uniform(seed, rows, draws[part])[:, None]
                col, exists = _draw(distance_weights(d, negative, limits), u)
            elif rule.endswith("positive"):
                col, exists = _positive(kind, d, positive, limits)
            else:
                col, exists = _negative(kind, d, negative, limits)
            col, exists = col.view(-1), exists.reshape(-1)
            cols.append(torch.where(exists, col, -1))
            value = s.gather(1, col[:, None])[:, 0] if s.shape[1] else s.new_zeros(len(rows))
            values.append(torch.where(exists, value, -INF))
    return torch.cat(cols), torch.cat(values)
