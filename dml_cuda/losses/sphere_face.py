"""SphereFace loss."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs import autocast as _autocast
from .._inputs.batch import make_batch
from .._inputs.checks import check_above_zero, check_count
from .._ops.evaluate import Call, of_rows
from ..reference.pairs import TINY_NORM, unit_rows
from ._classifier import ClassifierOptions, RowHead
from ._formula import Formula, softplus
from ._negatives import NegativesLSE
from ._pair import option


class SphereFace(Formula):
    """Liu et al., CVPR 2017. Only the parameters: a row's logits depend on its norm too."""

    name = "sphere_face"
    parameters: ClassVar = {"margin": check_count, "scale": check_above_zero}
    similarity = "dot"
    log_one_plus = True


def multiplied_angle(s: Tensor, margin: int) -> Tensor:
    """psi(theta) = (-1)^k cos(margin theta) - 2 k of s = cos(theta), with theta from k pi / margin on."""
    before, now = torch.ones_like(s), s
    for _ in range(margin - 1):  # cos(n theta), Chebyshev's polynomials of s
        before, now = now, 2 * s * now - before
    with torch.no_grad():
        k = (s.clamp(-1, 1).acos() / (math.pi / margin)).floor()
    return torch.where(k % 2 == 0, now, -now) - 2 * k


def _losses(
    push: Tensor, pull: Tensor, norms: Tensor, where: Tensor, margin: int, scale: float | Tensor
) -> Tensor:
    """``[N]`` from the log-sum-exp of the other classes' logits and the row's product with its own class."""
    has_length = norms > TINY_NORM
    cosine = torch.where(has_length, pull / torch.where(has_length, norms, 1.0), 0.0)
    return softplus(push - scale * norms * multiplied_angle(cosine, margin), where=where)


def row_losses(
    call: Call, embeddings: Tensor, weights: Tensor, labels: Tensor, margin: int, scale: float | Tensor
) -> Tensor:
    """``[N]``, computed in float32 or float64: the log-sum-exp over the other classes by a kernel; then the
    own class.

    weights ``[C, D]`` in the dtype of the embeddings.
    """
    call = call._replace(op_options=call.op_options._replace(similarity="dot"))
    classes = torch.arange(weights.shape[0], device=weights.device)
    known = (labels >= 0) & (labels < len(classes))
    with _autocast.off(embeddings.device):
        wide = _autocast.computed_dtype(embeddings.dtype)
        rows, centers = embeddings.to(wide), unit_rows(weights.to(wide))
        norms = torch.linalg.vector_norm(rows, dim=1)
        rows = torch.where((norms > TINY_NORM)[:, None], rows, 0.0)  # a zero row has gradient 0
        # Before the kernel, whose gradient then comes first: that of the weights is laid out as it is.
        own = nn.functional.embedding(torch.where(known, labels.long(), 0), centers)
        rule = {"epsilon": None, "similarity": "dot", "check_pairs": False}
        batch = make_batch(rows, labels, None, centers, classes, **rule)
        push = of_rows(call, NegativesLSE, [1.0 / scale], batch)
        has_others = known if weights.shape[0] > 1 else torch.zeros_like(known)
        return _losses(push, (rows * own).sum(1), norms, has_others, margin, scale)


class SphereFaceLoss(RowHead):
    r"""Softmax over the classes with a margin that multiplies the angle to the row's class y.

    .. math::
        L_i = -\log \frac{e^{\sigma |x_i| \psi(\theta_y)}}
                         {e^{\sigma |x_i| \psi(\theta_y)} + \sum_{j \ne y} e^{\sigma |x_i| \cos \theta_j}},
        \qquad \psi(\theta) = (-1)^k \cos(m \theta) - 2 k, \quad \theta \in [k \pi / m, (k + 1) \pi / m]

    with :math:`\sigma` = ``scale`` and m = ``margin``. The weights of the classes count as unit vectors, the
    rows keep their length. Liu et al., *SphereFace: Deep Hypersphere Embedding for Face Recognition*, CVPR
    2017, without the annealing there. The N x C matrix of logits is not materialised.

    Args:
        margin: a whole number, 1 or more; it cannot learn.
        scale: above 0.
        num_classes, embedding_size, options: as for :class:`NormalizedSoftmaxLoss`, which has ``W`` too.
    """

    formula = SphereFace
    weight = "W"
    W: nn.Parameter
    margin: int = option()
    scale: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, options, margin=margin, scale=scale)
        self.add_weight()

    def row_losses(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        return row_losses(self.call, *self.promoted(embeddings), labels, **self.values), 0.0

    def cosine_losses(self, cosines: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        margin, scale = self.values.values()
        norms = torch.linalg.vector_norm(embeddings, dim=1)
        own = labels[:, None] == self.classes()
        others = torch.where(own, -torch.inf, scale * norms[:, None] * cosines)
        has_others = own.any(1) & (own.shape[1] > 1)
        push = torch.logsumexp(torch.where(has_others[:, None], others, 0.0), 1)
        pull = torch.where(own, cosines, 0.0).sum(1) * norms
        return _losses(push, pull, norms, has_others, margin, scale)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` scaled products of the rows with the unit weights of the classes, without margin."""
        x, weights = self.promoted(embeddings)
        return self.values["scale"] * (x @ nn.functional.normalize(weights, dim=1).T)
