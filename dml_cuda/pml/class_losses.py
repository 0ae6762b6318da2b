"""Adapters of the class-level losses: pytorch-metric-learning's classes, computed by the kernels."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._shared import (  # isort: skip  # first, as it explains a missing pytorch-metric-learning
    reducer_of,
    similarity_options,
    warn_unsupported,
)

from pytorch_metric_learning import distances, losses, reducers
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from .._ops import centers
from .._ops.evaluate import Call, evaluate_arguments
from ..losses._classifier import check_classes
from ..losses._formula import Formula
from ..losses._pair import make_call
from ..losses.margin_softmax import ArcFace, CosFace, NormalizedSoftmax
from ..losses.proxy_anchor import ProxyAnchor
from ..losses.proxy_nca import ProxyNCA
from ..losses.soft_triple import SoftTriple
from ..losses.sphere_face import SphereFace, row_losses


class _FusedClassifier:
    """Replaces the computation of a class-level loss."""

    _formula: ClassVar[type[Formula]]
    _weight: ClassVar[str] = "W"
    _reducers: ClassVar[tuple[type, ...] | None] = None  # the supported types, None for all
    _methods = (
        "get_logits",
        "get_cosine",
        "get_angles",
        "scale_logits",
        "modify_cosine_of_target_classes",
        "nca_computation",
        "add_weight_regularization_to_loss_dict",
    )  # an override of one of these changes what the library computes

    def _class_weights(self) -> Tensor:
        """``[C, D]``; ``[C K, D]`` for the centres of SoftTriple."""
        weight = getattr(self, self._weight)
        return weight if self._weight == "proxies" else weight.T

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._formula.parameters}

    def _call_or_reason(self) -> Call | str:
        """The call that computes this loss, or why the kernels cannot."""
        base = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("pytorch_metric_learning"))
        for name in self._methods:
            overridden = getattr(type(self), name, None) is not getattr(base, name, None)
            if overridden or name in self.__dict__:
                return f"its own {name}"
        if not self._supports(self.distance):
            return str(self.distance)
        if self.collect_stats:
            return "collect_stats"
        if self._reducers is not None:
            types = {type(reducer_of(self.reducer, name)) for name in self._sub_loss_names()}
            if not types <= set(self._reducers):
                return str(self.reducer)
        reduction = "none" if self._reducers is None else "mean"
        try:
            return make_call(self._formula, self._values(), {"similarity": "cosine", "reduction": reduction})
        except (TypeError, ValueError) as error:
            return str(error)

    @staticmethod
    def _supports(distance: distances.BaseDistance) -> bool:
        return similarity_options(distance) == {"similarity": "cosine"}

    def is_fused(self) -> bool:
        """Whether dml_cuda computes this loss as it is now."""
        return isinstance(self._call_or_reason(), Call)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        call = self._call_or_reason()
        if isinstance(call, str) or labels is None or ref_emb is not embeddings:
            if isinstance(call, str):
                warn_unsupported(self, call)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        weight = getattr(self, self._weight)
        if (weight.dtype, weight.device) != (embeddings.dtype, embeddings.device):
            self.cast_types(embeddings.dtype, embeddings.device)  # in place, which torch.func refuses
        check_classes(labels, self._num_classes())
        loss_dict = self._loss_dict(call, embeddings, labels, indices_tuple)
        self.add_weight_regularization_to_loss_dict(loss_dict, self._class_weights())
        return loss_dict

    def _num_classes(self) -> int:
        return len(self._class_weights())

    def _loss_dict(self, call: Call, embeddings, labels, indices_tuple) -> dict:
        indices = indices_tuple if indices_tuple is None else tuple(indices_tuple)
        options = {"dtype": embeddings.dtype, "using_ref": self._formula is ProxyNCA}
        weights = lmu.convert_to_weights(indices, labels, **options)
        losses = self._row_losses(call, embeddings, labels) * weights
        rows = torch.arange(embeddings.shape[0], device=embeddings.device)
        return {"loss": {"losses": losses, "indices": rows, "reduction_type": "element"}}

    def _row_losses(self, call: Call, embeddings, labels) -> Tensor:
        classes = torch.arange(self._num_classes(), device=embeddings.device)
        return evaluate_arguments(call, embeddings, labels, None, self._class_weights(), classes)


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


class SubCenterArcFaceLoss(_FusedClassifier, losses.SubCenterArcFaceLoss):
    """``pytorch_metric_learning.losses.SubCenterArcFaceLoss``, computed a block of classes at a time."""

    _formula = ArcFace

    def _num_classes(self) -> int:
        return self.num_classes

    def _values(self) -> dict[str, Any]:
        return {"margin": math.degrees(self.margin), "scale": self.scale}

    def _row_losses(self, call: Call, embeddings, labels) -> Tensor:
        scale, _, cosine, sine = call.params
        batch = embeddings, self._class_weights(), labels.long()
        value = centers.row_losses(*batch, self.sub_centers, "sub_centers", (scale, cosine, sine))
        return value.to(embeddings.dtype)


class SphereFaceLoss(_FusedClassifier, losses.SphereFaceLoss):
    """``pytorch_metric_learning.losses.SphereFaceLoss`` on the kernels of dml_cuda."""

    _formula = SphereFace

    def _row_losses(self, call: Call, embeddings, labels) -> Tensor:
        value = row_losses(call, embeddings, self._class_weights(), labels, **self._values())
        return value.to(embeddings.dtype)


class ProxyNCALoss(_FusedClassifier, losses.ProxyNCALoss):
    """``pytorch_metric_learning.losses.ProxyNCALoss`` on the kernels of dml_cuda.

    A row whose probability underflows to 0 keeps its loss; pytorch-metric-learning drops it.
    """

    _formula = ProxyNCA
    _weight = "proxies"

    @staticmethod
    def _supports(distance: distances.BaseDistance) -> bool:
        unit = bool(distance.normalize_embeddings) and distance.p == 2 and distance.power == 2
        return type(distance) is distances.LpDistance and unit


class ProxyAnchorLoss(_FusedClassifier, losses.ProxyAnchorLoss):
    """``pytorch_metric_learning.losses.ProxyAnchorLoss`` on the kernels of dml_cuda.

    With a miner, or a reducer other than ``DivisorReducer``, pytorch-metric-learning computes it.
    """

    _formula = ProxyAnchor
    _weight = "proxies"
    _reducers = (reducers.DivisorReducer,)

    def _loss_dict(self, call: Call, embeddings, labels, indices_tuple) -> dict:
        if indices_tuple is not None:
            loss_dict = losses.ProxyAnchorLoss.compute_loss(
                self, embeddings, labels, indices_tuple, embeddings, labels
            )
            loss_dict.pop("weight_reg_loss", None)  # compute_loss adds it
            return loss_dict
        classes = torch.arange(self._num_classes(), device=embeddings.device)
        value = evaluate_arguments(call, self._class_weights(), classes, None, embeddings, labels)
        reduced = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return {"pos_loss": reduced, "neg_loss": self.zero_loss()}  # the sum of both


class SoftTripleLoss(_FusedClassifier, losses.SoftTripleLoss):
    """``pytorch_metric_learning.losses.SoftTripleLoss``, computed a block of classes at a time."""

    _formula = SoftTriple
    _weight = "fc"

    def _num_classes(self) -> int:
        return self.num_classes

    def _values(self) -> dict[str, Any]:
        return {"la": self.la, "gamma": 1 / self.gamma, "margin": self.margin, "tau": 0.0}

    def _row_losses(self, call: Call, embeddings, labels) -> Tensor:
        *params, _ = call.params
        batch = embeddings, self._class_weights(), labels.long()
        value = centers.row_losses(*batch, self.centers_per_class, "soft_triple", params)
        return value.to(embeddings.dtype)
