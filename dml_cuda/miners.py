"""The multi-similarity miner, for who wants to see the pairs or to give them to another loss."""

import torch
from torch import Tensor, nn

from ._arguments import SIMILARITIES, check_choice, check_flag, check_number
from .pairs import MinedPairs, PairCounts, mined_pairs


class MultiSimilarityMiner(nn.Module):
    """The hard pairs of a batch by the multi-similarity rule.

    A positive is kept when ``s - epsilon < max(negatives of its row)``, a negative when
    ``s + epsilon > min(positives of its row)``; a row without either keeps nothing. Wang et al.,
    *Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning*, CVPR 2019, section 4.1.

    A dml_cuda loss that is given the result with the same embeddings mines inside its kernel, and no pair is
    ever listed: it costs no more than ``epsilon=`` of the loss. Any other loss makes the lists by using them.

    Args:
        epsilon: the margin.
        similarity: ``"cosine"`` or ``"dot"``.
        pair_counts: also return how many pairs each row keeps.

    >>> miner, loss_fn = MultiSimilarityMiner(epsilon=0.1), MultiSimilarityLoss()
    >>> pairs = miner(embeddings, labels)
    >>> loss = loss_fn(embeddings, labels, pairs)
    """

    def __init__(
        self, epsilon: float = 0.1, *, similarity: str = "cosine", pair_counts: bool = False
    ) -> None:
        super().__init__()
        check_number("epsilon", epsilon)
        check_choice("similarity", similarity, SIMILARITIES)
        check_flag("pair_counts", pair_counts)
        self.epsilon = epsilon
        self.similarity = similarity
        self.pair_counts = pair_counts
        self._last: MinedPairs | None = None

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> MinedPairs | tuple[MinedPairs, PairCounts]:
        """The pairs of a batch, made when looked at.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is.

        Returns:
            :class:`dml_cuda.MinedPairs`; with ``pair_counts``, that and :class:`dml_cuda.PairCounts`.
        """
        pairs = self.mine(embeddings, labels, ref_emb, ref_labels)
        return (pairs, pairs.pair_counts()) if self.pair_counts else pairs

    def mine(self, *batch: Tensor | None, **own: Tensor | None) -> MinedPairs:
        """The pairs of a batch; ``own`` are options of :func:`mined_pairs`."""
        pairs = mined_pairs(*batch, epsilon=self.epsilon, similarity=self.similarity, **own)
        if not torch.compiler.is_compiling():
            self._last = pairs
        return pairs

    def _count(self, kind: int) -> int:
        return 0 if self._last is None else len(self._last[kind])

    @property
    def num_pos_pairs(self) -> int:
        """Positive pairs that the last batch kept; lists them, and waits for the device."""
        return self._count(0)

    @property
    def num_neg_pairs(self) -> int:
        """Negative pairs that the last batch kept; lists them, and waits for the device."""
        return self._count(2)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": None}  # a copy or a file needs no batch

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, similarity={self.similarity!r}"
