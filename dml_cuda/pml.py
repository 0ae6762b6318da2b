"""pytorch-metric-learning's own classes, computed by the kernels of dml_cuda.

Each class subclasses the one of the same name and replaces only its computation, so reducers,
regularisers, ``collect_stats``, ``isinstance`` checks, ``CrossBatchMemory`` and
``DistributedLossWrapper`` go on working. Needs ``pip install "dml_cuda[pml]"`` (version 2.9).

One result differs: pytorch-metric-learning gives 0 for a batch in which a miner leaves one pair of each
kind at most. To know that, the pairs would have to be counted, so here such pairs have their loss.

>>> from dml_cuda.pml import MultiSimilarityLoss, MultiSimilarityMiner
>>> miner, loss_fn = MultiSimilarityMiner(epsilon=0.1), MultiSimilarityLoss(reducer=reducers.SumReducer())
>>> loss = loss_fn(embeddings, labels, miner(embeddings, labels))
"""

import warnings

import torch
from torch import Tensor

try:
    from pytorch_metric_learning import distances, losses, miners
except ImportError as error:
    raise ImportError(
        'dml_cuda.pml needs pytorch-metric-learning 2.9: pip install "pytorch-metric-learning>=2.9,<3"'
    ) from error

from . import functional
from .pairs import MinedPairs, mined_pairs

__all__ = ["CircleLoss", "MultiSimilarityLoss", "MultiSimilarityMiner"]

_warned: set[str] = set()


def _similarity(distance: distances.BaseDistance) -> str | None:
    """What the kernels call this distance, or None for one that they lack."""
    if type(distance) not in (distances.CosineSimilarity, distances.DotProductSimilarity):
        return None
    if distance.power != 1 or (distance.normalize_embeddings and distance.p != 2):
        return None
    return "cosine" if distance.normalize_embeddings else "dot"


def _kernel_similarity(module: torch.nn.Module) -> str | None:
    """As :func:`_similarity`; warns, once for each kind, where pytorch-metric-learning must compute."""
    similarity = _similarity(module.distance)
    kind = f"{type(module).__name__} with {module.distance}"
    if similarity is None and kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"dml_cuda has no kernel for {kind}: pytorch-metric-learning computes it", stacklevel=6)
    return similarity


def _collect(distance: distances.BaseDistance, embeddings: Tensor, ref_emb: Tensor) -> None:
    """The statistics of the norms that a distance collects when it is called."""
    distance.reset_stats()
    if distance.collect_stats:
        points = embeddings, ref_emb
        distance.set_default_stats(*points, *(distance.maybe_normalize(x) for x in points))


class _Fused:
    """Replaces the computation of a pair loss; ``row_losses`` is its function."""

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        similarity = _kernel_similarity(self)
        if similarity is None or embeddings.shape[0] * ref_emb.shape[0] <= 2:
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        listed = indices_tuple is not None and not isinstance(indices_tuple, MinedPairs)
        if listed and all(len(index) <= 1 for index in indices_tuple):
            return self.zero_losses()  # as pytorch-metric-learning does with a single pair of each kind
        _collect(self.distance, embeddings, ref_emb)
        if ref_emb is embeddings and (ref_labels is labels or indices_tuple is not None):
            ref_emb = ref_labels = None  # no other points: a row is no pair with itself
        elif indices_tuple is None and ref_labels is labels:
            # The very same labels: pytorch-metric-learning takes row i of ref_emb for the same point too.
            own = torch.arange(embeddings.shape[0], device=embeddings.device)
            rule = {"epsilon": None, "similarity": similarity, "self_ref": own}
            indices_tuple = mined_pairs(embeddings, labels, ref_emb, ref_labels, **rule)
        value = self._row_losses(
            embeddings,
            labels,
            indices_tuple=indices_tuple,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            similarity=similarity,
            reduction="none",
        )
        rows = torch.arange(embeddings.shape[0], device=embeddings.device)
        # [N, 1], as pytorch-metric-learning's own: some reducers give another number for [N].
        return {"loss": {"losses": value[:, None], "indices": rows, "reduction_type": "element"}}


class MultiSimilarityLoss(_Fused, losses.MultiSimilarityLoss):
    """``pytorch_metric_learning.losses.MultiSimilarityLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.multi_similarity_loss` for the equation, and for arguments and errors the
    class that this one replaces.
    """

    def _row_losses(self, *batch, **options) -> Tensor:
        weights = {"alpha": self.alpha, "beta": self.beta, "base": self.base}
        return functional.multi_similarity_loss(*batch, **weights, **options)


class CircleLoss(_Fused, losses.CircleLoss):
    """``pytorch_metric_learning.losses.CircleLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.circle_loss` for the equation, and for arguments and errors the class that
    this one replaces.
    """

    def _row_losses(self, *batch, **options) -> Tensor:
        return functional.circle_loss(*batch, m=self.m, gamma=self.gamma, **options)


class MultiSimilarityMiner(miners.MultiSimilarityMiner):
    """``pytorch_metric_learning.miners.MultiSimilarityMiner``, which lists its pairs only when looked at.

    Returns :class:`dml_cuda.MinedPairs`: a loss of this module, or of dml_cuda, never lists them.
    """

    _pairs: MinedPairs | None = None

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        similarity = _kernel_similarity(self)
        if similarity is None:
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        _collect(self.distance, embeddings, ref_emb)
        if ref_emb is embeddings:
            ref_emb = ref_labels = None
        return mined_pairs(
            embeddings, labels, ref_emb, ref_labels, epsilon=self.epsilon, similarity=similarity
        )

    def output_assertion(self, output) -> None:
        """Keeps the pairs, to count them when ``num_pos_pairs`` or ``num_neg_pairs`` is read."""
        self._pairs = output if isinstance(output, MinedPairs) else None
        if self._pairs is None:
            super().output_assertion(output)

    def _count(self, kind: int, name: str) -> int:
        return self.__dict__.get(name, 0) if self._pairs is None else len(self._pairs[kind])

    @property
    def num_pos_pairs(self) -> int:
        return self._count(0, "num_pos_pairs")

    @num_pos_pairs.setter
    def num_pos_pairs(self, count: int) -> None:
        self._pairs, self.__dict__["num_pos_pairs"] = None, count

    @property
    def num_neg_pairs(self) -> int:
        return self._count(2, "num_neg_pairs")

    @num_neg_pairs.setter
    def num_neg_pairs(self, count: int) -> None:
        self._pairs, self.__dict__["num_neg_pairs"] = None, count

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pairs": None}
