"""The ops on pairs given as lists: fake kernels, derivatives, and sorting on devices without kernels."""

import torch
from torch import Tensor

from .autograd import call, no_second_derivative, register_derivative
from .fake import fake_kernel


@fake_kernel("pair_products")
def _pair_products(a):
    return a.x.new_empty(a.rows.shape[0])


@fake_kernel("pair_sums")
def _pair_sums(a):
    return a.points.new_empty(a.offsets.shape[0] - 1, a.points.shape[1])


@fake_kernel("segment_logsumexp")
def _segment_logsumexp(a):
    return a.logits.new_empty(a.offsets.shape[0] - 1)


@fake_kernel("segment_softmax")
def _segment_softmax(a):
    return torch.empty_like(a.logits)


@fake_kernel("pair_sort")
def _pair_sort_fake(a):
    offsets, fresh = a.rows.new_empty(a.n + 1), torch.empty_like(a.rows, dtype=torch.bool)
    return torch.empty_like(a.rows), torch.empty_like(a.cols), offsets, fresh


@fake_kernel("column_order")
def _column_order_fake(a):
    return torch.empty_like(a.cols), a.cols.new_empty(a.m + 1)


def _offsets(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count + 1, device=ascending.device))


@torch.library.impl("dml_cuda::pair_sort", "CompositeExplicitAutograd")  # the CPU has its own
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


register_derivative("pair_products", _products_backward, _products_setup_context)
register_derivative("pair_sums", no_second_derivative)
register_derivative("segment_logsumexp", _logsumexp_backward, _logsumexp_setup_context)
register_derivative("segment_softmax", no_second_derivative)
