"""What the losses of two towers share: pair i of the one with pair i of the other."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import TypedDict

from .._inputs.batch import Batch, make_batch
from .._inputs.checks import Backend, Reduction, Similarity
from .._inputs.options import check_names
from .._ops.evaluate import evaluate
from ._pair import FormulaModule, option


class TowerOptions(TypedDict, total=False):
    """The options that the losses of two towers share.

    Attributes:
        similarity, normalize_embeddings, backend: as in :class:`dml_cuda.PairOptions`.
        reduction: ``"mean"`` over the N pairs, ``"sum"``, or ``"none"`` for all ``[N]``.
    """

    similarity: Similarity
    normalize_embeddings: bool | None
    reduction: Reduction
    backend: Backend


_NAMES = tuple(TowerOptions.__annotations__)
_REDUCTIONS = ("mean", "sum", "none")


def check_tower_options(options: Mapping[str, Any], parameters: Iterable[str] = ()) -> None:
    """Raises TypeError or ValueError for an option that losses of two towers do not have; ``parameters`` are
    the names of the loss's own arguments."""
    check_names(options, _NAMES, parameters)
    reduction = options.get("reduction", "mean")
    if isinstance(reduction, str) and reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}; got {reduction!r}")


def pair_numbers(rows: Tensor, labels: Tensor | None) -> Tensor:
    """``[N]`` which rows belong together: by labels, or row i of one tower with row i of the other."""
    return torch.arange(rows.shape[0], device=rows.device) if labels is None else labels


def check_same_rows(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Raises ValueError unless both towers have as many rows."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim == 2 and len(a) != len(b):
        raise ValueError(f"{names[1]}: expected {len(a)} rows, one for each of {names[0]}; got {len(b)}")


class TowerModule(FormulaModule):
    """A formula with the options of losses of towers."""

    similarity: str = option()
    normalize_embeddings: bool | None = option()

    def __init__(self, options: TowerOptions, more: Iterable[str] = (), **values: Any) -> None:
        check_tower_options(options, (*values, *more))
        super().__init__({"reduction": "mean", **options}, **values)

    def set_option(self, name: str, value: object) -> None:
        check_tower_options({name: value} if name in _NAMES else {})
        super().set_option(name, value)


class TwoTowerLoss(TowerModule):
    """A loss of ``a`` and ``b`` ``[N, D]``."""

    both_directions: ClassVar[bool]

    def batch(self, a: Tensor, b: Tensor, labels: Tensor | None, row_weights: Tensor | None) -> Batch:
        """The validated batch: ``a`` as rows and ``b`` as columns."""
        if not isinstance(b, Tensor):
            raise TypeError(f"b: expected a floating-point tensor of shape [rows, D], got {type(b).__name__}")
        check_same_rows(a, b, ("a", "b"))
        numbers = pair_numbers(a, labels) if isinstance(a, Tensor) and a.ndim == 2 else labels
        rule = {"epsilon": None, "similarity": self._call.similarity, "check_pairs": False}
        return make_batch(a, numbers, None, b, numbers, **rule).with_row_weights(row_weights)

    def forward(
        self, a: Tensor, b: Tensor, labels: Tensor | None = None, row_weights: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            a, b: ``[N, D]`` each; row i of one belongs to row i of the other.
            labels: ``[N]`` integers, where several rows belong together: rows with equal labels are positives
                of each other. Without them each row has one positive.
            row_weights: ``[N]`` factors of the pairs' losses; a mean still divides by their number.
        """
        batch = self.batch(a, b, labels, row_weights)
        if not self.both_directions:
            return evaluate(self.call, batch)
        if row_weights is not None:
            batch = batch._replace(row_weights=torch.cat([batch.row_weights, batch.row_weights]))
        return self.halves(evaluate(self.call.with_both_directions(), batch))

    def halves(self, value: Tensor) -> Tensor:
        """From the losses of both directions, reduced, to those of the pairs."""
        if self.reduction == "none":
            return value.view(2, -1).sum(0) / 2
        return value / 2 if self.reduction == "sum" else value

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward
