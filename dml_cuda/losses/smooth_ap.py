"""Smooth-AP loss."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero
from ..reference.ranks import mean_of_positives, soft_ranks
from ._described import described_by
from ._formula import Pairs
from ._pair import option
from ._ranking import RankingFormula, RankingLoss, RankingOptions, ranking_loss


class SmoothAP(RankingFormula):
    """Brown et al., ECCV 2020."""

    name = "smooth_ap"
    parameters: ClassVar = {"temperature": check_above_zero}

    @staticmethod
    def row(pos: Pairs, neg: Pairs, temperature: float) -> Tensor:
        ranks, pos_ranks, exists = soft_ranks(pos, neg, temperature)
        return SmoothAP.one_minus(mean_of_positives(pos_ranks / ranks, exists, pos.count), pos)


def smooth_ap_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 0.01,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[RankingOptions],
) -> Tensor:
    r"""Smooth-AP loss: 1 minus the average precision of each row, with ranks made smooth by a sigmoid.

    .. math::
        L_i = 1 - \frac{1}{|P_i|} \sum_{j \in P_i}
              \frac{1 + \sum_{k \in P_i \setminus j} g_{ijk}}
                   {1 + \sum_{k \in P_i \cup N_i \setminus j} g_{ijk}},
        \quad g_{ijk} = \frac{1}{1 + e^{(s_{ij} - s_{ik}) / \tau}}

    with :math:`\tau` = ``temperature``; the mean is over rows with a positive. Brown et al., *Smooth-AP:
    Smoothing the Path Towards Large-Scale Image Retrieval*, ECCV 2020. Classes may have any sizes, and a row
    is not ranked among its own columns (in pytorch-metric-learning it is, as its first positive).

    Costs one sigmoid for each row, positive and column, in O(N) memory.

    Args:
        temperature: of the sigmoid, above 0. A tensor with one number learns.
        indices_tuple: ``None``, or all pairs of the batch as :class:`dml_cuda.MinedPairs`.
        embeddings, labels, ref_emb, ref_labels, row_weights: as in :func:`multi_similarity_loss`.
        options: ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean_valid"``, ``backend``,
            ``class_weights``; see :class:`dml_cuda.RankingOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`; ValueError for pairs that are listed or mined.
    """
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return ranking_loss(SmoothAP, {"temperature": temperature}, options, *batch)


@described_by(smooth_ap_loss)
class SmoothAPLoss(RankingLoss):
    """Smooth-AP loss; see :func:`dml_cuda.functional.smooth_ap_loss`.

    >>> loss_fn = SmoothAPLoss(temperature=0.01)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = SmoothAP
    temperature: float = option()

    def __init__(self, temperature: float = 0.01, **options: Unpack[RankingOptions]) -> None:
        super().__init__(options, temperature=temperature)
