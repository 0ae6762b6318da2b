"""Triplet margin loss."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from .._inputs.checks import check_flag, check_number, check_parameter
from .._inputs.options import Options
from ._described import described_by
from ._pair import option
from ._triplet import TripletCall, TripletLoss, TripletOptions, check_per_anchor, evaluate, triplet_options


def make_call(values: Mapping[str, Any], options: Options) -> TripletCall:
    """Validates the parameters. Raises TypeError or ValueError."""
    margin = values["margin"]
    check_parameter("margin", margin, check_number, per_class=True)
    for name in ("swap", "smooth_loss"):
        check_flag(name, values[name])
    term = "softplus" if values["smooth_loss"] else "hinge"
    per_anchor = check_per_anchor(values["triplets_per_anchor"])
    margin = margin if isinstance(margin, Tensor) else float(margin)
    return TripletCall(term, margin, values["swap"], per_anchor, options)


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float | Tensor = 0.05,
    swap: bool = False,
    smooth_loss: bool = False,
    triplets_per_anchor: int | Literal["all"] = "all",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    **options: Unpack[TripletOptions],
) -> Tensor:
    r"""Triplet margin loss: each positive nearer to its anchor than each negative, by a margin.

    .. math:: L = \operatorname{mean}_{(a, p, n)} [d_{ap} - d_{an} + m]_+

    over the triplets whose loss is not 0. With cosine or dot product, d is the negated similarity. Schroff et
    al., *FaceNet*, CVPR 2015; Hermans et al., *In Defense of the Triplet Loss for Person Re-Identification*,
    2017, whose soft margin is ``smooth_loss=True, margin=0``.

    The N P Q triplets of N rows with P positives and Q negatives each are not materialised. All of them,
    those of :class:`dml_cuda.TripletMarginMiner` and those of the other miners cost about as much as the
    pairs, in O(N) memory. Counts of triplets are exact beyond 2^31 too.

    Two cases are not fused and slower, computed from blocks of rows in bounded memory: ``swap`` over all
    triplets (or those of a ``TripletMarginMiner``), which compares P Q distances in each row, and
    ``reduction="none"``. ``swap`` over listed, selected or drawn triplets costs time in proportion to them.

    Args:
        margin: m, a distance or a difference of similarities: a number, or a tensor with one element or with
            ``[C]`` elements. Of these a triplet has that of its anchor's class; labels are then classes in
            [0, C), and ``indices_tuple`` requires them too. A tensor receives gradients.
        swap: replace the distance from anchor to negative by that from positive to negative if it is less.
        smooth_loss: ``log(1 + exp(d_ap - d_an + margin))`` instead of the hinge.
        triplets_per_anchor: ``"all"``, or how many triplets to draw for each row: positive and negative
            uniformly with replacement, by torch's generator. Ignored with ``indices_tuple``.
        indices_tuple: the triplets to use instead of all: the result of a miner of dml_cuda or
            pytorch-metric-learning, triplets ``(anchors, positives, negatives)`` or pairs
            ``(anchors, positives, anchors, negatives)``. Pairs are combined: every positive with every
            negative of the same anchor, which synchronises with a GPU if they are index tensors.
        embeddings, labels, ref_emb, ref_labels: as in :func:`multi_similarity_loss`.
        options: ``similarity="euclidean"``, ``normalize_embeddings``, ``reduction="mean_nonzero"``,
            ``backend``, ``check_pairs``; see :class:`dml_cuda.TripletOptions`.

    Returns, Raises:
        As :func:`multi_similarity_loss`. The divisor is a constant in the gradient. A label without a margin
        raises ValueError on the CPU; on a GPU, where checking would synchronise, the loss is NaN.
    """
    values = {
        "margin": margin,
        "swap": swap,
        "smooth_loss": smooth_loss,
        "triplets_per_anchor": triplets_per_anchor,
    }
    call = make_call(values, triplet_options(options, values))
    return evaluate(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)


@described_by(triplet_margin_loss)
class TripletMarginLoss(TripletLoss):
    """Triplet margin loss; see :func:`dml_cuda.functional.triplet_margin_loss`.

    A ``margin`` that is an ``nn.Parameter``, of one number or ``[C]``, is one of the module's.

    >>> loss_fn, miner = TripletMarginLoss(margin=0.1), BatchHardMiner()
    >>> loss = loss_fn(embeddings, labels, miner(embeddings, labels))
    >>> loss_fn = TripletMarginLoss(margin=nn.Parameter(torch.full((num_classes,), 0.1)), smooth_loss=True)
    """

    make_call = staticmethod(make_call)
    swap: bool = option()
    smooth_loss: bool = option()

    def __init__(
        self,
        margin: float | Tensor = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: int | Literal["all"] = "all",
        **options: Unpack[TripletOptions],
    ) -> None:
        values = {"margin": margin, "swap": swap, "smooth_loss": smooth_loss}
        super().__init__(options, **values, triplets_per_anchor=triplets_per_anchor)
