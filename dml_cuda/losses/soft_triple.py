"""SoftTriple loss."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs import autocast as _autocast
from .._inputs.checks import check_above_zero, check_count, check_number
from .._ops import center_spread, centers, soft_triple
from ._classifier import ClassifierOptions, RowHead
from ._formula import Formula
from ._pair import option

_BLOCK = 1 << 22  # distances between centres in memory at once


def _check_not_negative(name: str, value: object) -> None:
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")


class SoftTriple(Formula):
    """Qian et al., ICCV 2019. Only the parameters: with several centres a class, pairs do not suffice."""

    name = "soft_triple"
    parameters: ClassVar = {
        "la": check_above_zero,
        "gamma": check_above_zero,
        "margin": check_number,
        "tau": _check_not_negative,
    }


class SoftTripleLoss(RowHead):
    r"""Softmax over classes with several centres each, weighted by a softmax over the centres.

    .. math::
        S_{ic} = \sum_k \frac{e^{x_i \cdot w_{ck} / \gamma}}{\sum_l e^{x_i \cdot w_{cl} / \gamma}}
                 x_i \cdot w_{ck}, \qquad
        L_i = -\log \frac{e^{\lambda (S_{iy} - m)}}
                         {e^{\lambda (S_{iy} - m)} + \sum_{c \ne y} e^{\lambda S_{ic}}}

    of unit rows and centres, with :math:`\lambda` = ``la`` and m = ``margin``; plus, if ``tau`` is not 0,

    .. math:: \tau \frac{\sum_c \sum_{s < t} \sqrt{2 - 2 w_{cs} \cdot w_{ct}}}{C K (K - 1)},

    which merges centres that are not needed: :meth:`merged_centers` counts those left. Qian et al.,
    *SoftTriple Loss: Deep Metric Learning Without Triplet Sampling*, ICCV 2019 (there tau 0.2, la 20, gamma
    0.1, margin 0.01). Classes are processed in blocks, which backward recomputes, so memory is bounded.

    Args:
        num_classes, embedding_size: C and D.
        centers_per_class: K.
        la: the scale of the softmax over classes, above 0. It learns, as the other parameters do, if it is an
            ``nn.Parameter``.
        gamma: the temperature of the softmax over centres, above 0.
        margin: on the similarity to the true class.
        tau: the weight of the regulariser, 0 for none. It is added once to the batch's loss, and with
            ``reduction="none"`` to every row's.
        options: as for :class:`NormalizedSoftmaxLoss`.

    Attributes:
        fc: ``[D, C K]`` parameter, the K centres of a class in adjacent columns, initialised by
            ``kaiming_uniform_(a=sqrt(5))``.

    Rows with a negative label are ignored, as in :class:`NormalizedSoftmaxLoss`.
    """

    formula = SoftTriple
    weight = "fc"
    fc: nn.Parameter
    la: float = option()
    gamma: float = option()
    margin: float = option()
    tau: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        centers_per_class: int = 10,
        la: float = 20,
        gamma: float = 0.1,
        margin: float = 0.01,
        tau: float = 0.0,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        values = {"la": la, "gamma": gamma, "margin": margin, "tau": tau}
        super().__init__(num_classes, embedding_size, options, **values)
        check_count("centers_per_class", centers_per_class)
        self.centers_per_class = int(centers_per_class)
        self.add_weight()

    def num_columns(self) -> int:
        return self.num_classes * self.centers_per_class

    def reset_parameters(self) -> None:
        """Draws the centres anew, as pytorch-metric-learning does."""
        nn.init.kaiming_uniform_(self.fc, a=math.sqrt(5))

    def row_losses(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
        """The losses ``[N]`` of a validated batch, float32 or float64, and the regulariser of the batch."""
        *params, tau = self.call.params
        k, labels, reference = self.centers_per_class, labels.long(), self.backend == "reference"
        embeddings, weights = self.promoted(embeddings)
        with _autocast.off(embeddings.device):
            if reference:
                losses = soft_triple.dense(embeddings, weights, labels, k, *params)
            else:
                losses = centers.row_losses(embeddings, weights, labels, k, "soft_triple", params)
            if not isinstance(tau, Tensor) and tau == 0:
                return losses, 0.0
            spread = soft_triple.dense_spread if reference else center_spread.spread
            return losses, tau * spread(weights, k)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` similarities to the classes."""
        return soft_triple.similarities(self.cosines(embeddings), self.centers_per_class, self.gamma)

    def cosine_losses(self, cosines: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        *params, _ = self.call.params
        return soft_triple.losses(cosines, labels, self.centers_per_class, *params)

    @torch.no_grad()
    def merged_centers(self, threshold: float = 0.01) -> Tensor:
        """``[C]`` int64: the number of distinct centres of each class.

        Centres nearer than ``threshold`` count as one, transitively. Distances are between unit centres, from
        0 to 2.
        """
        _check_not_negative("threshold", threshold)
        k = self.centers_per_class
        counts = []
        for rows in self.rows().split(k * max(1, _BLOCK // (k * k))):
            unit = nn.functional.normalize(rows.double(), dim=1).view(-1, k, rows.shape[1])
            near = (2 - 2 * unit @ unit.mT).clamp(min=0).sqrt() < threshold
            near |= torch.eye(k, dtype=torch.bool, device=near.device)
            for _ in range((k - 1).bit_length()):  # the transitive closure, by squaring
                near = (near.float() @ near.float()) > 0
            first = ~near.tril(-1).any(2)  # the first centre of each group
            counts.append(first.sum(1))
        return torch.cat(counts)
