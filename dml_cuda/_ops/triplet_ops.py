"""The ops on triplets: fake kernels and derivatives."""

import torch

from .._inputs.autocast import computed_dtype
from .autograd import first_derivative, register_derivative
from .fake import fake_kernel, like_if


@fake_kernel("triplet_loss")
@fake_kernel("triplet_list_loss")
def _triplet_loss(a):
    n, dtype = a.embeddings.shape[0], computed_dtype(a.embeddings.dtype)
    return (
        a.embeddings.new_empty(n, dtype=dtype),
        a.embeddings.new_empty((n, 2), dtype=torch.int64),
        like_if(a.save, a.embeddings, a.embeddings, dtype),
        like_if(a.save and a.save_ref, a.ref_emb, a.embeddings, dtype),
        like_if(a.save, a.row_params, a.embeddings, dtype),
    )


@fake_kernel("select")
def _select(a):
    count = a.embeddings.shape[0] if a.anchors is None else a.anchors.shape[0]
    column = a.embeddings.new_empty(count, dtype=torch.int64)
    return column, a.embeddings.new_empty(count, dtype=computed_dtype(a.embeddings.dtype))


def _register(name: str) -> None:
    """Gives an op on triplets its derivative. Its last two arguments say what the forward pass saves."""
    names = [argument.name for argument in getattr(torch.ops.dml_cuda, name).default._schema.arguments]
    count, points = len(names), [names.index(point) for point in ("embeddings", "ref_emb", "row_params")]

    def setup_context(ctx, inputs, output) -> None:
        given, (save, save_ref) = [inputs[k] for k in points], inputs[-2:]
        counts, *gradients = output[1:]
        ctx.mark_non_differentiable(counts, *gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients, *given)
        ctx.dtypes = [None if x is None else x.dtype for x in given]
        ctx.saved = save, save and save_ref, save

    def backward(ctx, grad, *_):
        """The forward pass made the gradient of the sum of all rows: here it is multiplied."""
        result = [None] * count
        if grad is None:
            return tuple(result)
        if grad.shape[0] > 1 and grad.stride(0) != 0:  # not one number expanded, as the gradient of a sum is
            torch._assert_async(
                (grad == grad[0]).all(),
                "triplet_loss: its rows cannot be weighted apart, as the forward pass made the gradient of "
                'their sum; pass backend="reference" to weight them',
            )
        saved_tensors = ctx.saved_tensors  # unpacked once: what hooks and checkpoints keep may be there once
        gradients, given = saved_tensors[:3], saved_tensors[3:]
        for k, (place, gradient, dtype, saved) in enumerate(
            zip(points, gradients, ctx.dtypes, ctx.saved, strict=True)
        ):
            if not ctx.needs_input_grad[place]:
                continue
            if not saved:
                name = ("embeddings", "ref_emb", "row_params")[k]
                raise RuntimeError(f"triplet_loss: the gradient of {name} was not saved")
            result[place] = first_derivative((gradient * grad[:1].sum()).to(dtype), *given)
        return tuple(result)

    register_derivative(name, backward, setup_context)


_register("triplet_loss")
_register("triplet_list_loss")
