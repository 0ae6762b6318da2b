"""Binomial deviance loss."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero, check_number
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs, softplus
from ._pair import PairLoss, option, pair_loss


class BinomialDeviance(Formula):
    """Yi et al., ICPR 2014, in the form of Wang et al., CVPR 2019."""

    name = "binomial_deviance"
    parameters: ClassVar = {"alpha": check_above_zero, "beta": check_above_zero, "base": check_number}
    levels = ("base",)

    @staticmethod
    def row(pos: Pairs, neg: Pairs, alpha: float, beta: float, base: float) -> Tensor:
        pull, push = softplus(-alpha * (pos.s - base)), softplus(beta * (neg.s - base))
        return pos.mean(pull) + neg.mean(push)


def binomial_deviance_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 40.0,
    base: float = 0.5,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Binomial deviance loss.

    For every row :math:`i`, over its kept positives :math:`P_i` and negatives :math:`N_i`:

    .. math::
        L_i = \frac{1}{|P_i|} \sum_{j \in P_i} \log\big(1 + e^{-\alpha (s_{ij} - \lambda)}\big)
            + \frac{1}{|N_i|} \sum_{j \in N_i} \log\big(1 + e^{ \beta  (s_{ij} - \lambda)}\big)

    with :math:`\lambda` = ``base``; a mean over no pairs is 0. Yi et al., *Deep Metric Learning for Person
    Re-Identification*, ICPR 2014, in the form that Wang et al., CVPR 2019, compare with multi-similarity.

    Args:
        alpha: weight of positives, above 0.
        beta: weight of negatives, above 0.
        base: the similarity subtracted in both terms; with ``similarity="euclidean"`` a distance.
        embeddings, labels, ref_emb, ref_labels, indices_tuple, row_weights: as in
            :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"alpha": alpha, "beta": beta, "base": base}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(BinomialDeviance, values, options, *batch)


@described_by(binomial_deviance_loss)
class BinomialDevianceLoss(PairLoss):
    """Binomial deviance loss; see :func:`dml_cuda.functional.binomial_deviance_loss`.

    >>> loss_fn = BinomialDevianceLoss(epsilon=0.1)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = BinomialDeviance
    alpha: float = option()
    beta: float = option()
    base: float = option()

    def __init__(
        self, alpha: float = 2.0, beta: float = 40.0, base: float = 0.5, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, alpha=alpha, beta=beta, base=base)
