"""Which triplets of a batch count, and the ops that find them or sum over them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from ..reference import triplets
from .autograd import call
from .devices import has_kernel

INF = float("inf")
ANY = (-INF, INF)


class Selection(NamedTuple):
    """The triplets of the chosen positives and negatives whose distances lie within an interval.

    Distances d are the negated similarities.

    Attributes:
        positives: of a row, ``"all"``, the ``"hardest"`` (farthest) or the ``"easiest"``; or ``"semihard"``,
            the farthest that is nearer than the row's negative.
        negatives: ``"all"``, the ``"hardest"`` (nearest) or the ``"easiest"`` of a row; or one for each
            positive: ``"semihard"``, the nearest that is farther than the positive, or ``"drawn"`` by
            distance weights.
        gap: ``low < d_n - d_p <= high``.
        pos_range, neg_range: the distances within which one is chosen, ends included; of ``"all"`` too.
        cutoff, nonzero_loss_cutoff: as :class:`dml_cuda.DistanceWeightedMiner` has them.
    """

    positives: str = "all"
    negatives: str = "all"
    gap: tuple[float, float] = ANY
    pos_range: tuple[float, float] = ANY
    neg_range: tuple[float, float] = ANY
    cutoff: float = 0.5
    nonzero_loss_cutoff: float = 1.4

    @property
    def measures(self) -> bool:
        """Whether it depends on distances."""
        return self != Selection()

    @property
    def one_a_row(self) -> bool:
        """Whether each row has one triplet at most."""
        return self.positives != "all" and self.negatives not in ("all", "drawn")

    def params(self, margin: float, dim: int) -> list[float]:
        """As the ops take them."""
        ranges = (*self.gap, *self.pos_range, *self.neg_range)
        return [float(x) for x in (margin, *ranges, self.cutoff, self.nonzero_loss_cutoff, dim)]


class Rows(NamedTuple):
    """A batch, as the ops take it."""

    embeddings: Tensor  # [N, D]
    labels: Tensor  # [N]
    ref_emb: Tensor | None  # [M, D]
    ref_labels: Tensor | None  # [M]
    self_index: Tensor | None  # [N]
    num_valid_refs: Tensor | None

    @property
    def columns(self) -> Tensor:
        return self.embeddings if self.ref_emb is None else self.ref_emb

    def ready(self) -> "Rows":
        """With one dtype for both kinds of points, which differ under autocast only, and int64 labels."""
        embeddings, labels, ref_emb, ref_labels, *own = self
        if ref_emb is not None and ref_emb.dtype != embeddings.dtype:
            wider = torch.promote_types(embeddings.dtype, ref_emb.dtype)
            embeddings, ref_emb = embeddings.to(wider), ref_emb.to(wider)
        labels, ref_labels = (x if x is None else x.long() for x in (labels, ref_labels))
        return Rows(embeddings, labels, ref_emb, ref_labels, *own)


def show_nonfinite(rows: Rows, cols: Tensor) -> Tensor:
    """The columns chosen for rows or pairs; or, where a point of the batch is not finite, for all of them one
    whose similarity is NaN, so that no choice hides it from a loss. Waits for nothing."""

    def nonfinite(points: Tensor) -> Tensor:
        return ~points.detach().isfinite().all(1)

    columns = nonfinite(rows.columns)
    if rows.num_valid_refs is not None:  # what does not take part may hold anything
        columns = columns & (torch.arange(len(columns), device=columns.device) < rows.num_valid_refs)
    any_nonfinite = (
        columns.any() if rows.ref_emb is None else columns.any() | nonfinite(rows.embeddings).any()
    )
    if len(columns) == 0:
        return cols
    first = columns.byte().argmax()  # column 0 where only a row is not finite: its similarities are all NaN
    return torch.where(any_nonfinite, first, cols)


def select(
    rule: str,
    rows: Rows,
    selection: Selection,
    similarity: str,
    *,
    seed: Tensor | None = None,
    anchors: Tensor | None = None,
    positives: Tensor | None = None,
) -> Tensor:
    """The column that a rule finds for each row, or for each of the pairs (anchors, positives); -1 for
    none."""
    rows = rows.ready()
    fused = has_kernel(rows.embeddings.device) and rule != "semihard_positive"
    op = torch.ops.dml_cuda.select.default if fused else triplets.select
    params = selection.params(0.0, rows.embeddings.shape[1])
    with torch.no_grad(), _autocast.off(rows.embeddings.device):
        columns, found = op(*rows, seed, rule, params, anchors, positives, similarity)
        can_look = columns.device.type == "cpu" and not triplets.is_traced(found)
        if (
            fused and can_look and not found.isnan().any()
        ):  # the kernels' answer to a batch that is not finite
            return columns
        return show_nonfinite(rows, columns)


def select_one_each(rows: Rows, selection: Selection, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, positives and negatives ``[N]`` of a selection that has one triplet a row; -1 where a row has
    no positive or no negative. Waits for nothing."""
    anchors = torch.arange(rows.embeddings.shape[0], device=rows.embeddings.device)

    def one(rule: str, **given: Tensor) -> Tensor:
        return select(rule, rows, selection, similarity, **given)

    def beside(rule: str, found: Tensor) -> Tensor:
        """What is found beside the columns that were found before, where there is one."""
        if rows.columns.shape[0] == 0:
            return torch.full_like(found, -1)
        return torch.where(found >= 0, one(rule, anchors=anchors, positives=found.clamp(min=0)), -1)

    if selection.positives == "semihard":
        negatives = one(f"{selection.negatives}_negative")
        return anchors, beside("semihard_positive", negatives), negatives
    positives = one(f"{selection.positives}_positive")
    if selection.negatives == "semihard":
        return anchors, positives, beside("semihard_negative", positives)
    return anchors, positives, one(f"{selection.negatives}_negative")


def triplet_sums(
    rows: Rows,
    selection: Selection,
    similarity: str,
    *,
    term: str,
    margin: float,
    row_params: Tensor | None = None,
    seed: Tensor | None = None,
    swap: bool = False,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Each row's loss ``[N]`` over its triplets, float32 or float64, and counts ``[N, 2]``: how many terms
    are above 0, and how many triplets there are. Nothing is listed.

    ``row_params`` ``[N]`` are the rows' beta of the term margin; of the others their margins, instead of
    ``margin``.

    The kernel's loss can be differentiated as a sum over the rows only; ``fused=False`` is the reference,
    which has the gradient of every row, and ``swap``.
    """
    rows = rows.ready()
    how = term, selection.positives, selection.negatives
    how = *how, selection.params(margin, rows.embeddings.shape[1]), similarity
    with _autocast.off(rows.embeddings.device):
        if swap or not (fused and has_kernel(rows.embeddings.device)):
            return triplets.triplet_loss(*rows, row_params, seed, *how, swap)
        wanted = [x is not None and x.requires_grad for x in (rows.embeddings, rows.ref_emb, row_params)]
        save = torch.is_grad_enabled() and any(wanted)
        return call("triplet_loss", *rows, row_params, seed, *how, save, save and wanted[1])[:2]
