"""NT-Xent loss, also known as InfoNCE."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs, Part, softplus
from ._pair import PairLoss, option, pair_loss


class NTXent(Formula):
    """Sohn, NeurIPS 2016; van den Oord et al., 2018; Chen et al., ICML 2020."""

    name = "nt_xent"
    log_one_plus = True
    parameters: ClassVar = {"temperature": check_above_zero}
    repeats = True

    @staticmethod
    def row(pos: Pairs, neg: Pairs, temperature: float) -> tuple[Part, ...]:
        push = neg.lse(neg.s / temperature)
        has_negatives = pos.spread(neg.count > 0)
        losses = softplus(pos.spread(push) - pos.s / temperature, where=has_negatives)
        return (pos.each(losses, NTXent.is_nonzero(losses)),)


def nt_xent_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 0.07,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Normalised temperature-scaled cross entropy of each positive pair against its row's negatives.

    .. math::
        L_{ij} = -\log \frac{e^{s_{ij} / \tau}}{e^{s_{ij} / \tau} + \sum_{k \in N_i} e^{s_{ik} / \tau}}

    for every kept positive pair :math:`(i, j)`, with :math:`\tau` = ``temperature``; 0 in a row without kept
    negatives. Sohn, *Improved Deep Metric Learning with Multi-class N-pair Loss Objective*, NeurIPS 2016; van
    den Oord et al., *Representation Learning with Contrastive Predictive Coding*, 2018 (InfoNCE: two sets of
    points, the second as ``ref_emb``); Chen et al., *A Simple Framework for Contrastive Learning of Visual
    Representations*, ICML 2020.

    A pair-level loss over positive pairs: ``reduction="mean"`` and ``"mean_valid"`` average over all kept
    positive pairs, ``"mean_nonzero"`` over those whose loss is not 0; ``"none"`` gives each row's sum over
    its positives.

    Args:
        temperature: divides similarities, above 0.
        indices_tuple: as in :func:`multi_similarity_loss`, but a pair that is listed twice counts twice.
        embeddings, labels, ref_emb, ref_labels, row_weights: as in :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"temperature": temperature}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(NTXent, values, options, *batch)


@described_by(nt_xent_loss)
class NTXentLoss(PairLoss):
    """NT-Xent loss, InfoNCE; see :func:`dml_cuda.functional.nt_xent_loss`.

    >>> loss_fn = NTXentLoss(temperature=0.1)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = NTXent
    temperature: float = option()

    def __init__(self, temperature: float = 0.07, **options: Unpack[PairOptions]) -> None:
        super().__init__(options, temperature=temperature)
