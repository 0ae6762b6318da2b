"""What the miners of triplets find: the rule and the batch, listed when somebody looks."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._inputs.checks import check_batch
from .._inputs.indices import NAMES
from .._ops.triplets import ANY, Rows, Selection, select, select_one_each, triplet_sums
from .mined_pairs import Growing, Mined

_TRIPLETS = 1 << 22  # looked at together


class Selected(Mined):
    """What a :class:`Selection` of a batch's triplets holds.

    Args:
        embeddings, labels, ref_emb, ref_labels, similarity, self_index, num_valid_refs: as
        :class:`MinedPairs` has
            them; the pair with ``self_index`` is none for the selection either.
        selection: which triplets.
        seed: ``[1]`` int64 on the device, of the draws.
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
        own = {"similarity": similarity, "self_index": self_index, "num_valid_refs": num_valid_refs}
        super().__init__(embeddings, labels, ref_emb, ref_labels, **own)
        self.selection, self.seed = selection, seed

    @property
    def rule(self) -> dict[str, Any]:
        return {"selection": self.selection, "similarity": self.similarity, "seed": self.seed}

    @property
    def rows(self) -> Rows:
        """The batch that was mined."""
        self._check_unchanged()
        own = self.self_index, self.num_valid_refs
        return Rows(self.embeddings, self.labels, self.ref_emb, self.ref_labels, *own)

    def _of_kind(self, kind: int) -> tuple[Tensor, Tensor]:
        """The pairs of the positives (0) or the negatives (1) that are chosen, row by row."""
        chosen, (low, high) = self.selection[kind], self.selection[3 + kind]
        if chosen != "all":
            rule = f"{chosen}_{('positive', 'negative')[kind]}"
            cols = select(rule, self.rows, self.selection, self.similarity)
            rows = (cols >= 0).nonzero()[:, 0]
            return rows, cols[rows]
        found = Growing(self.embeddings.device), Growing(self.embeddings.device)
        measured = (low, high) != ANY
        for begin, s, positive, negative in self._blocks(measured=measured):
            mask = negative if kind else self.without_own(begin, positive)
            if s is not None:
                mask = mask & (-s >= low) & (-s <= high)
            rows, cols = mask.nonzero(as_tuple=True)
            found[0].append(rows + begin)
            found[1].append(cols)
        return tuple(each.tensor().clone() for each in found)

    def _one_a_row(self) -> tuple[Tensor, Tensor, Tensor]:
        found = select_one_each(self.rows, self.selection, self.similarity)
        there = ((found[1] >= 0) & (found[2] >= 0)).nonzero()[:, 0]
        return tuple(index[there] for index in found)

    def _repr(self) -> str:
        chosen = f"positives={self.selection.positives!r}, negatives={self.selection.negatives!r}"
        return f"{chosen}, {super()._repr()}"


class MinedTriplets(Selected):
    """The triplets of a batch: ``(anchors, positives, negatives)``, made when looked at.

    What :class:`dml_cuda.BatchHardMiner`, :class:`dml_cuda.TripletMarginMiner` and
    :class:`dml_cuda.DistanceWeightedMiner` return. It unpacks, indexes and has the length 3 of
    pytorch-metric-learning's tuple, and its losses take it. Until somebody looks it holds the batch and the
    rule that selects: :class:`dml_cuda.TripletMarginLoss` and :class:`dml_cuda.MarginLoss` given it with the
    same batch apply the rule in their kernel, and no triplet is ever listed. What
    :class:`dml_cuda.MinedPairs` says of a batch that changes, of copies and of compiled code holds here too.

    Attributes:
        anchors, positives, negatives: ``[T]`` int64, ordered by anchor, then positive, then negative.
    """

    names: ClassVar = ("anchors", "positives", "negatives")

    def _make_lists(self) -> Iterable[Tensor]:
        chosen = self.selection
        if chosen.positives != "all" and chosen.negatives != "all":
            return self._one_a_row()
        if chosen.negatives in ("semihard", "drawn"):
            anchors, positives = self._of_kind(0)
            negatives = select(
                f"{chosen.negatives}_negative",
                self.rows,
                chosen,
                self.similarity,
                seed=self.seed,
                anchors=anchors,
                positives=positives,
            )
            there = negatives >= 0
            return anchors[there], positives[there], negatives[there]
        return self._within_gap()

    def _within_gap(self) -> tuple[Tensor, ...]:
        """All triplets whose distances differ by what the selection's gap says."""
        found = [Growing(self.embeddings.device) for _ in self.names]
        low, high = self.selection.gap
        for begin, s, positive, negative in self._blocks(measured=True):
            rows, cols = self.without_own(begin, positive).nonzero(as_tuple=True)
            for part in torch.arange(len(rows), device=rows.device).split(
                max(1, _TRIPLETS // max(1, s.shape[1]))
            ):
                row, col = rows[part], cols[part]
                gap = s[row, col][:, None] - s[row]
                which, n = (negative[row] & (gap > low) & (gap <= high)).nonzero(as_tuple=True)
                for index, more in zip(found, (row[which] + begin, col[which], n), strict=True):
                    index.append(more)
        return tuple(index.tensor().clone() for index in found)

    def counts(self) -> tuple[int]:
        chosen = self.selection
        if self._looked or chosen.one_a_row or chosen.negatives == "drawn":
            return super().counts()
        with torch.no_grad():
            _, counts = triplet_sums(self.rows, chosen, self.similarity, term="hinge", margin=0.0)
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
    """The pairs that a selection holds: ``(pos_anchors, positives, neg_anchors, negatives)``, made when
    looked at.

    What :class:`dml_cuda.BatchEasyHardMiner` and :class:`dml_cuda.PairMarginMiner` return, with the length 4
    of pytorch-metric-learning's tuple. As :class:`MinedTriplets` otherwise: for a loss of triplets each
    positive of a row makes one with each of its negatives.

    Attributes:
        pos_anchors, positives: ``[P]`` int64.
        neg_anchors, negatives: ``[Q]`` int64.
    """

    names: ClassVar = NAMES

    def _make_lists(self) -> Iterable[Tensor]:
        if "all" not in (self.selection.positives, self.selection.negatives):
            anchors, positives, negatives = self._one_a_row()
            return anchors, positives, anchors, negatives
        return *self._of_kind(0), *self._of_kind(1)

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


def check_selected(kind: type[Selected], embeddings, labels, ref_emb, ref_labels, **rule) -> Selected:
    """:class:`Selected` of a batch that is checked first."""
    labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
    return kind(embeddings, labels, ref_emb, ref_labels, **rule)
