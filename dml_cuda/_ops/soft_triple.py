"""SoftTriple's computation: a block of classes at a time, recomputed in backward.

With x a unit row, w_ck the unit centres of class c, t_ck = x . w_ck / gamma and p = softmax of t over k, the
similarity of the row to the class is S_c = gamma sum_k p_k t_k, and dS_c / dt_k = gamma p_k (1 + t_k - T_c)
with T_c = S_c / gamma. The loss is the cross entropy of la (S - margin of the own class).

Within a block the centres are ordered [K, classes], so that sums over k run over whole vectors.
"""

import torch
from torch import Tensor

from .._inputs import autocast as _autocast
from ..losses._formula import reduce
from ..reference.pairs import TINY_NORM
from .autograd import call, no_second_derivative, register_derivative
from .fake import computed_dtype, fake_kernel

# Logits of rows and centres that are there at once: so many as stay in a CPU's cache, and so many that a GPU
# is busy for longer than the host with launching them.
_BLOCK = 1 << 19
_GPU_BLOCK = 1 << 24
_LARGEST = 80.0  # exp of more overflows float32


def _blocks(x: Tensor, classes: int, per_class: int) -> list[tuple[int, int]]:
    most = _BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    step = max(1, min(classes, most // max(1, len(x) * per_class)))
    return [(start, min(start + step, classes)) for start in range(0, classes, step)]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows, and 1 / their length: 0, with a gradient of 0, for a row of zeros."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = length <= TINY_NORM
    inverse = torch.where(is_zero, 0.0, 1 / torch.where(is_zero, 1.0, length))
    return x * inverse, inverse


def _through_norm(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    along = (gradient * unit).sum(-1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1).mul_(inverse)


class _Block:
    """The centres of the classes from ``start`` to ``stop``, and how the rows see them."""

    def __init__(self, centers: Tensor, start: int, stop: int, per_class: int, dtype: torch.dtype) -> None:
        self.start, self.stop, self.per_class = start, stop, per_class
        # As rows: the centres may be the columns of a matrix.
        rows = centers[start * per_class : stop * per_class].to(dtype).contiguous()
        rows = rows.view(-1, per_class, centers.shape[1])
        unit, self.inverse = _unit(rows.transpose(0, 1))
        self.unit = unit.contiguous()  # [K, classes, D]
        self.flat = self.unit.flatten(0, 1)

    def exponentials(self, x: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t ``[N, K, classes]``, its exponentials up to a factor, their sums, and T ``[N, classes]``."""
        t = (x @ self.flat.T).mul_(1 / gamma).view(len(x), self.per_class, self.stop - self.start)
        e = t.exp() if 1 / gamma < _LARGEST else (t - t.amax(1, keepdim=True)).exp_()
        total = e.sum(1)
        return t, e, total, (e * t).sum(1).div_(total)

    def own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where in this block the rows' classes are ``[N, 1]``, and which are here at all."""
        place = (labels - self.start)[:, None]
        here = (place >= 0) & (place < self.stop - self.start)
        return torch.where(here, place, 0), here

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
torch.library.define(  # by its schema: to derive one from annotations takes long at import
    "dml_cuda::soft_triple",
    f"(Tensor embeddings, Tensor centers, Tensor labels, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "dml_cuda::soft_triple_backward",
    "(Tensor grad_losses, Tensor grad_apart, Tensor embeddings, Tensor centers, Tensor labels, Tensor total, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
)


@torch.library.impl("dml_cuda::soft_triple", "CompositeExplicitAutograd")
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
    dtype = computed_dtype(embeddings)
    x, _ = _unit(embeddings.to(dtype))
    n, classes = len(x), len(centers) // per_class
    most, sums, own = x.new_full((n,), -float("inf")), x.new_zeros(n), x.new_zeros(n)
    apart = x.new_zeros(())
    for start, stop in _blocks(x, classes, per_class):
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
    rows = a.embeddings.new_empty(a.embeddings.shape[0], dtype=computed_dtype(a.embeddings))
    return rows, torch.empty_like(rows), rows.new_empty(())


@torch.library.impl("dml_cuda::soft_triple_backward", "CompositeExplicitAutograd")
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
    x, inverse = _unit(embeddings.to(dtype))
    classes = len(centers) // per_class
    known = (labels >= 0) & (labels < classes)
    upstream = torch.where(known, grad_losses, 0.0)[:, None] * la
    grad_x, grad_centers = torch.zeros_like(x), torch.empty_like(centers)
    for start, stop in _blocks(x, classes, per_class):
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
        rows = _through_norm(gradient, block.unit, block.inverse).transpose(0, 1)
        grad_centers[start * per_class : stop * per_class] = rows.flatten(0, 1)
    return _through_norm(grad_x, x, inverse).to(embeddings.dtype), grad_centers


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
    dtype = computed_dtype(embeddings)
    x, w = (_unit(points.to(dtype))[0] for points in (embeddings, centers))
    losses = _losses(x @ w.T, labels, per_class, la, gamma, margin)
    apart = x.new_zeros(())
    if spread and per_class > 1:
        w = w.view(len(w) // per_class, per_class, -1)
        squares = (2 - 2 * (w @ w.mT)).triu(1)
        some = squares > 16 * torch.finfo(dtype).eps
        d = torch.where(some, torch.sqrt(torch.where(some, squares, 1.0)), 0.0)
        apart = d.sum() * _spread_scale(len(w), per_class)
    return losses, apart


def _losses(
    cosines: Tensor, labels: Tensor, per_class: int, la: float, gamma: float, margin: float
) -> Tensor:
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


def weights(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    per_class: int,
    la: float,
    gamma: float,
    margin: float,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Rows, centres, their cosine and the loss's derivative by it: first those of the row's own class, then
    the others."""
    dtype = computed_dtype(embeddings)
    x, w = (_unit(points.detach().to(dtype))[0] for points in (embeddings, centers))
    with torch.enable_grad():
        s = (x @ w.T).requires_grad_()
        losses = _losses(s, labels, per_class, la, gamma, margin)
        value = reduce(losses, torch.ones_like(losses, dtype=torch.bool), reduction).sum()
    (derivative,) = torch.autograd.grad(value, s)
    classes = torch.arange(len(w), device=labels.device) // per_class
    own, known = labels[:, None] == classes, (labels >= 0)[:, None]
    return tuple(
        column
        for kind in (own, ~own & known)
        for column in (*kind.nonzero().unbind(1), s.detach()[kind], derivative[kind])
    )
