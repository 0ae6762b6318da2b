"""The triplets, or pairs, that a selection rule keeps."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._inputs.indices import NAMES
from .._ops.triplets import ANY, Rows, Selection, select, select_one_each, triplet_sums
from ..reference.triplets import within
from .mined import IndexBuffer, Mined

_BLOCK = 1 << 22  # triplets tested together


class Selected(Mined):
    """The result of a miner whose rule is a :class:`Selection`.

    Args:
        embeddings, labels, ref_emb, ref_labels, similarity, self_index, num_valid_refs: as in
            :class:`MinedPairs`, except that the selection never sees the pair with ``self_index``.
        selection: the rule.
        seed: ``[1]`` int64 on the device of the embeddings, for rules that draw.
    """

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        selection: Selection,
        similarity: str = "cosine",
        seed: Tensor | None = None,
        self_index: Tensor | None = None,
        num_valid_refs: Tensor | None = None,
    ) -> None:
        options = {"similarity": similarity, "self_index": self_index, "num_valid_refs": num_valid_refs}
        super().__init__(embeddings, labels, ref_emb, ref_labels, **options)
        self.selection, self.seed = selection, seed

    @property
    def rule(self) -> dict[str, Any]:
        return {"selection": self.selection, "similarity": self.similarity, "seed": self.seed}

    @property
    def rows(self) -> Rows:
        """The batch that was mined, as the ops take it."""
        self._check_unchanged()
        masks = self.self_index, self.num_valid_refs
        return Rows(self.embeddings, self.labels, self.ref_emb, self.ref_labels, *masks)

    def _pairs_of_kind(self, kind: int) -> tuple[Tensor, Tensor]:
        """Rows and columns ``[P]`` of the selected positives (kind 0) or negatives (kind 1), in row order."""
        strategy, (low, high) = self.selection[kind], self.selection[3 + kind]
        if strategy != "all":
            rule = f"{strategy}_{('positive', 'negative')[kind]}"
            cols = select(rule, self.rows, self.selection, self.similarity)
            rows = (cols >= 0).nonzero()[:, 0]
            return rows, cols[rows]
        buffers = IndexBuffer(self.embeddings.device), IndexBuffer(self.embeddings.device)
        measured = (low, high) != ANY
        for begin, s, positive, negative in self.blocks(measured=measured):
            mask = negative if kind else self.without_self_pairs(begin, positive)
            if s is not None:
                mask = mask & within(-s, low, high)
            rows, cols = mask.nonzero(as_tuple=True)
            buffers[0].append(rows + begin)
            buffers[1].append(cols)
        return tuple(buffer.view().clone() for buffer in buffers)

    def _one_triplet_per_row(self) -> tuple[Tensor, Tensor, Tensor]:
        triplets = select_one_each(self.rows, self.selection, self.similarity)
        complete = ((triplets[1] >= 0) & (triplets[2] >= 0)).nonzero()[:, 0]
        return tuple(index[complete] for index in triplets)

    def _describe(self) -> str:
        kinds = f"positives={self.selection.positives!r}, negatives={self.selection.negatives!r}"
        return f"{kinds}, {super()._describe()}"


class MinedTriplets(Selected):
    """The triplets of a batch, ``(anchors, positives, negatives)``, computed when read.

    :class:`dml_cuda.BatchHardMiner`, :class:`dml_cuda.TripletMarginMiner` and
    :class:`dml_cuda.DistanceWeightedMiner` return it. It unpacks, indexes and has the length 3 of
    pytorch-metric-learning's tuple, so that library's losses accept it. Until it is read it holds the batch
    and the selection rule: :class:`dml_cuda.TripletMarginLoss` and :class:`dml_cuda.MarginLoss` that get it
    with the same batch apply the rule in their kernel and materialise no triplet.
    :class:`dml_cuda.MinedPairs` describes what happens when the batch changes, with copies, in compiled code
    and to code in C; the same holds here.

    Attributes:
        anchors, positives, negatives: ``[T]`` int64, ordered by anchor, then positive, then negative.
    """

    names: ClassVar = ("anchors", "positives", "negatives")

    def _compute(self) -> Iterable[Tensor]:
        selection = self.selection
        if selection.positives != "all" and selection.negatives != "all":
            return self._one_triplet_per_row()
        if selection.negatives in ("semihard", "drawn"):
            anchors, positives = self._pairs_of_kind(0)
            negatives = select(
                f"{selection.negatives}_negative",
                self.rows,
                selection,
                self.similarity,
                seed=self.seed,
                anchors=anchors,
                positives=positives,
            )
            complete = negatives >= 0
            return anchors[complete], positives[complete], negatives[complete]
        return self._within_gap()

    def _within_gap(self) -> tuple[Tensor, ...]:
        """All triplets with ``low < d_n - d_p <= high`` of the selection's gap."""
        buffers = [IndexBuffer(self.embeddings.device) for _ in self.names]
        low, high = self.selection.gap
        for begin, s, positive, negative in self.blocks(measured=True):
            rows, cols = self.without_self_pairs(begin, positive).nonzero(as_tuple=True)
            step = max(1, _BLOCK // max(1, s.shape[1]))
            for part in torch.arange(len(rows), device=rows.device).split(step):
                row, col = rows[part], cols[part]
                gap = s[row, col][:, None] - s[row]
                # Written as "not outside", so that a NaN is kept and reaches the loss.
                pair, n = (negative[row] & ~(gap <= low) & ~(gap > high)).nonzero(as_tuple=True)
                for buffer, index in zip(buffers, (row[pair] + begin, col[pair], n), strict=True):
                    buffer.append(index)
        return tuple(buffer.view().clone() for buffer in buffers)

    def counts(self) -> tuple[int]:
        selection = self.selection
        if self._computed or selection.one_a_row or selection.negatives == "drawn":
            return super().counts()
        with torch.no_grad():
            _, counts = triplet_sums(self.rows, selection, self.similarity, term="hinge", margin=0.0)
        return (int(counts[:, 1].sum()),)

    @property
    def anchors(self) -> Tensor:
        return self[0]

    @property
    def positives(self) -> Tensor:
        return self[1]

    @property
    def negatives(self) -> Tensor:
        return self[2]


class SelectedPairs(Selected):
    """Selected pairs, ``(pos_anchors, positives, neg_anchors, negatives)``, computed when read.

    :class:`dml_cuda.BatchEasyHardMiner` and :class:`dml_cuda.PairMarginMiner` return it, with the length 4 of
    pytorch-metric-learning's tuple. Otherwise it is like :class:`MinedTriplets`: a triplet loss combines each
    positive of a row with each of its negatives.

    Attributes:
        pos_anchors, positives: ``[P]`` int64.
        neg_anchors, negatives: ``[Q]`` int64.
    """

    names: ClassVar = NAMES

    def _compute(self) -> Iterable[Tensor]:
        if "all" not in (self.selection.positives, self.selection.negatives):
            anchors, positives, negatives = self._one_triplet_per_row()
            return anchors, positives, anchors, negatives
        return *self._pairs_of_kind(0), *self._pairs_of_kind(1)

    @property
    def pos_anchors(self) -> Tensor:
        return self[0]

    @property
    def positives(self) -> Tensor:
        return self[1]

    @property
    def neg_anchors(self) -> Tensor:
        return self[2]

    @property
    def negatives(self) -> Tensor:
        return self[3]
