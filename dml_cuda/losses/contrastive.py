"""Contrastive loss."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_number
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs, Part
from ._pair import PairLoss, option, pair_loss


class Contrastive(Formula):
    """Hadsell et al., CVPR 2006, with hinges that are not squared and a margin for positives."""

    name = "contrastive"
    parameters: ClassVar = {"pos_margin": check_number, "neg_margin": check_number}
    levels = ("pos_margin", "neg_margin")
    similarity, reduction = "euclidean", "mean_nonzero"
    repeats = True

    @staticmethod
    def row(pos: Pairs, neg: Pairs, pos_level: float, neg_level: float) -> tuple[Part, ...]:
        return pos.each(torch.relu(-(pos.s - pos_level))), neg.each(torch.relu(neg.s - neg_level))


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Contrastive loss: hinges on the distances :math:`d` of positives and of negatives.

    .. math::
        L = \operatorname{mean}_P [d_{ij} - m_p]_+ + \operatorname{mean}_N [m_n - d_{ij}]_+

    over all kept positive and negative pairs of the batch. With cosine or dot product the hinges are
    :math:`[m_p - s_{ij}]_+` and :math:`[s_{ij} - m_n]_+`, and the margins are similarities, for example 1
    and 0.
    Hadsell et al., *Dimensionality Reduction by Learning an Invariant Mapping*, CVPR 2006 (there squared,
    without ``pos_margin``).

    A pair-level loss with one mean for positives and one for negatives: ``reduction="mean_nonzero"`` averages
    over pairs whose hinge is not 0, ``"mean"`` and ``"mean_valid"`` over all kept pairs; ``"none"`` gives
    each row's sum over its pairs.

    Args:
        pos_margin: positive pairs beyond this distance, or below this similarity, have a loss.
        neg_margin: negative pairs within this distance, or above this similarity, have a loss.
        indices_tuple: as in :func:`multi_similarity_loss`, but a pair that is listed twice counts twice.
        embeddings, labels, ref_emb, ref_labels, row_weights: as in :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="euclidean"``, ``normalize_embeddings``,
            ``reduction="mean_nonzero"``, ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``;
            see :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"pos_margin": pos_margin, "neg_margin": neg_margin}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(Contrastive, values, options, *batch)


@described_by(contrastive_loss)
class ContrastiveLoss(PairLoss):
    """Contrastive loss; see :func:`dml_cuda.functional.contrastive_loss`.

    >>> loss_fn = ContrastiveLoss(neg_margin=0.5)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = Contrastive
    pos_margin: float = option()
    neg_margin: float = option()

    def __init__(
        self, pos_margin: float = 0.0, neg_margin: float = 1.0, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, pos_margin=pos_margin, neg_margin=neg_margin)
