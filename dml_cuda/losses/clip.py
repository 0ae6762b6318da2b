"""CLIP's loss: softmax cross-entropy along the rows and along the columns of two towers' similarities."""

from torch import Tensor
from typing_extensions import Unpack

from ._pair import option
from ._two_towers import TowerOptions, TwoTowerLoss
from .nt_xent import NTXent


class CLIPLoss(TwoTowerLoss):
    r"""Symmetric cross-entropy of two towers, whose rows i belong together.

    .. math::
        L = -\frac{1}{2N} \sum_i \Big( \log \frac{e^{s_{ii} / \tau}}{\sum_j e^{s_{ij} / \tau}}
                                      + \log \frac{e^{s_{ii} / \tau}}{\sum_j e^{s_{ji} / \tau}} \Big)

    with :math:`s_{ij}` the cosine of row i of ``a`` with row j of ``b`` and :math:`\tau` = ``temperature``.
    Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, ICML 2021. One
    product serves both directions, and the N x N similarities are not stored.

    With ``labels``, each positive pair is compared with the negatives of its row alone, as by
    :class:`NTXentLoss`, and the mean is over positive pairs.

    Args:
        temperature: divides similarities, above 0. An ``nn.Parameter`` learns: ``1 / temperature`` is the
            ``logit_scale.exp()`` of open_clip.
        options: ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"``, ``backend``; see
            :class:`dml_cuda.TowerOptions`. Tensors of unit length need no normalisation, but it does no harm.

    >>> loss_fn = CLIPLoss(temperature=torch.nn.Parameter(torch.tensor(0.07)))
    >>> loss = loss_fn(image_features, text_features)
    """

    formula = NTXent
    both_directions = True
    temperature: "float | Tensor" = option()

    def __init__(self, temperature: "float | Tensor" = 0.07, **options: Unpack[TowerOptions]) -> None:
        super().__init__(options, temperature=temperature)
