"""Adapters of the ranking losses: pytorch-metric-learning's classes, computed by the kernels."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ._shared import (  # isort: skip  # first, as it explains a missing pytorch-metric-learning
    collect_norms,
    reduction_name,
    similarity_options,
    warn_unsupported,
)

from pytorch_metric_learning import distances, losses
from pytorch_metric_learning.losses.base_metric_loss_function import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from .._ops.evaluate import Call, evaluate_arguments
from ..losses._pair import make_call
from ..losses._ranking import RankingFormula
from ..losses.fast_ap import FastAP
from ..losses.smooth_ap import SmoothAP


class _FusedRanking:
    """Replaces the computation of a ranking loss by the kernel of a formula."""

    _base: ClassVar[type[BaseMetricLossFunction]]
    _formula: ClassVar[type[RankingFormula]]
    _name: ClassVar[str]  # of its sub-loss
    _methods: ClassVar[tuple[str, ...]] = ("zero_loss", "zero_losses", "_sub_loss_names")

    def _similarity(self) -> dict[str, Any] | None:
        return similarity_options(self.distance)

    def _call_or_reason(self) -> Call | str:
        """The call that computes the losses of rows, or why the kernels cannot."""
        for name in self._methods:
            overridden = getattr(type(self), name) is not getattr(self._base, name)
            if overridden or name in self.__dict__:
                return f"its own {name}"
        similarity = self._similarity()
        if similarity is None:
            return str(self.distance)
        values = {name: getattr(self, name) for name in self._formula.parameters}
        try:
            return make_call(self._formula, values, {**similarity, "reduction": "none"})
        except (TypeError, ValueError) as error:
            return str(error)

    def is_fused(self) -> bool:
        """Whether dml_cuda computes this loss as it is now."""
        return isinstance(self._call_or_reason(), Call)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        call = self._call_or_reason()
        if isinstance(call, str):
            warn_unsupported(self, call)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
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

    _base = losses.FastAPLoss
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

    _base = losses.SmoothAPLoss
    _formula = SmoothAP
    _name = "ap_loss"

    def _value(self, call: Call, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return evaluate_arguments(call, embeddings, labels, None, embeddings, labels, weights)

    def _rows(self, labels: Tensor) -> Tensor:
        return torch.arange(len(labels), device=labels.device)
