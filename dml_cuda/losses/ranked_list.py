"""Ranked list loss."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_number, check_parameter
from .._inputs.options import PairOptions
from .._ops.evaluate import of_rows
from .._ops.positive_rows import positive_rows, register
from ._described import described_by
from ._formula import Formula, Pairs, Part
from ._pair import PairLoss, option, pair_loss

_PER_COLUMN = 1e-5  # what each column adds to the sum of a row's weights, as in pytorch-metric-learning


def _weights(excess: Tensor, temperature: float | Tensor) -> Tensor:
    """exp(temperature excess) of pairs beyond their boundary, 0 of others."""
    beyond = excess > 0
    return torch.where(beyond, torch.exp(temperature * torch.where(beyond, excess, 0.0)), 0.0)


def _mean_excess(pairs: Pairs, excess: Tensor, temperature: float | Tensor, floor: float) -> Tensor:
    """``[N]`` the weighted mean of a row's pairs beyond their boundary."""
    weights = _weights(excess, temperature)
    return pairs.sum(weights * torch.relu(excess)) / (pairs.sum(weights) + floor)


def _floor(columns: int) -> float:
    return _PER_COLUMN * columns


def _of_positives(pos: Pairs, here: Tensor, there: Tensor | None, params: Tensor) -> Part:
    level, temperature = params
    losses = _mean_excess(pos, -(pos.s - level), temperature, _floor(pos.columns))
    return Part(losses, pos.count, (losses != 0).long())


register("ranked_list_loss", _of_positives)


class RankedListNegatives(Formula):
    """The share of a row's negatives; csrc/losses/ranked_list.h."""

    name = "ranked_list"

    @staticmethod
    def row(
        pos: Pairs, neg: Pairs, level: float | Tensor, temperature: float | Tensor, floor: float
    ) -> Tensor:
        return _mean_excess(neg, neg.s - level, temperature, floor)


def _check_share(name: str, value: object) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")


class RankedList(Formula):
    """Wang et al., CVPR 2019."""

    name = "ranked_list_loss"
    parameters: ClassVar = {
        "margin": check_number,
        "Tn": check_number,
        "imbalance": _check_share,
        "alpha": check_number,
        "Tp": check_number,
    }
    levels = ("alpha",)
    similarity = "euclidean"
    composed = True

    @staticmethod
    def row(
        pos: Pairs, neg: Pairs, margin: float, Tn: float, imbalance: float, level: float, Tp: float
    ) -> tuple[Part, ...]:
        floor = _floor(pos.columns)
        pull = _mean_excess(pos, -(pos.s - (level + margin)), Tp, floor)
        push = _mean_excess(neg, neg.s - level, Tn, floor)
        return RankedList._joined(pull, push, imbalance)

    @staticmethod
    def compose(call: Any, batch: Any) -> tuple[Part, ...]:
        """The share of negatives by a kernel, that of positives apart."""
        margin, Tn, imbalance, level, Tp = call.params
        columns = batch.embeddings if batch.ref_emb is None else batch.ref_emb
        push = of_rows(call, RankedListNegatives, [level, Tn, _floor(columns.shape[0])], batch)
        part = positive_rows(
            RankedList.name, call.similarity, batch, torch.zeros_like(push), None, [level + margin, Tp]
        )
        return RankedList._joined(part.losses, push, imbalance)

    @staticmethod
    def _joined(pull: Tensor, push: Tensor, imbalance: float | Tensor) -> tuple[Part, ...]:
        losses = (1 - imbalance) * pull + imbalance * push
        return (Part(losses, torch.ones_like(losses, dtype=torch.long), (losses.detach() != 0).long()),)


def _values(
    margin: float, Tn: float, imbalance: float, alpha: float | None, Tp: float
) -> dict[str, float | Tensor]:
    if alpha is None:
        check_parameter("margin", margin, check_number)
        # A constant; of a tensor without waiting for its device.
        alpha = 1 + (margin.detach() if isinstance(margin, Tensor) else float(margin)) / 2
    return {"margin": margin, "Tn": Tn, "imbalance": imbalance, "alpha": alpha, "Tp": Tp}


def ranked_list_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float = 0.4,
    Tn: float = 10.0,
    imbalance: float = 0.5,
    alpha: float | None = None,
    Tp: float = 0.0,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    row_weights: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Ranked list loss: positives within a ball around each row, negatives beyond a larger one.

    With the pairs that are on the wrong side of their boundary by their distance d,
    :math:`P_i^* = \{j \in P_i: d_{ij} > \alpha - m\}` and :math:`N_i^* = \{k \in N_i: d_{ik} < \alpha\}`,

    .. math::
        L_i = (1 - \lambda) \frac{\sum_{j \in P_i^*} w_{ij} (d_{ij} - (\alpha - m))}
                                  {\sum_{j \in P_i^*} w_{ij}}
            + \lambda \frac{\sum_{k \in N_i^*} w_{ik} (\alpha - d_{ik})}{\sum_{k \in N_i^*} w_{ik}}, \qquad
        w_{ij} = e^{T_p (d_{ij} - (\alpha - m))}, \quad w_{ik} = e^{T_n (\alpha - d_{ik})}

    with m = ``margin`` and :math:`\lambda` = ``imbalance``. As in pytorch-metric-learning, the gradient goes
    through the weights too, and both denominators have 1e-5 added for each column. Wang et al., *Ranked List
    Loss for Deep Metric Learning*, CVPR 2019.

    Args:
        margin: m, how far apart the two boundaries are.
        Tn, Tp: :math:`T_n` and :math:`T_p`; 0 weighs all pairs alike. pytorch-metric-learning has no default
            for ``margin`` and ``Tn``; 0.4 and 10 are the paper's.
        imbalance: :math:`\lambda`, from 0 to 1.
        alpha: :math:`\alpha`, the distance beyond which negatives should be; ``None`` for ``1 + margin / 2``.
            With cosine or dot product s, :math:`-s` takes the place of d and :math:`-\alpha` that of
            :math:`\alpha`: negatives should be below ``alpha``, positives above ``alpha + margin``.
        embeddings, labels, ref_emb, ref_labels, indices_tuple, row_weights: as in
            :func:`multi_similarity_loss`.
        options: ``epsilon``, ``similarity="euclidean"``, ``normalize_embeddings``, ``reduction="mean"``,
            ``backend``, ``check_pairs``, ``class_weights``, ``cache_bytes``; see
            :class:`dml_cuda.PairOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`.
    """
    values = _values(margin, Tn, imbalance, alpha, Tp)
    batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
    return pair_loss(RankedList, values, options, *batch)


@described_by(ranked_list_loss)
class RankedListLoss(PairLoss):
    """Ranked list loss; see :func:`dml_cuda.functional.ranked_list_loss`.

    >>> loss_fn = RankedListLoss(margin=0.4, Tn=10)
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = RankedList
    margin: float = option()
    Tn: float = option()
    imbalance: float = option()
    alpha: float = option()
    Tp: float = option()

    def __init__(
        self,
        margin: float = 0.4,
        Tn: float = 10.0,
        imbalance: float = 0.5,
        alpha: float | None = None,
        Tp: float = 0.0,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(options, **_values(margin, Tn, imbalance, alpha, Tp))
