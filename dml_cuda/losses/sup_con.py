"""Supervised contrastive loss."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero
from .._inputs.options import PairOptions
from ._described import described_by
from ._formula import Formula, Pairs
from ._pair import PairLoss, option, pair_loss


class SupCon(Formula):
    """Khosla et al., NeurIPS 2020, equation 2."""

    name = "sup_con"
    parameters: ClassVar = {"temperature": check_above_zero}
    reduction = "mean_nonzero"

    @staticmethod
    def row(pos: Pairs, neg: Pairs, temperature: float) -> Tensor:
        z_pos, z_neg = pos.s / temperature, neg.s / temperature
        has_positives = pos.count > 0
        lse_pos = torch.where(has_positives, pos.lse(z_pos), 0.0)
        lse_all = torch.logsumexp(torch.stack([lse_pos, neg.lse(z_neg)]), 0)
        return torch.where(has_positives, lse_all - pos.mean(z_pos), 0.0)


def sup_con_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Supervised contrastive loss.

    For every row :math:`i` with kept positives :math:`P_i` (without them the loss is 0) and kept negatives
    :math:`N_i`:

    .. math::
        L_i = -\frac{1}{|P_i|} \sum_{j \in P_i}
              \log \frac{e^{s_{ij} / \tau}}{\sum_{k \in P_i \cup N_i} e^{s_{ik} / \tau}}

    with :math:`\tau` = ``temperature``. Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020. The
    same holds for a batch in which no row has a negative; pytorch-metric-learning gives 0 there.

    Args:
        temperature: divides similarities, above 0.
        embeddings, labels, ref_emb, ref_labels, indices_tuple, row_weights: as in
            :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="cosine"``, ``normalize_embeddings``,
            ``reduction="mean_nonzero"``, ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``;
            see :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = {"temperature": temperature}
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(SupCon, values, options, *batch)


@described_by(sup_con_loss)
class SupConLoss(PairLoss):
    """Supervised contrastive loss; see :func:`dml_cuda.functional.sup_con_loss`.

    >>> loss_fn = SupConLoss(temperature=0.07)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = SupCon
    temperature: float = option()

    def __init__(self, temperature: float = 0.1, **options: Unpack[PairOptions]) -> None:
        super().__init__(options, temperature=temperature)
