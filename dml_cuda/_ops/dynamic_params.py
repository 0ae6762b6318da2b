"""The op as torch.compile should see it when a margin or a scale follows a schedule.

A graph fixes the float arguments of an op, so every new value would compile another. Here they come in a
tensor on the CPU, which the graph reads when it runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_TENSORS = (
    "Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, Tensor? self_index, "
    "Tensor? num_valid_refs"
)
torch.library.define(
    "dml_cuda::pair_loss_dynamic_params",
    f"({_TENSORS}, Tensor numbers, str formula, bool mine, str similarity, str reduction, bool "
    f"mine_self_pair, "
    "bool divide, bool save_for_backward) -> (Tensor, Tensor)",
)
torch.library.define(
    "dml_cuda::pair_loss_dynamic_params_backward",
    f"(Tensor grad_loss, {_TENSORS}, Tensor saved, Tensor numbers, str formula, str similarity, str "
    f"reduction, "
    "bool divide, bool need_emb, bool need_ref) -> (Tensor, Tensor)",
)


def _values(numbers: Tensor) -> list[float]:
    """Their values where they are known; where only shapes matter, any."""
    if isinstance(numbers, torch._subclasses.FakeTensor):
        return [1.0] * numbers.shape[0]
    return numbers.tolist()


def _forward(*arguments):
    *tensors, numbers, formula, mine, similarity, reduction, mine_self_pair, divide, save = arguments
    *params, epsilon = _values(numbers)
    options = params, epsilon if mine else None, similarity, reduction, mine_self_pair, divide, save
    return torch.ops.dml_cuda.pair_loss.default(*tensors, formula, *options)


def _backward_op(*arguments):
    *tensors, numbers, formula, similarity, reduction, divide, need_emb, need_ref = arguments
    options = _values(numbers)[:-1], similarity, reduction, divide, need_emb, need_ref
    return torch.ops.dml_cuda.pair_loss_backward.default(*tensors, formula, *options)


def _setup_context(ctx, inputs, output) -> None:
    tensors, (formula, _, similarity, reduction, _, divide, _) = inputs[:7], inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = formula, similarity, reduction, divide


def _backward(ctx, grad_loss, _):
    if grad_loss is None:
        return (None,) * 14
    *tensors, numbers, saved = ctx.saved_tensors
    need_emb, _, need_ref = ctx.needs_input_grad[:3]
    grad_emb, grad_ref = torch.ops.dml_cuda.pair_loss_dynamic_params_backward.default(
        grad_loss, *tensors, saved, numbers, *ctx.options, need_emb, need_ref
    )
    return (grad_emb if need_emb else None, None, grad_ref if need_ref else None, *(None,) * 11)


for _name, _implementation in (("", _forward), ("_backward", _backward_op)):
    torch.library.impl(f"dml_cuda::pair_loss_dynamic_params{_name}", "CompositeExplicitAutograd")(
        _implementation
    )
    torch.library.register_fake(f"dml_cuda::pair_loss_dynamic_params{_name}")(_implementation)
torch.library.register_autograd("dml_cuda::pair_loss_dynamic_params", _backward, setup_context=_setup_context)


def pair_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    self_index: Tensor | None,
    num_valid_refs: Tensor | None,
    formula: str,
    params: Sequence[float],
    epsilon: float | None,
    *how: str | bool,
) -> Tensor:
    """The loss; arguments as those of the op ``pair_loss``."""
    # Summed and stacked, not torch.tensor(params): what a compiler is told of numbers not yet known.
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    numbers = torch.stack([zero + value for value in (*params, 0.0 if epsilon is None else epsilon)])
    tensors = embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs
    mine = epsilon is not None
    return torch.ops.dml_cuda.pair_loss_dynamic_params.default(*tensors, numbers, formula, mine, *how)[0]
