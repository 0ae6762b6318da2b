"""Generalised lifted structure loss."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_number
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs
from ._pair import PairLoss, option, pair_loss


class LiftedStructure(Formula):
    """Hermans et al., 2017, equation 9."""

    name = "lifted_structure"
    parameters: ClassVar = {"neg_margin": check_number, "pos_margin": check_number}
    levels = ("neg_margin", "pos_margin")
    similarity = "euclidean"

    @staticmethod
    def row(pos: Pairs, neg: Pairs, neg_level: float, pos_level: float) -> Tensor:
        pull, push = pos.lse(-(pos.s - pos_level)), neg.lse(neg.s - neg_level)
        return torch.relu(torch.where(pos.count > 0, pull, 0.0) + torch.where(neg.count > 0, push, 0.0))


def generalized_lifted_structure_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    neg_margin: float = 1.0,
    pos_margin: float = 0.0,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Generalised lifted structure loss, on distances :math:`d`.

    For every row :math:`i`, over its kept positives :math:`P_i` and negatives :math:`N_i`:

    .. math::
        L_i = \Big[\log \sum_{j \in P_i} e^{d_{ij} - m_p} + \log \sum_{j \in N_i} e^{m_n - d_{ij}}\Big]_+

    where the logarithm of an empty sum is 0. With cosine or dot product the exponents are
    :math:`m_p - s_{ij}` and :math:`s_{ij} - m_n`. Hermans et al., *In Defense of the Triplet Loss for Person
    Re-Identification*, 2017, equation 9, after Oh Song et al., *Deep Metric Learning via Lifted Structured
    Feature Embedding*, CVPR 2016.

    Args:
        neg_margin: :math:`m_n`, added to the exponents of negatives.
        pos_margin: :math:`m_p`, subtracted from the exponents of positives.
        embeddings, labels, ref_emb, ref_labels, indices_tuple, row_weights: as in
            :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="euclidean"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"neg_margin": neg_margin, "pos_margin": pos_margin}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(LiftedStructure, values, options, *batch)


@described_by(generalized_lifted_structure_loss)
class GeneralizedLiftedStructureLoss(PairLoss):
    """Generalised lifted structure loss; see :func:`dml_cuda.functional.generalized_lifted_structure_loss`.

    >>> loss_fn = GeneralizedLiftedStructureLoss(neg_margin=0.5)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = LiftedStructure
    neg_margin: float = option()
    pos_margin: float = option()

    def __init__(
        self, neg_margin: float = 1.0, pos_margin: float = 0.0, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, neg_margin=neg_margin, pos_margin=pos_margin)
