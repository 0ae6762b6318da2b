"""Sub-center ArcFace loss."""

import math

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs import autocast as _autocast
from .._inputs.checks import check_count, check_number
from .._ops.centers import row_losses, unit_and_inverse
from ._classifier import ClassifierOptions, RowHead
from ._formula import softplus
from ._pair import option
from .margin_softmax import ArcFace, turned_by

_BLOCK = 1 << 22  # numbers of rows' own centres in memory at once


def nearest(cosines: Tensor, per_class: int) -> Tensor:
    """``[N, C]`` of rows to classes, from the cosines ``[N, C K]`` of rows and centres."""
    return cosines.unflatten(1, (cosines.shape[1] // per_class, per_class)).max(2)[0]


class SubCenterArcFaceLoss(RowHead):
    r"""ArcFace loss with several sub-centres a class, of which the nearest counts.

    .. math:: \cos \theta_{ic} = \max_k x_i \cdot w_{ck}

    of unit rows and sub-centres; the loss is that of :class:`ArcFaceLoss`. Noisy and unusual samples of a
    class gather around sub-centres that are not its dominant one: :meth:`get_outliers` lists them. Deng et
    al., *Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces*, ECCV 2020. Classes
    are processed in blocks, which backward recomputes, so memory is bounded.

    Args:
        num_classes, embedding_size: C and D.
        margin: on the angle, in degrees from 0 to 180; or a tensor ``[C]``, as for :class:`ArcFaceLoss`. The
            attribute is in degrees too, whereas pytorch-metric-learning's is in radians.
        scale: above 0.
        sub_centers: K.
        options: as for :class:`NormalizedSoftmaxLoss`.

    Attributes:
        W: ``[D, C K]`` parameter, the K sub-centres of a class in adjacent columns, initialised from a
            standard normal distribution.

    Rows with a negative label are ignored, as in :class:`NormalizedSoftmaxLoss`.

    >>> head = SubCenterArcFaceLoss(num_classes=100, embedding_size=128)
    >>> loss = head(embeddings, labels)
    >>> outliers, dominant_centers = head.get_outliers(embeddings, labels)
    """

    formula = ArcFace
    weight = "W"
    W: nn.Parameter
    margin: float = option()
    scale: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, options, margin=margin, scale=scale)
        check_count("sub_centers", sub_centers)
        self.sub_centers = int(sub_centers)
        self.add_weight()

    def num_columns(self) -> int:
        return self.num_classes * self.sub_centers

    def row_losses(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        embeddings, centers = self.promoted(embeddings)
        with _autocast.off(embeddings.device):
            # The kernels have one margin for all classes.
            if self.backend == "reference" or self.call.formula is not ArcFace:
                dtype = _autocast.computed_dtype(embeddings.dtype)
                x, w = (unit_and_inverse(points.to(dtype))[0] for points in (embeddings, centers))
                return self.cosine_losses(x @ w.T, embeddings, labels.long()), 0.0
            scale, _, *angle = self.call.params
            options = self.sub_centers, "sub_centers", (scale, *angle)
            return row_losses(embeddings, centers, labels.long(), *options), 0.0

    def cosine_losses(self, cosines: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        call = self.call
        s = nearest(cosines, self.sub_centers)
        own = labels[:, None] == self.classes()
        s_own = torch.where(own, s, 0.0).sum(1)
        if call.formula is ArcFace:
            scale, _, cosine, sine = call.params
            turned = turned_by(s_own, cosine, sine)
        else:
            scale, margins = call.params
            turned = call.formula.turned(s_own, margins.to(s)[labels.clamp(0, s.shape[1] - 1)])
        others = torch.where(own, -torch.inf, scale * s)
        pull = scale * turned
        has_others = own.any(1) & (s.shape[1] > 1)
        push = torch.logsumexp(torch.where(has_others[:, None], others, 0.0), 1)
        return softplus(push - pull, where=has_others)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` scaled cosines with the nearest sub-centre of each class, without margin."""
        return self.call.params[0] * nearest(self.cosines(embeddings), self.sub_centers)

    @torch.no_grad()
    def get_outliers(
        self,
        embeddings: Tensor,
        labels: Tensor,
        threshold: float = 75,
        return_dominant_centers: bool = True,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """The rows far from the dominant sub-centre of their class: the one that most rows of the class are
        nearest to.

        Args:
            embeddings: ``[N, D]``, of the whole dataset, or at least of whole classes.
            labels: ``[N]``; rows with a negative label are left out.
            threshold: the angle beyond which a row is an outlier, in degrees.
            return_dominant_centers: whether to return them too.

        Returns:
            ``[O]`` int64, the rows of the outliers by class, then by place; and ``[D, C]`` the dominant
            sub-centres, 0 for classes without rows. pytorch-metric-learning returns both whatever the last
            argument says, and leaves the columns of classes without rows as memory happens to be.
        """
        labels = self.check(embeddings, labels).long()
        check_number("threshold", threshold)
        k, classes = self.sub_centers, self.num_classes
        dtype = _autocast.computed_dtype(self.wide_dtype(embeddings))
        rows, centers = (points.to(dtype) for points in self.promoted(embeddings))
        (x, _), (w, _) = unit_and_inverse(rows), unit_and_inverse(centers)
        known = self.known(labels)
        own = torch.where(known, labels, 0)
        step = max(1, _BLOCK // (k * x.shape[1]))
        blocks = zip(x.split(step), own.split(step), strict=True)
        of_class = w.view(classes, k, -1)
        cosines = torch.cat([(of_class[label] @ row[:, :, None])[:, :, 0] for row, label in blocks])
        nearest = (own * k + cosines.argmax(1))[known]
        counts = torch.bincount(nearest, minlength=classes * k).view(classes, k)
        dominant = counts.argmax(1)
        far = cosines.gather(1, dominant[own][:, None])[:, 0] < math.cos(math.radians(threshold))
        order = labels.sort(stable=True)[1]
        outliers = order[(far & known)[order]]
        if not return_dominant_centers:
            return outliers
        columns = self.rows()[torch.arange(classes, device=dominant.device) * k + dominant]
        some = counts.sum(1) > 0
        return outliers, torch.where(some[:, None], columns, 0.0).T.to(embeddings.dtype)
