"""SoftTriple's computation: a block of classes at a time, recomputed in backward.

With x a unit row, w_ck the unit centres of class c, t_ck = x . w_ck / gamma and p = softmax of t over k, the
similarity of the row to the class is S_c = gamma sum_k p_k t_k, and dS_c / dt_k = gamma p_k (1 + t_k - T_c)
with T_c = S_c / gamma. The loss is the cross entropy of la (S - margin of the own class).
"""

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from .autograd import call, no_second_derivative, register_derivative
from .centers import CenterBlock, blocks, through_norm, unit_and_inverse
from .fake import fake_kernel
from .python_ops import python_op

_LARGEST = 80.0  # exp of more overflows float32


class _Block(CenterBlock):
    """The similarities of rows to the classes of a block, and the distances of their centres."""

    def exponentials(self, x: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t ``[N, K, classes]``, its exponentials up to a factor, their sums, and T ``[N, classes]``."""
        t = (x @ self.flat.T).mul_(1 / gamma).view(len(x), self.per_class, self.stop - self.start)
        e = t.exp() if 1 / gamma < _LARGEST else (t - t.amax(1, keepdim=True)).exp_()
        total = e.sum(1)
        return t, e, total, (e * t).sum(1).div_(total)

    def logits(self, t_of_class: Tensor, labels: Tensor, la: float, gamma: float, margin: float) -> Tensor:
        """``[N, classes]`` la (S - margin of the own class), in place."""
        logits = t_of_class.mul_(la * gamma)
        place, here = self.own(labels)
        return logits.scatter_add_(1, place, here.to(logits.dtype) * (-la * margin))

    def distances(self) -> tuple[Tensor, Tensor]:
        """``[classes, K, K]``: |w_s - w_t| for s < t, else 0, and its inverse, 0 where it is 0. Those no
        further apart than rounding count as one centre."""
        centres = self.unit.transpose(0, 1)
        squares = (2 - 2 * (centres @ centres.mT)).triu_(1)
        some = squares > 16 * torch.finfo(squares.dtype).eps
        d = torch.where(some, squares, 0.0).sqrt_()
        return d, torch.where(some, 1 / d, 0.0)


def _spread_scale(classes: int, per_class: int) -> float:
    pairs = classes * per_class * (per_class - 1)
    return 1 / pairs if pairs else 0.0


_OPTIONS = "SymInt per_class, float la, float gamma, float margin, bool spread"


@python_op(
    f"soft_triple(Tensor embeddings, Tensor centers, Tensor labels, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
def soft_triple(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    per_class: int,
    la: float,
    gamma: float,
    margin: float,
    spread: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows' losses ``[N]``, 0 where the label is no class; what backward needs of them ``[N]``; and, where
    ``spread``, the mean distance of the centres of a class, halved (``sum_{s<t} d_st / (C K (K-1))``).

    embeddings ``[N, D]``, centers ``[C K, D]``, labels ``[N]`` int64.
    """
    dtype = _autocast.computed_dtype(embeddings.dtype)
    x, _ = unit_and_inverse(embeddings.to(dtype))
    n, classes = len(x), len(centers) // per_class
    most, sums, own = x.new_full((n,), -float("inf")), x.new_zeros(n), x.new_zeros(n)
    apart = x.new_zeros(())
    for start, stop in blocks(x, classes, per_class):
        block = _Block(centers, start, stop, per_class, dtype)
        *_, of_class = block.exponentials(x, gamma)
        logits = block.logits(of_class, labels, la, gamma, margin)
        place, here = block.own(labels)
        own += torch.where(here, logits.gather(1, place), 0.0).squeeze(1)
        # A sum and not its logarithm, which would be rounded at its own size in every block.
        before, most = most, torch.maximum(most, logits.amax(1))
        sums = sums.mul_((before - most).exp_()).add_(logits.sub_(most[:, None]).exp_().sum(1))
        if spread:
            apart += block.distances()[0].sum()
    total = most + sums.log()
    known = (labels >= 0) & (labels < classes)
    return torch.where(known, total - own, 0.0), total, apart * _spread_scale(classes, per_class)


@fake_kernel("soft_triple")
def _soft_triple(a):
    rows = a.embeddings.new_empty(a.embeddings.shape[0], dtype=_autocast.computed_dtype(a.embeddings.dtype))
    return rows, torch.empty_like(rows), rows.new_empty(())


@python_op(
    "soft_triple_backward(Tensor grad_losses, Tensor grad_apart, Tensor embeddings, Tensor centers, "
    f"Tensor labels, Tensor total, {_OPTIONS}) -> (Tensor, Tensor)"
)
def soft_triple_backward(
    grad_losses: Tensor,
    grad_apart: Tensor,
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    total: Tensor,
    per_class: int,
    la: float,
    gamma: float,
    margin: float,
    spread: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients by embeddings and centers."""
    dtype = total.dtype
    x, inverse = unit_and_inverse(embeddings.to(dtype))
    classes = len(centers) // per_class
    known = (labels >= 0) & (labels < classes)
    upstream = torch.where(known, grad_losses, 0.0)[:, None] * la
    grad_x, grad_centers = torch.zeros_like(x), torch.empty_like(centers)
    for start, stop in blocks(x, classes, per_class):
        block = _Block(centers, start, stop, per_class, dtype)
        t, e, sums, of_class = block.exponentials(x, gamma)
        beside = 1 - of_class
        logits = block.logits(of_class, labels, la, gamma, margin)
        by_class = logits.sub_(total[:, None]).exp_()  # the class's probability
        place, here = block.own(labels)
        by_class.scatter_add_(1, place, -here.to(dtype)).mul_(upstream)
        # By the cosines, which are gamma t.
        by_center = t.add_(beside[:, None]).mul_(e).mul_(by_class.div_(sums)[:, None]).flatten(1)
        grad_x.addmm_(by_center, block.flat)
        gradient = (by_center.T @ x).view_as(block.unit)
        if spread:
            by_distance = block.distances()[1].mul_(grad_apart * _spread_scale(classes, per_class))
            both = by_distance + by_distance.mT  # d d_st / d w_s = -w_t / d_st, but for what is along w_s
            gradient -= (both @ block.unit.transpose(0, 1)).transpose(0, 1)
        rows = through_norm(gradient, block.unit, block.inverse).transpose(0, 1)
        grad_centers[start * per_class : stop * per_class] = rows.flatten(0, 1)
    return through_norm(grad_x, x, inverse).to(embeddings.dtype), grad_centers


@fake_kernel("soft_triple_backward")
def _soft_triple_backward(a):
    return torch.empty_like(a.embeddings), torch.empty_like(a.centers)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.arguments = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_losses, _, grad_apart):
    with _autocast.off(grad_losses.device):  # which would round the products
        grads = call("soft_triple_backward", grad_losses, grad_apart, *ctx.saved_tensors, *ctx.arguments)
    return *grads, *(None,) * 6


register_derivative("soft_triple", _backward, _setup_context)
register_derivative("soft_triple_backward", no_second_derivative)


def row_losses(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The op, under the transforms of torch.func too."""
    return call("soft_triple", *arguments)


def dense(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    per_class: int,
    la: float,
    gamma: float,
    margin: float,
    spread: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and spread as :func:`soft_triple` has them, in plain PyTorch on the whole matrix."""
    dtype = _autocast.computed_dtype(embeddings.dtype)
    x, w = (unit_and_inverse(points.to(dtype))[0] for points in (embeddings, centers))
    found = losses(x @ w.T, labels, per_class, la, gamma, margin)
    apart = x.new_zeros(())
    if spread and per_class > 1:
        w = w.view(len(w) // per_class, per_class, -1)
        squares = (2 - 2 * (w @ w.mT)).triu(1)
        some = squares > 16 * torch.finfo(dtype).eps
        d = torch.where(some, torch.sqrt(torch.where(some, squares, 1.0)), 0.0)
        apart = d.sum() * _spread_scale(len(w), per_class)
    return found, apart


def losses(cosines: Tensor, labels: Tensor, per_class: int, la: float, gamma: float, margin: float) -> Tensor:
    """``[N]`` from the cosines ``[N, C K]`` of rows and centres."""
    logits = la * similarities(cosines, per_class, gamma)
    own = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    logits = torch.where(own, logits - la * margin, logits)
    losses = torch.logsumexp(logits, 1) - torch.where(own, logits, 0.0).sum(1)
    return torch.where(own.any(1), losses, 0.0)


def similarities(cosines: Tensor, per_class: int, gamma: float) -> Tensor:
    """``[N, C]`` of rows to classes, from the cosines ``[N, C K]`` of rows and centres."""
    s = cosines.unflatten(1, (cosines.shape[1] // per_class, per_class))
    return (torch.softmax(s / gamma, 2) * s).sum(2)
