"""Adapters of the miners: pytorch-metric-learning's classes, whose results are computed when read."""

from numbers import Real
from typing import Any, ClassVar

import torch

from ._shared import (  # isort: skip  # first, as it explains a missing pytorch-metric-learning
    collect_norms,
    similarity_options,
    warn_unsupported,
)

from pytorch_metric_learning import miners

from .._inputs.options import measure
from .._ops.triplets import Selection
from ..miners.mined import Mined
from ..miners.mined_pairs import MinedPairs
from ..miners.mined_triplets import MinedTriplets, Selected, SelectedPairs
from ..miners.pairs import LastBatch
from ..miners.stats import average_pairs, average_triplet, extremes
from ..miners.triplets import beyond_margins, by_distance, easy_hard, fresh_seed, within_margin

_COUNTS = {3: ("num_triplets",), 4: ("num_pos_pairs", "num_neg_pairs")}


def _counted(kind: int, name: str) -> property:
    """An attribute that counts the pairs or triplets of the last batch when it is read."""

    def read(self) -> int:
        return self.__dict__.get(name, 0) if self._last is None else self._last.counts()[kind]

    def write(self, count: int) -> None:
        self._last, self.__dict__[name] = None, count

    return property(read, write)


class _Lazy:
    """Replaces the mining of a miner by a rule that is applied later."""

    _last: LastBatch | None = None
    _kind: ClassVar[type[Mined]]  # what it returns

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kind = vars(cls).get("_kind")
        for position, name in enumerate(_COUNTS[len(kind.names)] if kind else ()):
            setattr(cls, name, _counted(position, name))

    def _unsupported(self) -> str | None:
        """Why dml_cuda cannot mine as this miner does, or None."""
        return None

    def _rule(self, embeddings: torch.Tensor, similarity: str) -> dict[str, Any]:
        """The keyword arguments of ``_kind``, besides the batch."""
        raise NotImplementedError

    def _collect_stats(self, mined: Mined) -> None:
        """Sets the attributes that the miner collects."""

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        options = similarity_options(self.distance)
        reason = str(self.distance) if options is None else self._unsupported()
        if reason is not None:
            warn_unsupported(self, reason)
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        collect_norms(self.distance, embeddings, ref_emb)
        rule = {}
        if ref_emb is embeddings:
            ref_emb = ref_labels = None
        elif ref_labels is labels and self._kind is not MinedPairs:
            # The same label tensor: pytorch-metric-learning then treats row i of ref_emb as the same point.
            rule["self_index"] = torch.arange(embeddings.shape[0], device=embeddings.device)
        batch = embeddings, labels, ref_emb, ref_labels
        similarity = measure(options["similarity"], options.get("normalize_embeddings"))
        mined = self._kind(*batch, **self._rule(embeddings, similarity), **rule)
        if not torch.compiler.is_exporting():
            self._last = LastBatch(mined, *batch)
        if self.collect_stats:
            self._collect_stats(mined)
        return mined

    def output_assertion(self, output) -> None:
        """Counts nothing yet: that is done when the counts are read."""
        if not isinstance(output, Mined):
            super().output_assertion(output)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": None}


class MultiSimilarityMiner(_Lazy, miners.MultiSimilarityMiner):
    """``pytorch_metric_learning.miners.MultiSimilarityMiner``, computed when read.

    Returns :class:`dml_cuda.MinedPairs`. A loss of this module or of dml_cuda never computes its indices.
    """

    _kind = MinedPairs

    def _unsupported(self) -> str | None:
        return None if isinstance(self.epsilon, Real) else f"an epsilon of {type(self.epsilon).__name__}"

    def _rule(self, embeddings, similarity):
        return {"epsilon": self.epsilon, "similarity": similarity}


class _Selecting(_Lazy):
    """The miners whose rule is a selection."""

    _numbers: ClassVar[tuple[str, ...]] = ()  # parameters that must be numbers
    _seeded: ClassVar[bool] = False  # whether the selection draws

    def _unsupported(self) -> str | None:
        for name in self._numbers:
            if not isinstance(getattr(self, name), Real):
                return f"a {name} of {type(getattr(self, name)).__name__}"
        return None

    def _selection(self, embeddings: torch.Tensor, similarity: str) -> Selection:
        raise NotImplementedError

    def _rule(self, embeddings, similarity):
        seed = fresh_seed(embeddings.device) if self._seeded else None
        return {"selection": self._selection(embeddings, similarity), "similarity": similarity, "seed": seed}

    def _compute_stats(self, mined: Selected) -> dict[str, float]:
        return {}

    def _collect_stats(self, mined) -> None:
        for name, value in self._compute_stats(mined).items():
            setattr(self, name, value)


class _EasyHard(_Selecting):
    _methods = ("get_positives", "get_negatives", "get_x_per_row", "get_mine_function", "set_stats")

    def _unsupported(self) -> str | None:
        for name in self._methods:
            if getattr(type(self), name) is not getattr(miners.BatchEasyHardMiner, name):
                return f"its own {name}"
        return None

    def _selection(self, embeddings, similarity):
        ranges = self.allowed_pos_range, self.allowed_neg_range
        return easy_hard(self.pos_strategy, self.neg_strategy, *ranges, similarity)

    def _compute_stats(self, mined):
        return extremes(mined)


class BatchHardMiner(_EasyHard, miners.BatchHardMiner):
    """``pytorch_metric_learning.miners.BatchHardMiner``, computed when read."""

    _kind = MinedTriplets


class BatchEasyHardMiner(_EasyHard, miners.BatchEasyHardMiner):
    """``pytorch_metric_learning.miners.BatchEasyHardMiner``, computed when read."""

    _kind = SelectedPairs


class TripletMarginMiner(_Selecting, miners.TripletMarginMiner):
    """``pytorch_metric_learning.miners.TripletMarginMiner``, computed when read."""

    _kind = MinedTriplets
    _numbers = ("margin",)

    def _selection(self, embeddings, similarity):
        kind = self.type_of_triplets if self.type_of_triplets in ("hard", "semihard", "easy") else "all"
        return within_margin(float(self.margin), kind)

    def _compute_stats(self, mined):
        return average_triplet(mined)


class PairMarginMiner(_Selecting, miners.PairMarginMiner):
    """``pytorch_metric_learning.miners.PairMarginMiner``, computed when read."""

    _kind = SelectedPairs
    _numbers = ("pos_margin", "neg_margin")

    def _selection(self, embeddings, similarity):
        double = embeddings.dtype == torch.float64
        return beyond_margins(float(self.pos_margin), float(self.neg_margin), similarity, double)

    def _compute_stats(self, mined):
        return average_pairs(mined)


class DistanceWeightedMiner(_Selecting, miners.DistanceWeightedMiner):
    """``pytorch_metric_learning.miners.DistanceWeightedMiner``, computed when read.

    Draws one negative for each positive pair, as :class:`dml_cuda.DistanceWeightedMiner` does.
    """

    _kind = MinedTriplets
    _numbers = ("cutoff", "nonzero_loss_cutoff")
    _seeded = True

    def _selection(self, embeddings, similarity):
        return by_distance(self.cutoff, self.nonzero_loss_cutoff)
