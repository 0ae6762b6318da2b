"""What PyTorch must know of the compiled ops beyond their kernels: shapes and derivatives."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C  # loading it registers torch.ops.dml_cuda


def stages(formula: str, mining: bool, device: str) -> list[str]:
    """The stages in which a formula's rows meet blocks of columns, by name, on a kind of device."""
    if device == "cpu":
        return _C.stages(formula, mining)
    # csrc/cuda/blocks.h: one pass finds the hardest pairs of both kinds.
    of_formula = ["negatives", "positives"] if _C.formula_facts(formula)[1]["context"] else ["both"]
    return ["hardest", *of_formula] if mining else of_formula


# ---- the bytes that forward leaves for backward, as the engines lay them out; sizes may be symbolic --------

# csrc/cpu: the sides of small and large tiles, up to how many points there are small ones, and the memory
# that may keep tiles for backward.
_CPU_SIDES = 64, 128
_CPU_SMALL = 1024
_CPU_CACHE_BYTES = 32 << 20
_CPU_SQUARE_CACHE_BYTES = 64 << 20


def _after(at, size):
    """The next multiple of 64 bytes."""
    return (at + size + 63) // 64 * 64


def _tile_count(n, m, square: bool, side):
    rows, cols = (n + side - 1) // side, (m + side - 1) // side
    return rows * (rows + 1) // 2 if square else rows * cols


def _cpu_side(n, m):
    small, large = _CPU_SIDES
    # Without a branch, which a symbolic size could not take.
    is_large = torch.sym_min(1, torch.sym_max(torch.sym_max(n, m) - _CPU_SMALL, 0))
    return small + (large - small) * is_large


def _cpu_saved_bytes(n, m, square: bool, itemsize: int, save: bool):
    side = _cpu_side(n, m)
    tiles, tile_bytes = _tile_count(n, m, square, side), side * side * itemsize
    most = _CPU_SQUARE_CACHE_BYTES if square else _CPU_CACHE_BYTES
    cached = torch.sym_min(tiles, most // tile_bytes) if save else 0
    plan = _after(0, (6 * n + 3) * itemsize)
    kept = _after(plan, 4 * (3 * n + (0 if square else m)))
    return _after(kept, tiles) + cached * tile_bytes


# csrc/cuda/engine.cuh: likewise; batches up to so many rows, and so much work, are done in strips without
# tiles, and up to so many tiles it is known which hold a gradient.
_CUDA_CACHE_BYTES = 34 << 20
_CUDA_STRIP_ROWS = 512
_CUDA_STRIP_WORK = 512 * (128 + 256)
_CUDA_KEPT_TILES = 16 << 20


def _positive(x):
    """1 where x > 0, else 0; without a branch."""
    return torch.sym_min(1, torch.sym_max(x, 0))


def _cuda_saved_bytes(n, m, d, square: bool, itemsize: int, save: bool):
    rows, columns = torch.sym_max(n, m), torch.sym_min(n, m)
    beyond = torch.sym_max(rows - _CUDA_STRIP_ROWS, rows * (d + 256) - _CUDA_STRIP_WORK)
    in_tiles = _positive(beyond) * _positive(columns)
    side = 64 if itemsize == 8 else 128
    tiles = _tile_count(n, m, square, side) * in_tiles
    cache = tiles * side * side * itemsize
    cached = cache * _positive(_CUDA_CACHE_BYTES + 1 - cache) if save else 0
    numbers = (4 + 7 * n + (0 if square else m)) * itemsize
    flags = n + tiles * _positive(_CUDA_KEPT_TILES + 1 - tiles)
    return ((numbers + 15) // 16 * 16 + cached + flags + 15) // 16 * 16


def _cuda_precision() -> int:
    """How float32 is multiplied: in full (0) or as tf32 (1). As csrc/cuda_ops.cpp finds it out, which makes
    what is saved so many bytes longer."""
    known = getattr(torch._C, "_get_fp32_precision_getter", None)
    if known is not None:
        return int(known("cuda", "matmul") == "tf32")
    try:
        return int(torch.get_float32_matmul_precision() != "highest")
    except RuntimeError:
        return 0


def saved_bytes(device: str, n, m, d, square: bool, itemsize: int, save: bool):
    """Size of `saved` as the kernels of a device make it; ``itemsize`` is that of the type computed in."""
    if device == "cuda":
        return _cuda_saved_bytes(n, m, d, square, itemsize, save)
    return _cpu_saved_bytes(n, m, square, itemsize, save)


@torch.library.register_fake("dml_cuda::pair_loss")
def _pair_loss_fake(
    embeddings,
    labels,
    ref_emb,
    ref_labels,
    self_index,
    num_valid_refs,
    formula,
    params,
    epsilon,
    similarity,
    reduction,
    mine_self_pair,
    divide,
    save_for_backward,
):
    n = embeddings.shape[0]
    m = n if ref_emb is None else ref_emb.shape[0]
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    device = embeddings.device.type
    size = saved_bytes(device, n, m, embeddings.shape[1], ref_emb is None, dtype.itemsize, save_for_backward)
    if device == "cuda" and embeddings.dtype == torch.float32:
        size += _cuda_precision()
    shape = (n,) if reduction == "none" else () if divide else (4,)
    return embeddings.new_empty(shape, dtype=dtype), embeddings.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("dml_cuda::pair_loss_backward")
def _pair_loss_backward_fake(
    grad_loss,
    embeddings,
    labels,
    ref_emb,
    ref_labels,
    self_index,
    num_valid_refs,
    saved,
    formula,
    params,
    similarity,
    reduction,
    divide,
    need_emb,
    need_ref,
):
    def gradient(of: Tensor | None, needed: bool) -> Tensor:
        return embeddings.new_empty(of.shape if needed and of is not None else (0,))

    return gradient(embeddings, need_emb), gradient(ref_emb, need_ref)


@torch.library.register_fake("dml_cuda::triplet_loss")
def _triplet_loss_fake(
    embeddings,
    labels,
    ref_emb,
    ref_labels,
    self_index,
    num_valid_refs,
    beta,
    seed,
    term,
    positives,
    negatives,
    params,
    similarity,
    save,
    save_ref=True,
):
    n = embeddings.shape[0]
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32

    def gradient(of: Tensor | None, needed: bool) -> Tensor:
        return embeddings.new_empty(of.shape if needed and of is not None else (0,), dtype=dtype)

    return (
        embeddings.new_empty(n, dtype=dtype),
        embeddings.new_empty((n, 2), dtype=torch.int64),
        gradient(embeddings, save),
        gradient(ref_emb, save and save_ref),
        gradient(beta, save),
    )


@torch.library.register_fake("dml_cuda::triplet_list_loss")
def _triplet_list_loss_fake(
    embeddings, ref_emb, anchors, positives, negatives, there, beta, term, margin, similarity, save,
    save_ref=True,
):  # fmt: skip
    return _triplet_loss_fake(
        embeddings, None, ref_emb, None, None, None, beta, None, term, "", "", [], similarity, save, save_ref
    )


@torch.library.register_fake("dml_cuda::select")
def _select_fake(
    embeddings,
    labels,
    ref_emb,
    ref_labels,
    self_index,
    num_valid_refs,
    seed,
    rule,
    params,
    anchors,
    positives,
    similarity,
):
    count = embeddings.shape[0] if anchors is None else anchors.shape[0]
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return embeddings.new_empty(count, dtype=torch.int64), embeddings.new_empty(count, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    batch, (formula, params, _, similarity, reduction, _, divide, _) = inputs[:6], inputs[6:]
    saved = output[1]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*batch, saved)
    ctx.arguments = (formula, params, similarity, reduction, divide)


def _backward(ctx, grad_loss, _):
    if grad_loss is None:
        return (None,) * 14
    need_emb, _, need_ref = ctx.needs_input_grad[:3]
    grad_emb, grad_ref = call(
        "pair_loss_backward", grad_loss, *ctx.saved_tensors, *ctx.arguments, need_emb, need_ref
    )
    return (grad_emb if need_emb else None, None, grad_ref if need_ref else None, *(None,) * 11)


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


# csrc/cpu/blocks.cpp: a row's numbers while blocks pass, and those of them that backward needs.
_STATE_NUMBERS, _STAT_NUMBERS = 14, 6
# csrc/cuda/blocks.h: both are of one length, which also tells how float32 is multiplied. The bytes of tiles'
# extremes, and so many tiles, up to which they are known.
_CUDA_STATE_NUMBERS = 4, 6
_CUDA_EXTREMES_BYTES = 16 << 20


def _cuda_block_bytes(n, m, itemsize: int):
    """Of a block, the bytes of its tiles' extremes and of their kept flags."""
    tiles = _tile_count(n, m, False, 64 if itemsize == 8 else 128)
    known = _positive(_CUDA_KEPT_TILES + 1 - tiles)
    extremes = 2 * tiles * itemsize
    return extremes * known * _positive(_CUDA_EXTREMES_BYTES + 1 - extremes), tiles * known


@torch.library.register_fake("dml_cuda::pair_block_turn")
def _pair_block_turn_fake(state, pairs, formula, params, epsilon, stage, wide):
    if state is not None:
        return torch.empty_like(state)
    dtype = torch.float64 if wide else torch.float32
    if pairs.device.type == "cpu":
        return pairs.new_empty((_STATE_NUMBERS, pairs.shape[1]), dtype=dtype)
    header, each = _CUDA_STATE_NUMBERS
    mark = 0 if wide else _cuda_precision()
    return pairs.new_empty(header + each * pairs.shape[1] + mark, dtype=dtype)


@torch.library.register_fake("dml_cuda::pair_block")
def _pair_block_fake(
    state, embeddings, labels, block, block_labels, self_index, formula, params, epsilon, similarity,
    reduction,
    stage, found=None,
):  # fmt: skip
    n, m = embeddings.shape[0], block.shape[0]
    if embeddings.device.type == "cpu":
        size = _tile_count(n, m, False, _cpu_side(n, m))
    else:
        extremes, size = _cuda_block_bytes(n, m, state.dtype.itemsize)
        if stage == "hardest":
            size = extremes
        elif stage == "negatives" and found is not None:
            size += found.shape[0]
    return torch.empty_like(state), state.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("dml_cuda::pair_block_rows")
def _pair_block_rows_fake(state, pairs, formula, params, mining, reduction):
    n = pairs.shape[1]
    if pairs.device.type == "cpu":
        return state.new_empty(4, n), state.new_empty(_STAT_NUMBERS, n)
    return state.new_empty(4, n), torch.empty_like(state)


@torch.library.register_fake("dml_cuda::pair_block_backward")
def _pair_block_backward_fake(
    grad_parts, weights, kept, embeddings, labels, block, block_labels, self_index, formula, params,
    similarity,
    need_emb, need_block,
):  # fmt: skip
    points = (embeddings, need_emb), (block, need_block)
    return tuple(weights.new_empty(of.shape if needed else (0,)) for of, needed in points)


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


class _FirstDerivative(torch.autograd.Function):
    """A gradient by some points, as it is; it cannot be differentiated by them again."""

    @staticmethod
    def forward(gradient, *points):
        return gradient.clone()

    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_double_backward)


def _triplet_derivative(points: tuple[int, int, int], count: int):
    """Backward and context of an op on triplets: where, among so many arguments, embeddings, ref_emb and beta
    are; the last two arguments tell what the forward pass saves."""

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
        gradients, given = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        for k, (place, gradient, dtype, saved) in enumerate(
            zip(points, gradients, ctx.dtypes, ctx.saved, strict=True)
        ):
            if not ctx.needs_input_grad[place]:
                continue
            if not saved:
                raise RuntimeError(
                    f"triplet_loss: the gradient of {('embeddings', 'ref_emb', 'beta')[k]} was not saved"
                )
            result[place] = (gradient * grad[:1].sum()).to(dtype)
            # Without a graph of the gradient there is no second derivative to be refused.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                result[place] = _FirstDerivative.apply(result[place], *given)
        return tuple(result)

    return backward, setup_context


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
    "triplet_loss": _triplet_derivative((0, 2, 6), 15),
    "triplet_list_loss": _triplet_derivative((0, 1, 6), 12),
    "segment_logsumexp": (_logsumexp_backward, _logsumexp_setup_context),
}
for _name, (_derivative, _context) in _DERIVATIVES.items():
    if _name.startswith("pair_loss"):
        continue  # registered in csrc/autograd.cpp, which costs a small batch less time
    torch.library.register_autograd(f"dml_cuda::{_name}", _derivative, setup_context=_context)
_FUNCTIONS = {name: _function(name, *derivative) for name, derivative in _DERIVATIVES.items()}
