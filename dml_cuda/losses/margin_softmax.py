"""Softmax over classes with a margin for the true class: normalised softmax, CosFace, ArcFace."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs import autocast as _autocast
from .._inputs.checks import check_above_zero, check_number
from .._ops.centers import unit_and_inverse
from .._ops.evaluate import of_rows
from ._classifier import ClassifierLoss, ClassifierOptions
from ._formula import Formula, Pairs, Part, number, softplus
from ._negatives import NegativesLSE
from ._pair import option


def turned_by(s: Tensor, cosine: float | Tensor, sine: float | Tensor) -> Tensor:
    """cos(theta + angle) of s = cos(theta) by the angle's cosine and sine; it falls beyond pi - angle too,
    where cos(theta + angle) would increase again."""
    if not isinstance(sine, Tensor) and sine == 0:
        return cosine * s
    square = torch.relu((1 - s) * (1 + s))
    has_root = square > 0
    root = torch.where(has_root, torch.sqrt(torch.where(has_root, square, 1.0)), 0.0)
    atan2 = torch.atan2 if isinstance(sine, Tensor) else math.atan2
    shift = atan2(sine, cosine) * sine
    return torch.where(s >= -cosine, cosine * s - sine * root, s - shift)


class MarginSoftmax(Formula):
    """Cross entropy of ``scale`` times the similarities, with cos(theta + angle) - margin for the true class.

    The parameters of the kernel are ``scale``, ``margin``, cos(angle) and sin(angle); subclasses compute them
    from their own.
    """

    name = "margin_softmax"
    log_one_plus = True

    @staticmethod
    def row(pos: Pairs, neg: Pairs, scale: float, margin: float, cosine: float, sine: float) -> Tensor:
        turned = turned_by(pos.s, cosine, sine)
        both = (pos.count > 0) & (neg.count > 0)
        return softplus(pos.lse(-scale * (turned - margin)) + neg.lse(scale * neg.s), where=both)


class MarginPerClass(MarginSoftmax):
    """The same with a margin for each class: its parameters are ``scale`` and the margins ``[C]``.

    Composed of a kernel's log-sum-exp over the other classes, and of each row's similarity with its own.
    """

    composed = True

    @staticmethod
    def turned(s: Tensor, margins: Tensor) -> Tensor:
        """Similarities with the margins of their classes."""
        raise NotImplementedError

    @classmethod
    def row(cls, pos: Pairs, neg: Pairs, scale: float, margins: Tensor) -> Tensor:
        turned = cls.turned(pos.s, pos.spread_columns(margins))
        both = (pos.count > 0) & (neg.count > 0)
        return softplus(pos.lse(-scale * turned) + neg.lse(scale * neg.s), where=both)

    @classmethod
    def compose(cls, call: Any, batch: Any) -> tuple[Part, ...]:
        scale, margins = call.params
        push = of_rows(call, NegativesLSE, [1 / scale], batch)
        labels, classes = batch.labels.long(), batch.ref_emb.shape[0]
        known = (labels >= 0) & (labels < classes)
        own = labels.clamp(0, classes - 1)
        dtype = _autocast.computed_dtype(batch.embeddings.dtype)
        rows, weights = batch.embeddings.to(dtype), batch.ref_emb[own].to(dtype)
        s = (unit_and_inverse(rows)[0] * unit_and_inverse(weights)[0]).sum(1)
        pull = scale * cls.turned(s, margins.to(dtype)[own])
        losses = softplus(push - pull, where=known & (classes > 1))
        return (Part(losses, torch.ones_like(labels), cls.is_nonzero(losses).long()),)


class NormalizedSoftmax(MarginSoftmax):
    """Zhai & Wu, BMVC 2019."""

    parameters: ClassVar = {"temperature": check_above_zero}

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        return [1.0 / values["temperature"], 0.0, 1.0, 0.0]


class CosFacePerClass(MarginPerClass):
    """Wang et al., CVPR 2018, with a margin for each class."""

    parameters: ClassVar = {"margin": check_number, "scale": check_above_zero}

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        return [number(values["scale"]), values["margin"]]

    @staticmethod
    def turned(s: Tensor, margins: Tensor) -> Tensor:
        return s - margins


class CosFace(MarginSoftmax):
    """Wang et al., CVPR 2018."""

    parameters: ClassVar = {"margin": check_number, "scale": check_above_zero}
    per_class = ("margin",)
    of_classes = CosFacePerClass

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        return [number(values["scale"]), number(values["margin"]), 1.0, 0.0]


def _check_degrees(name: str, value: object) -> None:
    check_number(name, value)
    if not 0 <= value <= 180:
        raise ValueError(f"{name}: expected an angle between 0 and 180 degrees, got {value}")


class ArcFacePerClass(MarginPerClass):
    """Deng et al., CVPR 2019, with an angle for each class."""

    parameters: ClassVar = {"margin": _check_degrees, "scale": check_above_zero}

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        return [number(values["scale"]), values["margin"].deg2rad()]

    @staticmethod
    def turned(s: Tensor, margins: Tensor) -> Tensor:
        return turned_by(s, margins.cos(), margins.sin())


class ArcFace(MarginSoftmax):
    """Deng et al., CVPR 2019."""

    parameters: ClassVar = {"margin": _check_degrees, "scale": check_above_zero}
    per_class = ("margin",)
    of_classes = ArcFacePerClass

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        margin = values["margin"]
        if isinstance(margin, Tensor):
            angle = number(margin).deg2rad()
            return [number(values["scale"]), 0.0, angle.cos(), angle.sin()]
        angle = math.radians(margin)
        return [number(values["scale"]), 0.0, math.cos(angle), math.sin(angle)]


class _SoftmaxLoss(ClassifierLoss):
    weight = "W"
    W: nn.Parameter

    def __init__(self, num_classes: int, embedding_size: int, options: ClassifierOptions, **values: float):
        super().__init__(num_classes, embedding_size, options, **values)
        self.add_weight()

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` scaled cosines with the weights of the classes, without margin; for inference."""
        return self.call.params[0] * self.cosines(embeddings)


class NormalizedSoftmaxLoss(_SoftmaxLoss):
    r"""Softmax over the cosines :math:`s_j` of a row with the weights of the classes; its class is y.

    .. math:: L_i = -\log \frac{e^{s_y / \tau}}{\sum_j e^{s_j / \tau}}

    with :math:`\tau` = ``temperature``. Zhai & Wu, *Classification is a Strong Baseline for Deep Metric
    Learning*, BMVC 2019. The N x C matrix of logits is not materialised.

    Args:
        num_classes, embedding_size: C and D.
        temperature: above 0.
        options: ``reduction="mean"`` over the N rows, ``backend="auto"``; see :class:`dml_cuda.PairOptions`.

    Attributes:
        W: ``[D, C]`` parameter, one column a class, initialised from a standard normal distribution.

    Rows with a negative label are ignored. Labels >= C raise ValueError on the CPU; on the GPU, where
    checking would synchronise, those rows are ignored.

    >>> head = NormalizedSoftmaxLoss(num_classes=100, embedding_size=128)
    >>> loss = head(embeddings, labels)  # labels in [0, 100)
    >>> predicted = head.get_logits(embeddings).argmax(dim=1)
    """

    formula = NormalizedSoftmax
    temperature: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 0.05,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, options, temperature=temperature)


class CosFaceLoss(_SoftmaxLoss):
    r"""Softmax over the classes with a margin on the cosine with the row's class y.

    .. math:: L_i = -\log \frac{e^{\sigma (s_y - m)}}{e^{\sigma (s_y - m)} + \sum_{j \ne y} e^{\sigma s_j}}

    with :math:`\sigma` = ``scale`` and m = ``margin``. Wang et al., *CosFace: Large Margin Cosine Loss for
    Deep Face Recognition*, CVPR 2018. The N x C matrix of logits is not materialised.

    Args:
        margin: on the cosine; or a tensor ``[C]`` with one for each class, which learns if it is an
            ``nn.Parameter``.
        scale: above 0.
        num_classes, embedding_size, options: as for :class:`NormalizedSoftmaxLoss`, which has ``W`` too.
    """

    formula = CosFace
    margin: float = option()
    scale: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, options, margin=margin, scale=scale)


class ArcFaceLoss(_SoftmaxLoss):
    r"""Softmax over the classes with a margin on the angle to the row's class y.

    .. math::
        L_i = -\log \frac{e^{\sigma \psi(\theta_y)}}
                         {e^{\sigma \psi(\theta_y)} + \sum_{j \ne y} e^{\sigma \cos \theta_j}}, \qquad
        \psi(\theta) = \begin{cases} \cos(\theta + m) & \theta \le \pi - m \\
                                     \cos \theta - m \sin m & \text{beyond} \end{cases}

    with :math:`\sigma` = ``scale`` and m = ``margin``, in degrees. Deng et al., *ArcFace: Additive Angular
    Margin Loss for Deep Face Recognition*, CVPR 2019. The N x C matrix of logits is not materialised.

    Args:
        margin: on the angle, in degrees from 0 to 180; or a tensor ``[C]`` with one for each class, which
            learns if it is an ``nn.Parameter``. The attribute is in degrees too, whereas
            pytorch-metric-learning's is in radians.
        scale: above 0.
        num_classes, embedding_size, options: as for :class:`NormalizedSoftmaxLoss`, which has ``W`` too.

    The gradient at an angle of 0 is 0.
    """

    formula = ArcFace
    margin: float = option()
    scale: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, options, margin=margin, scale=scale)
