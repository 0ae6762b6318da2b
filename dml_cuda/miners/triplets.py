"""The miners that select pairs or triplets: the hardest, within a margin, or drawn by distance."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._inputs.checks import Similarity, check_batch, check_choice, check_number
from .._ops.constant_result import constant_result
from .._ops.triplets import ANY, INF, Selection
from ..losses._pair import option
from .mined_triplets import MinedTriplets, Selected, SelectedPairs
from .pairs import Miner
from .stats import average_pairs, average_triplet, extremes

STRATEGIES = ("hard", "semihard", "easy", "all")
TRIPLETS = ("all", "hard", "semihard", "easy")
_NAMES = {"hard": "hardest", "easy": "easiest", "semihard": "semihard", "all": "all"}


def _check_range(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{name}: expected None or two numbers (low, high), got {value!r}")
    for bound in value:
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise TypeError(f"{name}: expected two numbers (low, high), got {bound!r}")
    if not value[0] <= value[1]:
        raise ValueError(f"{name}: expected low <= high, got {value!r}")


def check_strategies(pos_strategy: str, neg_strategy: str) -> None:
    check_choice("pos_strategy", pos_strategy, STRATEGIES)
    check_choice("neg_strategy", neg_strategy, STRATEGIES)
    both = pos_strategy, neg_strategy
    if both == ("semihard", "semihard"):
        raise ValueError('pos_strategy, neg_strategy: expected at most one of them "semihard", got both')
    if "semihard" in both and "all" in both:
        raise ValueError('pos_strategy, neg_strategy: expected no "all" beside "semihard"')


def _distances(span: tuple[float, float] | None, similarity: str) -> tuple[float, float]:
    """A range of distances or of similarities as a range of d, which negates similarities."""
    low, high = ANY if span is None else map(float, span)
    return (low, high) if similarity.startswith("euclidean") else (-high, -low)


def easy_hard(
    pos_strategy: str,
    neg_strategy: str,
    allowed_pos_range: tuple[float, float] | None,
    allowed_neg_range: tuple[float, float] | None,
    similarity: str,
) -> Selection:
    """The selection of a :class:`BatchEasyHardMiner`."""
    ranges = [
        ANY if strategy == "all" else _distances(allowed, similarity)
        for strategy, allowed in ((pos_strategy, allowed_pos_range), (neg_strategy, allowed_neg_range))
    ]
    return Selection(_NAMES[pos_strategy], _NAMES[neg_strategy], ANY, *ranges)


def within_margin(margin: float, type_of_triplets: str) -> Selection:
    """The selection of a :class:`TripletMarginMiner`."""
    gaps = {
        "all": (-INF, margin),
        "hard": (-INF, min(margin, 0.0)),
        "semihard": (0.0, margin),
        "easy": (margin, INF),
    }
    return Selection(gap=gaps[type_of_triplets])


@constant_result
def _next(x: float, towards: float, double: bool) -> float:
    """The adjacent float64 or float32 number."""
    x, towards = torch.tensor([x, towards], dtype=torch.float64 if double else torch.float32)
    return torch.nextafter(x, towards).item()


def beyond_margins(pos_margin: float, neg_margin: float, similarity: str, double: bool) -> Selection:
    """The selection of a :class:`PairMarginMiner`.

    Its comparisons are strict, but the ranges of a selection include their ends: so the ends are the floating
    point numbers next to the margins.
    """
    sign = 1.0 if similarity.startswith("euclidean") else -1.0
    above, below = _next(sign * pos_margin, INF, double), _next(sign * neg_margin, -INF, double)
    return Selection(pos_range=(above, INF), neg_range=(-INF, below))


def by_distance(cutoff: float, nonzero_loss_cutoff: float) -> Selection:
    """The selection of a :class:`DistanceWeightedMiner`."""
    weights = {"cutoff": float(cutoff), "nonzero_loss_cutoff": float(nonzero_loss_cutoff)}
    return Selection(negatives="drawn", **weights)


def fresh_seed(device: torch.device) -> Tensor:
    """``[1]`` int64 from torch's generator of the device, without synchronising."""
    return torch.randint(torch.iinfo(torch.int64).max, (1,), device=device)


class SelectingMiner(Miner):
    """Base class of the miners whose rule is a :class:`Selection`."""

    kind: ClassVar[type[Selected]] = MinedTriplets

    def selection(self, embeddings: Tensor) -> Selection:
        """The rule by the current options."""
        raise NotImplementedError

    def seed(self, device: torch.device) -> Tensor | None:
        """The seed of the draws, for a rule that draws."""
        return None

    def _find(self, embeddings, labels, ref_emb, ref_labels, num_valid_refs) -> Selected:
        labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
        rule = {
            "similarity": self.measure,
            "seed": self.seed(embeddings.device),
            "num_valid_refs": num_valid_refs,
        }
        batch = embeddings, labels, ref_emb, ref_labels
        return self.kind(*batch, selection=self.selection(embeddings), **rule)


class _TripletMiner(SelectingMiner):
    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(
            self,
            embeddings: Tensor,
            labels: Tensor,
            ref_emb: Tensor | None = None,
            ref_labels: Tensor | None = None,
        ) -> MinedTriplets: ...


class _PairMiner(SelectingMiner):
    kind = SelectedPairs

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(
            self,
            embeddings: Tensor,
            labels: Tensor,
            ref_emb: Tensor | None = None,
            ref_labels: Tensor | None = None,
        ) -> SelectedPairs: ...


_EXTREMES = (
    "easiest_triplet",
    "hardest_triplet",
    "easiest_pos_pair",
    "hardest_pos_pair",
    "easiest_neg_pair",
    "hardest_neg_pair",
)


class BatchHardMiner(_TripletMiner):
    """One triplet per row: its farthest positive and its nearest negative.

    Hermans et al., *In Defense of the Triplet Loss for Person Re-Identification*, 2017. A row without
    positives or without negatives has no triplet; ties go to the lowest column. If
    :class:`dml_cuda.TripletMarginLoss` or :class:`dml_cuda.MarginLoss` gets the result with the same batch,
    its kernel finds both in the same pass.

    Args:
        similarity, normalize_embeddings: as for the losses.
        collect_stats: set ``easiest_triplet``, ``hardest_triplet``, ``easiest_pos_pair``, ... of the last
            batch as attributes, as pytorch-metric-learning does; synchronises with the device.

    Returns :class:`dml_cuda.MinedTriplets`.
    """

    stats = _EXTREMES

    def __init__(
        self,
        *,
        similarity: Similarity = "euclidean",
        normalize_embeddings: bool | None = None,
        collect_stats: bool = False,
    ) -> None:
        shared = {"similarity": similarity, "normalize_embeddings": normalize_embeddings}
        super().__init__(**shared, collect_stats=collect_stats)

    def selection(self, embeddings: Tensor) -> Selection:
        return Selection("hardest", "hardest")

    def _compute_stats(self, mined: Selected) -> Mapping[str, float]:
        return extremes(mined)


class BatchEasyHardMiner(_PairMiner):
    """For each row one positive or all, and one negative or all, each by a strategy.

    The strategies are ``"hard"``: the farthest positive or the nearest negative; ``"easy"``: the nearest
    positive or the farthest negative; ``"semihard"``: the farthest positive that is nearer than the negative,
    or the nearest negative that is farther than the positive; ``"all"``. Xuan et al., *Improved Embeddings
    with Easy Positive Triplet Mining*, WACV 2020. If neither strategy is ``"all"``, a row that lacks one of
    the two has neither. Ties go to the lowest column.

    Args:
        pos_strategy, neg_strategy: at most one is ``"semihard"``, and then the other is not ``"all"``.
        allowed_pos_range, allowed_neg_range: ``(low, high)``, ends included: the distances (or similarities)
            among which one is selected. Ignored for ``"all"``.
        similarity, normalize_embeddings: as for the losses.
        collect_stats: as for :class:`BatchHardMiner`.

    Returns :class:`dml_cuda.SelectedPairs`. With :class:`dml_cuda.CrossBatchMemory` the copy of a row in the
    queue is never selected.
    """

    pos_strategy: str = option()
    neg_strategy: str = option()
    allowed_pos_range: tuple[float, float] | None = option()
    allowed_neg_range: tuple[float, float] | None = option()

    stats = _EXTREMES
    HARD, SEMIHARD, EASY, ALL = STRATEGIES

    def __init__(
        self,
        pos_strategy: str = "easy",
        neg_strategy: str = "semihard",
        allowed_pos_range: tuple[float, float] | None = None,
        allowed_neg_range: tuple[float, float] | None = None,
        *,
        similarity: Similarity = "euclidean",
        normalize_embeddings: bool | None = None,
        collect_stats: bool = False,
    ) -> None:
        check_strategies(pos_strategy, neg_strategy)
        super().__init__(similarity=similarity, normalize_embeddings=normalize_embeddings)
        self._options |= {"pos_strategy": pos_strategy, "neg_strategy": neg_strategy}
        self.allowed_pos_range, self.allowed_neg_range = allowed_pos_range, allowed_neg_range
        self.collect_stats = collect_stats

    checks: ClassVar = {"allowed_pos_range": _check_range, "allowed_neg_range": _check_range}

    def set_option(self, name: str, value: Any) -> None:
        if name.endswith("_strategy"):
            both = {key: self._options[key] for key in ("pos_strategy", "neg_strategy")} | {name: value}
            check_strategies(**both)
            self._options = {**self._options, name: value}
        else:
            super().set_option(name, value)

    def selection(self, embeddings: Tensor) -> Selection:
        ranges = self.allowed_pos_range, self.allowed_neg_range
        return easy_hard(self.pos_strategy, self.neg_strategy, *ranges, self.measure)

    def _compute_stats(self, mined: Selected) -> Mapping[str, float]:
        return extremes(mined)


class TripletMarginMiner(_TripletMiner):
    """All triplets within a margin, or a part of them.

    With ``gap = d_an - d_ap``: ``"all"``, ``gap <= margin``; ``"hard"``, ``gap <= 0`` among these;
    ``"semihard"``, ``gap > 0`` among these (Schroff et al., *FaceNet*, CVPR 2015); or ``"easy"``,
    ``gap > margin``. If :class:`dml_cuda.TripletMarginLoss` or :class:`dml_cuda.MarginLoss` gets the result
    with the same batch, it sums over the triplets at the cost of pairs and materialises none.

    Args:
        margin: a distance, or a difference of similarities.
        type_of_triplets: ``"all"``, ``"hard"``, ``"semihard"`` or ``"easy"``.
        similarity, normalize_embeddings: as for the losses.
        collect_stats: set ``avg_triplet_margin``, ``pos_pair_dist`` and ``neg_pair_dist``, means over all
            triplets of the last batch, as attributes; synchronises with the device.

    Returns :class:`dml_cuda.MinedTriplets`.
    """

    margin: float = option()
    type_of_triplets: str = option()

    checks: ClassVar = {
        "margin": check_number,
        "type_of_triplets": lambda name, value: check_choice(name, value, TRIPLETS),
    }
    stats = ("avg_triplet_margin", "pos_pair_dist", "neg_pair_dist")

    def __init__(
        self,
        margin: float = 0.2,
        type_of_triplets: str = "all",
        *,
        similarity: Similarity = "euclidean",
        normalize_embeddings: bool | None = None,
        collect_stats: bool = False,
    ) -> None:
        shared = {"similarity": similarity, "normalize_embeddings": normalize_embeddings}
        rule = {"margin": margin, "type_of_triplets": type_of_triplets}
        super().__init__(**rule, **shared, collect_stats=collect_stats)

    def selection(self, embeddings: Tensor) -> Selection:
        return within_margin(float(self.margin), self.type_of_triplets)

    def _compute_stats(self, mined: Selected) -> Mapping[str, float]:
        return average_triplet(mined)


class PairMarginMiner(_PairMiner):
    """Positives farther than one margin, and negatives nearer than another.

    Args:
        pos_margin, neg_margin: distances. With cosine or dot product, similarities: positives below
            ``pos_margin`` and negatives above ``neg_margin`` are selected.
        similarity, normalize_embeddings: as for the losses.
        collect_stats: set ``pos_pair_dist`` and ``neg_pair_dist``, means over all pairs of the last batch,
            as attributes; synchronises with the device.

    Returns :class:`dml_cuda.SelectedPairs`.
    """

    pos_margin: float = option()
    neg_margin: float = option()

    checks: ClassVar = {"pos_margin": check_number, "neg_margin": check_number}
    stats = ("pos_pair_dist", "neg_pair_dist")

    def __init__(
        self,
        pos_margin: float = 0.2,
        neg_margin: float = 0.8,
        *,
        similarity: Similarity = "euclidean",
        normalize_embeddings: bool | None = None,
        collect_stats: bool = False,
    ) -> None:
        shared = {"similarity": similarity, "normalize_embeddings": normalize_embeddings}
        super().__init__(pos_margin=pos_margin, neg_margin=neg_margin, **shared, collect_stats=collect_stats)

    def selection(self, embeddings: Tensor) -> Selection:
        double = embeddings.dtype == torch.float64
        return beyond_margins(self.pos_margin, self.neg_margin, self.measure, double)

    def _compute_stats(self, mined: Selected) -> Mapping[str, float]:
        return average_pairs(mined)


class DistanceWeightedMiner(_TripletMiner):
    r"""One negative for each positive pair, drawn so that all distances are equally likely.

    The distances between points on the unit sphere in D dimensions have the density
    :math:`q(d) \propto d^{D-2} (1 - d^2/4)^{(D-3)/2}`; a negative at distance d is drawn with weight

    .. math:: w(d) = 1 / q(\max(d, \text{cutoff})),

    0 from ``nonzero_loss_cutoff`` on. Wu et al., *Sampling Matters in Deep Embedding Learning*, ICCV 2017. A
    row whose weights are all 0 has no triplet. Weights are logarithms relative to the row's largest, so they
    do not underflow in any number of dimensions.

    The draws depend on a seed from torch's generator, one for each call: they repeat under
    ``torch.manual_seed``, and reading the result gives the triplets that a loss used.

    Args:
        cutoff: nearer negatives get the weight at this distance, which bounds the variance of gradients.
        nonzero_loss_cutoff: negatives from this distance on are not drawn, as their loss would be 0.
        collect_stats: accepted as pytorch-metric-learning's miner does, which collects none.

    Returns :class:`dml_cuda.MinedTriplets`. Distances are between unit rows. pytorch-metric-learning also
    draws the positives, with replacement, as many for each row as its class has members; here every positive
    has one triplet.
    """

    cutoff: float = option()
    nonzero_loss_cutoff: float = option()

    checks: ClassVar = {"cutoff": check_number, "nonzero_loss_cutoff": check_number}

    def __init__(
        self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, *, collect_stats: bool = False
    ) -> None:
        rule = {"cutoff": cutoff, "nonzero_loss_cutoff": nonzero_loss_cutoff}
        shared = {"similarity": "euclidean", "normalize_embeddings": True}
        super().__init__(**rule, **shared, collect_stats=collect_stats)

    def set_option(self, name: str, value: Any) -> None:
        if name in ("similarity", "normalize_embeddings") and value not in ("euclidean", True):
            raise ValueError(f"{name}: expected distances of unit rows, got {value!r}")
        super().set_option(name, value)

    def selection(self, embeddings: Tensor) -> Selection:
        return by_distance(self.cutoff, self.nonzero_loss_cutoff)

    def seed(self, device: torch.device) -> Tensor:
        return fresh_seed(device)

    def extra_repr(self) -> str:
        return f"cutoff={self.cutoff}, nonzero_loss_cutoff={self.nonzero_loss_cutoff}"
