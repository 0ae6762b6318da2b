"""The op ranking_loss: a call of it, its fake kernel and its derivative."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._inputs.autocast import computed_dtype
from ..losses._formula import reduce, sums_and_counts
from .arguments import OpBatch, OpOptions
from .autograd import call, first_derivative, register_derivative
from .fake import fake_kernel, like_if


def ranking_loss(batch: OpBatch, options: OpOptions) -> Tensor:
    """As the op pair_loss gives it: the reduced loss, losses ``[N]``, or sums and counts ``[4]``."""
    # The last of dynamic_params is an epsilon, which a ranking does not have.
    dynamic = None if options.dynamic_params is None else options.dynamic_params[:-1]
    # Rows that are not reduced have their own gradients, which forward cannot know.
    save = options.save_for_backward and options.reduction != "none"
    save_ref = batch.ref_emb is not None and batch.ref_emb.requires_grad
    save_params = dynamic is not None and dynamic.requires_grad
    saved = save, save and save_ref, save and save_params
    how = options.formula, options.params, options.similarity, *saved
    losses, counts = call("ranking_loss", *batch, dynamic, *how)[:2]
    reduced = sums_and_counts if options.return_sums else reduce
    return reduced(losses, counts[:, 1], options.reduction, counts[:, 0])


@fake_kernel("ranking_loss")
def _ranking_loss(a):
    n, dtype = a.embeddings.shape[0], computed_dtype(a.embeddings.dtype)
    count = a.dynamic_params.shape[0] if a.save and a.save_params else 0
    return (
        a.embeddings.new_empty(n, dtype=dtype),
        a.embeddings.new_empty((n, 2), dtype=torch.int64),
        like_if(a.save, a.embeddings, a.embeddings, dtype),
        like_if(a.save and a.save_ref, a.ref_emb, a.embeddings, dtype),
        torch.empty(count, dtype=torch.float64, device="cpu"),
    )


_OP = torch.ops.dml_cuda.ranking_loss.default
_NAMES = [argument.name for argument in _OP._schema.arguments]
_TENSORS = _NAMES.index("dynamic_params") + 1  # the first arguments: a batch and the parameters
_WEIGHTS = _NAMES.index("row_weights")
_POINTS = [_NAMES.index(name) for name in ("embeddings", "ref_emb", "dynamic_params")]


def _setup_context(ctx, inputs, output) -> None:
    _, counts, *gradients = output
    ctx.mark_non_differentiable(counts, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, *inputs[:_TENSORS])
    ctx.how, ctx.saved = inputs[_TENSORS:-3], inputs[-3:]


def _weighted(tensors: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The op's tensors with the rows weighted by the gradient of their losses too."""
    weights = tensors[_WEIGHTS]
    return [*tensors[:_WEIGHTS], grad if weights is None else grad * weights, *tensors[_WEIGHTS + 1 :]]


def _backward(ctx, grad, *_):
    """Forward may have made the gradient of the sum of all rows: it is multiplied, if that will do."""
    result = [None] * len(_NAMES)
    if grad is None:
        return tuple(result)
    tensors = ctx.saved_tensors  # unpacked once: what hooks and checkpoints keep may be there once
    gradients, tensors = tensors[:3], tensors[3:]
    given, wanted = [tensors[k] for k in _POINTS], [ctx.needs_input_grad[k] for k in _POINTS]
    # One number expanded, as the gradient of a sum is.
    is_uniform = grad.shape[0] == 1 or (grad.shape[0] > 1 and grad.stride(0) == 0)
    has_all = all(saved for saved, want in zip(ctx.saved, wanted, strict=True) if want)
    factor = grad[:1].sum() if is_uniform and has_all else None
    if factor is None:
        fixed = [None if x is None else x.detach() for x in tensors]
        with torch.no_grad():
            gradients = _OP(*_weighted(fixed, grad.detach()), *ctx.how, True, *wanted[1:])[2:]
    for place, want, gradient, point in zip(_POINTS, wanted, gradients, given, strict=True):
        if want:
            gradient = gradient if factor is None else gradient * factor.to(gradient.device)
            result[place] = first_derivative(gradient.to(point.dtype), *given)
    return tuple(result)


register_derivative("ranking_loss", _backward, _setup_context)
