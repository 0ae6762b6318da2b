"""Proxy anchor loss."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Unpack

from .._inputs import autocast as _autocast
from .._inputs.batch import make_batch
from .._inputs.checks import check_above_zero, check_number
from .._ops.evaluate import Call, evaluate
from ..reference.pairs import MaskedPairs, is_traced, unit_rows
from ._classifier import ClassifierLoss, ClassifierOptions, row_weights
from ._formula import Formula, Pairs, Part, reduce, softplus
from ._pair import option

_BLOCK = 1 << 22  # cosines that are there at once where rows are weighted


class ProxyAnchor(Formula):
    """Kim et al., CVPR 2020, equation 4: the rows are the proxies."""

    name = "proxy_anchor"
    parameters: ClassVar = {"margin": check_number, "alpha": check_above_zero}

    @staticmethod
    def row(
        pos: Pairs, neg: Pairs, margin: float, alpha: float, bias: Tensor | float = 0.0
    ) -> tuple[Part, ...]:
        """``bias`` of the columns is added to their logits."""
        pull = softplus(pos.lse(-alpha * (pos.s - margin) + bias), where=pos.count > 0)
        push = softplus(neg.lse(alpha * (neg.s + margin) + bias), where=neg.count > 0)
        with_positives = (pos.count > 0).long()
        return (
            Part(pull, with_positives, (pull.detach() != 0).long()),
            Part(push, torch.ones_like(with_positives), (push.detach() != 0).long()),
        )


def _raised(
    proxies: Tensor, classes: Tensor, embeddings: Tensor, labels: Tensor, bias: Tensor, params: list[float]
) -> tuple[Part, ...]:
    """The parts of some proxies, the logits of each row raised by its bias."""
    s = unit_rows(proxies) @ unit_rows(embeddings).T
    positive = classes[:, None] == labels
    pos, neg = (MaskedPairs(s, mask) for mask in (positive, ~positive & (labels >= 0)))
    return ProxyAnchor.row(pos, neg, *params, bias=bias)


class ProxyAnchorLoss(ClassifierLoss):
    r"""Each class's proxy p pulls the rows of its class and pushes the others.

    .. math::
        L = \frac{1}{|P^+|} \sum_{p \in P^+} \log\Big(1 + \sum_{x \in X_p} e^{-\alpha (s(x, p) - m)}\Big)
          + \frac{1}{C} \sum_p \log\Big(1 + \sum_{x \notin X_p} e^{\alpha (s(x, p) + m)}\Big)

    where s is the cosine, :math:`X_p` are the rows of p's class, and :math:`P^+` the proxies that have any.
    Kim et al., *Proxy Anchor Loss for Deep Metric Learning*, CVPR 2020. The C x N matrix is never stored.

    Args:
        margin: m.
        alpha: the scale, above 0.
        num_classes, embedding_size: C and D.
        options: ``reduction="mean"`` is the equation above; ``"mean_nonzero"`` divides each sum by the
            proxies whose term is not 0, ``"sum"`` by nothing; ``"none"`` gives ``[C]``, each proxy's two
            terms together. ``backend="auto"``.

    Attributes:
        proxies: ``[C, D]`` parameter, drawn as by ``kaiming_normal_(mode="fan_out")`` at first.

    A row whose label is negative is left out: it is no negative of any proxy either. With ``indices_tuple`` a
    row's logits are raised by its weight (how often it is listed, over the most often) minus 1, as in
    pytorch-metric-learning.
    """

    formula = ProxyAnchor
    weight = "proxies"
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
        self.proxies = nn.Parameter(torch.empty(self.num_classes, self.embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def rows(self) -> Tensor:
        return self.proxies

    def pairs(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if bool((labels < 0).any()):
            embeddings, labels = embeddings[labels >= 0], labels[labels >= 0]
        return self.proxies, self.classes(), embeddings, labels

    def losses(self, call: Call, embeddings: Tensor, labels: Tensor) -> Tensor:
        count = None
        labels = labels.long()
        can_look = labels.device.type == "cpu" and not is_traced(labels)
        if not can_look or bool((labels < 0).any()):
            # Those to leave out come last, and only the others take part: no shape depends on their number.
            out = labels < 0
            order = out.byte().argsort(stable=True)
            embeddings, labels, count = embeddings[order], labels[order], (~out).sum()
        points = self.proxies, self.classes(), None, embeddings, labels
        how = {"epsilon": None, "similarity": call.similarity, "check_pairs": False}
        return evaluate(call, make_batch(*points, **how)._replace(num_valid_refs=count))

    def weighted(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any) -> Tensor:
        labels = labels.long()
        with _autocast.off(embeddings.device):
            wide = embeddings.dtype if embeddings.dtype == torch.float64 else torch.float32
            bias = row_weights(self.listed(indices_tuple), embeddings).to(wide) - 1
            x, params = embeddings.to(wide), self.call.params
            # Some proxies at a time, computed again in backward: the C x N matrix is never there.
            step = max(1, _BLOCK // max(1, len(labels)))
            blocks = zip(self.proxies.split(step), self.classes().split(step), strict=True)
            parts = [
                checkpoint(_raised, proxies.to(wide), classes, x, labels, bias, params, use_reentrant=False)
                for proxies, classes in blocks
            ]
            whole = tuple(
                Part(*(torch.cat(same) for same in zip(*of_blocks, strict=True)))
                for of_blocks in zip(*parts, strict=True)
            )
            value = reduce(whole, whole[0].counts > 0, self.reduction)
        return value if _autocast.is_on(embeddings.device) else value.to(embeddings.dtype)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """``[N, C]``: the cosine with each proxy."""
        return self.cosines(embeddings)
