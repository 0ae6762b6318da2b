"""Class-level circle loss."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from ._classifier import ClassifierLoss, ClassifierOptions
from ._pair import option
from .circle import Circle, NamedMargin, margin_or_m


class CircleClassifierLoss(NamedMargin, ClassifierLoss):
    r"""Circle loss with class-level labels: a classification loss without materialised logits.

    For a row of class :math:`y` with cosines :math:`s_j` to the weights of the classes :math:`j`:

    .. math::
        L_i = \log\Big(1 + e^{-\gamma [1 + m - s_y]_+ (s_y - (1 - m))}
                           \sum_{j \ne y} e^{ \gamma [s_j + m]_+ (s_j - m)}\Big)

    Sun et al., *Circle Loss: A Unified Perspective of Pair Similarity Optimization*, CVPR 2020, section 3.

    Args:
        num_classes, embedding_size: C and D.
        m: the relaxation margin, alias ``margin``; 0.25 for faces.
        gamma: the scale of the logits, above 0; 256 for faces.
        detach_weights: treat :math:`[\cdot]_+` as constant in the gradient, as the paper does.
        options: ``reduction="mean"`` over the N rows, ``backend="auto"``; see :class:`dml_cuda.PairOptions`.

    Attributes:
        W: ``[D, C]`` parameter, one column a class, initialised from a standard normal distribution.

    Rows with a negative label are ignored. Labels >= C raise ValueError on the CPU; on the GPU, where
    checking would synchronise, those rows are ignored.

    >>> head = CircleClassifierLoss(num_classes=100, embedding_size=128)
    >>> loss = head(embeddings, labels)  # labels in [0, 100)
    >>> predicted = head.get_logits(embeddings).argmax(dim=1)
    """

    formula = Circle
    weight = "W"
    W: nn.Parameter
    m: float = option()
    gamma: float = option()
    detach_weights: bool = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m: float = 0.25,
        gamma: float = 256.0,
        *,
        margin: float | None = None,
        detach_weights: bool = True,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        values: dict[str, Any] = {"m": margin_or_m(m, margin, 0.25), "gamma": gamma}
        super().__init__(num_classes, embedding_size, options, **values, detach_weights=detach_weights)
        self.add_weight()

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` gamma times the cosine with each class's weight, for inference."""
        return self.gamma * self.cosines(embeddings)
