"""Proxy anchor loss."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Unpack

from .._inputs import autocast as _autocast
from .._inputs.batch import make_batch
from .._inputs.checks import check_above_zero, check_number
from .._inputs.traced import is_traced
from .._ops.evaluate import Call, evaluate
from ..reference.pairs import MaskedPairs, unit_rows
from ._classifier import ClassifierLoss, ClassifierOptions
from ._formula import Formula, Pairs, Part, reduce, softplus
from ._pair import option

_BLOCK = 1 << 22  # cosines in memory at once when rows are weighted


class ProxyAnchor(Formula):
    """Kim et al., CVPR 2020, equation 4: the rows are the proxies."""

    name = "proxy_anchor"
    log_one_plus = True
    parameters: ClassVar = {"margin": check_number, "alpha": check_above_zero}

    @staticmethod
    def row(
        pos: Pairs, neg: Pairs, margin: float, alpha: float, bias: Tensor | float = 0.0
    ) -> tuple[Part, ...]:
        """``bias`` of the columns ``[N]`` is added to their logits."""
        pull = softplus(pos.lse(-alpha * (pos.s - margin) + bias), where=pos.count > 0)
        push = softplus(neg.lse(alpha * (neg.s + margin) + bias), where=neg.count > 0)
        with_positives = (pos.count > 0).long()
        return (
            Part(pull, with_positives, ProxyAnchor.is_nonzero(pull).long()),
            Part(push, torch.ones_like(with_positives), ProxyAnchor.is_nonzero(push).long()),
        )


def _biased_parts(
    proxies: Tensor, classes: Tensor, embeddings: Tensor, labels: Tensor, bias: Tensor, params: list[float]
) -> tuple[Part, ...]:
    """The parts of a block of proxies, with the bias of each row added to its logits."""
    s = unit_rows(proxies) @ unit_rows(embeddings).T
    positive = classes[:, None] == labels
    pos, neg = (MaskedPairs(s, mask) for mask in (positive, ~positive & (labels >= 0)))
    return ProxyAnchor.row(pos, neg, *params, bias=bias)


class ProxyAnchorLoss(ClassifierLoss):
    r"""The proxy p of each class attracts the rows of its class and repels the others.

    .. math::
        L = \frac{1}{|P^+|} \sum_{p \in P^+} \log\Big(1 + \sum_{x \in X_p} e^{-\alpha (s(x, p) - m)}\Big)
          + \frac{1}{C} \sum_p \log\Big(1 + \sum_{x \notin X_p} e^{\alpha (s(x, p) + m)}\Big)

    where s is the cosine, :math:`X_p` the rows of p's class, and :math:`P^+` the proxies with at least one.
    Kim et al., *Proxy Anchor Loss for Deep Metric Learning*, CVPR 2020. The C x N matrix is not materialised.

    Args:
        margin: m.
        alpha: the scale, above 0.
        num_classes, embedding_size: C and D.
        options: ``reduction="mean"`` is the equation above; ``"mean_nonzero"`` divides each sum by the
            number of proxies whose term is not 0, ``"sum"`` does not divide; ``"none"`` gives ``[C]``, the
            sum of each proxy's two terms. ``backend="auto"``.

    Attributes:
        proxies: ``[C, D]`` parameter, initialised by ``kaiming_normal_(mode="fan_out")``.

    Rows with a negative label are ignored: they are not negatives of any proxy either. With ``indices_tuple``
    the weight of a row (how often it is listed, relative to the most listed row) minus 1 is added to its
    logits, as in pytorch-metric-learning.
    """

    formula = ProxyAnchor
    weight = "proxies"
    by_columns = False
    proxies: nn.Parameter
    margin: float = option()
    alpha: float = option()

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32,
        **options: Unpack[ClassifierOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, options, margin=margin, alpha=alpha)
        self.add_weight()

    def reset_parameters(self) -> None:
        """Draws the proxies anew, as pytorch-metric-learning does."""
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def pairs(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if bool((labels < 0).any()):
            embeddings, labels = embeddings[labels >= 0], labels[labels >= 0]
        embeddings, proxies = self.promoted(embeddings)
        return proxies, self.classes(), embeddings, labels

    def losses(self, call: Call, embeddings: Tensor, labels: Tensor) -> Tensor:
        count = None
        labels = labels.long()
        can_read = labels.device.type == "cpu" and not is_traced(labels)  # without synchronising
        if not can_read or bool((labels < 0).any()):
            # Sorts ignored rows last and limits num_valid_refs, so that no shape depends on their number.
            ignored = labels < 0
            order = ignored.byte().argsort(stable=True)
            embeddings, labels, count = embeddings[order], labels[order], (~ignored).sum()
        embeddings, proxies = self.promoted(embeddings)
        points = proxies, self.classes(), None, embeddings, labels
        options = {"epsilon": None, "similarity": call.similarity, "check_pairs": False}
        return evaluate(call, make_batch(*points, **options)._replace(num_valid_refs=count))

    def factors(self, embeddings: Tensor, labels: Tensor, row_weights: Tensor | None) -> None:
        for name, value in (("row_weights", row_weights), ("class_weights", self.class_weights)):
            if value is not None:
                raise ValueError(f"{name}: expected None, as the losses are those of proxies, not of rows")

    def weighted(
        self, embeddings: Tensor, labels: Tensor, listing: Tensor | None, factors: Tensor | None
    ) -> Tensor:
        labels = labels.long()
        with _autocast.off(embeddings.device):
            embeddings, all_proxies = self.promoted(embeddings)
            wide = embeddings.dtype if embeddings.dtype == torch.float64 else torch.float32
            bias = listing.to(wide) - 1
            x, params = embeddings.to(wide), self.call.params
            # Blocks of proxies, recomputed in backward, so that the C x N matrix is not materialised.
            step = max(1, _BLOCK // max(1, len(labels)))
            blocks = zip(all_proxies.split(step), self.classes().split(step), strict=True)
            parts = [
                checkpoint(
                    _biased_parts, proxies.to(wide), classes, x, labels, bias, params, use_reentrant=False
                )
                for proxies, classes in blocks
            ]
            whole = tuple(
                Part(*(torch.cat(fields) for fields in zip(*blocks_of_part, strict=True)))
                for blocks_of_part in zip(*parts, strict=True)
            )
            value = reduce(whole, whole[0].counts > 0, self.reduction)
        return value.to(_autocast.result_dtype(embeddings))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` cosines with the proxies."""
        return self.cosines(embeddings)
