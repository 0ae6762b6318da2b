"""ProxyNCA loss."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs.checks import check_above_zero
from ._classifier import ClassifierLoss, ClassifierOptions
from ._pair import option
from .margin_softmax import MarginSoftmax


class ProxyNCA(MarginSoftmax):
    """Movshovitz-Attias et al., ICCV 2017. For unit rows |x - p|^2 = 2 - 2 cos."""

    parameters: ClassVar = {"softmax_scale": check_above_zero}

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        return [2.0 * values["softmax_scale"], 0.0, 1.0, 0.0]


class ProxyNCALoss(ClassifierLoss):
    r"""Softmax over the negated squared distances of a unit row x to the unit proxies p of the classes.

    .. math:: L_i = -\log \frac{e^{-\sigma |x_i - p_y|^2}}{\sum_j e^{-\sigma |x_i - p_j|^2}}

    with :math:`\sigma` = ``softmax_scale``. Movshovitz-Attias et al., *No Fuss Distance Metric Learning using
    Proxies*, ICCV 2017, with the true class in the denominator, as in pytorch-metric-learning. The N x C
    matrix is not materialised.

    Args:
        softmax_scale: above 0.
        num_classes, embedding_size, options: as for :class:`NormalizedSoftmaxLoss`.

    Attributes:
        proxies: ``[C, D]`` parameter, initialised from a standard normal distribution.

    Only the anchors of ``indices_tuple`` count for the weights of rows. A row whose probability underflows to
    0 keeps its loss; pytorch-metric-learning drops it.
    """

    formula = ProxyNCA
    weight = "proxies"
    by_columns = False
    proxies: nn.Parameter
    softmax_scale: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        softmax_scale: float = 1,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, options, softmax_scale=softmax_scale)
        self.add_weight()

    def listed(self, indices_tuple: Any) -> tuple[Tensor, ...]:
        lists = super().listed(indices_tuple)
        return lists[:1] if len(lists) == 3 else lists[::2]

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` squared distances to the proxies, as in pytorch-metric-learning: argmin is the class."""
        # Not cdist, which chooses its way by the number of rows: torch.export would fix that number.
        x, proxies = (nn.functional.normalize(points, dim=1) for points in self.promoted(embeddings))
        lengths = x.square().sum(1, keepdim=True) + proxies.square().sum(1)
        return (lengths - 2 * x @ proxies.T).clamp(min=0)
