"""The mean distance between the centres of a class, a block of classes at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._inputs.autocast import computed_dtype
from .._inputs.autocast import off as autocast_off
from .autograd import call, no_second_derivative, register_derivative
from .centers import block_size, through_norm, unit_and_inverse
from .fake import fake_kernel
from .python_ops import python_op


def spread(centers: Tensor, per_class: int) -> Tensor:
    """``sum_{s<t} |w_cs - w_ct| / (C K (K - 1))`` over all classes c, of unit centres ``[C K, D]``."""
    return call("center_spread", centers, per_class)


def distances(unit: Tensor) -> tuple[Tensor, Tensor]:
    """``[classes, K, K]``: |w_s - w_t| for s < t, else 0, and its inverse, 0 where it is 0. Centres that
    rounding alone tells apart count as one."""
    squares = (2 - 2 * (unit @ unit.mT)).triu(1)
    some = squares > 16 * torch.finfo(squares.dtype).eps
    d = torch.where(some, torch.sqrt(torch.where(some, squares, 1.0)), 0.0)
    return d, torch.where(some, 1 / d, 0.0)


def scale(classes: int, per_class: int) -> float:
    pairs = classes * per_class * (per_class - 1)
    return 1 / pairs if pairs else 0.0


def _blocks(centers: Tensor, per_class: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Unit centres ``[classes, K, D]``, 1 / their lengths, and which of the centres they are."""
    count, dim = centers.shape
    step = per_class * max(1, block_size(centers) // (per_class * max(per_class, dim)))
    for start in range(0, count, step):
        where = slice(start, min(start + step, count))
        rows = centers[where].to(computed_dtype(centers.dtype)).contiguous()  # they may be columns
        yield *unit_and_inverse(rows.view(-1, per_class, dim)), where


@python_op("center_spread(Tensor centers, SymInt per_class) -> Tensor")
def _center_spread(centers: Tensor, per_class: int) -> Tensor:
    total = centers.new_zeros((), dtype=computed_dtype(centers.dtype))
    for unit, _, _ in _blocks(centers, per_class):
        total += distances(unit)[0].sum()
    return total * scale(centers.shape[0] // per_class, per_class)


@fake_kernel("center_spread")
def _fake(a):
    return a.centers.new_empty((), dtype=computed_dtype(a.centers.dtype))


@python_op("center_spread_backward(Tensor grad, Tensor centers, SymInt per_class) -> Tensor")
def _center_spread_backward(grad: Tensor, centers: Tensor, per_class: int) -> Tensor:
    result = torch.empty_like(centers)
    factor = grad * scale(centers.shape[0] // per_class, per_class)
    for unit, inverse, where in _blocks(centers, per_class):
        by_distance = distances(unit)[1].mul_(factor)
        # d d_st / d w_s = -w_t / d_st, but for what is along w_s
        gradient = (by_distance + by_distance.mT) @ unit
        result[where] = through_norm(gradient, unit, -inverse).flatten(0, 1)
    return result


@fake_kernel("center_spread_backward")
def _fake_backward(a):
    return torch.empty_like(a.centers)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.per_class = inputs[1]


def _backward(ctx, grad):
    with autocast_off(grad.device):  # which would round the products
        return call("center_spread_backward", grad, *ctx.saved_tensors, ctx.per_class), None


register_derivative("center_spread", _backward, _setup_context)
register_derivative("center_spread_backward", no_second_derivative)
