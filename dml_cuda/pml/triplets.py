"""pytorch-metric-learning's losses of triplets on the kernels of dml_cuda."""

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
from ._shared import collect, reducer_of, reduction_name, similarity_options, warn


class _FusedTriplets:
    """Replaces the computation of a loss of triplets."""

    _theirs: ClassVar[type[BaseMetricLossFunction]]
    _methods: ClassVar[tuple[str, ...]] = ("zero_loss", "zero_losses", "_sub_loss_names")

    def _reduces(self, name: str) -> str | None:
        """What the kernels call the reducer of the loss of that name, or None for one that they lack."""
        return reduction_name(self.reducer, name)

    def _values(self) -> dict[str, Any]:
        raise NotImplementedError

    def _lacks(self, ref_emb: torch.Tensor | None) -> str | None:
        """What of this loss we cannot do with other columns."""
        return None

    def _kernel(self) -> TripletCall | str:
        """What computes this loss, or what the kernels lack for it."""
        for name in self._methods:
            replaced = getattr(type(self), name) is not getattr(self._theirs, name)
            if replaced or name in self.__dict__:
                return f"its own {name}"
        options, kinds = similarity_options(self.distance), {self._reduces(n) for n in self._sub_loss_names()}
        if options is None or None in kinds or len(kinds) > 1:
            return str(self.distance if options is None else self.reducer)
        try:
            return self._make_call(self._values(), triplet_options({**options, "reduction": kinds.pop()}))
        except (TypeError, ValueError) as error:
            return str(error)

    def is_fused(self) -> bool:
        """Whether dml_cuda computes this loss as it is now."""
        return isinstance(self._kernel(), TripletCall)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        call = self._kernel()
        lacks = call if isinstance(call, str) else self._lacks(None if ref_emb is embeddings else ref_emb)
        if lacks is not None:
            warn(self, lacks)
            return super().compute_loss(*batch)
        if labels is None and indices_tuple is None:
            return super().compute_loss(*batch)
        collect(self.distance, embeddings, ref_emb)
        if ref_emb is embeddings and (ref_labels is labels or indices_tuple is not None):
            ref_emb = ref_labels = None  # no other points: a row is no pair with itself
        elif indices_tuple is None and ref_labels is labels and call.per_anchor is None:
            # The very same labels: pytorch-metric-learning takes row i of ref_emb for the same point too.
            own = torch.arange(embeddings.shape[0], device=embeddings.device)
            rule = {"selection": Selection(), "similarity": call.similarity, "self_index": own}
            indices_tuple = MinedTriplets(embeddings, labels, ref_emb, ref_labels, **rule)
        value = self._value(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        first, *others = self._sub_loss_names()
        # The sum of all parts stands for the first.
        reduced = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return {first: reduced, **{name: self.zero_loss() for name in others}}


class TripletMarginLoss(_FusedTriplets, losses.TripletMarginLoss):
    """``pytorch_metric_learning.losses.TripletMarginLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.triplet_margin_loss` for what is computed, and for arguments and errors the
    class that this one replaces. ``swap`` with other columns is left to that class.
    """

    _theirs = losses.TripletMarginLoss
    _make_call = staticmethod(triplet_call)

    def _values(self) -> dict[str, Any]:
        names = "margin", "swap", "smooth_loss", "triplets_per_anchor"
        return {name: getattr(self, name) for name in names}

    def _lacks(self, ref_emb) -> str | None:
        # There a positive, a column, is measured as if it were a row.
        return "swap and ref_emb" if self.swap and ref_emb is not None else None

    def _value(self, call, *batch):
        return evaluate(call, *batch)


class MarginLoss(_FusedTriplets, losses.MarginLoss):
    """``pytorch_metric_learning.losses.MarginLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.margin_loss` for what is computed, and for arguments and errors the class
    that this one replaces.
    """

    _theirs = losses.MarginLoss
    _make_call = staticmethod(margin_call)
    _methods = (*_FusedTriplets._methods, "compute_reg_loss")

    def _reduces(self, name: str) -> str | None:
        reducer = reducer_of(self.reducer, name)
        if type(reducer) is reducers.DivisorReducer and not reducer.collect_stats:
            return "mean_nonzero"  # that of its terms, of which a triplet has two
        reduction = super()._reduces(name)
        return None if reduction == "mean_nonzero" else reduction

    def _values(self) -> dict[str, Any]:
        names = "margin", "nu", "triplets_per_anchor"
        return {name: getattr(self, name) for name in names}

    def _value(self, call, embeddings, *batch):
        beta = c_f.to_device(self.beta, device=embeddings.device)
        return margin_loss(call, beta, self.nu if self.learn_beta else 0.0, embeddings, *batch)
