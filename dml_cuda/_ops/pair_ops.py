"""Fake kernels of the ops on pairs and on blocks of columns. Sizes come from the engines' own layouts."""

import torch

from .. import _C
from .._inputs.autocast import computed_dtype
from .fake import fake_kernel, gradient_if, like_if


@fake_kernel("pair_loss")
def _pair_loss(a):
    n = a.embeddings.shape[0]
    m = n if a.ref_emb is None else a.ref_emb.shape[0]
    dtype, device = computed_dtype(a.embeddings.dtype), a.embeddings.device.type
    shape = n, m, a.ref_emb is None, a.both_directions
    kept = a.save_for_backward, a.cache_bytes
    size = _C.saved_bytes(device, *shape, dtype.itemsize, *kept, _device_params(a))
    lines = n + m if a.both_directions else n
    shape = (lines,) if a.reduction == "none" else (4,) if a.return_sums else ()
    return a.embeddings.new_empty(shape, dtype=dtype), a.embeddings.new_empty(size, dtype=torch.uint8)


def _device_params(a):
    """How many parameters are on the GPU of the points."""
    if a.dynamic_params is None or a.dynamic_params.device.type == "cpu":
        return 0
    return int(a.dynamic_params.shape[0]) - 1


def _grad_params(a):
    if not a.need_params:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    return torch.empty_like(a.dynamic_params)


@fake_kernel("pair_loss_backward")
def _pair_loss_backward(a):
    needs = (a.need_emb, a.embeddings), (a.need_ref, a.ref_emb)
    gradients = (gradient_if(needed, points, a.embeddings) for needed, points in needs)
    return *gradients, _grad_params(a)


@fake_kernel("count_pairs")
def _count_pairs(a):
    return a.labels.new_empty((2, a.embeddings.shape[0]))


@fake_kernel("pair_block_turn")
def _pair_block_turn(a):
    if a.state is not None:
        return torch.empty_like(a.state)
    shape = _C.ring_state_shape(a.pairs.device.type, a.pairs.shape[1])
    return a.pairs.new_empty(shape, dtype=torch.float64 if a.is_double else torch.float32)


@fake_kernel("pair_block")
def _pair_block(a):
    n, m, itemsize = a.embeddings.shape[0], a.ref_emb.shape[0], a.state.dtype.itemsize
    of_hardest, size = _C.ring_found_bytes(a.embeddings.device.type, n, m, itemsize)
    if a.stage == "hardest":
        size = of_hardest
    elif a.stage == "negatives" and a.found is not None and a.embeddings.device.type == "cuda":
        size += a.found.shape[0]
    return torch.empty_like(a.state), a.state.new_empty(size, dtype=torch.uint8)


@fake_kernel("pair_block_rows")
def _pair_block_rows(a):
    n = a.pairs.shape[1]
    shape = _C.ring_weights_shape(a.pairs.device.type, n)
    if params := _device_params(a):  # behind the weights: what they do to the rows' parts
        shape = [shape[0] + 2 * params * n]
    return a.state.new_empty(4, n), a.state.new_empty(shape)


@fake_kernel("pair_block_backward")
def _pair_block_backward(a):
    return (
        like_if(a.need_emb, a.embeddings, a.weights),
        like_if(a.need_ref, a.ref_emb, a.weights),
        _grad_params(a),
    )
