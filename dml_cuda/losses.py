"""The losses as modules: their options fixed once, then called on batches."""

from torch import Tensor, nn

from . import functional
from ._arguments import REDUCTIONS, SIMILARITIES, check_choice, check_flag, check_number


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
        self.options = options

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers.
            indices_tuple: pairs mined elsewhere; not supported yet, use ``epsilon``.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is.
        """
        if indices_tuple is not None:
            raise NotImplementedError(
                "indices_tuple: explicit pairs are not supported yet; epsilon= mines inside the kernel"
            )
        return type(self).function(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, **self.options)

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
        )


class CircleLoss(_PairLoss):
    """Circle loss on pairs; see :func:`dml_cuda.functional.circle_loss`.

    >>> loss_fn = CircleLoss(m=0.4, gamma=80)
    >>> loss = loss_fn(embeddings, labels)
    """

    function = staticmethod(functional.circle_loss)

    def __init__(
        self,
        m: float = 0.4,
        gamma: float = 80.0,
        *,
        detach_weights: bool = True,
        epsilon: float | None = None,
        similarity: str = "cosine",
        reduction: str = "mean_nonzero",
        backend: str = "auto",
    ) -> None:
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
        )
