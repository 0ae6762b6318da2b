"""The losses as modules: their options fixed once, then called on batches."""

import torch
from torch import Tensor, nn

from . import functional
from ._arguments import REDUCTIONS, SIMILARITIES, check_choice, check_count, check_flag, check_number
from .formulas import Circle, Formula, MultiSimilarity


class _PairLoss(nn.Module):
    """What the pair losses share. ``self.options`` are the keyword arguments of the function."""

    function = None  # set by subclasses

    def __init__(self, **options) -> None:
        super().__init__()
        if options["epsilon"] is not None:
            check_number("epsilon", options["epsilon"])
        check_choice("similarity", options["similarity"], SIMILARITIES)
        check_choice("reduction", options["reduction"], REDUCTIONS)
        check_choice("backend", options["backend"], functional.BACKENDS)
        check_flag("check_pairs", options["check_pairs"])
        self.options = options

    @property
    def formula(self) -> Formula:
        """The loss's formula with this module's options."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers; not needed with ``indices_tuple``.
            indices_tuple: the pairs or triplets that count, as a miner returns them.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is; not needed with
                ``indices_tuple``.
        """
        return type(self).function(
            embeddings,
            labels,
            indices_tuple=indices_tuple,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class MultiSimilarityLoss(_PairLoss):
    """Multi-similarity loss; see :func:`dml_cuda.functional.multi_similarity_loss`.

    >>> loss_fn = MultiSimilarityLoss(epsilon=0.1)
    >>> loss = loss_fn(embeddings, labels)
    """

    function = staticmethod(functional.multi_similarity_loss)

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        epsilon: float | None = None,
        similarity: str = "cosine",
        reduction: str = "mean",
        backend: str = "auto",
        check_pairs: bool = False,
    ) -> None:
        check_number("alpha", alpha, positive=True)
        check_number("beta", beta, positive=True)
        check_number("base", base)
        super().__init__(
            alpha=alpha,
            beta=beta,
            base=base,
            epsilon=epsilon,
            similarity=similarity,
            reduction=reduction,
            backend=backend,
            check_pairs=check_pairs,
        )

    @property
    def formula(self) -> Formula:
        return MultiSimilarity(*(self.options[name] for name in ("alpha", "beta", "base")))


def _margin(m: float, margin: float | None, default: float) -> float:
    """``margin`` is what version 3 of pytorch-metric-learning calls ``m``."""
    if margin is None:
        return m
    if m != default:
        raise ValueError(
            f"margin: another name for m: expected one of the two, got m={m} and margin={margin}"
        )
    return margin


class CircleLoss(_PairLoss):
    """Circle loss on pairs; see :func:`dml_cuda.functional.circle_loss`. ``margin`` is the same as ``m``.

    >>> loss_fn = CircleLoss(m=0.4, gamma=80)
    >>> loss = loss_fn(embeddings, labels)
    """

    function = staticmethod(functional.circle_loss)

    def __init__(
        self,
        m: float = 0.4,
        gamma: float = 80.0,
        *,
        margin: float | None = None,
        detach_weights: bool = True,
        epsilon: float | None = None,
        similarity: str = "cosine",
        reduction: str = "mean_nonzero",
        backend: str = "auto",
        check_pairs: bool = False,
    ) -> None:
        m = _margin(m, margin, 0.4)
        check_number("m", m)
        check_number("gamma", gamma, positive=True)
        check_flag("detach_weights", detach_weights)
        super().__init__(
            m=m,
            gamma=gamma,
            detach_weights=detach_weights,
            epsilon=epsilon,
            similarity=similarity,
            reduction=reduction,
            backend=backend,
            check_pairs=check_pairs,
        )

    @property
    def formula(self) -> Formula:
        return Circle(*(self.options[name] for name in ("m", "gamma", "detach_weights")))


class CircleClassifierLoss(nn.Module):
    r"""Circle loss with class-level labels: a classification loss whose columns are the classes' weights.

    For a row with class :math:`y`, and the cosine :math:`s_j` with the weight of class :math:`j`:

    .. math::
        L_i = \log\Big(1 + e^{-\gamma [1 + m - s_y]_+ (s_y - (1 - m))}
                           \sum_{j \ne y} e^{ \gamma [s_j + m]_+ (s_j - m)}\Big)

    Sun et al., *Circle Loss: A Unified Perspective of Pair Similarity Optimization*, CVPR 2020, section 3.
    The N x C matrix of logits is never stored.

    Args:
        num_classes: C.
        embedding_size: D.
        m: the relaxation margin; ``margin`` is another name for it. Faces: 0.25.
        gamma: the scale, above 0. Faces: 256.
        detach_weights: hold :math:`[\cdot]_+` constant in the gradient, as the paper does.
        reduction, backend: as in :func:`dml_cuda.functional.circle_loss`.

    Attributes:
        W: ``[D, C]`` parameter, normally distributed at first, one column a class.

    >>> head = CircleClassifierLoss(num_classes=100, embedding_size=128)
    >>> loss = head(embeddings, labels)  # labels in [0, 100)
    >>> predicted = head.get_logits(embeddings).argmax(dim=1)
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m: float = 0.25,
        gamma: float = 256.0,
        *,
        margin: float | None = None,
        detach_weights: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("embedding_size", embedding_size)
        self.loss = CircleLoss(
            _margin(m, margin, 0.25),
            gamma,
            detach_weights=detach_weights,
            reduction=reduction,
            backend=backend,
        )
        self.W = nn.Parameter(torch.empty(embedding_size, num_classes))
        nn.init.normal_(self.W)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings`` ``[N, D]`` with classes ``labels`` ``[N]``.

        A label outside [0, C) is the negative of every class, which gives 0: a row to be ignored.
        """
        classes = torch.arange(self.W.shape[1], device=self.W.device)
        return self.loss(embeddings, labels, ref_emb=self.W.T, ref_labels=classes)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]``: gamma times the cosine with each class's weight, for inference."""
        unit, classes = nn.functional.normalize(embeddings, dim=1), nn.functional.normalize(self.W, dim=0)
        return self.loss.options["gamma"] * torch.matmul(unit, classes)

    def extra_repr(self) -> str:
        return f"num_classes={self.W.shape[1]}, embedding_size={self.W.shape[0]}"
