"""Tuplet margin loss."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero, check_number
from .._inputs.options import PairOptions
from .._ops.positive_rows import positive_rows, register
from ._described import described_by
from ._formula import Formula, Pairs, Part, softplus
from ._negatives import negatives_lse
from ._pair import PairLoss, option, pair_loss


def _of_pairs(pos: Pairs, push: Tensor, margin: float | Tensor, scale: float | Tensor) -> Part:
    """From ``push`` ``[N]``, the log-sum-exp over each row's negatives, -inf without any."""
    if isinstance(margin, Tensor):
        cosine, sine = margin.deg2rad().cos(), margin.deg2rad().sin()
    else:
        cosine, sine = math.cos(math.radians(margin)), math.sin(math.radians(margin))
    square = torch.relu((1 - pos.s) * (1 + pos.s))
    has_root = square > 0
    root = torch.where(has_root, torch.sqrt(torch.where(has_root, square, 1.0)), 0.0)
    turned = cosine * pos.s + sine * root  # cos(theta - angle)
    has_negatives = push != -torch.inf
    logits = pos.spread(torch.where(has_negatives, push, 0.0)) - scale * turned
    losses = softplus(logits, where=pos.spread(has_negatives))
    return pos.each(losses, TupletMargin.is_nonzero(losses))


def _of_positives(pos: Pairs, push: Tensor, there: None, params: Tensor) -> Part:
    return _of_pairs(pos, push, *params)


register("tuplet_margin", _of_positives)


class TupletMargin(Formula):
    """Yu and Tao, ICCV 2019, equation 5."""

    name = "tuplet_margin"
    parameters: ClassVar = {"margin": check_number, "scale": check_above_zero}
    log_one_plus = True
    repeats = True
    on_cuda = False

    @staticmethod
    def row(pos: Pairs, neg: Pairs, margin: float | Tensor, scale: float | Tensor) -> tuple[Part, ...]:
        return (_of_pairs(pos, neg.lse(scale * neg.s), margin, scale),)

    @staticmethod
    def compose(call: Any, batch: Any) -> tuple[Part, ...]:
        """The log-sum-exp of each row's negatives by a kernel, then the positives: on CUDA, see on_cuda."""
        margin, scale = call.params
        push = negatives_lse(call, batch, 1 / scale)
        return (positive_rows(TupletMargin.name, call.similarity, batch, push, None, [margin, scale]),)


def tuplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float = 5.73,
    scale: float = 64.0,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Tuplet margin loss: each positive pair against all of its row's negatives, with a margin on its angle.

    .. math::
        L_{ij} = \log \Big(1 + \sum_{k \in N_i} e^{\sigma (\cos \theta_{ik} - \cos(\theta_{ij} - m))}\Big)

    for every kept positive pair :math:`(i, j)`, with :math:`\sigma` = ``scale`` and m = ``margin``; 0 in a
    row without kept negatives. The margin makes positives look nearer than they are: those that are very
    near already are not pulled further. Yu and Tao, *Deep Metric Learning with Tuplet Margin Loss*, ICCV
    2019, equation 5. Meant for cosines; other similarities s take the place of :math:`\cos \theta`, with
    :math:`\cos(\theta - m) = s \cos m` beyond [-1, 1].

    A pair-level loss over positive pairs: ``reduction="mean"`` and ``"mean_valid"`` average over all kept
    positive pairs, ``"mean_nonzero"`` over those whose loss is not 0; ``"none"`` gives each row's sum over
    its positives. The gradient at an angle of 0 is that of the cosine alone.

    Args:
        margin: m, in degrees. The attribute is in degrees too, whereas pytorch-metric-learning's is in
            radians.
        scale: above 0.
        indices_tuple: as in :func:`multi_similarity_loss`, but a pair that is listed twice counts twice.
        embeddings, labels, ref_emb, ref_labels, row_weights: as in :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"margin": margin, "scale": scale}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(TupletMargin, values, options, *batch)


@described_by(tuplet_margin_loss)
class TupletMarginLoss(PairLoss):
    """Tuplet margin loss; see :func:`dml_cuda.functional.tuplet_margin_loss`.

    >>> loss_fn = TupletMarginLoss(margin=5.73, scale=64)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = TupletMargin
    margin: float = option()
    scale: float = option()

    def __init__(self, margin: float = 5.73, scale: float = 64.0, **options: Unpack[PairOptions]) -> None:
        super().__init__(options, margin=margin, scale=scale)
