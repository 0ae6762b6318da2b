"""What a formula is: a loss as a function of the similarities of each row's kept pairs.

Each file of ``dml_cuda.losses`` states one, as ``csrc/losses`` does for the kernels. A formula sees its
pairs only through :class:`Pairs`, so the same few lines serve a matrix with masks (``reference/pairs.py``)
and pairs given as lists (``_ops/listed_pairs.py``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One sum over the rows, and what a mean divides it by."""

    losses: Tensor  # [N]
    counts: Tensor  # [N] int64: a row's kept pairs
    nonzero: Tensor  # [N] int64: how many of them have a loss other than 0


class Pairs(ABC):
    """The kept pairs of one kind, positives or negatives, of every row.

    Attributes:
        s: their similarities, in whatever shape they are stored; terms of pairs have the same.
        count: ``[N]`` int64, how many each row has.
        columns: M, the number of columns that pairs may be of.
        square: whether column j is row j.
    """

    s: Tensor
    count: Tensor
    columns: int
    square: bool

    @abstractmethod
    def spread(self, of_rows: Tensor) -> Tensor:
        """A number of each row ``[N]``, repeated for each of its pairs."""

    @abstractmethod
    def spread_columns(self, of_columns: Tensor) -> Tensor:
        """A number of each column ``[M]``, repeated for each of its pairs."""

    @abstractmethod
    def lse(self, logits: Tensor, plus_one: bool = False) -> Tensor:
        """``[N]`` log(sum exp(logits)), -inf for a row without pairs; or log(1 + sum exp(logits))."""

    @abstractmethod
    def sum(self, terms: Tensor) -> Tensor:
        """``[N]``"""

    @abstractmethod
    def number(self, which: Tensor) -> Tensor:
        """``[N]`` int64, how many of a row's pairs are marked."""

    def mean(self, terms: Tensor) -> Tensor:
        """``[N]``, 0 for a row without pairs."""
        return self.sum(terms) / self.count.clamp(min=1)

    def each(self, losses: Tensor, nonzero: Tensor | None = None) -> Part:
        """A part of the loss in which every pair counts for itself; ``nonzero`` marks the pairs that
        ``"mean_nonzero"`` counts, by default those whose loss is not 0."""
        return Part(
            self.sum(losses), self.count, self.number(losses.detach() != 0 if nonzero is None else nonzero)
        )


def number(value: float | Tensor) -> float | Tensor:
    """A parameter as a Python float, or as a tensor of shape ``[]`` if it learns."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.reshape(()) if value.ndim else value


class Formula:
    """A loss. Never instantiated: its parameters are arguments of :meth:`row`.

    Attributes:
        name: as csrc/losses/list.h has it.
        parameters: the parameters in order, each with the check of its value: ``check(name, value)`` raises
            TypeError or ValueError.
        levels: those of them that are levels of the similarity, or margins of a distance: there ``row`` gets
            them negated, as similarities are negated distances.
        similarity, reduction: what the options of these names are by default.
        repeats: whether a pair that is listed twice counts twice.
        log_one_plus: whether the loss (of a pair, or of a row) is ``log(1 + x)``, which ``"mean_nonzero"``
            counts as 0 where ``1 + x`` is 1 in the dtype.
        on_cuda: whether a build with CUDA has kernels for the formula.
        composed: whether no kernel has the formula, but :meth:`compose` makes it of those of other formulas;
            so it does on CUDA where ``on_cuda`` says that there are none.
        per_class: the parameters that may be a tensor with a number for each class, in which case the formula
            is ``of_classes``.
        ranks: whether a pair's part in the loss depends on the row's other pairs one by one: such a loss is
            of all pairs, and has an op of its own (``_ops/ranking.py``).
    """

    name: ClassVar[str]
    parameters: ClassVar[Mapping[str, Callable[[str, object], None]]]
    levels: ClassVar[tuple[str, ...]] = ()
    similarity: ClassVar[str] = "cosine"
    reduction: ClassVar[str] = "mean"
    repeats: ClassVar[bool] = False
    log_one_plus: ClassVar[bool] = False
    on_cuda: ClassVar[bool] = True
    composed: ClassVar[bool] = False
    per_class: ClassVar[tuple[str, ...]] = ()
    of_classes: ClassVar["type[Formula]"]
    ranks: ClassVar[bool] = False

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        """The parameters as :meth:`row` and the kernels take them; those that learn are tensors."""
        negated = cls.levels if similarity.startswith("euclidean") else ()
        return [number(-values[name] if name in negated else values[name]) for name in cls.parameters]

    @classmethod
    def is_nonzero(cls, losses: Tensor) -> Tensor:
        """Which losses ``"mean_nonzero"`` counts."""
        losses = losses.detach()
        return ~vanishes(losses) if cls.log_one_plus else losses != 0

    @staticmethod
    def valid(pos: Pairs, neg: Pairs) -> Tensor:
        """``[N]`` which rows ``"mean_valid"`` counts."""
        return (pos.count + neg.count) > 0

    @staticmethod
    def row(pos: Pairs, neg: Pairs, *params: float | Tensor) -> Tensor | tuple[Part, ...]:
        """The rows' losses ``[N]``, or parts that count pairs.

        Write ``-(s - margin)`` for ``margin - s``, which torch.compile compiles again for every margin.
        """
        raise NotImplementedError

    @classmethod
    def is_composed(cls, device: torch.device) -> bool:
        """Whether :meth:`compose` computes it on a device."""
        instead = device.type == "cuda" and not cls.on_cuda and cls.compose is not Formula.compose
        return cls.composed or instead

    @staticmethod
    def compose(call: Any, batch: Any) -> tuple[Part, ...]:
        """The same for a ``_ops.evaluate.Call`` and a batch whose pairs all count."""
        raise NotImplementedError


def vanishes(x: Tensor) -> Tensor:
    """Whether ``x = log(1 + y)`` is 0 where it is computed from ``1 + y`` in its dtype, as that is 1 for tiny
    y."""
    return x <= torch.finfo(x.dtype).eps / 2


def log_one_plus(x: Tensor) -> Tensor:
    """``x = log(1 + y)`` as computed from ``1 + y``: 0 where that is 1. The gradient stays."""
    return torch.where(vanishes(x), x - x.detach(), x)


def softplus(x: Tensor, where: Tensor | None = None) -> Tensor:
    """log(1 + exp(x)), accurate to the last digits; 0, without a gradient, outside ``where``."""
    if where is None:
        return torch.logaddexp(x, torch.zeros_like(x))
    return torch.where(where, softplus(torch.where(where, x, 0.0)), 0.0)


def logaddexp(first: Tensor, second: Tensor) -> Tensor:
    """log(exp(first) + exp(second)), with gradient 0 where both are -inf."""
    finite = (first != -torch.inf) | (second != -torch.inf)
    value = torch.logaddexp(torch.where(finite, first, 0.0), torch.where(finite, second, 0.0))
    return torch.where(finite, value, -torch.inf)


Losses = Tensor | tuple[Part, ...]  # what Formula.row returns


def joined(losses: Sequence[Losses]) -> Losses:
    """The losses of several sets of rows as those of one."""
    if len(losses) == 1:
        return losses[0]
    if isinstance(losses[0], Tensor):
        return torch.cat(losses)
    return tuple(Part(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*losses, strict=True))


def _weighted(losses: Losses, row_weights: Tensor | None) -> Losses:
    if row_weights is None:
        return losses
    if isinstance(losses, Tensor):
        return losses * row_weights.to(losses.dtype)
    return tuple(part._replace(losses=_weighted(part.losses, row_weights)) for part in losses)


def _totals(
    losses: Losses, valid: Tensor, reduction: str, nonzero: Tensor | None, row_weights: Tensor | None
) -> tuple[list[Tensor], list[Tensor | int]]:
    """The sum of each part, and of its counts, which weights do not change."""
    weighted = _weighted(losses, row_weights)
    if not isinstance(losses, Tensor):
        counts = [(part.nonzero if reduction == "mean_nonzero" else part.counts).sum() for part in losses]
        return [part.losses.sum() for part in weighted], counts
    if reduction == "mean_nonzero":
        return [weighted.sum()], [(losses != 0 if nonzero is None else nonzero).sum()]
    return [weighted.sum()], [valid.sum() if reduction == "mean_valid" else len(losses)]


def reduce(
    losses: Losses,
    valid: Tensor,
    reduction: str,
    nonzero: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """One number, or one for each row, from what :meth:`Formula.row` gives.

    ``valid`` ``[N]`` marks rows with a kept pair, ``nonzero`` ``[N]`` those that ``"mean_nonzero"`` counts,
    by default those whose loss is not 0. ``row_weights`` ``[N]`` multiply the losses.
    """
    if reduction == "none":
        weighted = _weighted(losses, row_weights)
        return weighted if isinstance(weighted, Tensor) else sum(part.losses for part in weighted)
    if reduction == "sum":
        return reduce(losses, valid, "none", row_weights=row_weights).sum()
    parts, counts = _totals(losses, valid, reduction, nonzero, row_weights)
    return sum(
        part / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        for part, count in zip(parts, counts, strict=True)
    )


def sums_and_counts(
    losses: Losses,
    valid: Tensor,
    reduction: str,
    nonzero: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """``[4]``: parts 0 and 1 and their counts, as the op gives them with ``return_sums``."""
    parts, counts = _totals(losses, valid, reduction, nonzero, row_weights)
    counts = [count if isinstance(count, Tensor) else parts[0].new_full((), count) for count in counts]
    none = [parts[0].new_zeros(())] * (2 - len(parts))
    return torch.stack([*parts, *none, *(count.to(parts[0]) for count in counts), *none])


def divided(totals: Tensor, reduction: str) -> Tensor:
    """The loss from what :func:`sums_and_counts` gives; a part that counts nothing is 0."""
    parts, counts = totals[:2], totals[2:].detach()
    if reduction == "sum":
        return parts.sum()
    return (parts * torch.where(counts > 0, 1 / counts, 0.0)).sum()
