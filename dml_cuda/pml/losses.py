"""Adapters of the losses of pairs and classes: PML's classes, computed by the kernels."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._shared import collect, reducer_of, reduction_name, similarity_options, warn  # isort: skip  # before PML itself

from pytorch_metric_learning import distances, losses, reducers
from pytorch_metric_learning.losses.generic_pair_loss import GenericPairLoss
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from .._ops import soft_triple
from .._ops.evaluate import Call, evaluate_arguments
from ..losses._classifier import check_classes
from ..losses._formula import Formula
from ..losses._pair import make_call
from ..losses.circle import Circle
from ..losses.contrastive import Contrastive
from ..losses.lifted_structure import LiftedStructure
from ..losses.margin_softmax import ArcFace, CosFace, NormalizedSoftmax
from ..losses.multi_similarity import MultiSimilarity
from ..losses.nt_xent import NTXent
from ..losses.proxy_anchor import ProxyAnchor
from ..losses.proxy_nca import ProxyNCA
from ..losses.soft_triple import SoftTriple
from ..losses.sup_con import SupCon
from ..miners.mined_pairs import Mined, MinedPairs, mined_pairs


class _Fused:
    """Replaces the computation of a pair loss by that of a formula."""

    _formula: ClassVar[type[Formula]]
    _row_losses = True  # whether pytorch-metric-learning has losses of rows here, not of pairs
    _shape = (-1, 1)  # of these there, for which some reducers give another number than for [N]
    _stands_for: ClassVar[dict[str, Any]] = {}  # pytorch-metric-learning's methods, which are not called
    _override: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_formula" in vars(cls):
            theirs = cls.__mro__[2], GenericPairLoss
            skipped = {"compute_loss", "get_default_distance", "get_default_reducer"}
            names = {n for each in theirs for n in vars(each) if not n.startswith("__")} - skipped
            cls._stands_for = {name: getattr(cls, name) for name in names}
        replaced = (n for n, method in cls._stands_for.items() if getattr(cls, n) is not method)
        cls._override = next(replaced, None)

    def _overridden(self) -> str | None:
        """A method that a subclass, or somebody on this very loss, has put in place of theirs."""
        if self._override is not None:
            return self._override
        for name in self._stands_for:
            if name in self.__dict__:
                return name
        method = self.mat_based_loss if self._row_losses else self.pair_based_loss
        # Compared as torch.compile can.
        return None if getattr(self.loss_method, "__func__", None) is method.__func__ else "loss_method"

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._formula.parameters}

    def _kernel(self) -> Call | str:
        """What computes this loss, or what the kernels lack for it."""
        override = self._overridden()
        if override is not None:
            return f"its own {override}"
        similarity = similarity_options(self.distance)
        if similarity is None:
            return str(self.distance)
        kinds = {reduction_name(self.reducer, name) for name in self._sub_loss_names()}
        reduction = kinds.pop() if len(kinds) == 1 else None
        if reduction is None and not self._row_losses:
            return str(self.reducer)
        try:
            return make_call(self._formula, self._values(), {**similarity, "reduction": reduction or "none"})
        except (TypeError, ValueError) as error:
            return str(error)

    def is_fused(self) -> bool:
        """Whether dml_cuda computes this loss as it is now."""
        return isinstance(self._kernel(), Call)

    @property
    def call(self) -> Call:
        """The formula and its options, as :func:`dml_cuda.functional.pair_weights` takes them."""
        call = self._kernel()
        if isinstance(call, str):
            kind = f"{type(self).__name__} with {call}"
            raise TypeError(f"loss: expected a pair loss that dml_cuda computes, got {kind}")
        return call

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        call = self._kernel()
        if isinstance(call, str):
            warn(self, call)
            return super().compute_loss(*batch)
        if embeddings.shape[0] * ref_emb.shape[0] <= 2 or (labels is None and indices_tuple is None):
            return super().compute_loss(*batch)
        listed = indices_tuple is not None and not isinstance(indices_tuple, Mined)
        if listed and all(len(index) <= 1 for index in indices_tuple):
            return self.zero_losses()  # as pytorch-metric-learning does with a single pair of each kind
        collect(self.distance, embeddings, ref_emb)
        if ref_emb is embeddings and (ref_labels is labels or indices_tuple is not None):
            ref_emb = ref_labels = None  # no other points: a row is no pair with itself
        elif indices_tuple is None and ref_labels is labels:
            # The very same labels: pytorch-metric-learning takes row i of ref_emb for the same point too.
            own = torch.arange(embeddings.shape[0], device=embeddings.device)
            rule = {"epsilon": None, "similarity": call.similarity, "self_index": own}
            indices_tuple = mined_pairs(embeddings, labels, ref_emb, ref_labels, **rule)
        value = self._value(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if call.options.reduction == "none":
            rows = torch.arange(embeddings.shape[0], device=embeddings.device)
            value = value.view(self._shape)
            return {"loss": {"losses": value, "indices": rows, "reduction_type": "element"}}
        # The sum of all parts stands for the first.
        first, *others = self._sub_loss_names()
        reduced = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return {first: reduced, **{name: self.zero_loss() for name in others}}

    def _value(self, call: Call, *batch) -> Tensor:
        return evaluate_arguments(call, *batch)


class MultiSimilarityLoss(_Fused, losses.MultiSimilarityLoss):
    """``pytorch_metric_learning.losses.MultiSimilarityLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.multi_similarity_loss` for the equation, and for arguments and errors the
    class that this one replaces.
    """

    _formula = MultiSimilarity


class CircleLoss(_Fused, losses.CircleLoss):
    """``pytorch_metric_learning.losses.CircleLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.circle_loss` for the equation, and for arguments and errors the class that
    this one replaces. Setting ``m`` later sets what that class derives from it in its constructor only.
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

    See :func:`dml_cuda.functional.contrastive_loss` for the equation, and for arguments and errors the class
    that this one replaces.
    """

    _formula = Contrastive
    _row_losses = False


class GeneralizedLiftedStructureLoss(_Fused, losses.GeneralizedLiftedStructureLoss):
    """``pytorch_metric_learning.losses.GeneralizedLiftedStructureLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.generalized_lifted_structure_loss` for the equation, and for arguments and
    errors the class that this one replaces.
    """

    _formula = LiftedStructure


class NTXentLoss(_Fused, losses.NTXentLoss):
    """``pytorch_metric_learning.losses.NTXentLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.nt_xent_loss` for the equation, and for arguments and errors the class that
    this one replaces.
    """

    _formula = NTXent
    _row_losses = False


class SupConLoss(_Fused, losses.SupConLoss):
    """``pytorch_metric_learning.losses.SupConLoss`` on the kernels of dml_cuda.

    See :func:`dml_cuda.functional.sup_con_loss` for the equation, and for arguments and errors the class that
    this one replaces.
    """

    _formula = SupCon
    _shape = (-1,)

    def _value(self, call: Call, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> Tensor:
        """pytorch-metric-learning's is 0 where the batch has no negative at all."""
        value = evaluate_arguments(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        mined = indices_tuple if isinstance(indices_tuple, MinedPairs) else None
        if indices_tuple is not None and mined is None:
            return value if len(indices_tuple[-1]) > 0 else value * 0
        if mined is not None and mined.epsilon is not None:
            return value  # its rows have both kinds or none
        if mined is not None:
            labels, ref_labels = mined.labels, mined.ref_labels
        columns = labels if ref_labels is None else ref_labels
        differ = columns != labels[:1]
        if mined is not None and mined.num_valid_refs is not None:
            differ = differ & (torch.arange(len(columns), device=columns.device) < mined.num_valid_refs)
        return torch.where(differ.any() | (labels != labels[:1]).any(), value, 0.0)


# ---- class-level losses ----------------------------------------------------------------------------------


_THEIRS = (
    losses.NormalizedSoftmaxLoss,
    losses.CosFaceLoss,
    losses.ArcFaceLoss,
    losses.ProxyAnchorLoss,
    losses.ProxyNCALoss,
    losses.SoftTripleLoss,
)


class _FusedClassifier:
    """Replaces the computation of a class-level loss. Weights that lie class beside class in memory are laid
    out class after class, as the kernels read them; their shape, and the state dict, stay."""

    _formula: ClassVar[type[Formula]]
    _weight: ClassVar[str] = "W"
    _reducers: ClassVar[tuple[type, ...] | None] = None  # those that can be served, None for all
    _methods = (
        "get_logits",
        "get_cosine",
        "get_angles",
        "scale_logits",
        "modify_cosine_of_target_classes",
        "nca_computation",
        "add_weight_regularization_to_loss_dict",
    )

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        if self._weight != "proxies":
            weight = getattr(self, self._weight)
            weight.data = weight.data.T.contiguous().T

    def _rows(self) -> Tensor:
        weight = getattr(self, self._weight)
        return weight if self._weight == "proxies" else weight.T

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._formula.parameters}

    def _kernel(self) -> Call | str:
        """What computes this loss, or what the kernels lack for it."""
        theirs = next(
            cls for cls in type(self).__mro__ if cls.__module__.startswith("pytorch_metric_learning")
        )
        for name in self._methods:
            replaced = getattr(type(self), name, None) is not getattr(theirs, name, None)
            if replaced or name in self.__dict__:
                return f"its own {name}"
        if not self._measures(self.distance):
            return str(self.distance)
        if self.collect_stats:
            return "collect_stats"
        if self._reducers is not None:
            kinds = {type(reducer_of(self.reducer, name)) for name in self._sub_loss_names()}
            if not kinds <= set(self._reducers):
                return str(self.reducer)
        reduction = "none" if self._reducers is None else "mean"
        try:
            return make_call(self._formula, self._values(), {"similarity": "cosine", "reduction": reduction})
        except (TypeError, ValueError) as error:
            return str(error)

    @staticmethod
    def _measures(distance: distances.BaseDistance) -> bool:
        return similarity_options(distance) == {"similarity": "cosine"}

    def is_fused(self) -> bool:
        """Whether dml_cuda computes this loss as it is now."""
        return isinstance(self._kernel(), Call)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        call = self._kernel()
        if isinstance(call, str) or labels is None or ref_emb is not embeddings:
            if isinstance(call, str):
                warn(self, call)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        check_classes(labels, self._classes())
        found = self._losses(call, embeddings, labels, indices_tuple)
        self.add_weight_regularization_to_loss_dict(found, self._rows())
        return found

    def _classes(self) -> int:
        return len(self._rows())

    def _losses(self, call: Call, embeddings, labels, indices_tuple) -> dict:
        indices = indices_tuple if indices_tuple is None else tuple(indices_tuple)
        how = {"dtype": embeddings.dtype, "using_ref": self._formula is ProxyNCA}
        losses = self._of_rows(call, embeddings, labels) * lmu.convert_to_weights(indices, labels, **how)
        rows = torch.arange(embeddings.shape[0], device=embeddings.device)
        return {"loss": {"losses": losses, "indices": rows, "reduction_type": "element"}}

    def _of_rows(self, call: Call, embeddings, labels) -> Tensor:
        classes = torch.arange(self._classes(), device=embeddings.device)
        return evaluate_arguments(call, embeddings, labels, None, self._rows(), classes)


class NormalizedSoftmaxLoss(_FusedClassifier, losses.NormalizedSoftmaxLoss):
    """``pytorch_metric_learning.losses.NormalizedSoftmaxLoss`` on the kernels of dml_cuda."""

    _formula = NormalizedSoftmax


class CosFaceLoss(_FusedClassifier, losses.CosFaceLoss):
    """``pytorch_metric_learning.losses.CosFaceLoss`` on the kernels of dml_cuda."""

    _formula = CosFace


class ArcFaceLoss(_FusedClassifier, losses.ArcFaceLoss):
    """``pytorch_metric_learning.losses.ArcFaceLoss`` on the kernels of dml_cuda."""

    _formula = ArcFace

    def _values(self) -> dict[str, Any]:
        return {"margin": math.degrees(self.margin), "scale": self.scale}


class ProxyNCALoss(_FusedClassifier, losses.ProxyNCALoss):
    """``pytorch_metric_learning.losses.ProxyNCALoss`` on the kernels of dml_cuda, which drop no row."""

    _formula = ProxyNCA
    _weight = "proxies"

    @staticmethod
    def _measures(distance: distances.BaseDistance) -> bool:
        unit = bool(distance.normalize_embeddings) and distance.p == 2 and distance.power == 2
        return type(distance) is distances.LpDistance and unit


class ProxyAnchorLoss(_FusedClassifier, losses.ProxyAnchorLoss):
    """``pytorch_metric_learning.losses.ProxyAnchorLoss`` on the kernels of dml_cuda, with its own reducer and
    without a miner."""

    _formula = ProxyAnchor
    _weight = "proxies"
    _reducers = (reducers.DivisorReducer,)

    def _losses(self, call: Call, embeddings, labels, indices_tuple) -> dict:
        if indices_tuple is not None:
            found = losses.ProxyAnchorLoss.compute_loss(
                self, embeddings, labels, indices_tuple, embeddings, labels
            )
            found.pop("weight_reg_loss", None)
            return found
        classes = torch.arange(self._classes(), device=embeddings.device)
        value = evaluate_arguments(call, self._rows(), classes, None, embeddings, labels)
        reduced = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return {"pos_loss": reduced, "neg_loss": self.zero_loss()}  # the sum of both stands for the first


class SoftTripleLoss(_FusedClassifier, losses.SoftTripleLoss):
    """``pytorch_metric_learning.losses.SoftTripleLoss``, computed a block of classes at a time."""

    _formula = SoftTriple
    _weight = "fc"

    def _classes(self) -> int:
        return self.num_classes

    def _values(self) -> dict[str, Any]:
        return {"la": self.la, "gamma": 1 / self.gamma, "margin": self.margin, "tau": 0.0}

    def _of_rows(self, call: Call, embeddings, labels) -> Tensor:
        la, gamma, margin, _ = call.params
        batch = embeddings, self._rows(), labels.long()
        value, *_ = soft_triple.soft_triple(*batch, self.centers_per_class, la, gamma, margin, False)
        return value.to(embeddings.dtype)
