"""Recall@K loss."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero, check_count
from ..reference.ranks import mean_of_positives, soft_ranks
from ._described import described_by
from ._formula import Pairs, number
from ._pair import option
from ._ranking import RankingFormula, RankingLoss, RankingOptions, ranking_loss

_MOST_CUTOFFS = 64  # as csrc/core/ranking.h has it


def _check_cutoffs(name: str, values: object) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a tuple of integers, got {type(values).__name__}")
    if not 1 <= len(values) <= _MOST_CUTOFFS:
        raise ValueError(f"{name}: expected 1 to {_MOST_CUTOFFS} integers, got {len(values)}")
    for value in values:
        check_count(name, value)


class RecallAtK(RankingFormula):
    """Patel et al., CVPR 2022."""

    name = "recall_at_k"
    parameters: ClassVar = {
        "ks": _check_cutoffs,
        "temperature": check_above_zero,
        "temperature_k": check_above_zero,
    }

    @classmethod
    def params(cls, values: Mapping[str, Any], similarity: str) -> list[float | Tensor]:
        temperatures = [number(values[name]) for name in ("temperature", "temperature_k")]
        return [*temperatures, *map(float, values["ks"])]

    @staticmethod
    def row(pos: Pairs, neg: Pairs, temperature: float, temperature_k: float, *ks: float | Tensor) -> Tensor:
        ranks, _, exists = soft_ranks(pos, neg, temperature)
        found = torch.stack([torch.sigmoid(-(ranks - k) / temperature_k) for k in ks]).mean(0)
        return RecallAtK.one_minus(mean_of_positives(found, exists, pos.count), pos)


def recall_at_k_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    temperature: float = 0.01,
    temperature_k: float = 1.0,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[RankingOptions],
) -> Tensor:
    r"""Recall@K loss: 1 minus the share of a row's positives that are among its first K, made smooth.

    .. math::
        L_i = 1 - \frac{1}{|K|} \sum_{K} \frac{1}{|P_i|} \sum_{j \in P_i}
              \sigma\!\left(\frac{K - r_{ij}}{\tau_K}\right), \quad
        r_{ij} = 1 + \sum_{k \in P_i \cup N_i \setminus j} \sigma\!\left(\frac{s_{ik} - s_{ij}}{\tau}\right)

    with :math:`\tau` = ``temperature`` and :math:`\tau_K` = ``temperature_k``; the mean is over rows with a
    positive. Patel et al., *Recall@k Surrogate Loss with Large Batches and Similarity Mixup*, CVPR 2022.

    Costs one sigmoid for each row, positive and column, in O(N) memory.

    Args:
        ks: the cut-offs K, 1 to 64 integers from 1 on.
        temperature: of the sigmoid that makes ranks, above 0. A tensor with one number learns.
        temperature_k: of the sigmoid that compares a rank with K, likewise.
        indices_tuple: ``None``, or all pairs of the batch as :class:`dml_cuda.MinedPairs`.
        embeddings, labels, ref_emb, ref_labels, row_weights: as in :func:`multi_similarity_loss`.
        options: ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean_valid"``, ``backend``,
            ``class_weights``; see :class:`dml_cuda.RankingOptions`.

    Returns, Raises:
        As :func:`smooth_ap_loss`.
    """
    values = {"ks": ks, "temperature": temperature, "temperature_k": temperature_k}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return ranking_loss(RecallAtK, values, options, *batch)


@described_by(recall_at_k_loss)
class RecallAtKLoss(RankingLoss):
    """Recall@K loss; see :func:`dml_cuda.functional.recall_at_k_loss`.

    >>> loss_fn = RecallAtKLoss(ks=(1, 2, 4))
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = RecallAtK
    ks: Sequence[int] = option()
    temperature: float = option()
    temperature_k: float = option()

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8, 16),
        temperature: float = 0.01,
        temperature_k: float = 1.0,
        **options: Unpack[RankingOptions],
    ) -> None:
        super().__init__(options, ks=ks, temperature=temperature, temperature_k=temperature_k)
