"""Class-level circle loss."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _autocast
from .._arguments import check_count
from ..law import reduce
from ..options import Backend, Reduction
from .base import apply
from .circle import CircleLoss, margin_or_m


class _OptionOfLoss:
    """An option that the head hands on to its pair loss."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: "CircleClassifierLoss | None", owner: type | None = None) -> Any:
        return self if module is None else getattr(module.loss, self.name)

    def __set__(self, module: "CircleClassifierLoss", value: object) -> None:
        setattr(module.loss, self.name, value)


def _option() -> Any:
    return _OptionOfLoss()


def _row_weights(indices_tuple: Any, embeddings: Tensor) -> Tensor:
    """``[N]`` how often each row is listed, over the most often; 1 where none is."""
    counts = embeddings.new_zeros(embeddings.shape[0], dtype=torch.float32)
    for index in indices_tuple:
        index = index.to(counts.device, torch.long)
        counts = counts.index_add(0, index, torch.ones_like(index, dtype=counts.dtype))
    most = counts.max() if len(counts) else counts.sum()
    return torch.where(most > 0, counts / most.clamp(min=1), 1.0)


class CircleClassifierLoss(nn.Module):
    r"""Circle loss with class-level labels: a classification loss whose columns are the classes' weights.

    For a row with class :math:`y`, and the cosine :math:`s_j` with the weight of class :math:`j`:

    .. math::
        L_i = \log\Big(1 + e^{-\gamma [1 + m - s_y]_+ (s_y - (1 - m))}
                           \sum_{j \ne y} e^{ \gamma [s_j + m]_+ (s_j - m)}\Big)

    Sun et al., *Circle Loss: A Unified Perspective of Pair Similarity Optimization*, CVPR 2020, section 3.
    The N x C matrix of logits is never stored.

    A row whose label is no class is ignored: its loss and its gradient are 0. ``reduction="mean"`` and
    ``"mean_valid"`` divide by all N rows, the ignored ones among them (each row has a pair with every class);
    ``"mean_nonzero"`` divides by those whose loss is not 0.

    Args:
        num_classes: C.
        embedding_size: D.
        m: the relaxation margin; ``margin`` is another name for it. Faces: 0.25.
        gamma: the scale, above 0. Faces: 256.
        detach_weights: hold :math:`[\cdot]_+` constant in the gradient, as the paper does.
        reduction, backend: as :class:`dml_cuda.PairOptions` has them.

    Attributes:
        W: ``[D, C]`` parameter, normally distributed at first, one column a class.

    >>> head = CircleClassifierLoss(num_classes=100, embedding_size=128)
    >>> loss = head(embeddings, labels)  # labels in [0, 100)
    >>> predicted = head.get_logits(embeddings).argmax(dim=1)
    """

    m: float = _option()
    margin: float = _option()
    gamma: float = _option()
    detach_weights: bool = _option()
    reduction: str = _option()
    backend: str = _option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m: float = 0.25,
        gamma: float = 256.0,
        *,
        margin: float | None = None,
        detach_weights: bool = True,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("embedding_size", embedding_size)
        self.loss = CircleLoss(
            margin_or_m(m, margin, 0.25),
            gamma,
            detach_weights=detach_weights,
            reduction=reduction,
            backend=backend,
        )
        self.W = nn.Parameter(torch.empty(int(embedding_size), int(num_classes)))
        nn.init.normal_(self.W)

    def _check(self, embeddings: object) -> None:
        """What the pair loss would otherwise say of ``ref_emb``, which nobody passed."""
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
            return  # which the pair loss says
        if embeddings.shape[1] != self.W.shape[0]:
            raise ValueError(
                f"embeddings: expected embedding_size={self.W.shape[0]} columns, got {embeddings.shape[1]}"
            )
        if embeddings.device != self.W.device:
            raise ValueError(f"embeddings: expected on {self.W.device} as W is, got on {embeddings.device}")
        if embeddings.dtype != self.W.dtype and not _autocast.is_on(embeddings.device):
            raise TypeError(f"embeddings: expected {self.W.dtype} as W has, got {embeddings.dtype}")

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: object = None) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``, dtype and device of ``W``.
            labels: ``[N]`` classes. A label outside [0, C) is the negative of every class, which gives 0: a
                row to be ignored.
            indices_tuple: pairs or triplets of a miner. They restrict nothing here, where every row meets
                every class: as in pytorch-metric-learning's classification losses, each row's loss is
                weighted by how often the row is listed, over how often the most listed one is (1 where no
                row is).
        """
        self._check(embeddings)
        classes = torch.arange(self.W.shape[1], device=self.W.device)
        if indices_tuple is None:
            return self.loss(embeddings, labels, ref_emb=self.W.T, ref_labels=classes)
        return self._weighted(embeddings, labels, indices_tuple, classes)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward

    def _weighted(self, embeddings: Tensor, labels: Tensor, indices_tuple: object, classes: Tensor) -> Tensor:
        call = self.loss.call
        call = call._replace(options=call.options._replace(reduction="none"))
        losses = apply(call, embeddings, labels, None, self.W.T, classes)
        losses = losses * _row_weights(indices_tuple, embeddings).to(losses.dtype)
        return reduce(losses, torch.ones_like(losses, dtype=torch.bool), self.reduction)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]``: gamma times the cosine with each class's weight, for inference."""
        unit, classes = nn.functional.normalize(embeddings, dim=1), nn.functional.normalize(self.W, dim=0)
        return self.gamma * torch.matmul(unit, classes)

    def extra_repr(self) -> str:
        return f"num_classes={self.W.shape[1]}, embedding_size={self.W.shape[0]}"
