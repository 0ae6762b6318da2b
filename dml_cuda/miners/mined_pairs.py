"""Mined pairs: the rule and the batch, listed when somebody looks."""

import copyreg
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, SupportsIndex, overload

import torch
from torch import Tensor
from typing_extensions import Self

from .._inputs import autocast as _autocast
from .._inputs.checks import check_batch
from .._inputs.indices import NAMES
from ..reference.pairs import first_columns, full_precision, mine, similarity_matrix, without_self

# Similarities looked at together when pairs are listed: on a CPU they should stay in its cache, on a GPU
# they should keep it busy.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 24

_BATCH = ("embeddings", "ref_emb", "labels", "ref_labels")


class PairCounts(NamedTuple):
    """How many positives and negatives each row keeps, ``[N]`` int64 each."""

    positives: Tensor
    negatives: Tensor


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one, or views of the same numbers."""
    if a is b:
        return True
    if a is None or b is None or torch.compiler.is_compiling():
        return False
    if (a.shape, a.stride(), a.dtype, a.device) != (b.shape, b.stride(), b.dtype, b.device):
        return False
    try:
        return a.data_ptr() == b.data_ptr()
    except RuntimeError:  # without storage, as under torch.func
        return False


def version(x: Tensor | None) -> int | None:
    """Counts the changes in place that a tensor has seen, where that is known."""
    if x is None or torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


class Growing:
    """Numbers collected part by part.

    In few and large pieces of memory: small ones that stay, taken between the large ones that each block of
    similarities needs for a moment, can keep the CPU's allocator from ever using those again.
    """

    def __init__(self, device: torch.device) -> None:
        self._room = torch.empty(0, dtype=torch.long, device=device)
        self._size = 0

    def append(self, part: Tensor) -> None:
        size = self._size + part.shape[0]
        if size > self._room.shape[0]:
            self._room = torch.cat([self.tensor(), self._room.new_empty(2 * size - self._size)])
        self._room[self._size : size] = part
        self._size = size

    def tensor(self) -> Tensor:
        return self._room[: self._size]


class Mined(list[Tensor]):
    """What a miner found in a batch, as lists of indices that are made when looked at.

    Until somebody looks it holds the batch and the rule that mines it; a loss of dml_cuda given it with the
    same batch applies the rule in its kernel and lists nothing. It unpacks, indexes and has the length of
    pytorch-metric-learning's tuple, and its losses take it. Looking waits for the device.

    The rule is that of the batch as it was. Embeddings or labels that were changed in place since are an
    error, unless the lists were looked at before: then they are what was found, whatever happens to the
    batch. Compiled code (``torch.compile``) cannot see such a change: there, look first. A copy, and what
    another process receives, are lists.

    A list, which fills itself, and not a tuple, so that functions that take only true lists and tuples
    (``torch.cat``) take it once it has been looked at.

    Subclasses state their ``rule`` and make their lists in ``_make_lists``.
    """

    names: ClassVar[tuple[str, ...]]  # of the lists

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        similarity: str = "cosine",
        self_index: Tensor | None = None,
        num_valid_refs: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.similarity = similarity
        # Without their graph, which a list of pairs should not keep alive; but a compiler, and a transform
        # of torch.func, know a tensor again only when it is the same.
        compiling = torch.compiler.is_compiling()
        traced = compiling or torch._C._are_functorch_transforms_active()
        keep = (lambda x: x) if traced else Tensor.detach
        self.embeddings = keep(embeddings)
        self.ref_emb = None if ref_emb is None else keep(ref_emb)
        # A compiler knows the miner's points again by these, when it traces a loss of them.
        given = embeddings, ref_emb
        self._given = None if compiling else tuple(x if x is None else weakref.ref(x) for x in given)
        self.labels = labels
        self.ref_labels = ref_labels
        self.self_index, self.num_valid_refs = self_index, num_valid_refs  # as reference.pair_loss has them
        self._looked = self.only_lists = False
        self._versions = self._batch_versions()

    def _is_of(self, embeddings: Tensor, ref_emb: Tensor | None) -> bool:
        """Whether these are the very points that were mined."""
        if torch.compiler.is_compiling() and self._given is not None:
            rows, columns = self._given
            return rows() is embeddings and (ref_emb is None if columns is None else columns() is ref_emb)
        return _is_same(self.embeddings, embeddings) and _is_same(self.ref_emb, ref_emb)

    def rules(self, embeddings: Tensor, ref_emb: Tensor | None) -> bool:
        """Whether the rule, applied to these points, gives the pairs. If not they go by their lists."""
        if not self._is_of(embeddings, ref_emb):
            return False
        if not self._looked:
            self._check_unchanged()
            return True
        return not (self.only_lists or torch.compiler.is_compiling() or self._changed())

    def _batch_versions(self) -> tuple[int | None, ...]:
        return tuple(version(getattr(self, name)) for name in _BATCH)

    def _changed(self) -> list[str]:
        """What of the batch is known to have been changed in place."""
        versions = zip(_BATCH, self._versions, self._batch_versions(), strict=True)
        return [name for name, was, now in versions if None not in (was, now) and was != now]

    def _check_unchanged(self) -> None:
        if changed := self._changed():
            raise RuntimeError(
                f"indices_tuple: {' and '.join(changed)} changed in place since pairs were mined; use, or "
                "look at, mined pairs before that"
            )

    @property
    def rule(self) -> dict[str, Any]:
        """What, given to the class with another batch, mines that by the same rule."""
        return {"similarity": self.similarity}

    def of(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        **own: Tensor | None,
    ) -> Self:
        """What the rule finds in another batch; ``own`` is ``self_index`` and ``num_valid_refs``."""
        return type(self)(embeddings, labels, ref_emb, ref_labels, **self.rule, **own)

    def _blocks(self, measured: bool) -> Iterator[tuple[int, Tensor | None, Tensor, Tensor]]:
        """First row, similarities ``[rows, M]`` if ``measured``, and masks ``[rows, M]`` of the positives and
        the negatives, block after block. The pairs with ``self_index`` are among the positives."""
        self._check_unchanged()
        square = self.ref_emb is None
        labels = self.labels.long()
        ref_labels = labels if square else self.ref_labels.long()
        device = self.embeddings.device
        with torch.no_grad(), _autocast.off(device):
            x, y = self.points()
            area = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
            step = max(1, area // max(1, y.shape[0]))
            for begin in range(0, x.shape[0], step):
                rows = slice(begin, min(begin + step, x.shape[0]))
                positive = labels[rows, None] == ref_labels[None, :]
                negative = ~positive
                if square:
                    positive = without_self(positive, torch.arange(rows.start, rows.stop, device=device))
                if self.num_valid_refs is not None:
                    positive, negative = (
                        first_columns(mask, self.num_valid_refs) for mask in (positive, negative)
                    )
                s = similarity_matrix(x[rows], y, self.similarity) if measured else None
                yield begin, s, positive, negative

    def points(self) -> tuple[Tensor, Tensor]:
        """Rows and columns as similarities are taken of them."""
        points = [self.embeddings] if self.ref_emb is None else [self.embeddings, self.ref_emb]
        dtype = torch.promote_types(points[0].dtype, points[-1].dtype)  # they differ under autocast only
        x, *refs = (full_precision(each.to(dtype), self.similarity) for each in points)
        return x, refs[0] if refs else x

    def without_own(self, begin: int, positive: Tensor) -> Tensor:
        """Takes from the mask ``[rows, M]`` of a block the pairs with ``self_index``."""
        if self.self_index is None:
            return positive
        return without_self(positive, self.self_index[begin : begin + positive.shape[0]])

    def _make_lists(self) -> Iterable[Tensor]:
        raise NotImplementedError

    def counts(self) -> tuple[int, ...]:
        """How many positive and negative pairs, or triplets, there are; waits for the device."""
        return tuple(len(self[k]) for k in range(0, len(self.names), 2 if len(self.names) == 4 else 3))

    def _look(self) -> None:
        if self._looked:
            return
        self._check_unchanged()
        super().extend(self._make_lists())
        self._looked = True

    def __reduce__(self):
        self._look()
        # Whether the batch is still as it was mined cannot be told there: a copy is its lists.
        state = self.__dict__ | {"_given": None, "only_lists": True}
        return copyreg.__newobj__, (type(self),), state, super().__iter__()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Tensor]:
        self._look()
        return super().__iter__()

    @overload
    def __getitem__(self, index: SupportsIndex) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index):
        self._look()
        return super().__getitem__(index)

    def __setitem__(self, index, value) -> None:
        self._look()
        self.only_lists = True
        super().__setitem__(index, value)

    def __reversed__(self) -> Iterator[Tensor]:
        return iter(self[::-1])

    def __add__(self, other: Iterable) -> tuple:
        return (*self, *other)

    def __radd__(self, other: Iterable) -> tuple:
        return (*other, *self)

    def copy(self) -> tuple:
        return tuple(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def _repr(self) -> str:
        """The rule, in words."""
        return f"similarity={self.similarity!r}"

    def __repr__(self) -> str:
        columns = self.embeddings if self.ref_emb is None else self.ref_emb
        rows = self.embeddings.shape[0]
        return f"{type(self).__name__}({self._repr()}, rows={rows}, columns={columns.shape[0]})"


class MinedPairs(Mined):
    """The pairs of a batch: ``(pos_anchors, positives, neg_anchors, negatives)``, made when looked at.

    What :class:`dml_cuda.MultiSimilarityMiner` returns. It unpacks, indexes and has the length 4 of
    pytorch-metric-learning's tuple, with the field names of its version 3, and its losses take it. Until
    somebody looks it holds the batch and the rule that mines it; a loss of dml_cuda given it with the same
    batch applies the rule in its kernel and never lists a pair. Looking lists them block by block, without
    the N x M matrix, and waits for the device.

    The rule is that of the batch as it was. Embeddings or labels that were changed in place since are an
    error, unless the pairs were looked at before: then they are what was found, whatever happens to the
    batch. Compiled code (``torch.compile``) cannot see such a change: there, look first. A copy, and what
    another process receives, are lists.

    Args:
        embeddings, labels, ref_emb, ref_labels: as the losses take them.
        epsilon: the miner's margin; ``None`` for every pair.
        similarity: as the miner takes it.
        self_index: ``[N]`` int64, for each row the row of ``ref_emb`` that is the same point, or -1. Mining
            sees that pair, but it is none: ``torch.arange(N)`` for two views of the same images leaves out
            the pairs (i, i).
        num_valid_refs: int64, one number: only so many rows of ``ref_emb`` take part.

    Attributes:
        pos_anchors, positives: ``[P]`` int64, rows of ``embeddings`` and of ``ref_emb`` (of ``embeddings``
            without it).
        neg_anchors, negatives: ``[Q]`` int64, likewise.
        epsilon: the miner's margin; ``None`` for every pair.
    """

    names = NAMES

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        epsilon: float | None,
        similarity: str = "cosine",
        self_index: Tensor | None = None,
        num_valid_refs: Tensor | None = None,
    ) -> None:
        own = {"similarity": similarity, "self_index": self_index, "num_valid_refs": num_valid_refs}
        super().__init__(embeddings, labels, ref_emb, ref_labels, **own)
        self.epsilon = epsilon

    @property
    def rule(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "similarity": self.similarity}

    def _kept(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, and masks ``[rows, M]`` of the kept positives and negatives, block after block."""
        for begin, s, positive, negative in self._blocks(measured=self.epsilon is not None):
            if s is not None:
                positive, negative = mine(s, positive, negative, self.epsilon)
            yield begin, self.without_own(begin, positive), negative

    def _make_lists(self) -> Iterable[Tensor]:
        found = [Growing(self.embeddings.device) for _ in NAMES]
        for begin, *masks in self._kept():
            for kind, mask in enumerate(masks):
                rows, cols = mask.nonzero(as_tuple=True)
                found[2 * kind].append(rows + begin)
                found[2 * kind + 1].append(cols)
        return [parts.tensor().clone() for parts in found]

    def pair_counts(self) -> PairCounts:
        """How many positives and negatives each row keeps, on the device and without waiting for it."""
        size, device = self.embeddings.shape[0], self.embeddings.device
        counts = PairCounts(*(torch.zeros(size, dtype=torch.long, device=device) for _ in range(2)))
        if self._looked:
            for count, rows in zip(counts, (self[0], self[2]), strict=True):
                count.index_add_(0, rows, torch.ones_like(rows))
            return counts
        for begin, *masks in self._kept():
            for count, mask in zip(counts, masks, strict=True):
                torch.sum(mask, 1, out=count[begin : begin + mask.shape[0]])
        return counts

    def counts(self) -> tuple[int, int]:
        positives, negatives = self.pair_counts()
        return int(positives.sum()), int(negatives.sum())

    def _repr(self) -> str:
        return f"epsilon={self.epsilon}"

    @property
    def pos_anchors(self) -> Tensor:
        return self[0]

    @property
    def positives(self) -> Tensor:
        return self[1]

    @property
    def neg_anchors(self) -> Tensor:
        return self[2]

    @property
    def negatives(self) -> Tensor:
        return self[3]


def mined_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    *,
    epsilon: float | None,
    similarity: str,
    self_index: Tensor | None = None,
    num_valid_refs: Tensor | None = None,
) -> MinedPairs:
    """:class:`MinedPairs` of a batch that is checked first."""
    labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
    rule = {
        "epsilon": epsilon,
        "similarity": similarity,
        "self_index": self_index,
        "num_valid_refs": num_valid_refs,
    }
    return MinedPairs(embeddings, labels, ref_emb, ref_labels, **rule)
