"""The base of the triplet losses: which triplets of a batch count, and how their losses are reduced."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from .._inputs.autocast import computed_dtype
from .._inputs.batch import check_mined, same_dtype, to_save
from .._inputs.checks import Backend, Reduction, Similarity, check_batch, check_count, check_points
from .._inputs.indices import listed_indices
from .._inputs.options import Options, check_names, check_options
from .._inputs.random_triplets import random_triplets
from .._inputs.traced import is_traced
from .._ops import listed_triplets
from .._ops.devices import use_kernel
from .._ops.evaluate import in_wanted_dtype
from .._ops.listed_pairs import of_rows
from .._ops.listed_triplets import Triplets
from .._ops.triplets import Rows, Selection, select_one_each, triplet_sums
from ..miners.mined import Mined
from ..miners.mined_pairs import MinedPairs
from ..miners.mined_triplets import Selected
from ..reference.triplets import Terms
from ._pair import LossModule, described, option

_ANY = -float("inf"), float("inf")


class TripletOptions(TypedDict, total=False):
    """The options that the triplet losses share. Each loss documents its defaults.

    Attributes:
        similarity, normalize_embeddings, backend, check_pairs: as in :class:`dml_cuda.PairOptions`.
        reduction: ``"mean_nonzero"`` over the terms that are not 0 (a triplet has one term in
            :class:`dml_cuda.TripletMarginLoss`, two in :class:`dml_cuda.MarginLoss`), ``"mean"`` and
            ``"mean_valid"`` over all triplets that count, ``"sum"``, or ``"none"`` for each row's sum
            ``[N]``. The kernels compute all but ``"none"``, which the reference computes.
    """

    similarity: Similarity
    normalize_embeddings: bool | None
    reduction: Reduction
    backend: Backend
    check_pairs: bool


TRIPLET_NAMES = tuple(TripletOptions.__annotations__)


class TripletCall(NamedTuple):
    """The parameters and options of a triplet loss, validated."""

    term: str  # as the op names it: "hinge", "softplus" or "margin"
    margin: float | Tensor  # a tensor of the anchors' classes [C], or of one number
    swap: bool
    per_anchor: int | None  # how many triplets are drawn for each anchor; None for all
    options: Options

    @property
    def similarity(self) -> str:
        return self.options.measure


def check_per_anchor(value: object) -> int | None:
    """``TripletCall.per_anchor`` of the parameter ``triplets_per_anchor``."""
    if isinstance(value, str) and value == "all":
        return None
    if isinstance(value, str):
        raise ValueError(f'triplets_per_anchor: expected "all" or an integer, got {value!r}')
    check_count("triplets_per_anchor", value)
    return int(value)


def triplet_options(options: Mapping[str, Any], parameters: Iterable[str] = ()) -> Options:
    """Validates options and adds the defaults of triplet losses. ``parameters`` are the loss's own names, for
    the message. Raises TypeError or ValueError."""
    check_names(options, TRIPLET_NAMES, parameters)
    return check_options(options, similarity="euclidean", reduction="mean_nonzero")


class TripletBatch(NamedTuple):
    """The rows of a batch, and the triplets that count: by a selection, or as listed."""

    rows: Rows
    selection: Selection | None = None
    seed: Tensor | None = None
    listed: Triplets | tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # triplets, or pairs


def _by_selection(
    call: TripletCall, rows: Rows, selection: Selection, mined: Selected | None
) -> TripletBatch:
    """The selection for the kernel, or its triplets if the kernel does not support it."""
    if selection.positives == "semihard" or (call.swap and selection.one_a_row):
        triplets = select_one_each(rows, selection, call.similarity)
        exists = (triplets[1] >= 0) & (triplets[2] >= 0)
        return TripletBatch(rows, listed=Triplets(*triplets, exists))
    if call.swap and selection.negatives == "drawn":
        return TripletBatch(rows, listed=Triplets(*mined))
    return TripletBatch(rows, selection, None if mined is None else mined.seed)


def triplet_batch(
    call: TripletCall,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> TripletBatch:
    """Validates a batch and finds which of its triplets count. Raises TypeError or ValueError."""
    points = embeddings, ref_emb  # as mined: not promoted
    embeddings, ref_emb = same_dtype(embeddings, ref_emb)
    if indices_tuple is None:
        if labels is None:
            raise ValueError("labels: expected labels, or triplets as indices_tuple; got neither")
        labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
        rows = Rows(*map(to_save, (embeddings, labels, ref_emb, ref_labels)), None, None)
        if call.per_anchor is not None:
            return TripletBatch(rows, listed=random_triplets(rows, call.per_anchor))
        return TripletBatch(rows, Selection())
    check_points(embeddings, ref_emb)
    check_pairs = call.options.check_pairs
    mined = indices_tuple if isinstance(indices_tuple, Mined) else None
    if labels is not None:
        labels, _ = check_batch(embeddings, labels, None, None)
    if mined is not None:
        check_mined(mined, embeddings, labels, ref_emb, check_pairs)
        labels = mined.labels if labels is None else labels
        selection = mined.selection if isinstance(mined, Selected) else None
        if isinstance(mined, MinedPairs) and mined.epsilon is None:
            selection = Selection()
        same_rule = selection is not None and (not selection.measures or mined.similarity == call.similarity)
        if same_rule and mined.rule_applies(*points):
            batch = (
                embeddings,
                mined.labels,
                ref_emb,
                mined.ref_labels,
                mined.self_index,
                mined.num_valid_refs,
            )
            rows = Rows(*map(to_save, batch))
            return _by_selection(call, rows, selection, mined if isinstance(mined, Selected) else None)
    listed = mined is None or mined.only_lists
    can_read = embeddings.device.type == "cpu" and not torch.compiler.is_compiling()  # without synchronising
    check_range = listed and (check_pairs or can_read)
    indices = listed_indices(indices_tuple, embeddings, ref_emb, check_range=check_range)
    rows = Rows(*map(to_save, (embeddings, labels, ref_emb)), None, None, None)
    if len(indices) == 3:
        return TripletBatch(rows, listed=Triplets(*indices, ascending=False))
    if call.swap:  # needs the similarity of positive and negative, so triplets instead of pairs
        return TripletBatch(rows, listed=Triplets(*to_triplets(indices), ascending=False))
    return TripletBatch(rows, listed=indices)


def to_triplets(pairs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Each listed positive with each listed negative of the same anchor."""
    pos_anchors, positives, neg_anchors, negatives = pairs
    neg_anchors, order = torch.sort(neg_anchors, stable=True)
    begin = torch.searchsorted(neg_anchors, pos_anchors)
    count = torch.searchsorted(neg_anchors, pos_anchors, right=True) - begin
    p = torch.repeat_interleave(torch.arange(len(pos_anchors), device=count.device), count)
    within = torch.arange(len(p), device=count.device) - (count.cumsum(0) - count)[p]
    return pos_anchors[p], positives[p], negatives[order[begin[p] + within]]


def _check_classes(name: str, labels: Tensor | None, num_classes: int) -> None:
    """Raises ValueError for labels that are not classes; on a GPU checking would synchronise."""
    if labels is None:
        raise ValueError(
            f"labels: expected the labels of the rows, as {name} has a value for each class; got None"
        )
    if labels.device.type != "cpu" or is_traced(labels) or labels.numel() == 0:
        return
    for label in (int(labels.long().min()), int(labels.long().max())):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"labels: expected classes in [0, {num_classes}), one for each {name}; got {label}"
            )


def row_values(name: str, value: Tensor | float, labels: Tensor | None, embeddings: Tensor) -> Tensor:
    """Each row's number ``[N]`` of a parameter that has one, or one for each class, in the dtype of the
    computation; NaN for a label without a class where looking for one would synchronise."""
    n, dtype = embeddings.shape[0], computed_dtype(embeddings.dtype)
    if not isinstance(value, Tensor):
        return torch.full((n,), float(value), dtype=dtype, device=embeddings.device)
    value = value.to(embeddings.device, dtype)
    if value.numel() == 1:
        return value.view(1).expand(n)
    classes = value.shape[0]
    _check_classes(name, labels, classes)
    labels = labels.long()
    own = of_rows(value, labels.clamp(0, classes - 1))
    return torch.where((labels >= 0) & (labels < classes), own, torch.nan)


def row_sums(call: TripletCall, batch: TripletBatch, beta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row's loss ``[N]``, float32 or float64, and counts ``[N, 2]``: of terms above 0, and of triplets.

    ``beta`` is ``[N]``. A row whose beta or margin is NaN has the loss NaN.
    """
    rows, margin, row_params = batch.rows, call.margin, beta
    if isinstance(margin, Tensor):
        row_params = row_values("margin", margin, rows.labels, rows.embeddings).contiguous()
        margin = 0.0
    sums, counts = _row_sums(call, margin, row_params, batch)
    # No comparison holds for NaN, so no kernel shows it.
    return (sums if row_params is None else sums + row_params.detach() * 0), counts


def _row_sums(
    call: TripletCall, margin: float, row_params: Tensor | None, batch: TripletBatch
) -> tuple[Tensor, Tensor]:
    rows, selection, seed, listed = batch
    fused = use_kernel(rows.embeddings.device, call.options.backend)
    per_row = call.options.reduction == "none"  # needs the gradient of every row
    if selection is not None:
        options = {"term": call.term, "margin": margin, "row_params": row_params, "seed": seed}
        fused = fused and not per_row
        return triplet_sums(rows, selection, call.similarity, **options, swap=call.swap, fused=fused)
    terms = Terms(call.term, margin, _ANY)
    points = rows.embeddings, rows.ref_emb
    if isinstance(listed, Triplets):
        options = call.similarity, terms, row_params, call.swap, fused, per_row
        return listed_triplets.triplet_sums(*points, listed, *options)
    return listed_triplets.crossed_sums(*points, listed, call.similarity, terms, row_params, fused)


def divisor(counts: Tensor, reduction: str) -> Tensor | int:
    """The divisor of a sum, from the counts ``[2]`` of all rows."""
    if reduction == "sum":
        return 1
    return counts[0 if reduction == "mean_nonzero" else 1].clamp(min=1)


def reduced(sums: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """The loss from the rows' losses ``[N]`` and counts ``[N, 2]``."""
    return sums if reduction == "none" else sums.sum() / divisor(counts.sum(0), reduction)


def evaluate(call: TripletCall, *batch: Any) -> Tensor:
    """The loss of a batch, with the arguments of :func:`triplet_batch`; not for terms with beta."""
    sums, counts = row_sums(call, triplet_batch(call, *batch))
    return in_wanted_dtype(reduced(sums, counts, call.options.reduction), batch[0])


class TripletLoss(LossModule):
    """Base class of the triplet losses.

    Every parameter and option is an attribute, readable and settable, validated when set. ``call`` holds them
    as they are computed with.
    """

    margin: float = option()
    triplets_per_anchor: int | str = option()
    similarity: str = option()
    normalize_embeddings: bool | None = option()
    reduction: str = option()
    backend: str = option()
    check_pairs: bool = option()

    def __init__(self, options: TripletOptions, **values: Any) -> None:
        super().__init__()
        self._set(values, triplet_options(options, values))

    @staticmethod
    def make_call(values: Mapping[str, Any], options: Options) -> TripletCall:
        """Validates the parameters. Raises TypeError or ValueError."""
        raise NotImplementedError

    def _set(self, values: Mapping[str, Any], options: Options) -> None:
        call = self.make_call(values, options)
        self._options = options
        self._fixed = None if isinstance(call.margin, Tensor) else call
        self._keep(values)

    @property
    def call(self) -> TripletCall:
        return self.make_call(self.values, self._options) if self._fixed is None else self._fixed

    def get_option(self, name: str) -> Any:
        return self.values[name] if name in self._values else getattr(self._options, name)

    def set_option(self, name: str, value: object) -> None:
        values, options = self.values, self._options
        if name in values:
            values[name] = value
        else:
            known = {key: getattr(options, key) for key in TRIPLET_NAMES}
            options = triplet_options({**known, name: value})
        self._set(values, options)

    def row_parts(self, batch: TripletBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The results of :func:`row_sums`, and ``[N]`` values whose sum :meth:`whole` takes as ``extra``."""
        return *row_sums(self.call, batch), None

    def whole(self, total: Tensor, counts: Tensor, extra: Tensor | None) -> Tensor:
        """The loss, from the sums of the results of :meth:`row_parts` over all rows."""
        return total / divisor(counts, self.reduction)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers; not needed with ``indices_tuple``.
            indices_tuple: the triplets that count, or pairs to combine, as a miner returns them.
            ref_emb: ``[M, D]`` positives and negatives; ``None`` takes them from ``embeddings``.
            ref_labels: ``[M]`` integers, required with ``ref_emb``; not needed with ``indices_tuple``.
        """
        return evaluate(self.call, embeddings, labels, indices_tuple, ref_emb, ref_labels)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward

    def extra_repr(self) -> str:
        return described({name: self.get_option(name) for name in (*self._values, *TRIPLET_NAMES)})
