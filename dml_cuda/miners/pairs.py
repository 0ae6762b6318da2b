"""The base class of the miners, and the multi-similarity miner."""

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from .._inputs.checks import SIMILARITIES, Similarity, check_choice, check_flag, check_number
from .._inputs.options import measure, with_known_names
from ..losses._pair import option
from .mined import Mined, version
from .mined_pairs import MinedPairs, PairCounts, mined_pairs

# What a multi-similarity miner returns; depends on its pair_counts.
_Result = TypeVar("_Result", MinedPairs, tuple[MinedPairs, PairCounts], default=MinedPairs)

_MAX_COPY = 4 << 20  # bytes: larger tensors are not copied to count pairs later


class _Borrowed:
    """A weak reference to a tensor as it is now: lost when the tensor is freed or changed in place."""

    def __init__(self, x: Tensor) -> None:
        self._owner = weakref.ref(x._base if x._is_view() else x)
        self._layout = x.shape, x.stride(), x.storage_offset()
        self._version = version(x)

    def tensor(self) -> Tensor | None:
        owner = self._owner()
        if owner is None or version(owner) != self._version:
            return None
        return owner.detach().as_strided(*self._layout)


def _copy_or_borrow(x: Tensor | None) -> Tensor | _Borrowed | None:
    if x is None or x.numel() * x.element_size() <= _MAX_COPY:
        return x if x is None else x.detach().clone()
    return None if torch.compiler.is_compiling() else _Borrowed(x)


class LastBatch:
    """The batch that a miner saw last, whose kept pairs or triplets are counted on request.

    By then the step may be over, its memory needed elsewhere, and embeddings that are parameters updated. So
    small tensors are copied, and large embeddings or a large queue are not kept alive.
    """

    def __init__(
        self,
        mined: Mined,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> None:
        self._counts: tuple[int, ...] | None = None
        self._kind, self._rule = type(mined), mined.rule | {"num_valid_refs": mined.num_valid_refs}
        self._square = ref_emb is None
        self._batch = [_copy_or_borrow(x) for x in (embeddings, labels, ref_emb, ref_labels)]
        self._mined = None if torch.compiler.is_compiling() else weakref.ref(mined)

    def _mine_again(self) -> Mined | None:
        batch = [x.tensor() if isinstance(x, _Borrowed) else x for x in self._batch]
        if all(x is not None for x in batch[: 2 if self._square else 4]):
            return self._kind(*batch, **self._rule)
        return None if self._mined is None else self._mined()

    def counts(self) -> tuple[int, ...]:
        """The numbers of kept positives and negatives, or of triplets; synchronises with the device."""
        if self._counts is None:
            mined = self._mine_again()
            if mined is None:
                names = "num_triplets" if self._kind.names[0] == "anchors" else "num_pos_pairs, num_neg_pairs"
                raise RuntimeError(
                    f"{names}: expected the last batch to be alive and unchanged, since a miner copies no "
                    "tensor above 4 MiB; read the counts earlier, or use pair_counts=True"
                )
            self._counts = mined.counts()
            self._batch.clear()
        return self._counts


class Miner(nn.Module):
    """Base class of the miners: options are attributes, validated when set; the last batch is remembered."""

    similarity: Similarity = option()
    normalize_embeddings: bool | None = option()
    collect_stats: bool = option()

    kind: ClassVar[type[Mined]]  # what it returns
    stats: ClassVar[tuple[str, ...]] = ()  # attributes that collect_stats sets
    checks: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {}  # of the options, by name

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            cls.__init__ = with_known_names(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options: dict[str, Any] = {}
        self._last: LastBatch | None = None
        self._collected: dict[str, float] = {}
        for name, value in options.items():
            self.set_option(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).stats:
            return self.__dict__.get("_collected", {}).get(name, 0)
        return super().__getattr__(name)

    def get_option(self, name: str) -> Any:
        return self._options[name]

    def set_option(self, name: str, value: Any) -> None:
        if name == "similarity":
            check_choice(name, value, SIMILARITIES)
        elif name == "normalize_embeddings":
            if value is not None:
                check_flag(name, value)
        elif name == "collect_stats":
            check_flag(name, value)
        else:
            self.checks[name](name, value)
        self._options = {**self._options, name: value}

    @property
    def measure(self) -> str:
        """The similarity as the ops name it."""
        return measure(self.similarity, self.normalize_embeddings)

    def _find(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        num_valid_refs: Tensor | None,
    ) -> Mined:
        raise NotImplementedError

    def _compute_stats(self, mined: Any) -> Mapping[str, float]:
        """The values of ``stats`` for a batch."""
        return {}

    def mine(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        num_valid_refs: Tensor | None = None,
    ) -> Any:
        """As :meth:`forward`, with the first ``num_valid_refs`` rows of ``ref_emb``."""
        batch = embeddings, labels, ref_emb, ref_labels
        mined = self._find(*batch, num_valid_refs)
        if self.collect_stats:
            self._collected = dict(self._compute_stats(mined))
        self._last = None if torch.compiler.is_exporting() else LastBatch(mined, *batch)
        return mined

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Mines a batch; the indices are computed when the result is read.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is.
        """
        return self.mine(embeddings, labels, ref_emb, ref_labels)

    def _counted(self, lists: int, position: int) -> int:
        """The count at ``position`` of a miner that returns so many lists; 0 for the others."""
        has_it = self._last is not None and len(self.kind.names) == lists
        return self._last.counts()[position] if has_it else 0

    @property
    def num_pos_pairs(self) -> int:
        """The number of positive pairs kept in the last batch, 0 if triplets were; synchronises with the
        device."""
        return self._counted(4, 0)

    @property
    def num_neg_pairs(self) -> int:
        """The number of negative pairs kept in the last batch, 0 if triplets were; synchronises with the
        device."""
        return self._counted(4, 1)

    @property
    def num_triplets(self) -> int:
        """The number of triplets kept in the last batch, 0 if pairs were; synchronises with the device."""
        return self._counted(3, 0)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": None}  # copies and pickles do not hold the batch

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options.items())


class MultiSimilarityMiner(Miner, Generic[_Result]):
    """The hard pairs of a batch by the multi-similarity rule.

    A positive is kept when ``s - epsilon < max(negatives of its row)``, a negative when
    ``s + epsilon > min(positives of its row)``; a row without positives or without negatives keeps nothing.
    Wang et al., *Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning*, CVPR 2019,
    section 4.1.

    A loss of dml_cuda that gets the result with the same embeddings mines inside its kernel and materialises
    no indices: this costs no more than ``epsilon=`` of the loss. Any other loss reads the indices, which
    computes them.

    Args:
        epsilon: the margin.
        similarity: ``"cosine"``, ``"dot"`` or ``"euclidean"``, as for the losses. With distances the rule is
            that of pytorch-metric-learning's miner with ``LpDistance``.
        normalize_embeddings: as for the losses; ``None`` is the default of the similarity.
        pair_counts: also return how many pairs each row keeps.
        collect_stats: accepted as pytorch-metric-learning's miner does, which collects none.

    All are attributes too, readable and settable.

    >>> miner, loss_fn = MultiSimilarityMiner(epsilon=0.1), MultiSimilarityLoss()
    >>> pairs = miner(embeddings, labels)
    >>> loss = loss_fn(embeddings, labels, pairs)
    """

    epsilon: float = option()
    pair_counts: bool = option()

    kind = MinedPairs
    checks: ClassVar = {"epsilon": check_number, "pair_counts": check_flag}

    @overload
    def __init__(
        self: "MultiSimilarityMiner[MinedPairs]",
        epsilon: float = ...,
        *,
        similarity: Similarity = ...,
        normalize_embeddings: bool | None = ...,
        pair_counts: Literal[False] = ...,
        collect_stats: bool = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: "MultiSimilarityMiner[tuple[MinedPairs, PairCounts]]",
        epsilon: float = ...,
        *,
        similarity: Similarity = ...,
        normalize_embeddings: bool | None = ...,
        pair_counts: Literal[True],
        collect_stats: bool = ...,
    ) -> None: ...

    def __init__(
        self,
        epsilon: float = 0.1,
        *,
        similarity: Similarity = "cosine",
        normalize_embeddings: bool | None = None,
        pair_counts: bool = False,
        collect_stats: bool = False,
    ) -> None:
        options = {"epsilon": epsilon, "similarity": similarity, "normalize_embeddings": normalize_embeddings}
        super().__init__(**options, pair_counts=pair_counts, collect_stats=collect_stats)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> _Result:
        """Mines a batch; the indices are computed when the result is read.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is.

        Returns:
            :class:`dml_cuda.MinedPairs`; with ``pair_counts`` a tuple of that and
            :class:`dml_cuda.PairCounts`.
        """
        pairs = self.mine(embeddings, labels, ref_emb, ref_labels)
        return (pairs, pairs.pair_counts()) if self.pair_counts else pairs  # type: ignore[return-value]

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(
            self,
            embeddings: Tensor,
            labels: Tensor,
            ref_emb: Tensor | None = None,
            ref_labels: Tensor | None = None,
        ) -> _Result: ...

    def _find(self, embeddings, labels, ref_emb, ref_labels, num_valid_refs) -> MinedPairs:
        rule = {"epsilon": self.epsilon, "similarity": self.measure, "num_valid_refs": num_valid_refs}
        return mined_pairs(embeddings, labels, ref_emb, ref_labels, **rule)

    def extra_repr(self) -> str:
        shown = ("epsilon", "similarity", "normalize_embeddings")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
