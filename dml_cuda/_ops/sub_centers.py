"""The softmax over classes that are as near as the nearest of their sub-centres, with a margin on the angle
to the row's class: a block of classes at a time, recomputed in backward.

With x a unit row and w_ck the unit centres of class c, S_c = max_k x . w_ck. The loss is the cross entropy of
scale S, with scale cos(theta + angle) for the own class, as csrc/losses/margin_softmax.h has it.
"""

import math

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from .autograd import call, no_second_derivative, register_derivative
from .centers import CenterBlock, blocks, through_norm, unit_and_inverse
from .fake import fake_kernel
from .python_ops import python_op


def _turned(s: Tensor, cosine: float, sine: float) -> tuple[Tensor, Tensor]:
    """cos(theta + angle) of s = cos(theta), falling beyond pi - angle too; and its derivative by s, of which
    the infinite part at theta = 0 is taken as 0."""
    root = torch.relu((1 - s) * (1 + s)).sqrt()
    falls = s >= -cosine
    across = torch.where(root > 0, s / torch.where(root > 0, root, 1.0), 0.0)
    turned = torch.where(falls, cosine * s - sine * root, s - sine * math.atan2(sine, cosine))
    return turned, torch.where(falls, cosine + sine * across, 1.0)


class _Block(CenterBlock):
    """How near rows are to the classes of a block."""

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, classes]`` S, and which centre it is of."""
        s = (x @ self.flat.T).view(len(x), self.per_class, self.stop - self.start)
        return s.max(1)

    def logits(
        self, s: Tensor, labels: Tensor, scale: float, cosine: float, sine: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The logits ``[N, classes]``, in place; where the rows' own classes are, which are here, and the
        derivative ``[N, 1]`` of the turned cosine."""
        place, here = self.own(labels)
        own = s.gather(1, place)
        turned, derivative = _turned(own, cosine, sine)
        s.scatter_(1, place, torch.where(here, turned, own))
        return s.mul_(scale), place, here, derivative


_OPTIONS = "SymInt per_class, float scale, float cosine, float sine"


@python_op(f"sub_centers(Tensor embeddings, Tensor centers, Tensor labels, {_OPTIONS}) -> (Tensor, Tensor)")
def _op(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    per_class: int,
    scale: float,
    cosine: float,
    sine: float,
) -> tuple[Tensor, Tensor]:
    """Rows' losses ``[N]``, 0 where the label is no class, and what backward needs of them ``[N]``.

    embeddings ``[N, D]``, centers ``[C K, D]``, labels ``[N]`` int64.
    """
    dtype = _autocast.computed_dtype(embeddings.dtype)
    x, _ = unit_and_inverse(embeddings.to(dtype))
    n, classes = len(x), len(centers) // per_class
    most, sums, own = x.new_full((n,), -torch.inf), x.new_zeros(n), x.new_zeros(n)
    for start, stop in blocks(x, classes, per_class):
        block = _Block(centers, start, stop, per_class, dtype)
        logits, place, here, _ = block.logits(block.nearest(x)[0], labels, scale, cosine, sine)
        own += torch.where(here, logits.gather(1, place), 0.0).squeeze(1)
        before, most = most, torch.maximum(most, logits.amax(1))
        sums = sums.mul_((before - most).exp_()).add_(logits.sub_(most[:, None]).exp_().sum(1))
    total = most + sums.log()
    known = (labels >= 0) & (labels < classes)
    return torch.where(known, total - own, 0.0), total


@fake_kernel("sub_centers")
def _fake(a):
    rows = a.embeddings.new_empty(a.embeddings.shape[0], dtype=_autocast.computed_dtype(a.embeddings.dtype))
    return rows, torch.empty_like(rows)


@python_op(
    "sub_centers_backward(Tensor grad_losses, Tensor embeddings, Tensor centers, Tensor labels, "
    f"Tensor total, {_OPTIONS}) -> (Tensor, Tensor)"
)
def _op_backward(
    grad_losses: Tensor,
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    total: Tensor,
    per_class: int,
    scale: float,
    cosine: float,
    sine: float,
) -> tuple[Tensor, Tensor]:
    """The gradients by embeddings and centers."""
    dtype = total.dtype
    x, inverse = unit_and_inverse(embeddings.to(dtype))
    classes = len(centers) // per_class
    known = (labels >= 0) & (labels < classes)
    upstream = torch.where(known, grad_losses, 0.0)[:, None] * scale
    grad_x, grad_centers = torch.zeros_like(x), torch.empty_like(centers)
    for start, stop in blocks(x, classes, per_class):
        block = _Block(centers, start, stop, per_class, dtype)
        s, which = block.nearest(x)
        logits, place, here, derivative = block.logits(s, labels, scale, cosine, sine)
        by_class = logits.sub_(total[:, None]).exp_()  # the class's probability
        by_class.scatter_add_(1, place, -here.to(dtype))
        of_own = torch.where(here, derivative, 1.0)
        by_class.scatter_(1, place, by_class.gather(1, place) * of_own).mul_(upstream)
        by_center = x.new_zeros(len(x), per_class, stop - start)
        by_center = by_center.scatter_(1, which[:, None], by_class[:, None]).flatten(1)
        grad_x.addmm_(by_center, block.flat)
        gradient = (by_center.T @ x).view_as(block.unit)
        rows = through_norm(gradient, block.unit, block.inverse).transpose(0, 1)
        grad_centers[start * per_class : stop * per_class] = rows.flatten(0, 1)
    return through_norm(grad_x, x, inverse).to(embeddings.dtype), grad_centers


@fake_kernel("sub_centers_backward")
def _fake_backward(a):
    return torch.empty_like(a.embeddings), torch.empty_like(a.centers)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.arguments = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_losses, _):
    with _autocast.off(grad_losses.device):  # which would round the products
        grads = call("sub_centers_backward", grad_losses, *ctx.saved_tensors, *ctx.arguments)
    return *grads, *(None,) * 5


register_derivative("sub_centers", _backward, _setup_context)
register_derivative("sub_centers_backward", no_second_derivative)


def row_losses(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    per_class: int,
    scale: float,
    cosine: float,
    sine: float,
) -> Tensor:
    """``[N]`` by the op, under the transforms of torch.func too."""
    return call("sub_centers", embeddings, centers, labels, per_class, scale, cosine, sine)[0]


def similarities(cosines: Tensor, per_class: int) -> Tensor:
    """``[N, C]`` of rows to classes, from the cosines ``[N, C K]`` of rows and centres."""
    return cosines.unflatten(1, (cosines.shape[1] // per_class, per_class)).max(2)[0]
