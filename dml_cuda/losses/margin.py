"""Margin loss."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs.checks import check_count, check_flag, check_number
from .._inputs.options import Options
from .._ops.evaluate import in_wanted_dtype
from .._ops.listed_pairs import of_rows
from ..reference.pairs import is_traced
from ._pair import option
from ._triplet import (
    TripletBatch,
    TripletCall,
    TripletLoss,
    TripletOptions,
    check_per_anchor,
    divisor,
    row_sums,
    triplet_batch,
    triplet_options,
)


def make_call(values: Mapping[str, Any], options: Options) -> TripletCall:
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
        raise ValueError(f"beta: expected one number, or [C] for as many classes, got {list(beta.shape)}")


def _check_labels(labels: Tensor | None, num_classes: int) -> None:
    """Names the labels that are no class. A GPU would have to be waited for: there nobody looks."""
    if labels is None:
        raise ValueError(
            "labels: expected the labels of the rows, which have a beta for each class; got None"
        )
    if labels.device.type != "cpu" or is_traced(labels) or labels.numel() == 0:
        return
    for label in (int(labels.long().min()), int(labels.long().max())):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"labels: expected classes in [0, {num_classes}), one for each beta; got {label}"
            )


def _of_rows(beta: Tensor | float, labels: Tensor | None, embeddings: Tensor) -> Tensor:
    """``[N]`` in the type that is computed in."""
    n, dtype = embeddings.shape[0], torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    if not isinstance(beta, Tensor):
        return torch.full((n,), float(beta), dtype=dtype, device=embeddings.device)
    beta = beta.to(embeddings.device, dtype)
    if beta.numel() == 1:
        return beta.view(1).expand(n)
    _check_labels(labels, len(beta))
    # Out of range on a GPU, where nobody looks: some class.
    return of_rows(beta, labels.long().clamp(0, len(beta) - 1))


def row_parts(call: TripletCall, beta: Tensor | float, batch: TripletBatch) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`row_sums`; and the sum of beta over each row's triplets ``[N]``."""
    of_each = _of_rows(beta, batch.rows.labels, batch.rows.embeddings)
    level = of_each if call.similarity.startswith("euclidean") else -of_each
    sums, counts = row_sums(call, batch, level.contiguous())
    return sums, counts, of_each * counts[:, 1]


def whole(
    call: TripletCall, beta: Tensor | float, nu: float, total: Tensor, counts: Tensor, betas: Tensor
) -> Tensor:
    """The loss, from the sums over all rows of what :func:`row_parts` gives."""
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
    r"""Margin loss: positives should be nearer than a boundary, negatives farther, each by a margin.

    .. math:: L = \operatorname{mean}_{(a, p, n)} [d_{ap} - \beta_a + m]_+ + [\beta_a - d_{an} + m]_+

    Wu et al., *Sampling Matters in Deep Embedding Learning*, ICCV 2017; meant for the triplets that
    :class:`dml_cuda.DistanceWeightedMiner` draws. The sum runs over triplets, so a pair counts once for every
    triplet that holds it, and is divided by the number of its terms that are not 0. With cosine or dot
    product, beta is a similarity that positives should exceed.

    As :func:`triplet_margin_loss`, nothing is listed: over all triplets a pair's term is counted as often as
    its row has triplets that hold it.

    Args:
        margin: on both sides of the boundary.
        nu: weight of the regulariser of a ``beta`` that is a tensor: plus ``nu * beta``, or for a beta of
            each class plus nu times the sum over triplets of their anchor's beta, divided as the loss is.
            Not with ``reduction="none"``.
        beta: the boundary: a number, or a tensor, one number or ``[C]``, one for each class (labels are
            then the classes). Gradients reach a tensor.
        triplets_per_anchor: as in :func:`triplet_margin_loss`.
        embeddings, labels, ref_emb, ref_labels, indices_tuple, options: as in :func:`triplet_margin_loss`.
            With ``[C]`` betas, labels are needed with lists of indices too.

    Returns, Raises:
        As :func:`triplet_margin_loss`.
    """
    call = make_call(
        {"margin": margin, "nu": nu, "triplets_per_anchor": triplets_per_anchor}, triplet_options(options)
    )
    return evaluate(call, beta, nu, embeddings, labels, indices_tuple, ref_emb, ref_labels)


class MarginLoss(TripletLoss):
    """Margin loss; see :func:`dml_cuda.functional.margin_loss`.

    ``learn_beta`` makes ``beta`` a parameter, ``[1]``, or ``[num_classes]`` with ``num_classes``: give the
    optimiser ``loss_fn.parameters()`` too. It is in the ``state_dict`` then, as in pytorch-metric-learning's.
    ``beta`` can be set: a number, for all classes.

    >>> loss_fn, miner = MarginLoss(learn_beta=True), DistanceWeightedMiner()
    >>> loss = loss_fn(embeddings, labels, miner(embeddings, labels))
    """

    make_call = staticmethod(make_call)
    nu: float = option()
    beta: Tensor

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
        """The loss of a batch; arguments as :meth:`TripletLoss.forward` has them."""
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        return evaluate(self.call, self.beta, self._nu, *batch)

    @property
    def _nu(self) -> float:
        return self.nu if self.learn_beta else 0.0

    def row_parts(self, batch: TripletBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        _check_beta(self.beta)
        return row_parts(self.call, self.beta, batch)

    def whole(self, total: Tensor, counts: Tensor, more: Tensor | None) -> Tensor:
        return whole(self.call, self.beta, self._nu, total, counts, more)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learn_beta={self.learn_beta}, num_classes={self.num_classes}"
