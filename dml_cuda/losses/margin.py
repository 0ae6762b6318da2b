"""Margin loss."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs.checks import check_count, check_flag, check_number
from .._inputs.options import Options, check_names
from .._ops.evaluate import in_wanted_dtype
from ._described import described_by
from ._pair import option
from ._triplet import (
    TRIPLET_NAMES,
    TripletBatch,
    TripletCall,
    TripletLoss,
    TripletOptions,
    check_per_anchor,
    divisor,
    row_sums,
    row_values,
    triplet_batch,
    triplet_options,
)


def make_call(values: Mapping[str, Any], options: Options) -> TripletCall:
    """Validates the parameters. Raises TypeError or ValueError."""
    for name in ("margin", "nu"):
        check_number(name, values[name])
    per_anchor = check_per_anchor(values["triplets_per_anchor"])
    return TripletCall("margin", float(values["margin"]), False, per_anchor, options)


def _check_beta(beta: object) -> None:
    if not isinstance(beta, Tensor):
        check_number("beta", beta)
        return
    if not beta.is_floating_point():
        raise TypeError(f"beta: expected a number or a floating-point tensor, got {beta.dtype}")
    if beta.ndim > 1 or beta.numel() == 0:
        raise ValueError(f"beta: expected one number, or [C] for C classes, got {list(beta.shape)}")


def row_parts(call: TripletCall, beta: Tensor | float, batch: TripletBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The results of :func:`row_sums`, and the sum of beta over each row's triplets ``[N]``."""
    betas = row_values("beta", beta, batch.rows.labels, batch.rows.embeddings)
    level = betas if call.similarity.startswith("euclidean") else -betas
    sums, counts = row_sums(call, batch, level.contiguous())
    return sums, counts, betas * counts[:, 1]


def whole(
    call: TripletCall, beta: Tensor | float, nu: float, total: Tensor, counts: Tensor, betas: Tensor
) -> Tensor:
    """The loss, from the sums of the results of :func:`row_parts` over all rows."""
    reduction = call.options.reduction
    value = total / divisor(counts, reduction)
    if nu == 0 or not isinstance(beta, Tensor):
        return value
    if beta.numel() == 1:
        return value + nu * (beta.view(()).to(value) * (counts[1] > 0))
    penalty = betas / divisor(counts, reduction)
    if reduction == "mean_nonzero":
        penalty = penalty * (counts[0] > 0)
    return value + nu * penalty


def evaluate(call: TripletCall, beta: Tensor | float, nu: float, *batch: Any) -> Tensor:
    """The loss of a batch, with the arguments of :func:`triplet_batch`."""
    _check_beta(beta)
    sums, counts, betas = row_parts(call, beta, triplet_batch(call, *batch))
    if call.options.reduction != "none":
        sums = whole(call, beta, nu, sums.sum(), counts.sum(0), betas.sum())
    return in_wanted_dtype(sums, batch[0])


def margin_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    nu: float = 0.0,
    beta: float | Tensor = 1.2,
    triplets_per_anchor: int | Literal["all"] = "all",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    **options: Unpack[TripletOptions],
) -> Tensor:
    r"""Margin loss: positives inside a boundary, negatives outside it, each by a margin.

    .. math:: L = \operatorname{mean}_{(a, p, n)} [d_{ap} - \beta_a + m]_+ + [\beta_a - d_{an} + m]_+

    Wu et al., *Sampling Matters in Deep Embedding Learning*, ICCV 2017, where
    :class:`dml_cuda.DistanceWeightedMiner` draws the triplets. The sum runs over triplets, so a pair counts
    once for every triplet that contains it, and is divided by the number of terms that are not 0. With cosine
    or dot product, beta is a similarity that positives should exceed.

    As in :func:`triplet_margin_loss`, no triplets are materialised: a pair's term is multiplied by the number
    of its row's triplets that contain it.

    Args:
        margin: on both sides of the boundary.
        nu: weight of the regulariser if ``beta`` is a tensor. It adds ``nu * beta``, or for one beta a class
            nu times the sum of the anchors' betas over triplets, divided like the loss. Ignored with
            ``reduction="none"``.
        beta: the boundary: a number, or a tensor with one element or with ``[C]`` elements, one a class
            (labels are then class indices). A tensor receives gradients.
        triplets_per_anchor: as in :func:`triplet_margin_loss`.
        embeddings, labels, ref_emb, ref_labels, indices_tuple: as in :func:`triplet_margin_loss`.
            With ``[C]`` betas, ``indices_tuple`` requires labels too.
        options: ``similarity="euclidean"``, ``normalize_embeddings``, ``reduction="mean_nonzero"``,
            ``backend``, ``check_pairs``; see :class:`dml_cuda.TripletOptions`.

    Returns, Raises:
        As :func:`triplet_margin_loss`.
    """
    values = {"margin": margin, "nu": nu, "triplets_per_anchor": triplets_per_anchor}
    call = make_call(values, triplet_options(options, (*values, "beta")))
    return evaluate(call, beta, nu, embeddings, labels, indices_tuple, ref_emb, ref_labels)


@described_by(margin_loss)
class MarginLoss(TripletLoss):
    """Margin loss; see :func:`dml_cuda.functional.margin_loss`.

    ``learn_beta`` makes ``beta`` a parameter, ``[1]``, or ``[num_classes]`` with ``num_classes``: pass
    ``loss_fn.parameters()`` to the optimiser too. The ``state_dict`` then contains it, as in
    pytorch-metric-learning. ``beta`` can be set to a number, for all classes.

    >>> loss_fn, miner = MarginLoss(learn_beta=True), DistanceWeightedMiner()
    >>> loss = loss_fn(embeddings, labels, miner(embeddings, labels))
    """

    make_call = staticmethod(make_call)
    nu: float = option()
    beta: Tensor
    own_names: ClassVar = ("margin", "nu", "beta", "triplets_per_anchor", "learn_beta", "num_classes")

    def __init__(
        self,
        margin: float = 0.2,
        nu: float = 0,
        beta: float = 1.2,
        triplets_per_anchor: int | Literal["all"] = "all",
        learn_beta: bool = False,
        num_classes: int | None = None,
        **options: Unpack[TripletOptions],
    ) -> None:
        check_names(options, TRIPLET_NAMES, self.own_names)
        super().__init__(options, margin=margin, nu=nu, triplets_per_anchor=triplets_per_anchor)
        check_number("beta", beta)
        check_flag("learn_beta", learn_beta)
        if num_classes is not None:
            check_count("num_classes", num_classes)
        self.learn_beta, self.num_classes = learn_beta, num_classes
        start = torch.full((num_classes or 1,), float(beta))
        if learn_beta:
            self.beta = nn.Parameter(start)
        else:
            self.register_buffer("beta", start, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "beta" and not isinstance(value, Tensor):
            check_number("beta", value)
            with torch.no_grad():
                self.beta.fill_(value)
            return
        super().__setattr__(name, value)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments as for :meth:`dml_cuda.TripletMarginLoss.forward`."""
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        return evaluate(self.call, self.beta, self._nu, *batch)

    @property
    def _nu(self) -> float:
        return self.nu if self.learn_beta else 0.0

    def row_parts(self, batch: TripletBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        _check_beta(self.beta)
        return row_parts(self.call, self.beta, batch)

    def whole(self, total: Tensor, counts: Tensor, extra: Tensor | None) -> Tensor:
        return whole(self.call, self.beta, self._nu, total, counts, extra)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learn_beta={self.learn_beta}, num_classes={self.num_classes}"
