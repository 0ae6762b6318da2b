"""The base of the ranking losses: what a row makes of the ranks, or of a histogram, of its similarities."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import TypedDict

from .._inputs.checks import Backend, Reduction, Similarity
from .._inputs.options import check_names
from .._ops.evaluate import evaluate_arguments
from ._formula import Formula, Pairs
from ._pair import FormulaModule, described, option, pair_loss


class RankingOptions(TypedDict, total=False):
    """The options that the ranking losses share.

    Attributes:
        similarity, normalize_embeddings, backend, class_weights: as in :class:`dml_cuda.PairOptions`.
        reduction: ``"mean_valid"`` over rows with a positive, ``"mean"`` over all rows (those without a
            positive have the loss 0), ``"mean_nonzero"`` over those whose loss is not 0, ``"sum"``, or
            ``"none"`` for all ``[N]``.
    """

    similarity: Similarity
    normalize_embeddings: bool | None
    reduction: Reduction
    backend: Backend
    class_weights: Tensor | None


RANKING_NAMES = tuple(RankingOptions.__annotations__)


class RankingFormula(Formula):
    """A loss of all pairs of a row, which have no terms of their own: there is no mining."""

    ranks = True
    reduction = "mean_valid"

    @staticmethod
    def valid(pos: Pairs, neg: Pairs) -> Tensor:
        return pos.count > 0

    @staticmethod
    def one_minus(score: Tensor, pos: Pairs) -> Tensor:
        """The losses ``[N]`` of scores, 0 for a row without positives."""
        return torch.where(pos.count > 0, 1 - score, 0.0)


def ranking_loss(
    formula: type[RankingFormula], values: Mapping[str, Any], options: RankingOptions, *batch: Any
) -> Tensor:
    """The loss as a function; the batch is as :func:`pair_loss` takes it."""
    check_names(options, RANKING_NAMES, formula.parameters)
    return pair_loss(formula, values, options, *batch)


class RankingLoss(FormulaModule):
    """What the ranking losses share."""

    formula: ClassVar[type[RankingFormula]]
    similarity: str = option()
    normalize_embeddings: bool | None = option()
    class_weights: Tensor | None = option()

    def __init__(self, options: RankingOptions, **values: Any) -> None:
        check_names(options, RANKING_NAMES, values)
        super().__init__(options, **values)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers.
            indices_tuple: ``None``, or all pairs of this batch as :class:`dml_cuda.MinedPairs` (which
                :class:`dml_cuda.CrossBatchMemory` passes): a ranking is of all columns.
            ref_emb: ``[M, D]`` to rank for each row, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is.
            row_weights: ``[N]`` factors of the rows' losses. What a mean divides by stays as it is.
        """
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
        return evaluate_arguments(self.call, *batch)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward

    def extra_repr(self) -> str:
        return described(self.values | {name: self.get_option(name) for name in RANKING_NAMES})
