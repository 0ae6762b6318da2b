"""Circle loss on pairs."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero, check_flag, check_number, check_parameter
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs, softplus
from ._pair import PairLoss, option, pair_loss


class Circle(Formula):
    """Sun et al., CVPR 2020, equations 4 to 8."""

    name = "circle"
    parameters: ClassVar = {"m": check_number, "gamma": check_above_zero, "detach_weights": check_flag}
    reduction = "mean_nonzero"

    @staticmethod
    def row(pos: Pairs, neg: Pairs, m: float, gamma: float, detach_weights: float) -> Tensor:
        to_pos, to_neg = (pairs.s.detach() if detach_weights else pairs.s for pairs in (pos, neg))
        pull = pos.lse(-gamma * torch.relu(-(to_pos - (1 + m))) * (pos.s - (1 - m)))
        push = neg.lse(gamma * torch.relu(to_neg + m) * (neg.s - m))
        return softplus(pull + push, where=(pos.count > 0) & (neg.count > 0))


def circle_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    m: float = 0.4,
    gamma: float = 80.0,
    detach_weights: bool = True,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Circle loss on pairs, with multi-similarity mining when ``epsilon`` is given.

    For every row :math:`i` with kept positives :math:`P_i` and kept negatives :math:`N_i` (without either
    the loss is 0):

    .. math::
        L_i = \log\Big(1 + \sum_{j \in P_i} e^{-\gamma [1 + m - s_{ij}]_+ (s_{ij} - (1 - m))}
                           \sum_{j \in N_i} e^{ \gamma [s_{ij} + m]_+ (s_{ij} - m)}\Big)

    Sun et al., *Circle Loss: A Unified Perspective of Pair Similarity Optimization*, CVPR 2020. The
    paper uses m 0.25 and gamma 256 for faces, m 0.4 and gamma 80 for fine-grained retrieval. The formula is
    meant for cosines; other similarities are inserted unchanged.

    Args:
        m: the relaxation margin.
        gamma: the scale of the logits, above 0.
        detach_weights: treat the weights :math:`[\cdot]_+` as constants in the gradient, as the paper does.
            ``False`` gives the derivative of the value.
        embeddings, labels, ref_emb, ref_labels, indices_tuple, row_weights: as in
            :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="cosine"``, ``normalize_embeddings``,
            ``reduction="mean_nonzero"``, ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``;
            see :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"m": m, "gamma": gamma, "detach_weights": detach_weights}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(Circle, values, options, *batch)


def margin_or_m(m: float, margin: float | None, default: float) -> float:
    """``m``, which version 3 of pytorch-metric-learning calls ``margin``."""
    if margin is None:
        return m
    check_parameter("margin", margin, check_number)
    if m is not default and m != default:
        raise ValueError(
            f"margin: expected only one of m and margin, which are the same; got m={m} and margin={margin}"
        )
    return margin


class NamedMargin:
    """Adds the attribute ``margin``, an alias of ``m``."""

    m: float

    @property
    def margin(self) -> float:
        return self.m

    @margin.setter
    def margin(self, margin: float) -> None:
        check_parameter("margin", margin, check_number)
        self.m = margin


@described_by(circle_loss)
class CircleLoss(NamedMargin, PairLoss):
    """Circle loss on pairs; see :func:`dml_cuda.functional.circle_loss`.

    ``margin`` is the same as ``m``.

    >>> loss_fn = CircleLoss(m=0.4, gamma=80)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = Circle
    m: float = option()
    gamma: float = option()
    detach_weights: bool = option()

    def __init__(
        self,
        m: float = 0.4,
        gamma: float = 80.0,
        *,
        margin: float | None = None,
        detach_weights: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        m = margin_or_m(m, margin, 0.4)
        super().__init__(options, m=m, gamma=gamma, detach_weights=detach_weights)
