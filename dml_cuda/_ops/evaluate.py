"""From a batch to its loss: one ladder, read top to bottom in :func:`evaluate` and :func:`compute`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._inputs import autocast as _autocast
from .._inputs.batch import Batch, make_batch
from .._inputs.options import Options
from .._inputs.row_weights import weights_of_rows
from ..losses._formula import Formula, divided, reduce, sums_and_counts
from ..miners.mined_pairs import MinedPairs
from ..reference import pairs as reference
from . import listed_pairs, ranking
from .arguments import OpBatch, OpOptions, precision_for
from .devices import use_kernel

_PAIR_LOSS = torch.ops.dml_cuda.pair_loss.default


class Call(NamedTuple):
    """A formula with its parameters and options, checked: all that a loss is but the batch."""

    formula: type[Formula]
    options: Options
    op_options: OpOptions  # the same as the ops take them
    dynamic_params: bool = False  # whether parameters may change from call to call
    learns: bool = False  # whether a parameter is a tensor

    @property
    def params(self) -> list[float | Tensor]:
        """The parameters as ``formula.row`` and the kernels take them."""
        return self.op_options.params

    @property
    def similarity(self) -> str:
        """As the ops name it."""
        return self.op_options.similarity

    def with_values(self, values: Mapping[str, float | Tensor]) -> "Call":
        """The same with other values of the parameters, which were checked."""
        params = self.formula.params(values, self.similarity)
        return self._replace(op_options=self.op_options._replace(params=params))

    def with_reduction(self, reduction: str) -> "Call":
        return self._replace(
            options=self.options._replace(reduction=reduction),
            op_options=self.op_options._replace(reduction=reduction),
        )

    def without_class_weights(self) -> "Call":
        return self._replace(options=self.options._replace(class_weights=None))

    def with_both_directions(self) -> "Call":
        return self._replace(op_options=self.op_options._replace(both_directions=True))

    def with_sums(self, return_sums: bool) -> "Call":
        return self._replace(op_options=self.op_options._replace(return_sums=return_sums))


def validate(
    call: Call,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    row_weights: Tensor | None = None,
) -> Batch:
    """The batch as the options of a call ask for it. Raises TypeError or ValueError for an invalid one."""
    classes = call.options.class_weights
    row_weights = weights_of_rows(classes, labels, row_weights, ignore_negative=False)
    batch = make_batch(
        embeddings,
        labels,
        indices_tuple,
        ref_emb,
        ref_labels,
        epsilon=call.options.epsilon,
        similarity=call.similarity,
        check_pairs=call.options.check_pairs,
    )
    if call.formula.ranks and (batch.indices is not None or batch.epsilon is not None):
        raise ValueError(
            "indices_tuple: expected None with a ranking loss, which is of all pairs of a row; got "
            + ("pairs as lists" if batch.epsilon is None else "mined pairs")
        )
    return batch.with_row_weights(row_weights)


def evaluate_arguments(
    call: Call,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The loss of a batch as a user passes it."""
    given = indices_tuple, row_weights, call.options.class_weights
    if any(x is not None for x in given):
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
        return evaluate(call, validate(call, *arguments))
    batch = Batch(embeddings, labels, ref_emb, ref_labels, epsilon=call.op_options.epsilon)
    return evaluate(call, batch, is_valid=False)


def evaluate(call: Call, batch: Batch, *, is_valid: bool = True) -> Tensor:
    """The loss of a batch in the dtype that its embeddings ask for. ``is_valid``: it was validated."""
    # 1. Eager fast path, in C++: it checks what it takes, and returns None for unusual inputs.
    if (
        batch.indices is None
        and not call.formula.ranks
        and call.options.backend != "reference"
        and not call.formula.composed
        and not torch.compiler.is_compiling()
        and (not call.op_options.both_directions or is_on_cpu(batch.embeddings))
    ):
        options = call.op_options
        if batch.epsilon is not options.epsilon or not batch.mine_self_pair:
            options = options._replace(epsilon=batch.epsilon, mine_self_pair=batch.mine_self_pair)
        if call.learns:
            options = options.with_dynamic_params(device_of_params(batch.embeddings))
        loss = _C.fast_pair_loss(*options, *batch[:7])
        if loss is not None:
            return loss
    # 2. The other ways, with a valid batch.
    if not is_valid:
        batch = validate(call, batch.embeddings, batch.labels, None, batch.ref_emb, batch.ref_labels)
    return in_wanted_dtype(compute(call, batch), batch.embeddings)


def compute(call: Call, batch: Batch) -> Tensor:
    """The loss of a valid batch in the type that is computed in, float32 or float64."""
    device = batch.embeddings.device
    composed, on_gpu = call.formula.is_composed(device), device.type == "cuda"
    fused = use_kernel(device, call.options.backend, composed or call.formula.on_cuda)
    if fused and composed and batch.indices is None:
        return _composed(call, batch)
    # 3. The custom op: torch.compile, torch.func, subclasses of Tensor, inputs that were converted.
    if fused and call.formula.ranks:
        return ranking.ranking_loss(_op_batch(batch), _op_options(call, batch))
    if fused and batch.indices is None and call.op_options.both_directions and on_gpu:
        return _both_directions(call, batch)
    if fused and batch.indices is None:
        return _PAIR_LOSS(*_op_batch(batch), *_op_options(call, batch))[0]
    # 4. Pairs given as lists.
    if fused:
        sides = batch.embeddings, batch.ref_emb, batch.indices
        how = call.similarity, call.op_options.reduction, batch.row_weights
        return listed_pairs.pair_loss(call.formula, call.params, *sides, *how)
    # 5. The reference in plain PyTorch.
    return _reference(call, batch)


def _composed(call: Call, batch: Batch) -> Tensor:
    """The loss by a formula that is made of others: of all pairs, or of those that mining keeps, listed."""
    if batch.epsilon is not None and torch.compiler.is_compiling():
        return _reference(call, batch)  # a graph cannot list them
    with _autocast.off(batch.embeddings.device):
        if batch.embeddings.device.type == "cpu":  # computes in float32 anyway: gradients are rounded once
            batch = _widened(batch)
        if batch.epsilon is None:
            losses = call.formula.compose(call, batch)
        else:
            losses = listed_pairs.losses(call.formula, call.params, *_kept(call, batch))
        valid = losses[0].counts > 0
        how = sums_and_counts if call.op_options.return_sums else reduce
        return how(losses, valid, call.op_options.reduction, row_weights=batch.row_weights)


def _kept(call: Call, batch: Batch) -> tuple[Any, ...]:
    """Both sides, the pairs that mining keeps, listed, and the similarity."""
    labels = batch.labels.long(), None if batch.ref_labels is None else batch.ref_labels.long()
    rule = {"epsilon": batch.epsilon, "similarity": call.similarity, "self_index": batch.self_index}
    sides = batch.embeddings.detach(), labels[0], None if batch.ref_emb is None else batch.ref_emb.detach()
    mined = MinedPairs(*sides, labels[1], **rule, num_valid_refs=batch.num_valid_refs)
    return batch.embeddings, batch.ref_emb, tuple(mined), call.similarity


def of_rows(call: Call, formula: type[Formula], params: list[float | Tensor], batch: Batch) -> Tensor:
    """``[N]`` the rows' losses by another formula, of the same pairs: what a composed formula is made of."""
    op = call.op_options._replace(
        formula=formula.name, params=params, epsilon=None, reduction="none", return_sums=False
    )
    options = call.options._replace(epsilon=None, reduction="none", class_weights=None)
    part = call._replace(formula=formula, options=options, op_options=op, learns=op.learns)
    return compute(part, batch._replace(epsilon=None, row_weights=None))


def _both_directions(call: Call, batch: Batch) -> Tensor:
    """The losses of the rows over the columns, and of the columns over the rows, each by a call of its own:
    the CUDA kernels know one direction."""
    options, n = call.op_options, batch.embeddings.shape[0]
    one = options._replace(both_directions=False, return_sums=options.reduction != "none")
    call = call._replace(op_options=one)
    weights = (
        (None, None)
        if batch.row_weights is None
        else batch.row_weights.split_with_sizes([n, batch.ref_emb.shape[0]])
    )
    forth = batch._replace(row_weights=weights[0])
    sides = batch.ref_emb, batch.ref_labels, batch.embeddings, batch.labels
    back = Batch(*sides, epsilon=batch.epsilon, row_weights=weights[1])
    results = [compute(call, each) for each in (forth, back)]
    if options.reduction == "none":
        return torch.cat(results)
    sums = results[0] + results[1]  # parts 0 and 1, then their counts
    return sums if options.return_sums else divided(sums, options.reduction)


def device_of_params(embeddings: object) -> torch.device | str:
    """Where kernels read parameters that learn."""
    return embeddings.device if isinstance(embeddings, Tensor) and embeddings.is_cuda else "cpu"


def is_on_cpu(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu"


def in_wanted_dtype(value: Tensor, embeddings: Tensor) -> Tensor:
    """A loss in the dtype that the embeddings ask for: theirs; under autocast float32 at least."""
    if value.dtype == embeddings.dtype == torch.float32:
        return value
    wanted = _autocast.result_dtype(embeddings)
    return value if value.dtype == wanted else value.to(wanted)


def _op_batch(batch: Batch) -> OpBatch:
    """With the labels in int64."""
    embeddings, labels, ref_emb, ref_labels, *places = batch[:7]
    labels, ref_labels = (
        x if x is None or x.dtype == torch.int64 else x.long() for x in (labels, ref_labels)
    )
    return OpBatch(embeddings, labels, ref_emb, ref_labels, *places)


def _op_options(call: Call, batch: Batch) -> OpOptions:
    sources = batch.embeddings, batch.ref_emb, *call.params
    needs_grad = any(isinstance(x, Tensor) and x.requires_grad for x in sources)
    # The batch may have a miner's rule. Not compared with the call's: that would compile a graph per epsilon.
    options = call.op_options._replace(
        epsilon=batch.epsilon,
        mine_self_pair=batch.mine_self_pair,
        precision=precision_for(batch.embeddings),
        save_for_backward=needs_grad and torch.is_grad_enabled(),
    )
    # Numbers on the CPU keep a compiled graph from being a CUDA graph: on a GPU only where they change.
    changes = call.dynamic_params or batch.embeddings.device.type == "cpu"
    if call.learns:
        return options.with_dynamic_params(device_of_params(batch.embeddings))
    if changes and torch.compiler.is_compiling():
        return options.with_dynamic_params()
    return options


def _widened(batch: Batch) -> Batch:
    """The batch with points of float32 at least."""
    points = (
        x if x is None else x.to(_autocast.computed_dtype(x.dtype)) for x in (batch.embeddings, batch.ref_emb)
    )
    return batch._replace(**dict(zip(("embeddings", "ref_emb"), points, strict=True)))


def _reference(call: Call, batch: Batch) -> Tensor:
    """As the kernels do, in float32 at least from the embeddings as they come."""
    arguments = _widened(batch)._asdict()
    for name in ("similarity", "reduction", "return_sums", "both_directions"):
        arguments[name] = getattr(call.op_options, name)
    with _autocast.off(batch.embeddings.device):  # which would round the similarities
        return reference.pair_loss(call.formula, call.params, **arguments)
