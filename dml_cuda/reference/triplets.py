"""The ops ``triplet_loss`` and ``select`` in plain PyTorch: the readable truth, a block of rows at a time.

A triplet is an anchor i, a positive p and a negative n; d, the negated similarity, is its distances. What is
computed here is written out over all triplets of a block, N P Q of them in all, and the gradient is left to
autograd, which computes each block once more.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..losses._formula import softplus
from .pairs import first_columns, full_precision, is_traced, similarity_matrix, without_self

INF = float("inf")
_AREA = 1 << 20  # triplets that are looked at together
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
    """The int64 of the same bits."""
    return (x & (2**64 - 1)) - (x >> 63 << 64)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, of int64 taken as unsigned."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x


def uniform(seed: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
    """A number in (0, 1), of 24 bits, for each row and number of the draw; float64."""
    x = _mix(_mix(seed + _signed(_GOLDEN) * (rows + 1)) + _signed(_GOLDEN) * (draws + 1))
    return (((x >> 40) & ((1 << 24) - 1)).double() + 0.5) * 2.0**-24


def distance_weights(d: Tensor, negative: Tensor, params: Params) -> Tensor:
    """``[..., M]`` how likely each negative at distance d is drawn, over the likeliest of its row.

    One over the density of distances between points on the unit sphere, q(d) ~ d^(D - 2)
    (1 - d^2 / 4)^((D - 3) / 2), d from the cutoff on: Wu et al., ICCV 2017, section 4.
    """
    d = d.clamp(min=params.cutoff)
    logs = (2 - params.dim) * d.log() - (params.dim - 3) / 2 * (1 - d.square() / 4).log()
    drawn = negative & logs.isfinite() & (d < params.nonzero_loss_cutoff)
    logs = torch.where(drawn, logs, -INF)
    most = logs.amax(-1, keepdim=True) if logs.shape[-1] else logs.sum(-1, keepdim=True)
    return torch.where(drawn, (logs - torch.where(drawn.any(-1, keepdim=True), most, 0.0)).exp(), 0.0)


def _draw(weights: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Columns drawn from weights ``[..., M]`` at the numbers ``[..., K]``, and whether there was one."""
    if weights.shape[-1] == 0:
        return torch.zeros_like(at, dtype=torch.long), torch.zeros_like(at, dtype=torch.bool)
    upto = weights.double().cumsum(-1)
    total = upto[..., -1:]
    cols = torch.searchsorted(upto, (at * total).contiguous(), right=True)
    return cols.clamp(max=weights.shape[-1] - 1), (total > 0).expand_as(cols)


# --- Choices of one column


def _extreme(d: Tensor, among: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The column of the largest or the smallest d, the first of equal ones, and whether there was one."""
    if d.shape[-1] == 0:
        none = among.any(-1)
        return none.long(), none
    if largest:
        return torch.where(among, d, -INF).argmax(-1), among.any(-1)
    return torch.where(among, d, INF).argmin(-1), among.any(-1)


def _within(d: Tensor, low: float, high: float) -> Tensor:
    """Written as "not outside", so that a NaN keeps its pair and reaches the loss."""
    return ~(d < low) & ~(d > high)


def _positive(rule: str, d: Tensor, positive: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """One of a row."""
    return _extreme(d, positive & _within(d, params.pos_low, params.pos_high), rule == "hardest")


def _negative(rule: str, d: Tensor, negative: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """One of a row."""
    return _extreme(d, negative & _within(d, params.neg_low, params.neg_high), rule == "easiest")


def _semihard_negative(d: Tensor, negative: Tensor, d_p: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """For each d_p ``[..., K]`` the nearest negative beyond it."""
    d = d[..., None, :]
    beyond = (negative & _within(d[..., 0, :], params.neg_low, params.neg_high))[..., None, :]
    return _extreme(d, beyond & (d > d_p[..., None]), False)


# --- Blocks of rows


class _Batch(NamedTuple):
    """Points as similarities are taken of them, and what of the batch says which pairs there are."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    labels: Tensor  # [N] int64
    ref_labels: Tensor  # [M] int64
    self_index: Tensor | None  # [N]
    num_valid_refs: Tensor | None
    similarity: str

    @classmethod
    def of(cls, embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, similarity):
        x = full_precision(embeddings, similarity)
        labels = labels.long()
        if ref_emb is None:
            own = torch.arange(x.shape[0], device=x.device)
            return cls(x, x, labels, labels, own, num_valid_refs, similarity)
        y = full_precision(ref_emb, similarity)
        return cls(x, y, labels, ref_labels.long(), self_index, num_valid_refs, similarity)

    def masks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[K, M]`` the positives and the negatives of some rows."""
        positive = self.labels[rows, None] == self.ref_labels
        negative = ~positive
        if self.num_valid_refs is not None:
            positive, negative = (first_columns(mask, self.num_valid_refs) for mask in (positive, negative))
        if self.self_index is not None:
            positive = without_self(positive, self.self_index[rows])
        return positive, negative

    def most_positives(self) -> int:
        """Of any row; at least 1. Waits for the device."""
        if is_traced(self.x):
            return max(self.y.shape[0], 1)
        columns = self.ref_labels.sort().values
        sizes = torch.searchsorted(columns, self.labels, right=True) - torch.searchsorted(
            columns, self.labels
        )
        return max(int(sizes.max()), 1) if len(sizes) else 1


def _listed_positives(positive: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``[B, P]`` the columns of a mask ``[B, M]`` in ascending order, and which of these are there."""
    found = torch.sort(positive, dim=1, descending=True, stable=True)
    return found.indices[:, :most], found.values[:, :most]


class Terms(NamedTuple):
    """How a triplet's loss is made of its distances."""

    kind: str  # hinge, softplus or margin, as the op has it
    margin: float
    gap: tuple[float, float]

    def sums(
        self, d_p: Tensor, d_n: Tensor, kept: Tensor, beta: Tensor | None, gap: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``[B]`` losses and ``[B, 2]`` counts of the triplets ``[B, P, Q]`` that are kept.

        ``d_p`` and ``d_n`` broadcast to these; ``beta`` is ``[B]``; ``gap``, by which they are considered,
        is ``d_n - d_p`` unless given.
        """
        losses, active, considered = self.each(d_p, d_n, kept, beta, gap)
        counts = torch.stack([active.sum((1, 2)), considered.sum((1, 2))], dim=1)
        return losses.sum((1, 2)), counts

    def each(
        self, d_p: Tensor, d_n: Tensor, kept: Tensor, beta: Tensor | None, gap: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every triplet's loss, how many of its terms are above 0, and whether it is considered."""
        low, high = self.gap
        gap = (d_n - d_p).detach() if gap is None else gap
        considered = kept & ~(gap <= low) & ~(gap > high)  # a NaN is
        if self.kind == "margin":
            beta = beta.view(-1, *(1,) * (kept.ndim - 1))
            pull, push = torch.relu(d_p - beta + self.margin), torch.relu(beta - d_n + self.margin)
            losses, active = pull + push, (pull > 0).long() + (push > 0)
        else:
            violation = d_p - d_n + self.margin
            losses = softplus(violation) if self.kind == "softplus" else torch.relu(violation)
            active = (losses > 0).long()
        losses = torch.where(considered, losses, 0.0)
        return losses, torch.where(considered, active, 0), considered


def recomputed(function, *arguments):
    """The function's result; for its gradient it is computed once more, so that nothing of it is kept."""
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
    beta: Tensor | None,
    seed: Tensor | None,
    term: str,
    positives: str,
    negatives: str,
    params: list[float],
    similarity: str,
    swap: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each row's loss ``[N]`` and counts ``[N, 2]`` over its triplets, as the op has them; with ``swap`` the
    nearer of anchor and positive is what a negative's distance is taken from."""
    given = Params(*params)
    batch = _Batch.of(embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, similarity)
    terms = Terms(term, given.margin, (given.gap_low, given.gap_high))
    n, m = batch.x.shape[0], batch.y.shape[0]
    most = batch.most_positives() if positives == "all" else 1
    wide = negatives in ("all", "semihard") or swap
    step = n if is_traced(batch.x) else max(1, _AREA // max(1, m * (most if wide else 1)))
    panel = max(1, _AREA // max(1, m)) if wide and not is_traced(batch.x) else max(1, most)

    def block(x: Tensor, y: Tensor, beta: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        d = -similarity_matrix(x, y, similarity)
        fixed = d.detach()
        positive, negative = batch.masks(rows)
        if positives == "all":
            positive = positive & _within(fixed, given.pos_low, given.pos_high)
            p, has_p = _listed_positives(positive, most)
        else:
            p, has_p = (each[:, None] for each in _positive(positives, fixed, positive, given))
        losses = x.new_zeros(len(rows)) if m else x.sum(1) * 0
        counts = x.new_zeros(len(rows), 2, dtype=torch.long)
        for begin in range(0, p.shape[1] if m else 0, panel):
            some = slice(begin, begin + panel)
            more = part(d, y, negative, p[:, some], has_p[:, some], rows, begin, beta)
            losses, counts = losses + more[0], counts + more[1]
        return losses, counts

    def part(d, y, negative, p, has_p, rows, begin, beta) -> tuple[Tensor, Tensor]:
        """Of some of the positives, p ``[B, P]``."""
        fixed = d.detach()
        d_p = d.gather(1, p)
        if negatives == "all":
            near = _within(fixed, given.neg_low, given.neg_high)
            n, has_n, d_n = None, (negative & near)[:, None, :], d[:, None, :]
        else:
            if negatives == "semihard":
                n, has_n = _semihard_negative(fixed, negative, d_p.detach(), given)
            elif negatives == "drawn":
                draws = torch.arange(begin, begin + p.shape[1], device=p.device)
                at = uniform(seed, rows[:, None], draws)
                n, has_n = _draw(distance_weights(fixed, negative, given), at)
            else:
                n, has_n = (e[:, None].expand_as(p) for e in _negative(negatives, fixed, negative, given))
            d_n, has_n, n = d.gather(1, n)[:, :, None], has_n[:, :, None], n[:, :, None]
        gap = (d_n - d_p[:, :, None]).detach()
        if swap:
            between = -similarity_matrix(y[p.flatten()], y, similarity).view(*p.shape, -1)
            d_n = torch.minimum(d_n, between if n is None else between.gather(2, n))
        return terms.sums(d_p[:, :, None], d_n, has_p[:, :, None] & has_n, beta, gap)

    losses, counts = [], []
    for rows in torch.arange(n, device=batch.x.device).split(max(1, step)):
        some = None if beta is None else beta[rows]
        more = recomputed(block, batch.x[rows], batch.y, some, rows)
        losses.append(more[0])
        counts.append(more[1])
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
    """The column that a rule finds for each row, or each of the pairs (anchors, positives), and its
    similarity, as the op has them. Besides, ``semihard_positive`` finds the farthest positive nearer than
    the column that ``positives`` name."""
    given, kind = Params(*params), rule.rpartition("_")[0]
    cols, found = [], []
    with torch.no_grad():
        batch = _Batch.of(embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, similarity)
        all_rows = torch.arange(batch.x.shape[0], device=batch.x.device) if anchors is None else anchors
        draws = torch.zeros_like(all_rows)
        if anchors is not None:
            draws = torch.arange(len(anchors), device=anchors.device) - torch.searchsorted(anchors, anchors)
        step = len(all_rows) if is_traced(batch.x) else max(1, _AREA // max(1, batch.y.shape[0]))
        for part in torch.arange(len(all_rows), device=batch.x.device).split(max(1, step)):
            rows = all_rows[part]
            s = similarity_matrix(batch.x[rows], batch.y, similarity)
            d = -s
            positive, negative = batch.masks(rows)
            if rule == "semihard_negative":
                col, there = _semihard_negative(d, negative, d.gather(1, positives[part, None]), given)
            elif rule == "semihard_positive":
                nearer = positive & _within(d, given.pos_low, given.pos_high)
                col, there = _extreme(d, nearer & (d < d.gather(1, positives[part, None])), True)
            elif rule == "drawn_negative":
                at = uniform(seed, rows, draws[part])[:, None]
                col, there = _draw(distance_weights(d, negative, given), at)
            elif rule.endswith("positive"):
                col, there = _positive(kind, d, positive, given)
            else:
                col, there = _negative(kind, d, negative, given)
            col, there = col.view(-1), there.reshape(-1)
            cols.append(torch.where(there, col, -1))
            value = s.gather(1, col[:, None])[:, 0] if s.shape[1] else s.new_zeros(len(rows))
            found.append(torch.where(there, value, -INF))
    return torch.cat(cols), torch.cat(found)
