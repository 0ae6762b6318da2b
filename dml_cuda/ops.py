"""What PyTorch must know of the compiled ops beyond their kernels: shapes and derivatives."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C  # noqa: F401  (loading it registers torch.ops.dml_cuda)

# As csrc/cpu/pair_loss.cpp has it: the side of a tile, and the memory that may keep tiles for backward.
_CPU_TILE = 128
_CPU_CACHE_BYTES = 64 << 20

# As csrc/cuda/engine.cuh has it: likewise, up to how many rows a batch is done in strips without tiles
# (bytes of one row of similarities), and up to how many tiles it is known which were kept.
_CUDA_CACHE_BYTES = 34 << 20
_CUDA_STRIP_BYTES = 4096
_CUDA_KEPT_TILES = 16 << 20


def _tile_count(n, m, square: bool, side: int):
    rows, cols = -(-n // side), -(-m // side)
    return rows * (rows + 1) // 2 if square else rows * cols


def _cpu_sizes(n, m, square: bool, itemsize: int, save: bool) -> tuple:
    tiles, area = _tile_count(n, m, square, _CPU_TILE), _CPU_TILE * _CPU_TILE
    cached = torch.sym_min(tiles, _CPU_CACHE_BYTES // (area * itemsize)) if save else 0
    return 4 * n + 2, 3 * n + (0 if square else m), cached * area, tiles + 2


def _cuda_sizes(n, m, square: bool, itemsize: int, save: bool) -> tuple:
    stats, plan = 4 + 7 * n + (0 if square else m), n
    fits_strip = n <= _CUDA_STRIP_BYTES // itemsize and m <= _CUDA_STRIP_BYTES // itemsize
    if fits_strip or n == 0 or m == 0:
        return stats, plan, 0, 0
    side = 64 if itemsize == 8 else 128
    tiles = _tile_count(n, m, square, side)
    area = tiles * side * side
    cached = area if save and area * itemsize <= _CUDA_CACHE_BYTES else 0
    return stats, plan, cached, tiles if tiles <= _CUDA_KEPT_TILES else 0


def saved_sizes(device: str, n, m, square: bool, itemsize: int, save: bool) -> tuple:
    """Elements of stats, plan, tiles and kept as the kernels of a device make them.

    ``itemsize`` is that of the type computed in. Sizes may be symbolic.
    """
    sizes = _cuda_sizes if device == "cuda" else _cpu_sizes
    return sizes(n, m, square, itemsize, save)


@torch.library.register_fake("dml_cuda::pair_loss")
def _pair_loss_fake(
    embeddings,
    labels,
    ref_emb,
    ref_labels,
    self_ref,
    ref_count,
    loss,
    params,
    epsilon,
    normalize,
    reduction,
    save_for_backward,
):
    n = embeddings.shape[0]
    m = n if ref_emb is None else ref_emb.shape[0]
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    sizes = saved_sizes(embeddings.device.type, n, m, ref_emb is None, dtype.itemsize, save_for_backward)
    stats, plan, tiles, kept = sizes
    return (
        embeddings.new_empty((n,) if reduction == "none" else (), dtype=dtype),
        embeddings.new_empty(stats, dtype=dtype),
        embeddings.new_empty(plan, dtype=torch.int32),
        embeddings.new_empty(tiles, dtype=dtype),
        embeddings.new_empty(kept, dtype=torch.uint8),
    )


@torch.library.register_fake("dml_cuda::pair_loss_backward")
def _pair_loss_backward_fake(
    grad_loss,
    embeddings,
    labels,
    ref_emb,
    ref_labels,
    self_ref,
    ref_count,
    stats,
    plan,
    tiles,
    kept,
    loss,
    params,
    normalize,
    reduction,
    need_emb,
    need_ref,
):
    def gradient(of: Tensor | None, needed: bool) -> Tensor:
        return embeddings.new_empty(of.shape if needed and of is not None else (0,))

    return gradient(embeddings, need_emb), gradient(ref_emb, need_ref)


def _setup_context(ctx, inputs, output) -> None:
    batch, (loss, params, _, normalize, reduction, _) = inputs[:6], inputs[6:]
    _, stats, plan, tiles, kept = output
    ctx.mark_non_differentiable(stats, plan, tiles, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*batch, stats, plan, tiles, kept)
    ctx.arguments = (loss, params, normalize, reduction)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 12
    need_emb, _, need_ref = ctx.needs_input_grad[:3]
    grad_emb, grad_ref = call(
        "pair_loss_backward", grad_loss, *ctx.saved_tensors, *ctx.arguments, need_emb, need_ref
    )
    return (grad_emb if need_emb else None, None, grad_ref if need_ref else None, *(None,) * 9)


def _double_backward(ctx, *_):
    raise RuntimeError(
        "the fused losses of dml_cuda have no second derivative: "
        'pass backend="reference" to differentiate their gradient'
    )


@torch.library.register_fake("dml_cuda::pair_products")
def _pair_products_fake(x, y, rows, cols, row_offsets):
    return x.new_empty(rows.shape[0])


@torch.library.register_fake("dml_cuda::pair_sums")
def _pair_sums_fake(weights, points, index, offsets):
    return points.new_empty(offsets.shape[0] - 1, points.shape[1])


@torch.library.register_fake("dml_cuda::segment_logsumexp")
def _segment_logsumexp_fake(logits, offsets, plus_one):
    return logits.new_empty(offsets.shape[0] - 1)


def call(name: str, *arguments):
    """An op of dml_cuda, as whatever is under way needs it.

    torch.func's transforms and forward-mode differentiation do not see the derivatives that an op is
    registered with; the autograd functions below give them the same, or a clear error.
    """
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return _FUNCTIONS[name].apply(*arguments)
    return getattr(torch.ops.dml_cuda, name).default(*arguments)


@torch.library.register_fake("dml_cuda::segment_softmax")
def _segment_softmax_fake(grad, logits, value, offsets):
    return torch.empty_like(logits)


@torch.library.register_fake("dml_cuda::pair_sort")
def _pair_sort_fake(rows, cols, n, m):
    offsets, fresh = rows.new_empty(n + 1), torch.empty_like(rows, dtype=torch.bool)
    return torch.empty_like(rows), torch.empty_like(cols), offsets, fresh


@torch.library.register_fake("dml_cuda::column_order")
def _column_order_fake(cols, m):
    return torch.empty_like(cols), cols.new_empty(m + 1)


def _offsets(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count + 1, device=ascending.device))


# The two orders for devices other than the CPU, which has kernels of its own.


@torch.library.impl("dml_cuda::pair_sort", "CompositeExplicitAutograd")
def _pair_sort(rows, cols, n, m):
    outside = (rows < 0) | (rows >= n) | (cols < 0) | (cols >= m)
    key = torch.where(outside, rows.clamp(0, max(n - 1, 0)) * (m + 1) + m, rows * (m + 1) + cols)
    key = torch.sort(key).values
    fresh = torch.ones_like(key, dtype=torch.bool)
    fresh[1:] = key[1:] != key[:-1]
    rows = key // (m + 1)
    return rows, key - rows * (m + 1), _offsets(rows, n), fresh


@torch.library.impl("dml_cuda::column_order", "CompositeExplicitAutograd")
def _column_order(cols, m):
    cols, order = torch.sort(cols, stable=True)
    return order, _offsets(cols, m)


def _products_setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _products_backward(ctx, grad):
    x, y, rows, cols, offsets = ctx.saved_tensors
    grad_x = grad_y = None
    grad = grad.contiguous()
    if ctx.needs_input_grad[0]:
        grad_x = call("pair_sums", grad, y, cols, offsets)
    if ctx.needs_input_grad[1]:
        order, col_offsets = torch.ops.dml_cuda.column_order.default(cols, y.shape[0])
        grad_y = call("pair_sums", grad[order], x, rows[order], col_offsets)
    return grad_x, grad_y, None, None, None


def _logsumexp_setup_context(ctx, inputs, output) -> None:
    logits, offsets, _ = inputs
    ctx.save_for_backward(logits, offsets, output)


def _logsumexp_backward(ctx, grad):
    logits, offsets, value = ctx.saved_tensors
    return call("segment_softmax", grad.contiguous(), logits, value, offsets), None, None


def _no_context(ctx, inputs, output) -> None:
    pass


def _no_vmap(info, in_dims, *arguments):
    raise NotImplementedError(
        "the fused losses of dml_cuda take one batch at a time, not torch.vmap: call them in a loop, or pass "
        'backend="reference"'
    )


def _no_jvp(ctx, *tangents):
    raise NotImplementedError(
        "the fused losses of dml_cuda have no forward-mode derivative: differentiate in reverse, or pass "
        'backend="reference"'
    )


def _function(name: str, backward, setup_context) -> type[torch.autograd.Function]:
    op = getattr(torch.ops.dml_cuda, name).default
    members = {
        "forward": lambda *arguments: op(*arguments),
        "setup_context": setup_context,
        "backward": backward,
        "vmap": _no_vmap,
        "jvp": _no_jvp,
    }
    return type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})


_DERIVATIVES = {
    "pair_loss": (_backward, _setup_context),
    "pair_loss_backward": (_double_backward, _no_context),
    "pair_products": (_products_backward, _products_setup_context),
    "pair_sums": (_double_backward, _no_context),
    "segment_softmax": (_double_backward, _no_context),
    "segment_logsumexp": (_logsumexp_backward, _logsumexp_setup_context),
}
for _name, (_derivative, _context) in _DERIVATIVES.items():
    if _name.startswith("pair_loss"):
        continue  # registered in csrc/autograd.cpp, which costs a small batch less time
    torch.library.register_autograd(f"dml_cuda::{_name}", _derivative, setup_context=_context)
_FUNCTIONS = {name: _function(name, *derivative) for name, derivative in _DERIVATIVES.items()}
