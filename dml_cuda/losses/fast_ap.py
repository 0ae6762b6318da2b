"""FastAP loss."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_count
from ._described import described_by
from ._formula import Pairs
from ._pair import option
from ._ranking import RankingFormula, RankingLoss, RankingOptions, ranking_loss


class FastAP(RankingFormula):
    """Cakir et al., CVPR 2019."""

    name = "fast_ap"
    parameters: ClassVar = {"num_bins": check_count}

    @classmethod
    def params(cls, values: Mapping[str, Any], similarity: str) -> list[float | Tensor]:
        if similarity != "cosine":
            raise ValueError(
                'similarity: expected "cosine", as the histogram is of squared distances of unit rows; got '
                f'"{similarity}"'
            )
        return [float(values["num_bins"])]

    @staticmethod
    def row(pos: Pairs, neg: Pairs, num_bins: float) -> Tensor:
        places = ((1 - pos.s) * (num_bins / 2)).clamp(0, num_bins)
        pos_below = all_below = score = torch.zeros_like(pos.s[:, :1].sum(1))
        for edge in range(int(num_bins) + 1):
            shares = torch.relu(1 - (places - edge).abs())
            here = pos.sum(shares)
            pos_below = pos_below + here
            all_below = all_below + here + neg.sum(shares)
            some = here * pos_below > 0
            score = score + torch.where(some, here * pos_below / torch.where(some, all_below, 1.0), 0.0)
        return FastAP.one_minus(score / pos.count.clamp(min=1), pos)


def fast_ap_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    num_bins: int = 10,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[RankingOptions],
) -> Tensor:
    r"""FastAP loss: 1 minus the average precision of each row, from a soft histogram of its distances.

    .. math::
        L_i = 1 - \frac{1}{|P_i|} \sum_{b = 0}^{B} \frac{h^+_b H^+_b}{H_b}, \quad
        h_b = \sum_j \left[1 - \frac{|d_{ij}^2 - 4 b / B|}{4 / B}\right]_+, \quad H_b = \sum_{c \le b} h_c

    over B = ``num_bins`` bins of squared distances of unit rows, in [0, 4]; :math:`h^+` counts positives,
    :math:`h` all columns. The mean is over rows with a positive. Cakir et al., *Deep Metric Learning to
    Rank*, CVPR 2019.

    Args:
        num_bins: B, at least 1; the time grows with it.
        indices_tuple: ``None``, or all pairs of the batch as :class:`dml_cuda.MinedPairs`.
        embeddings, labels, ref_emb, ref_labels, row_weights: as in :func:`multi_similarity_loss`.
        options: ``reduction="mean_valid"``, ``backend``, ``class_weights``; see
            :class:`dml_cuda.RankingOptions`. ``similarity`` is ``"cosine"``, which squared distances of unit
            rows follow from.

    Returns, Raises:
        As :func:`smooth_ap_loss`.
    """
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return ranking_loss(FastAP, {"num_bins": num_bins}, options, *batch)


@described_by(fast_ap_loss)
class FastAPLoss(RankingLoss):
    """FastAP loss; see :func:`dml_cuda.functional.fast_ap_loss`.

    >>> loss_fn = FastAPLoss(num_bins=10)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = FastAP
    num_bins: int = option()

    def __init__(self, num_bins: int = 10, **options: Unpack[RankingOptions]) -> None:
        super().__init__(options, num_bins=num_bins)
