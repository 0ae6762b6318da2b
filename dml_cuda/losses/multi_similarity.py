"""Multi-similarity loss."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero, check_number
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs
from ._pair import PairLoss, option, pair_loss


class MultiSimilarity(Formula):
    """Wang et al., CVPR 2019, equation 15."""

    name = "multi_similarity"
    parameters: ClassVar = {"alpha": check_above_zero, "beta": check_above_zero, "base": check_number}
    levels = ("base",)

    @staticmethod
    def row(pos: Pairs, neg: Pairs, alpha: float, beta: float, base: float) -> Tensor:
        pull = pos.lse(-alpha * (pos.s - base), plus_one=True)
        push = neg.lse(beta * (neg.s - base), plus_one=True)
        return pull / alpha + push / beta


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Multi-similarity loss, with its hard-pair mining when ``epsilon`` is given.

    For every row :math:`i`, over its kept positives :math:`P_i` and negatives :math:`N_i`:

    .. math::
        L_i = \frac{1}{\alpha} \log\Big(1 + \sum_{j \in P_i} e^{-\alpha (s_{ij} - \lambda)}\Big)
            + \frac{1}{\beta}  \log\Big(1 + \sum_{j \in N_i} e^{ \beta  (s_{ij} - \lambda)}\Big)

    with :math:`\lambda` = ``base``. Wang et al., *Multi-Similarity Loss with General Pair Weighting
    for Deep Metric Learning*, CVPR 2019.

    Args:
        embeddings: ``[N, D]`` float16, bfloat16, float32 or float64, any strides, normalised or not.
        labels: ``[N]``, any integer dtype. Two rows with equal labels are a positive pair, all others
            negative; a row is not paired with itself. Not needed with ``indices_tuple``.
        alpha: weight of positives, above 0. As every parameter of a loss, a number, or a tensor of one
            number, such as an ``nn.Parameter``, that learns.
        beta: weight of negatives, above 0.
        base: the similarity (lambda in the paper) subtracted in both terms; with
            ``similarity="euclidean"`` a distance.
        ref_emb: ``[M, D]``, dtype and device of ``embeddings``: compares the rows with these instead of
            with each other. Both receive gradients.
        ref_labels: ``[M]``, required with ``ref_emb``.
        indices_tuple: the pairs to use instead of those that the labels define: the result of a miner of
            dml_cuda or pytorch-metric-learning, pairs ``(anchors, positives, anchors, negatives)`` or
            triplets ``(anchors, positives, negatives)``, int64 or int32. Anchors index ``embeddings``, the
            rest ``ref_emb`` if it is given. A pair that is listed twice counts once. A result of
            :class:`dml_cuda.MultiSimilarityMiner` for the same embeddings is never materialised.
        row_weights: ``[N]`` factors of the rows' losses; what a mean divides by stays as it is.
        options: ``epsilon``, ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns:
        A scalar, or ``[N]`` for ``reduction="none"``, in the dtype of ``embeddings`` (under autocast
        float32 at least), differentiable once with respect to ``embeddings`` and ``ref_emb``. A batch without
        pairs gives 0 with a zero gradient; NaN or infinite embeddings give NaN.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; the message names it.
        RuntimeError: ``backend="fused"`` on a device without a kernel.
    """
    values = {"alpha": alpha, "beta": beta, "base": base}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(MultiSimilarity, values, options, *batch)


@described_by(multi_similarity_loss)
class MultiSimilarityLoss(PairLoss):
    """Multi-similarity loss; see :func:`dml_cuda.functional.multi_similarity_loss`.

    >>> loss_fn = MultiSimilarityLoss(epsilon=0.1)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = MultiSimilarity
    alpha: float = option()
    beta: float = option()
    base: float = option()

    def __init__(
        self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, alpha=alpha, beta=beta, base=base)
