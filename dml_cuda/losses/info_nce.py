"""InfoNCE with tensors of queries, positives and negatives instead of labels."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs import autocast as _autocast
from .._inputs.batch import Batch, make_batch
from .._inputs.checks import check_choice, check_flag
from .._inputs.row_weights import check_row_weights
from .._ops.evaluate import Call, compute, in_wanted_dtype
from ..reference.pairs import full_precision, negated_root
from ._formula import reduce, softplus
from ._negatives import NegativesLSE
from ._pair import option
from ._two_towers import TowerModule, TowerOptions, check_same_rows

NegativeMode = Literal["unpaired", "paired"]
# [N] the log-sum-exp of queries against columns, others' positives (True) or negatives; None without any.
Against = Callable[[Tensor, Tensor, bool], Tensor | None]


def _similarities(x: Tensor, y: Tensor, similarity: str) -> Tensor:
    """Of each row of x ``[N, D]`` with its own rows of y ``[N, K, D]``: ``[N, K]``."""
    x, y = full_precision(x, similarity), full_precision(y.flatten(0, 1), similarity).view(y.shape)
    if similarity.startswith("euclidean"):
        squares = (x[:, None] - y).square().sum(2)
        return negated_root(squares, torch.zeros_like(squares, dtype=torch.bool), squares)
    return (x[:, None] * y).sum(2)


def lse_batch(call: Call, query: Tensor, rows: Tensor, columns: Tensor, are_positives: bool) -> Batch:
    """Queries with the numbers ``rows`` against columns: the positives of the same numbers, which count for
    nothing in their own row, or negatives of all."""
    numbers = rows if are_positives else torch.full(columns.shape[:1], -1, device=query.device)
    rule = {"epsilon": None, "similarity": call.similarity, "check_pairs": False}
    return make_batch(query, rows, None, columns, numbers, **rule)


class InfoNCELoss(TowerModule):
    r"""Cross-entropy of each query's positive against negatives.

    .. math::
        L_i = -\log \frac{e^{s(q_i, p_i) / \tau}}
                        {e^{s(q_i, p_i) / \tau} + \sum_{n \in N_i} e^{s(q_i, n) / \tau}}

    with s the cosine and :math:`\tau` = ``temperature``. The negatives :math:`N_i` are

    * without ``negatives``: the positives of the other queries;
    * with ``negatives`` ``[M, D]`` and ``negative_mode="unpaired"``: those, for every query;
    * with ``negatives`` ``[N, K, D]`` and ``negative_mode="paired"``: K of each query's own;
    * with ``in_batch_negatives=True`` besides: the positives of the other queries too, as
      sentence-transformers' ``MultipleNegativesRankingLoss`` counts them.

    van den Oord et al., *Representation Learning with Contrastive Predictive Coding*, 2018. No matrix of
    N x N or N x M numbers is stored.

    Args:
        temperature: divides similarities, above 0; an ``nn.Parameter`` learns.
        negative_mode: ``"unpaired"`` or ``"paired"``.
        in_batch_negatives: ``None`` (the default) counts other queries' positives only where no negatives are
            given.
        options: ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"``, ``backend``; see
            :class:`dml_cuda.TowerOptions`.

    >>> loss_fn = InfoNCELoss(temperature=0.05)
    >>> loss = loss_fn(query, positive)
    """

    formula = NegativesLSE
    temperature: "float | Tensor" = option()

    def __init__(
        self,
        temperature: "float | Tensor" = 0.07,
        negative_mode: NegativeMode = "unpaired",
        in_batch_negatives: bool | None = None,
        **options: Unpack[TowerOptions],
    ) -> None:
        check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
        if in_batch_negatives is not None:
            check_flag("in_batch_negatives", in_batch_negatives)
        super().__init__(options, ("negative_mode", "in_batch_negatives"), temperature=temperature)
        self.negative_mode, self.in_batch_negatives = negative_mode, in_batch_negatives

    def check(
        self, query: Tensor, positive: Tensor, negatives: Tensor | None, row_weights: Tensor | None
    ) -> None:
        """Raises TypeError or ValueError for a batch that cannot be."""
        for name, points in (("query", query), ("positive", positive)):
            if not isinstance(points, Tensor) or points.ndim != 2:
                got = list(points.shape) if isinstance(points, Tensor) else type(points).__name__
                raise (ValueError if isinstance(points, Tensor) else TypeError)(
                    f"{name}: expected a tensor of shape [N, D], got {got}"
                )
        check_same_rows(query, positive, ("query", "positive"))
        if positive.shape[1] != query.shape[1]:
            raise ValueError(f"positive: expected {query.shape[1]} columns, got {positive.shape[1]}")
        if row_weights is not None:
            check_row_weights(row_weights, query)
        if negatives is None:
            return
        n, dim = query.shape
        wanted = f"[{n}, K, {dim}]" if self.negative_mode == "paired" else f"[M, {dim}]"
        if not isinstance(negatives, Tensor):
            raise TypeError(f"negatives: expected a tensor of shape {wanted}, got {type(negatives).__name__}")
        fits = (
            negatives.ndim == 3 and negatives.shape[::2] == query.shape
            if self.negative_mode == "paired"
            else negatives.ndim == 2 and negatives.shape[1] == dim
        )
        if not fits:
            raise ValueError(
                f'negatives: expected shape {wanted} with negative_mode="{self.negative_mode}", got '
                f"{list(negatives.shape)}"
            )

    def row_losses(
        self, query: Tensor, positive: Tensor, negatives: Tensor | None, against: Against
    ) -> Tensor:
        """``[N]`` the losses of a checked batch, float32 or float64."""
        call = self.call
        (temperature,) = call.params
        in_batch = negatives is None if self.in_batch_negatives is None else self.in_batch_negatives
        found = []
        if in_batch:
            found.append(against(query, positive, True))
        if negatives is not None and self.negative_mode == "unpaired":
            found.append(against(query, negatives, False))
        with _autocast.off(query.device):
            if negatives is not None and self.negative_mode == "paired":
                own = _similarities(query, negatives, call.similarity)
                found.append(torch.logsumexp(own / temperature, 1) if own.shape[1] else None)
            pull = _similarities(query, positive[:, None], call.similarity)[:, 0]
            found = [value for value in found if value is not None]
            if not found:
                return 0.0 * (pull / temperature)
            push = found[0] if len(found) == 1 else torch.stack(found).logsumexp(0)
            return softplus(push - pull / temperature)

    def lse_call(self) -> Call:
        """The call for the log-sum-exp of each row."""
        return self.call.with_reduction("none")

    def forward(
        self,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            query, positive: ``[N, D]`` each; row i of one belongs to row i of the other.
            negatives: ``[M, D]`` or, with ``negative_mode="paired"``, ``[N, K, D]``.
            row_weights: ``[N]`` factors of the queries' losses; a mean still divides by N.
        """
        self.check(query, positive, negatives, row_weights)
        call, rows = self.lse_call(), torch.arange(query.shape[0], device=query.device)

        def against(points: Tensor, columns: Tensor, are_positives: bool) -> Tensor | None:
            if len(columns) <= are_positives:  # its own positive is no negative
                return None
            return compute(call, lse_batch(call, points, rows, columns, are_positives))

        losses = self.row_losses(query, positive, negatives, against)
        valid = torch.ones_like(losses, dtype=torch.bool)
        return in_wanted_dtype(reduce(losses, valid, self.reduction, row_weights=row_weights), query)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward
