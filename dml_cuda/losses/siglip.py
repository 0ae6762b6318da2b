"""SigLIP's loss: every pair of two towers is a binary classification of its own."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_number
from ._formula import Formula, Pairs, softplus
from ._pair import option
from ._two_towers import TowerOptions, TwoTowerLoss


class SigLIP(Formula):
    """Zhai et al., ICCV 2023."""

    name = "siglip"
    parameters: ClassVar = {"scale": check_number, "bias": check_number}

    @staticmethod
    def row(pos: Pairs, neg: Pairs, scale: float, bias: float) -> Tensor:
        pull, push = softplus(-(scale * pos.s + bias)), softplus(scale * neg.s + bias)
        return pos.sum(pull) + neg.sum(push)


class SigLIPLoss(TwoTowerLoss):
    r"""Sigmoid loss of all pairs of two towers, whose rows i belong together.

    .. math:: L = -\frac{1}{N} \sum_{ij} \log \sigma\big(z_{ij} (t s_{ij} + b)\big)

    with :math:`s_{ij}` the cosine of row i of ``a`` with row j of ``b``, :math:`z_{ij}` 1 for pairs that
    belong together and -1 for others, t = ``scale`` and b = ``bias``. Zhai et al., *Sigmoid Loss for Language
    Image Pre-Training*, ICCV 2023. The N x N similarities are not stored.

    Args:
        scale, bias: of the logits. The paper lets both learn, from 10 and -10, the scale by its logarithm:
            pass ``nn.Parameter`` tensors, or ``log_scale.exp()`` through ``dml_cuda.functional``.
        options: ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"``, ``backend``; see
            :class:`dml_cuda.TowerOptions`.

    >>> loss_fn = SigLIPLoss(scale=nn.Parameter(torch.tensor(10.0)), bias=nn.Parameter(torch.tensor(-10.0)))
    >>> loss = loss_fn(image_features, text_features)
    """

    formula = SigLIP
    both_directions = False
    scale: "float | Tensor" = option()
    bias: "float | Tensor" = option()

    def __init__(
        self,
        scale: "float | Tensor" = 10.0,
        bias: "float | Tensor" = -10.0,
        **options: Unpack[TowerOptions],
    ) -> None:
        super().__init__(options, scale=scale, bias=bias)
