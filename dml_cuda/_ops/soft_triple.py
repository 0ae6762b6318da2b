"""SoftTriple in plain PyTorch, on the matrix of all cosines. The kernels' is in csrc/core/centers.h."""

import torch
from torch import Tensor

from .._inputs.autocast import computed_dtype
from .center_spread import distances, scale
from .centers import unit_and_inverse


def dense(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    per_class: int,
    la: float | Tensor,
    gamma: float | Tensor,
    margin: float | Tensor,
) -> Tensor:
    """The rows' losses ``[N]``, 0 where the label is no class."""
    dtype = computed_dtype(embeddings.dtype)
    x, w = (unit_and_inverse(points.to(dtype))[0] for points in (embeddings, centers))
    return losses(x @ w.T, labels, per_class, la, gamma, margin)


def dense_spread(centers: Tensor, per_class: int) -> Tensor:
    """As :func:`dml_cuda._ops.center_spread.spread`."""
    w, _ = unit_and_inverse(centers.to(computed_dtype(centers.dtype)))
    w = w.view(len(w) // per_class, per_class, -1)
    return distances(w)[0].sum() * scale(len(w), per_class)


def losses(
    cosines: Tensor,
    labels: Tensor,
    per_class: int,
    la: float | Tensor,
    gamma: float | Tensor,
    margin: float | Tensor,
) -> Tensor:
    """``[N]`` from the cosines ``[N, C K]`` of rows and centres."""
    logits = la * similarities(cosines, per_class, gamma)
    own = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    logits = torch.where(own, logits - la * margin, logits)
    losses = torch.logsumexp(logits, 1) - torch.where(own, logits, 0.0).sum(1)
    return torch.where(own.any(1), losses, 0.0)


def similarities(cosines: Tensor, per_class: int, gamma: float | Tensor) -> Tensor:
    """``[N, C]`` of rows to classes, from the cosines ``[N, C K]`` of rows and centres."""
    s = cosines.unflatten(1, (cosines.shape[1] // per_class, per_class))
    return (torch.softmax(s / gamma, 2) * s).sum(2)
