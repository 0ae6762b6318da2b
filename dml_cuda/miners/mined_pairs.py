"""The pairs that the multi-similarity rule keeps."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._inputs.checks import check_batch
from .._inputs.indices import NAMES
from .._ops.devices import has_kernel
from ..reference.pairs import mine
from .mined import IndexBuffer, Mined


class PairCounts(NamedTuple):
    """The numbers of positives and negatives that each row keeps, ``[N]`` int64 each."""

    positives: Tensor
    negatives: Tensor


class MinedPairs(Mined):
    """The pairs of a batch, ``(pos_anchors, positives, neg_anchors, negatives)``, computed when read.

    :class:`dml_cuda.MultiSimilarityMiner` returns it. It unpacks, indexes and has the length 4 of
    pytorch-metric-learning's tuple, with the field names of its version 3, so that library's losses accept
    it. Until it is read it holds the batch and the mining rule. A loss of dml_cuda that gets it with the same
    batch applies the rule in its kernel, and the indices are never computed. Reading computes them block by
    block, without the N x M matrix, and synchronises with the device.

    The rule refers to the batch as it was. If embeddings or labels have been changed in place since, using
    the rule raises RuntimeError, unless the indices were read before: they stay as they were found. Code
    compiled by ``torch.compile`` cannot detect such a change: there, read first. Copies and pickles hold
    indices only.

    It is a list whose items can be replaced but not added, removed or reordered. Functions in C that read a
    list's memory directly (``torch.cat``) raise TypeError until it has been read.

    Args:
        embeddings, labels, ref_emb, ref_labels: as the losses take them.
        epsilon: the miner's margin; ``None`` for every pair.
        similarity: as the miner takes it.
        self_index: ``[N]`` int64, for each row the index in ``ref_emb`` of the same point, or -1. Mining
            compares with that pair, but it is never kept: ``torch.arange(N)`` for two views of the same
            images leaves out the pairs (i, i).
        num_valid_refs: int64 scalar; only the first ``num_valid_refs`` rows of ``ref_emb`` take part.

    Attributes:
        pos_anchors, positives: ``[P]`` int64, rows of ``embeddings`` and of ``ref_emb`` (of ``embeddings``
            without it).
        neg_anchors, negatives: ``[Q]`` int64, likewise.
        epsilon: the miner's margin; ``None`` for every pair.
    """

    names = NAMES

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        epsilon: float | None,
        similarity: str = "cosine",
        self_index: Tensor | None = None,
        num_valid_refs: Tensor | None = None,
    ) -> None:
        options = {"similarity": similarity, "self_index": self_index, "num_valid_refs": num_valid_refs}
        super().__init__(embeddings, labels, ref_emb, ref_labels, **options)
        self.epsilon = epsilon

    @property
    def rule(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "similarity": self.similarity}

    def _kept_blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields blocks of rows: the first row, and masks ``[rows, M]`` of kept positives and negatives."""
        for begin, s, positive, negative in self.blocks(measured=self.epsilon is not None):
            if s is not None:
                positive, negative = mine(s, positive, negative, self.epsilon)
            yield begin, self.without_self_pairs(begin, positive), negative

    def _compute(self) -> Iterable[Tensor]:
        buffers = [IndexBuffer(self.embeddings.device) for _ in NAMES]
        for begin, *masks in self._kept_blocks():
            for kind, mask in enumerate(masks):
                rows, cols = mask.nonzero(as_tuple=True)
                buffers[2 * kind].append(rows + begin)
                buffers[2 * kind + 1].append(cols)
        return [buffer.view().clone() for buffer in buffers]

    def pair_counts(self) -> PairCounts:
        """The numbers of positives and negatives that each row keeps, without synchronising."""
        size, device = self.embeddings.shape[0], self.embeddings.device
        counts = PairCounts(*(torch.zeros(size, dtype=torch.long, device=device) for _ in range(2)))
        if self._computed:
            for count, rows in zip(counts, (self[0], self[2]), strict=True):
                count.index_add_(0, rows, torch.ones_like(rows))
            return counts
        if device.type == "cuda" and has_kernel(device):
            return PairCounts(*self._count())
        for begin, *masks in self._kept_blocks():
            for count, mask in zip(counts, masks, strict=True):
                torch.sum(mask, 1, out=count[begin : begin + mask.shape[0]])
        return counts

    def _count(self) -> Tensor:
        """The numbers ``[2, N]`` of positives and negatives, by the kernels of CUDA."""
        self._check_unchanged()
        x, *refs = (matrix.detach() for matrix in self.points_of_one_type())
        labels = [x if x is None else x.long() for x in (self.labels, self.ref_labels)]
        return torch.ops.dml_cuda.count_pairs(
            x, labels[0], refs[0] if refs else None, labels[1], self.self_index, self.num_valid_refs,
            self.epsilon, self.similarity,
        )  # fmt: skip

    def counts(self) -> tuple[int, int]:
        positives, negatives = self.pair_counts()
        return int(positives.sum()), int(negatives.sum())

    def _describe(self) -> str:
        return f"epsilon={self.epsilon}"

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


def mined_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    *,
    epsilon: float | None,
    similarity: str,
    self_index: Tensor | None = None,
    num_valid_refs: Tensor | None = None,
) -> MinedPairs:
    """:class:`MinedPairs` of a batch, which is validated first."""
    labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
    options = {"self_index": self_index, "num_valid_refs": num_valid_refs}
    return MinedPairs(
        embeddings, labels, ref_emb, ref_labels, epsilon=epsilon, similarity=similarity, **options
    )
