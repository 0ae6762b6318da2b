"""Neighbourhood components analysis."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs, Part, softplus
from ._pair import PairLoss, option, pair_loss


class NCA(Formula):
    """Goldberger et al., NeurIPS 2004."""

    name = "nca"
    parameters: ClassVar = {"softmax_scale": check_above_zero}
    levels = ("softmax_scale",)
    similarity = "euclidean"
    log_one_plus = True

    @staticmethod
    def row(pos: Pairs, neg: Pairs, softmax_scale: float | Tensor) -> tuple[Part, ...]:
        """A negative scale, that of distances, multiplies their squares."""
        if isinstance(softmax_scale, Tensor):
            linear, square = softmax_scale.relu(), -(-softmax_scale).relu()
        else:
            linear, square = max(softmax_scale, 0.0), min(softmax_scale, 0.0)
        pull, push = (pairs.lse(pairs.s * (linear + square * pairs.s)) for pairs in (pos, neg))
        losses = softplus(push - pull, where=(pos.count > 0) & (neg.count > 0))
        return (Part(losses, (pos.count > 0).long(), NCA.is_nonzero(losses).long()),)


def nca_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    softmax_scale: float = 1.0,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Neighbourhood components analysis: a neighbour that a row draws should be of its class.

    A row draws one of its kept pairs by a softmax over the negated squared distances:

    .. math::
        L_i = -\log \frac{\sum_{j \in P_i} e^{-\sigma d_{ij}^2}}
                         {\sum_{j \in P_i} e^{-\sigma d_{ij}^2} + \sum_{k \in N_i} e^{-\sigma d_{ik}^2}}

    with :math:`\sigma` = ``softmax_scale``: -log of the probability of a positive. With cosine or dot product
    s the logits are :math:`\sigma s`. 0 for a row without kept negatives; a row without kept positives has no
    loss. Goldberger et al., *Neighbourhood Components Analysis*, NeurIPS 2004, with the logarithm as in
    pytorch-metric-learning.

    ``reduction="mean"`` and ``"mean_valid"`` divide by the number of rows with a positive.

    Args:
        softmax_scale: multiplies the logits, above 0.
        embeddings, labels, ref_emb, ref_labels, indices_tuple, row_weights: as in
            :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="euclidean"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"softmax_scale": softmax_scale}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(NCA, values, options, *batch)


@described_by(nca_loss)
class NCALoss(PairLoss):
    """Neighbourhood components analysis; see :func:`dml_cuda.functional.nca_loss`.

    >>> loss_fn = NCALoss(softmax_scale=8)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = NCA
    softmax_scale: float = option()

    def __init__(self, softmax_scale: float = 1.0, **options: Unpack[PairOptions]) -> None:
        super().__init__(options, softmax_scale=softmax_scale)
