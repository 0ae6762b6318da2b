"""What the losses share: how a formula with its options is applied to a batch, as a function and as a
module."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import _C
from .._inputs import autocast as _autocast
from .._inputs.batch import Batch, make_batch
from .._inputs.options import NAMES, Options, PairOptions, check_options
from .._ops import dynamic_params
from .._ops import listed_pairs as listed
from .._ops import registration as ops
from .._ops.devices import BUILT_FOR_CUDA, use_kernel
from ..reference import pairs as reference
from ._formula import Formula


class Call(NamedTuple):
    """A formula, its parameters and its options, checked: what remains is the batch."""

    formula: type[Formula]
    params: list[float]  # as formula.row and the kernels take them
    options: Options
    similarity: str  # as the ops name it
    dynamic_params: bool = False  # whether parameters may change from call to call
    divide: bool = True  # False: the result is [part 0, part 1, count 0, count 1], for the caller to divide


def make_call(formula: type[Formula], values: Mapping[str, Any], options: Mapping[str, Any]) -> Call:
    """Raises TypeError or ValueError for a parameter or an option that cannot be."""
    for name, check in formula.parameters.items():
        check(name, values[name])
    checked = check_options(options, similarity=formula.similarity, reduction=formula.reduction)
    return Call(formula, formula.params(values, checked.measure), checked, checked.measure)


def _long(labels: Tensor | None) -> Tensor | None:
    return labels if labels is None or labels.dtype == torch.int64 else labels.long()


def _fast_path(
    call: Call,
    embeddings: Tensor,
    labels: Tensor | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    epsilon: float | None,
    self_index: Tensor | None = None,
    num_valid_refs: Tensor | None = None,
    mine_self_pair: bool = True,
) -> Tensor | None:
    """What :func:`evaluate` returns, by the shortest way, of a batch that needs no care; None of others."""
    formula, options = call.formula, call.options
    if torch.compiler.is_compiling() or options.backend == "reference":
        return None
    batch = embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs
    how = call.similarity, options.reduction, mine_self_pair, call.divide
    return _C.fast_pair_loss(
        *batch, formula.name, call.params, epsilon, *how, formula.on_cuda and BUILT_FOR_CUDA
    )


def _fused(call: Call, batch: Batch) -> Tensor:
    embeddings, ref_emb, labels, ref_labels, epsilon, self_index, num_valid_refs, indices, mine_self_pair = (
        batch
    )
    reduction = call.options.reduction
    if indices is not None:
        pairs = embeddings, ref_emb, indices
        return listed.pair_loss(call.formula, call.params, *pairs, call.similarity, reduction)
    needs_grad = embeddings.requires_grad or (ref_emb is not None and ref_emb.requires_grad)
    tensors = embeddings, _long(labels), ref_emb, _long(ref_labels), self_index, num_valid_refs
    save = needs_grad and torch.is_grad_enabled()
    how = call.similarity, reduction, mine_self_pair, call.divide, save
    # Numbers on the CPU keep a compiled graph from being a CUDA graph: on a GPU only where they change.
    if torch.compiler.is_compiling() and (call.dynamic_params or embeddings.device.type == "cpu"):
        return dynamic_params.pair_loss(*tensors, call.formula.name, call.params, epsilon, *how)
    return ops.call("pair_loss", *tensors, call.formula.name, call.params, epsilon, *how)[0]


def _reference(call: Call, batch: Batch) -> Tensor:
    """As the kernels do, in float32 at least from the embeddings as they come."""
    rows = batch._asdict()
    for name in ("embeddings", "ref_emb"):
        points = rows[name]
        rows[name] = points if points is None or points.dtype == torch.float64 else points.float()
    how = {"similarity": call.similarity, "reduction": call.options.reduction, "divide": call.divide}
    with _autocast.off(batch.embeddings.device):  # which would round the similarities
        return reference.pair_loss(call.formula, call.params, **rows, **how)


def compute(call: Call, batch: Batch) -> Tensor:
    """What a formula makes of a batch, float32 or float64."""
    fused = use_kernel(batch.embeddings.device, call.options.backend, call.formula.on_cuda)
    return (_fused if fused else _reference)(call, batch)


def in_wanted_dtype(value: Tensor, embeddings: Tensor) -> Tensor:
    """A loss in the dtype that the embeddings ask for: theirs, float32 under autocast."""
    if value.dtype == embeddings.dtype == torch.float32:
        return value
    wanted = torch.float32 if _autocast.is_on(embeddings.device) else embeddings.dtype
    return value if value.dtype == wanted else value.to(wanted)


def evaluate(call: Call, batch: Batch) -> Tensor:
    """The loss of a batch that has been checked."""
    if batch.indices is None:
        embeddings, ref_emb, labels, ref_labels, epsilon, self_index, num_valid_refs, _, mine_self_pair = (
            batch
        )
        more = epsilon, self_index, num_valid_refs, mine_self_pair
        loss = _fast_path(call, embeddings, labels, ref_emb, ref_labels, *more)
        if loss is not None:
            return loss
    return in_wanted_dtype(compute(call, batch), batch.embeddings)


def batch_of(
    call: Call,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> Batch:
    """The batch as the options of a call ask for it, checked."""
    return make_batch(
        embeddings,
        labels,
        indices_tuple,
        ref_emb,
        ref_labels,
        epsilon=call.options.epsilon,
        similarity=call.similarity,
        check_pairs=call.options.check_pairs,
    )


def apply(call: Call, *batch: Any) -> Tensor:
    """The loss of a batch, whose arguments are those of :func:`batch_of`."""
    embeddings, labels, indices_tuple, ref_emb, ref_labels = batch
    if indices_tuple is None:
        loss = _fast_path(call, embeddings, labels, ref_emb, ref_labels, call.options.epsilon)
        if loss is not None:
            return loss
    return evaluate(call, batch_of(call, *batch))


def pair_loss(
    formula: type[Formula],
    values: Mapping[str, Any],
    options: PairOptions,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> Tensor:
    """What the functions are: a formula with its parameters by name, applied to a batch."""
    call = make_call(formula, values, options)._replace(dynamic_params=True)
    return apply(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)


class _Option:
    """An option of a module: an attribute that is checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: "FormulaModule | None", owner: type | None = None) -> Any:
        return self if module is None else module.get_option(self.name)

    def __set__(self, module: "FormulaModule", value: object) -> None:
        module.set_option(self.name, value)


def option() -> Any:
    """An attribute of :class:`FormulaModule` that is one of its options."""
    return _Option()


class FormulaModule(nn.Module):
    """A formula with its parameters and options as a module.

    Every parameter and option is an attribute, readable and settable, checked when it is set as when the
    module was made. ``call`` is what applies them, prepared then, once.
    """

    formula: ClassVar[type[Formula]]

    reduction: str = option()
    backend: str = option()

    def __init__(self, options: Mapping[str, Any], **values: Any) -> None:
        super().__init__()
        self._values = values
        self.call = make_call(self.formula, values, options)

    def get_option(self, name: str) -> Any:
        return getattr(self.call.options, name) if name in NAMES else self._values[name]

    def set_option(self, name: str, value: object) -> None:
        values, options = self._values, self.call.options._asdict()
        if name in NAMES:
            options = {**options, name: value}
        else:
            values = {**values, name: value}
        # Who sets an option may do so again at every step: no graph should be compiled for each value.
        self.call = make_call(self.formula, values, options)._replace(dynamic_params=True)
        self._values = values

    def extra_repr(self) -> str:
        options = self._values | self.call.options._asdict()
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class PairLoss(FormulaModule):
    """What the pair losses share."""

    epsilon: float | None = option()
    similarity: str = option()
    normalize_embeddings: bool | None = option()
    check_pairs: bool = option()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers; not needed with ``indices_tuple``.
            indices_tuple: the pairs or triplets that count, as a miner returns them.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is; not needed with
                ``indices_tuple``.
        """
        return apply(self.call, embeddings, labels, indices_tuple, ref_emb, ref_labels)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward
