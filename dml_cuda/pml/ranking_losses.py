"""Adapters of the ranking losses: pytorch-metric-learning's classes, computed by the kernels."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ._shared import (  # isort: skip  # first, as it explains a missing pytorch-metric-learning
    collect_norms,
    reduction_name,
)

from pytorch_metric_learning import distances, losses
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from .._ops.evaluate import Call, evaluate_arguments
from ..losses._ranking import RankingFormula
from ..losses.fast_ap import FastAP
from ..losses.smooth_ap import SmoothAP
from .pair_losses import _FusedRows


class _FusedRanking(_FusedRows):
    """Replaces the computation of a ranking loss by the kernel of a formula."""

    _formula: ClassVar[type[RankingFormula]]
    _name: ClassVar[str]  # of its sub-loss
    _methods = ("zero_loss", "zero_losses", "_sub_loss_names")

    def _is_left(self, embeddings, labels) -> bool:
        return False

    def _loss_dict(self, call: Call, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        collect_norms(self.distance, embeddings, ref_emb)
        reduction = reduction_name(self.reducer, self._name)
        weights = None
        if indices_tuple is not None:
            weights = lmu.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype)
            # It counts rows whose weighted loss is not 0, dml_cuda those whose loss is not.
            reduction = None if reduction == "mean_nonzero" else reduction
        if reduction is None:
            return {self._name: self._elements(call, embeddings, labels, weights)}
        reduction = self._formula.reduction if reduction == "mean" else reduction
        value = self._value(call.with_reduction(reduction), embeddings, labels, weights)
        return {self._name: {"losses": value, "indices": None, "reduction_type": "already_reduced"}}

    def _elements(self, call: Call, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> dict:
        """The losses of the rows that count, for a reducer that is the library's."""
        value = self._value(call, embeddings, labels, weights)
        rows = self._rows(labels)
        return {"losses": value[rows], "indices": rows, "reduction_type": "element"}

    def _value(self, call: Call, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return evaluate_arguments(call, embeddings, labels, None, None, None, weights)

    def _rows(self, labels: Tensor) -> Tensor:
        """The rows with a positive; synchronises with the device."""
        _, index, sizes = labels.unique(return_inverse=True, return_counts=True)
        return torch.where(sizes[index] > 1)[0]


class FastAPLoss(_FusedRanking, losses.FastAPLoss):
    """``pytorch_metric_learning.losses.FastAPLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.fast_ap_loss` for the equation, and the replaced class for arguments and
    errors.
    """

    _formula = FastAP
    _name = "loss"

    def _similarity(self) -> dict[str, Any] | None:
        distance = self.distance
        is_square = type(distance) is distances.LpDistance and (distance.p, distance.power) == (2, 2)
        return {"similarity": "cosine"} if is_square and distance.normalize_embeddings else None


class SmoothAPLoss(_FusedRanking, losses.SmoothAPLoss):
    """``pytorch_metric_learning.losses.SmoothAPLoss`` on the kernels of dml_cuda.

    As in the replaced class, a row is a positive of its own and ranked among the others, where
    :func:`dml_cuda.functional.smooth_ap_loss` leaves it out. Classes may have any sizes and any order here;
    the replaced class takes classes of one size, and is right only where there are as many classes as each
    has members, one after another.
    """

    _formula = SmoothAP
    _name = "ap_loss"

    def _value(self, call: Call, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return evaluate_arguments(call, embeddings, labels, None, embeddings, labels, weights)

    def _rows(self, labels: Tensor) -> Tensor:
        return torch.arange(len(labels), device=labels.device)
