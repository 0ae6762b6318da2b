"""Adapters of the triplet losses: pytorch-metric-learning's classes, computed by the kernels."""

from typing import Any, ClassVar

import torch
from pytorch_metric_learning import losses, reducers
from pytorch_metric_learning.losses.base_metric_loss_function import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f

from .._ops.triplets import Selection
from ..losses._triplet import TripletCall, evaluate, triplet_options
from ..losses.margin import evaluate as margin_loss
from ..losses.margin import make_call as margin_call
from ..losses.triplet_margin import make_call as triplet_call
from ..miners.mined_triplets import MinedTriplets
from ._shared import collect_norms, reducer_of, reduction_name, similarity_options, warn_unsupported


class _FusedTriplets:
    """Replaces the computation of a triplet loss."""

    _base: ClassVar[type[BaseMetricLossFunction]]
    _methods: ClassVar[tuple[str, ...]] = ("zero_loss", "zero_losses", "_sub_loss_names")

    def _reduction(self, name: str) -> str | None:
        """The reduction equivalent to the reducer of the sub-loss ``name``, or None if there is none."""
        return reduction_name(self.reducer, name)

    def _values(self) -> dict[str, Any]:
        raise NotImplementedError

    def _unsupported(self, ref_emb: torch.Tensor | None) -> str | None:
        """Why the kernels cannot compute this loss for a batch with ``ref_emb``, or None."""
        return None

    def _call_or_reason(self) -> TripletCall | str:
        """The call that computes this loss, or why the kernels cannot."""
        for name in self._methods:
            overridden = getattr(type(self), name) is not getattr(self._base, name)
            if overridden or name in self.__dict__:
                return f"its own {name}"
        options = similarity_options(self.distance)
        reductions = {self._reduction(name) for name in self._sub_loss_names()}
        if options is None or None in reductions or len(reductions) > 1:
            return str(self.distance if options is None else self.reducer)
        try:
            return self._make_call(
                self._values(), triplet_options({**options, "reduction": reductions.pop()})
            )
        except (TypeError, ValueError) as error:
            return str(error)

    def is_fused(self) -> bool:
        """Whether dml_cuda computes this loss as it is now."""
        return isinstance(self._call_or_reason(), TripletCall)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        call = self._call_or_reason()
        columns = None if ref_emb is embeddings else ref_emb
        reason = call if isinstance(call, str) else self._unsupported(columns)
        if reason is not None:
            warn_unsupported(self, reason)
            return super().compute_loss(*batch)
        if labels is None and indices_tuple is None:
            return super().compute_loss(*batch)
        collect_norms(self.distance, embeddings, ref_emb)
        if ref_emb is embeddings and (ref_labels is labels or indices_tuple is not None):
            ref_emb = ref_labels = None  # so a row is not paired with itself
        elif indices_tuple is None and ref_labels is labels and call.per_anchor is None:
            # The same label tensor: pytorch-metric-learning then treats row i of ref_emb as the same point.
            self_index = torch.arange(embeddings.shape[0], device=embeddings.device)
            rule = {"selection": Selection(), "similarity": call.similarity, "self_index": self_index}
            indices_tuple = MinedTriplets(embeddings, labels, ref_emb, ref_labels, **rule)
        value = self._value(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        # The first sub-loss holds the sum of all; the library adds them up.
        first, *rest = self._sub_loss_names()
        reduced = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return {first: reduced, **{name: self.zero_loss() for name in rest}}


class TripletMarginLoss(_FusedTriplets, losses.TripletMarginLoss):
    """``pytorch_metric_learning.losses.TripletMarginLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.triplet_margin_loss` for the equation, and the replaced class for arguments
    and errors. With both ``swap`` and ``ref_emb`` the replaced class computes.
    """

    _base = losses.TripletMarginLoss
    _make_call = staticmethod(triplet_call)

    def _values(self) -> dict[str, Any]:
        names = "margin", "swap", "smooth_loss", "triplets_per_anchor"
        return {name: getattr(self, name) for name in names}

    def _unsupported(self, ref_emb) -> str | None:
        # pytorch-metric-learning then indexes the rows with a positive's column.
        return "swap and ref_emb" if self.swap and ref_emb is not None else None

    def _value(self, call, *batch):
        return evaluate(call, *batch)


class MarginLoss(_FusedTriplets, losses.MarginLoss):
    """``pytorch_metric_learning.losses.MarginLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.margin_loss` for the equation, and the replaced class for arguments and
    errors.
    """

    _base = losses.MarginLoss
    _make_call = staticmethod(margin_call)
    _methods = (*_FusedTriplets._methods, "compute_reg_loss")

    def _reduction(self, name: str) -> str | None:
        reducer = reducer_of(self.reducer, name)
        if type(reducer) is reducers.DivisorReducer and not reducer.collect_stats:
            return "mean_nonzero"  # over terms, and a triplet has two
        reduction = super()._reduction(name)
        return None if reduction == "mean_nonzero" else reduction

    def _values(self) -> dict[str, Any]:
        names = "margin", "nu", "triplets_per_anchor"
        return {name: getattr(self, name) for name in names}

    def _value(self, call, embeddings, *batch):
        beta = c_f.to_device(self.beta, device=embeddings.device)
        return margin_loss(call, beta, self.nu if self.learn_beta else 0.0, embeddings, *batch)
