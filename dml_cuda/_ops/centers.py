"""What heads with several centres a class share: unit points, and the op center_softmax."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._inputs.autocast import computed_dtype
from .._inputs.autocast import off as autocast_off
from ..reference.pairs import TINY_NORM
from .autograd import call, no_second_derivative, register_derivative
from .fake import fake_kernel, like_if

# Products of rows and centres that are there at once: so many as stay in a CPU's cache, and so many (64 MiB
# of float32) that a GPU is busy for longer than the host with launching them.
_BLOCK = 1 << 19
_GPU_BLOCK = 1 << 24


def block_size(points: Tensor) -> int:
    """How many numbers a block may hold."""
    if points.device.type == "cpu":
        return _BLOCK
    return _GPU_BLOCK // (2 if points.dtype == torch.float64 else 1)


def unit_and_inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows, and 1 / their length: 0, with a gradient of 0, for a row of zeros."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = length <= TINY_NORM
    inverse = torch.where(is_zero, 0.0, 1 / torch.where(is_zero, 1.0, length))
    return x * inverse, inverse


def through_norm(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """A gradient by unit rows as that by the rows."""
    along = (gradient * unit).sum(-1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1).mul_(inverse)


def row_losses(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    per_class: int,
    loss: str,
    params: Sequence[float | Tensor],
) -> Tensor:
    """The losses ``[N]`` by the op, under the transforms of torch.func too; 0 where the label is no class.

    embeddings ``[N, D]``, centers ``[C K, D]``, labels ``[N]`` int64; loss and params as
    csrc/torch/schemas.h has them.
    """
    learned, block = None, block_size(embeddings)
    if any(isinstance(value, Tensor) for value in params):
        zero = torch.zeros((), dtype=torch.float64, device=embeddings.device)
        # Summed and stacked: torch.tensor(values) has no gradient, and would wait for the device.
        learned, params = torch.stack([zero + value for value in params]), []
    how = per_class, loss, list(params), block
    return call("center_softmax", embeddings, centers, labels, learned, *how)[0]


@fake_kernel("center_softmax")
def _center_softmax(a):
    n, dtype = a.embeddings.shape[0], computed_dtype(a.embeddings.dtype)
    return a.embeddings.new_empty(n, dtype=dtype), a.embeddings.new_empty((3, n), dtype=dtype)


@fake_kernel("center_softmax_backward")
def _center_softmax_backward(a):
    source = a.embeddings if a.learned is None else a.learned
    return (
        like_if(a.need_emb, a.embeddings, a.embeddings),
        torch.empty_like(a.centers) if a.need_centers else a.centers.new_empty(0),
        like_if(a.need_params, a.learned, source, torch.float64),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.how = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_losses, _):
    embeddings, centers, labels, learned, saved = ctx.saved_tensors
    needed = [ctx.needs_input_grad[k] for k in (0, 1, 3)]
    with autocast_off(grad_losses.device):  # which would round the products
        tensors = grad_losses, embeddings, centers, labels, learned, saved
        grads = call("center_softmax_backward", *tensors, *ctx.how, *needed)
    by_embeddings, by_centers, by_learned = (
        gradient if need else None for gradient, need in zip(grads, needed, strict=True)
    )
    return by_embeddings, by_centers, None, by_learned, *(None,) * len(ctx.how)


register_derivative("center_softmax", _backward, _setup_context)
register_derivative("center_softmax_backward", no_second_derivative)
