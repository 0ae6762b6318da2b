"""Adapters of the pair losses: pytorch-metric-learning's classes, computed by the kernels."""

import math
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
from pytorch_metric_learning.losses.generic_pair_loss import GenericPairLoss
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from .._ops.evaluate import Call, evaluate, evaluate_arguments
from ..losses._formula import Formula
from ..losses._pair import make_call
from ..losses.circle import Circle
from ..losses.contrastive import Contrastive
from ..losses.lifted_pairs import LiftedPairs
from ..losses.lifted_structure import LiftedStructure
from ..losses.multi_similarity import MultiSimilarity
from ..losses.n_pairs import NPairs, batch_of_pairs
from ..losses.nca import NCA
from ..losses.nt_xent import NTXent
from ..losses.ranked_list import RankedList
from ..losses.sup_con import SupCon
from ..losses.tuplet_margin import TupletMargin
from ..miners.mined import Mined
from ..miners.mined_pairs import MinedPairs, mined_pairs


class _Fused:
    """Replaces the computation of a pair loss by the kernel of a formula."""

    _formula: ClassVar[type[Formula]]
    _row_losses = True  # whether pytorch-metric-learning reduces losses of rows here, not of pairs
    _shape = (-1, 1)  # the shape of its row losses, on which the result of some reducers depends
    _bypassed: ClassVar[dict[str, Any]] = {}  # its methods that are not called
    _override: ClassVar[str | None] = None  # one of them that a subclass overrides

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_formula" in vars(cls):
            used = {"compute_loss", "get_default_distance", "get_default_reducer"}
            bases = cls.__mro__[2], GenericPairLoss
            names = {name for base in bases for name in vars(base) if not name.startswith("__")} - used
            cls._bypassed = {name: getattr(cls, name) for name in names}
        overrides = (name for name, method in cls._bypassed.items() if getattr(cls, name) is not method)
        cls._override = next(overrides, None)

    def _overridden(self) -> str | None:
        """A bypassed method that a subclass overrides, or that was replaced on this instance."""
        if self._override is not None:
            return self._override
        for name in self._bypassed:
            if name in self.__dict__:
                return name
        method = self.mat_based_loss if self._row_losses else self.pair_based_loss
        # torch.compile cannot compare bound methods.
        return None if getattr(self.loss_method, "__func__", None) is method.__func__ else "loss_method"

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._formula.parameters}

    def _call_or_reason(self) -> Call | str:
        """The call that computes this loss, or why the kernels cannot."""
        override = self._overridden()
        if override is not None:
            return f"its own {override}"
        similarity = similarity_options(self.distance)
        if similarity is None:
            return str(self.distance)
        reductions = {reduction_name(self.reducer, name) for name in self._sub_loss_names()}
        reduction = reductions.pop() if len(reductions) == 1 else None
        if reduction is None and not self._row_losses:
            return str(self.reducer)
        try:
            return make_call(self._formula, self._values(), {**similarity, "reduction": reduction or "none"})
        except (TypeError, ValueError) as error:
            return str(error)

    def is_fused(self) -> bool:
        """Whether dml_cuda computes this loss as it is now."""
        return isinstance(self._call_or_reason(), Call)

    @property
    def call(self) -> Call:
        """The formula and its options, as :func:`dml_cuda.functional.pair_weights` takes them."""
        call = self._call_or_reason()
        if isinstance(call, str):
            kind = f"{type(self).__name__} with {call}"
            raise TypeError(f"loss: expected a pair loss that dml_cuda computes, got {kind}")
        return call

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        call = self._call_or_reason()
        if isinstance(call, str):
            warn_unsupported(self, call)
            return super().compute_loss(*batch)
        if embeddings.shape[0] * ref_emb.shape[0] <= 2 or (labels is None and indices_tuple is None):
            return super().compute_loss(*batch)
        listed = indices_tuple is not None and not isinstance(indices_tuple, Mined)
        if listed and all(len(index) <= 1 for index in indices_tuple):
            return self.zero_losses()  # as pytorch-metric-learning does with at most one pair of each kind
        collect_norms(self.distance, embeddings, ref_emb)
        if ref_emb is embeddings and (ref_labels is labels or indices_tuple is not None):
            ref_emb = ref_labels = None  # so a row is not paired with itself
        elif indices_tuple is None and ref_labels is labels:
            # The same label tensor: pytorch-metric-learning then treats row i of ref_emb as the same point.
            self_index = torch.arange(embeddings.shape[0], device=embeddings.device)
            rule = {"epsilon": None, "similarity": call.similarity, "self_index": self_index}
            indices_tuple = mined_pairs(embeddings, labels, ref_emb, ref_labels, **rule)
        value = self._value(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if call.options.reduction == "none":
            rows = torch.arange(embeddings.shape[0], device=embeddings.device)
            value = value.view(self._shape)
            return {"loss": {"losses": value, "indices": rows, "reduction_type": "element"}}
        # The first sub-loss holds the sum of all; the library adds them up.
        first, *rest = self._sub_loss_names()
        reduced = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return {first: reduced, **{name: self.zero_loss() for name in rest}}

    def _value(self, call: Call, *batch) -> Tensor:
        return evaluate_arguments(call, *batch)


class MultiSimilarityLoss(_Fused, losses.MultiSimilarityLoss):
    """``pytorch_metric_learning.losses.MultiSimilarityLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.multi_similarity_loss` for the equation, and the
    replaced class for arguments and errors.
    """

    _formula = MultiSimilarity


class CircleLoss(_Fused, losses.CircleLoss):
    """``pytorch_metric_learning.losses.CircleLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.circle_loss` for the equation, and the
    replaced class for arguments and errors. Setting ``m`` also
    updates the values that the replaced class derives from it in its constructor.
    """

    _formula = Circle

    @property
    def m(self) -> float:
        return self.delta_n

    @m.setter
    def m(self, m: float) -> None:
        self.op, self.on, self.delta_p, self.delta_n = 1 + m, -m, 1 - m, m

    def _overridden(self) -> str | None:
        if (self.op, self.on, self.delta_p) != (1 + self.m, -self.m, 1 - self.m):
            return "op, on, delta_p and delta_n"
        return super()._overridden()

    def _values(self) -> dict[str, Any]:
        return {"m": self.m, "gamma": self.gamma, "detach_weights": True}


class ContrastiveLoss(_Fused, losses.ContrastiveLoss):
    """``pytorch_metric_learning.losses.ContrastiveLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.contrastive_loss` for the equation, and the
    replaced class for arguments and errors.
    """

    _formula = Contrastive
    _row_losses = False


class GeneralizedLiftedStructureLoss(_Fused, losses.GeneralizedLiftedStructureLoss):
    """``pytorch_metric_learning.losses.GeneralizedLiftedStructureLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.generalized_lifted_structure_loss` for the equation, and the
    replaced class for arguments and errors.
    """

    _formula = LiftedStructure


class NTXentLoss(_Fused, losses.NTXentLoss):
    """``pytorch_metric_learning.losses.NTXentLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.nt_xent_loss` for the equation, and the
    replaced class for arguments and errors.
    """

    _formula = NTXent
    _row_losses = False


class SupConLoss(_Fused, losses.SupConLoss):
    """``pytorch_metric_learning.losses.SupConLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.sup_con_loss` for the equation, and the
    replaced class for arguments and errors.
    """

    _formula = SupCon
    _shape = (-1,)

    def _value(self, call: Call, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> Tensor:
        """0 if the batch has no negative at all, as in pytorch-metric-learning."""
        value = evaluate_arguments(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        mined = indices_tuple if isinstance(indices_tuple, MinedPairs) else None
        if indices_tuple is not None and mined is None:
            return value if len(indices_tuple[-1]) > 0 else value * 0
        if mined is not None and mined.epsilon is not None:
            return value  # mined rows keep pairs of both kinds or none
        if mined is not None:
            labels, ref_labels = mined.labels, mined.ref_labels
        columns = labels if ref_labels is None else ref_labels
        differ = columns != labels[:1]
        if mined is not None and mined.num_valid_refs is not None:
            differ = differ & (torch.arange(len(columns), device=columns.device) < mined.num_valid_refs)
        return torch.where(differ.any() | (labels != labels[:1]).any(), value, 0.0)


class LiftedStructureLoss(_Fused, losses.LiftedStructureLoss):
    """``pytorch_metric_learning.losses.LiftedStructureLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.lifted_structure_loss` for the equation, and the
    replaced class for arguments and errors. With ``ref_emb`` a pair has the negatives of its row alone;
    pytorch-metric-learning adds those of the row that happens to have the number of the pair's column.
    """

    _formula = LiftedPairs
    _row_losses = False


class TupletMarginLoss(_Fused, losses.TupletMarginLoss):
    """``pytorch_metric_learning.losses.TupletMarginLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.tuplet_margin_loss` for the equation, and the
    replaced class for arguments and errors. With ``collect_stats`` pytorch-metric-learning computes it.
    """

    _formula = TupletMargin
    _row_losses = False

    def _overridden(self) -> str | None:
        return "collect_stats" if self.collect_stats else super()._overridden()

    def _values(self) -> dict[str, Any]:
        return {"margin": math.degrees(self.margin), "scale": self.scale}


class _FusedRows:
    """Replaces the computation of a loss whose rows' losses pytorch-metric-learning reduces, whatever the
    reducer."""

    _formula: ClassVar[type[Formula]]
    _methods: ClassVar[tuple[str, ...]] = ()  # an override of one of these changes what it computes

    def _similarity(self) -> dict[str, Any] | None:
        """The options equivalent to the distance, or None if the kernels do not support it."""
        return similarity_options(self.distance)

    def _call_or_reason(self) -> Call | str:
        """The call that computes the rows' losses, or why the kernels cannot."""
        base = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("pytorch_metric_learning"))
        for name in self._methods:
            if getattr(type(self), name) is not getattr(base, name) or name in self.__dict__:
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
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        call = self._call_or_reason()
        if isinstance(call, str):
            warn_unsupported(self, call)
            return super().compute_loss(*batch)
        if self._is_left(embeddings, labels):
            return super().compute_loss(*batch)
        return self._loss_dict(call, *batch)

    def _is_left(self, embeddings, labels) -> bool:
        """Whether a batch is left to pytorch-metric-learning."""
        return labels is None or len(embeddings) <= 1

    def _loss_dict(self, call: Call, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        raise NotImplementedError


def _of_elements(losses: Tensor, indices: Tensor) -> dict:
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


class NCALoss(_FusedRows, losses.NCALoss):
    """``pytorch_metric_learning.losses.NCALoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.nca_loss` for the equation, and the
    replaced class for arguments and errors. As there, a miner's pairs weigh the rows. A row whose probability
    underflows to 0 keeps its loss; pytorch-metric-learning drops it.
    """

    _formula = NCA
    _methods = ("nca_computation",)

    def _similarity(self) -> dict[str, Any] | None:
        distance = self.distance
        if type(distance) is not distances.LpDistance:
            return similarity_options(distance)
        if (distance.p, distance.power) != (2, 2):
            return None
        return {"similarity": "euclidean", "normalize_embeddings": bool(distance.normalize_embeddings)}

    def _loss_dict(self, call: Call, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        using_ref = ref_emb is not embeddings
        how = {"dtype": embeddings.dtype, "using_ref": using_ref}
        weights = lmu.convert_to_weights(indices_tuple, labels, **how)
        collect_norms(self.distance, embeddings, ref_emb)
        columns = (ref_emb, ref_labels) if using_ref else (None, None)
        value = evaluate_arguments(call, embeddings, labels, None, *columns)
        found = ref_labels.sort()[0]
        ends = (torch.searchsorted(found, labels, right=right) for right in (True, False))
        (rows,) = (next(ends) - next(ends) > int(not using_ref)).nonzero(as_tuple=True)  # with a positive
        return _of_elements(value[rows] * weights[rows], rows)


class RankedListLoss(_FusedRows, losses.RankedListLoss):
    """``pytorch_metric_learning.losses.RankedListLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.ranked_list_loss` for the equation, and the
    replaced class for arguments and errors.
    """

    _formula = RankedList

    def _similarity(self) -> dict[str, Any] | None:
        found = super()._similarity()
        return found if found and found["similarity"] == "euclidean" else None

    def _loss_dict(self, call: Call, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        c_f.indices_tuple_not_supported(indices_tuple)
        collect_norms(self.distance, embeddings, embeddings)
        value = evaluate_arguments(call, embeddings, labels, None, None, None)
        return _of_elements(value, torch.arange(len(value), device=value.device))


class NPairsLoss(_FusedRows, losses.NPairsLoss):
    """``pytorch_metric_learning.losses.NPairsLoss`` on the kernels of dml_cuda.

    See :class:`dml_cuda.NPairsLoss` for the equation, and the replaced class for arguments and errors.
    """

    _formula = NPairs

    def _loss_dict(self, call: Call, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        batch, anchors, count = batch_of_pairs(embeddings, labels, indices_tuple, call.similarity)
        self.num_pairs = int(count)
        if self.num_pairs == 0:
            return self.zero_losses()
        collect_norms(self.distance, embeddings[anchors], embeddings[anchors])
        value = evaluate(call, batch)
        return _of_elements(value[: self.num_pairs], anchors[: self.num_pairs])
