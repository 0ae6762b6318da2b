"""Lifted structure loss."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_number
from .._inputs.options import PairOptions
from .._ops.positive_rows import positive_rows, register
from ._described import described_by
from ._formula import Formula, Pairs, Part, logaddexp
from ._negatives import negatives_lse
from ._pair import PairLoss, option, pair_loss


def _terms(pos: Pairs, here: Tensor, there: Tensor | None, pos_level: float | Tensor) -> Tensor:
    """The losses of positive pairs from the log-sum-exp over their row's negatives and their column's."""
    context = pos.spread(here)
    if there is not None:
        context = logaddexp(context, pos.spread_columns(there))
    context = torch.where(context == -torch.inf, 0.0, context)
    return torch.relu(context - (pos.s - pos_level)).square() / 2


def _of_positives(pos: Pairs, here: Tensor, there: Tensor | None, params: Tensor) -> Part:
    return pos.each(_terms(pos, here, there, params[0]))


register("lifted_pairs", _of_positives)


class LiftedPairs(Formula):
    """Oh Song et al., CVPR 2016."""

    name = "lifted_pairs"
    parameters: ClassVar = {"neg_margin": check_number, "pos_margin": check_number}
    levels = ("neg_margin", "pos_margin")
    similarity = "euclidean"
    repeats = True
    composed = True

    @staticmethod
    def row(pos: Pairs, neg: Pairs, neg_level: float, pos_level: float) -> tuple[Part, ...]:
        push = neg.lse(neg.s - neg_level)
        losses = _terms(pos, push, push if pos.square else None, pos_level)
        return (pos.each(torch.where((neg.count > 0).any(), losses, 0.0)),)

    @staticmethod
    def compose(call: Any, batch: Any) -> tuple[Part, ...]:
        """The log-sum-exp of each row's negatives by a kernel, then the positives."""
        neg_level, pos_level = call.params
        here = there = None
        if batch.ref_emb is None or batch.mine_self_pair:
            here = negatives_lse(call, batch, 1.0) - neg_level
            there = here if batch.ref_emb is None else None
        else:  # a process's rows among those of all, which are the columns: each column is a row too
            every = batch._replace(embeddings=batch.ref_emb, labels=batch.ref_labels, ref_emb=None)
            there = negatives_lse(call, every._replace(ref_labels=None, self_index=None), 1.0) - neg_level
            here = there[batch.self_index]
        part = positive_rows(LiftedPairs.name, call.similarity, batch, here, there, [pos_level])
        some = (here != -torch.inf).any()
        return (Part(torch.where(some, part.losses, 0.0), part.counts, torch.where(some, part.nonzero, 0)),)


def lifted_structure_loss(
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
    r"""Lifted structure loss: each positive pair against the negatives of both its rows, on distances d.

    For every kept positive pair :math:`(i, j)`

    .. math::
        L_{ij} = \frac{1}{2} \Big[\log \Big(\sum_{k \in N_i} e^{m_n - d_{ik}}
                                            + \sum_{l \in N_j} e^{m_n - d_{jl}}\Big) + d_{ij} - m_p\Big]_+^2

    where the logarithm of an empty sum is 0; 0 in a batch without kept negatives. With ``ref_emb`` a pair has
    one row, and :math:`N_i` alone counts. With cosine or dot product s the exponents are :math:`s - m_n`, and
    :math:`m_p - s_{ij}` takes the place of :math:`d_{ij} - m_p`. Oh Song et al., *Deep Metric Learning via
    Lifted Structured Feature Embedding*, CVPR 2016.

    The cost is that of one pass over all pairs, in place of positive pairs times negative pairs. With
    ``epsilon`` the pairs that mining keeps are listed first.

    A pair-level loss over positive pairs: ``reduction="mean"`` and ``"mean_valid"`` average over all kept
    positive pairs, ``"mean_nonzero"`` over those whose loss is not 0; ``"none"`` gives each row's sum over
    its positives.

    Args:
        neg_margin: :math:`m_n`, added to the exponents of negatives.
        pos_margin: :math:`m_p`, subtracted from the distances of positives.
        indices_tuple: as in :func:`multi_similarity_loss`, but a pair that is listed twice counts twice.
        embeddings, labels, ref_emb, ref_labels, row_weights: as in :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="euclidean"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"neg_margin": neg_margin, "pos_margin": pos_margin}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(LiftedPairs, values, options, *batch)


@described_by(lifted_structure_loss)
class LiftedStructureLoss(PairLoss):
    """Lifted structure loss; see :func:`dml_cuda.functional.lifted_structure_loss`.

    >>> loss_fn = LiftedStructureLoss(neg_margin=1)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = LiftedPairs
    neg_margin: float = option()
    pos_margin: float = option()

    def __init__(
        self, neg_margin: float = 1.0, pos_margin: float = 0.0, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, neg_margin=neg_margin, pos_margin=pos_margin)
