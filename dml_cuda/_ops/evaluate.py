"""From a batch to its loss: one ladder, read top to bottom in :func:`evaluate` and :func:`compute`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._inputs import autocast as _autocast
from .._inputs.batch import Batch, make_batch
from .._inputs.options import Options
from ..losses._formula import Formula
from ..reference import pairs as reference
from . import listed_pairs
from .arguments import OpOptions, precision_for
from .devices import use_kernel

_PAIR_LOSS = torch.ops.dml_cuda.pair_loss.default


class Call(NamedTuple):
    """A formula with its parameters and options, checked: all that a loss is but the batch."""

    formula: type[Formula]
    options: Options
    op_options: OpOptions  # the same as the ops take them
    dynamic_params: bool = False  # whether parameters may change from call to call

    @property
    def params(self) -> list[float]:
        """The parameters as ``formula.row`` and the kernels take them."""
        return self.op_options.params

    @property
    def similarity(self) -> str:
        """As the ops name it."""
        return self.op_options.similarity

    def with_reduction(self, reduction: str) -> "Call":
        return self._replace(
            options=self.options._replace(reduction=reduction),
            op_options=self.op_options._replace(reduction=reduction),
        )

    def with_sums(self, return_sums: bool) -> "Call":
        return self._replace(op_options=self.op_options._replace(return_sums=return_sums))


def validate(
    call: Call,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> Batch:
    """The batch as the options of a call ask for it. Raises TypeError or ValueError for an invalid one."""
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


def evaluate_arguments(
    call: Call,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> Tensor:
    """The loss of a batch as a user passes it."""
    if indices_tuple is not None:
        return evaluate(call, validate(call, embeddings, labels, indices_tuple, ref_emb, ref_labels))
    batch = Batch(embeddings, labels, ref_emb, ref_labels, None, None, call.op_options.epsilon)
    return evaluate(call, batch, is_valid=False)


def evaluate(call: Call, batch: Batch, *, is_valid: bool = True) -> Tensor:
    """The loss of a batch in the dtype that its embeddings ask for. ``is_valid``: it was validated."""
    # 1. Eager fast path, in C++: it checks what it takes, and returns None for unusual inputs.
    if batch.indices is None and call.options.backend != "reference" and not torch.compiler.is_compiling():
        options = call.op_options
        if batch.epsilon is not options.epsilon or not batch.mine_self_pair:
            options = options._replace(epsilon=batch.epsilon, mine_self_pair=batch.mine_self_pair)
        loss = _C.fast_pair_loss(*options, *batch[:6])
        if loss is not None:
            return loss
    # 2. The other ways, with a valid batch.
    if not is_valid:
        batch = validate(call, batch.embeddings, batch.labels, None, batch.ref_emb, batch.ref_labels)
    return in_wanted_dtype(compute(call, batch), batch.embeddings)


def compute(call: Call, batch: Batch) -> Tensor:
    """The loss of a valid batch in the type that is computed in, float32 or float64."""
    fused = use_kernel(batch.embeddings.device, call.options.backend, call.formula.on_cuda)
    # 3. The custom op: torch.compile, torch.func, subclasses of Tensor, inputs that were converted.
    if fused and batch.indices is None:
        return _PAIR_LOSS(*_op_batch(batch), *_op_options(call, batch))[0]
    # 4. Pairs given as lists.
    if fused:
        sides = batch.embeddings, batch.ref_emb, batch.indices
        return listed_pairs.pair_loss(
            call.formula, call.params, *sides, call.similarity, call.op_options.reduction
        )
    # 5. The reference in plain PyTorch.
    return _reference(call, batch)


def in_wanted_dtype(value: Tensor, embeddings: Tensor) -> Tensor:
    """A loss in the dtype that the embeddings ask for: theirs; under autocast float32 at least."""
    if value.dtype == embeddings.dtype == torch.float32:
        return value
    wanted = _autocast.result_dtype(embeddings)
    return value if value.dtype == wanted else value.to(wanted)


def _op_batch(batch: Batch) -> tuple[Any, ...]:
    """``OpBatch`` with the labels in int64."""
    embeddings, labels, ref_emb, ref_labels, *places = batch[:6]
    labels, ref_labels = (
        x if x is None or x.dtype == torch.int64 else x.long() for x in (labels, ref_labels)
    )
    return embeddings, labels, ref_emb, ref_labels, *places


def _op_options(call: Call, batch: Batch) -> OpOptions:
    needs_grad = batch.embeddings.requires_grad or (batch.ref_emb is not None and batch.ref_emb.requires_grad)
    # The batch may have a miner's rule. Not compared with the call's: that would compile a graph per epsilon.
    options = call.op_options._replace(
        epsilon=batch.epsilon,
        mine_self_pair=batch.mine_self_pair,
        precision=precision_for(batch.embeddings),
        save_for_backward=needs_grad and torch.is_grad_enabled(),
    )
    # Numbers on the CPU keep a compiled graph from being a CUDA graph: on a GPU only where they change.
    if torch.compiler.is_compiling() and (call.dynamic_params or batch.embeddings.device.type == "cpu"):
        return options.with_dynamic_params()
    return options


def _reference(call: Call, batch: Batch) -> Tensor:
    """As the kernels do, in float32 at least from the embeddings as they come."""
    arguments = batch._asdict()
    for name in ("embeddings", "ref_emb"):
        points = arguments[name]
        arguments[name] = points if points is None or points.dtype == torch.float64 else points.float()
    for name in ("similarity", "reduction", "return_sums"):
        arguments[name] = getattr(call.op_options, name)
    with _autocast.off(batch.embeddings.device):  # which would round the similarities
        return reference.pair_loss(call.formula, call.params, **arguments)
