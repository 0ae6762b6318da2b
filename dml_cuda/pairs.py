"""Pairs, as the rule that mines them or as lists of indices."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _autocast
from ._arguments import check_batch
from .reference import first_columns, mine, normalizes, similarity_matrix, unit_rows, without_self

# Similarities looked at together when pairs are listed: on a CPU they should stay in its cache, on a GPU
# they should keep it busy.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 24

_NAMES = ("pos_anchors", "positives", "neg_anchors", "negatives")


class PairCounts(NamedTuple):
    """How many positives and negatives each row keeps, ``[N]`` int64 each."""

    positives: Tensor
    negatives: Tensor


def full_precision(embeddings: Tensor, similarity: str) -> Tensor:
    """``[N, D]`` contiguous, float32 at least; unit rows where the similarity wants them."""
    points = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return (unit_rows(points) if normalizes(similarity) else points).contiguous()


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


def _version(x: Tensor | None) -> int | None:
    """Counts the changes in place that a tensor has seen, where that is known."""
    if x is None or torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


class _Growing:
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


class MinedPairs(list):
    """The pairs of a batch: ``(pos_anchors, positives, neg_anchors, negatives)``, made when looked at.

    What :class:`dml_cuda.MultiSimilarityMiner` returns. It unpacks, indexes and has the length 4 of
    pytorch-metric-learning's tuple, with the field names of its version 3, and its losses take it. Until
    somebody looks it holds the batch and the rule that mines it; a loss of dml_cuda given it with the same
    batch applies the rule in its kernel and never lists a pair. Looking lists them block by block, without
    the N x M matrix, and waits for the device.

    A list, which fills itself, and not a tuple, so that functions that take only true lists and tuples
    (``torch.cat``) take it once it has been looked at.

    Attributes:
        pos_anchors, positives: ``[P]`` int64, rows of ``embeddings`` and of ``ref_emb`` (of ``embeddings``
            without it).
        neg_anchors, negatives: ``[Q]`` int64, likewise.
        epsilon: the miner's margin; ``None`` for every pair.
    """

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        epsilon: float | None,
        similarity: str = "cosine",
        self_ref: Tensor | None = None,
        ref_count: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.similarity = similarity
        # Without their graph, which a list of pairs should not keep alive; but a compiler, and a transform
        # of torch.func, know a tensor again only when it is the same.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        keep = (lambda x: x) if traced else Tensor.detach
        self.embeddings = keep(embeddings)
        self.ref_emb = None if ref_emb is None else keep(ref_emb)
        self.labels = labels
        self.ref_labels = ref_labels
        self.self_ref, self.ref_count = self_ref, ref_count  # as reference.pair_loss has them
        self._versions = _version(embeddings), _version(ref_emb)

    def is_of(self, embeddings: Tensor, ref_emb: Tensor | None) -> bool:
        """Whether these are the very points that were mined."""
        return _is_same(self.embeddings, embeddings) and _is_same(self.ref_emb, ref_emb)

    def check_unchanged(self) -> None:
        now = _version(self.embeddings), _version(self.ref_emb)
        if any(was not in (None, is_now) for was, is_now in zip(self._versions, now, strict=True)):
            raise RuntimeError(
                "indices_tuple: the embeddings were changed in place since they were mined; use, or look at, "
                "mined pairs before that"
            )

    def _blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, and masks ``[rows, M]`` of the kept positives and negatives, block after block."""
        self.check_unchanged()
        square = self.ref_emb is None
        labels = self.labels.long()
        ref_labels = labels if square else self.ref_labels.long()
        device = self.embeddings.device
        with torch.no_grad(), _autocast.off(device):
            points = [self.embeddings] if square else [self.embeddings, self.ref_emb]
            dtype = torch.promote_types(points[0].dtype, points[-1].dtype)  # they differ under autocast only
            x, *refs = (full_precision(each.to(dtype), self.similarity) for each in points)
            y = x if square else refs[0]
            area = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
            step = max(1, area // max(1, y.shape[0]))
            for begin in range(0, x.shape[0], step):
                rows = slice(begin, min(begin + step, x.shape[0]))
                positive = labels[rows, None] == ref_labels[None, :]
                negative = ~positive
                if square:
                    positive = without_self(positive, torch.arange(rows.start, rows.stop, device=device))
                if self.ref_count is not None:
                    positive, negative = (
                        first_columns(mask, self.ref_count) for mask in (positive, negative)
                    )
                if self.epsilon is not None:
                    s = similarity_matrix(x[rows], y, self.similarity)
                    positive, negative = mine(s, positive, negative, self.epsilon)
                if self.self_ref is not None:
                    positive = without_self(positive, self.self_ref[rows])
                yield begin, positive, negative

    def _look(self) -> None:
        if super().__len__() > 0:
            return
        found = [_Growing(self.embeddings.device) for _ in _NAMES]
        for begin, *masks in self._blocks():
            for kind, mask in enumerate(masks):
                rows, cols = mask.nonzero(as_tuple=True)
                found[2 * kind].append(rows + begin)
                found[2 * kind + 1].append(cols)
        super().extend(parts.tensor().clone() for parts in found)

    def pair_counts(self) -> PairCounts:
        """How many positives and negatives each row keeps, on the device and without waiting for it."""
        size, device = self.embeddings.shape[0], self.embeddings.device
        counts = PairCounts(*(torch.empty(size, dtype=torch.long, device=device) for _ in range(2)))
        for begin, *masks in self._blocks():
            for count, mask in zip(counts, masks, strict=True):
                torch.sum(mask, 1, out=count[begin : begin + mask.shape[0]])
        return counts

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Tensor]:
        self._look()
        return super().__iter__()

    def __getitem__(self, index):
        self._look()
        return super().__getitem__(index)

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

    def __repr__(self) -> str:
        columns = self.embeddings if self.ref_emb is None else self.ref_emb
        rows = self.embeddings.shape[0]
        return f"MinedPairs(epsilon={self.epsilon}, rows={rows}, columns={columns.shape[0]})"

    pos_anchors = property(lambda self: self[0])
    positives = property(lambda self: self[1])
    neg_anchors = property(lambda self: self[2])
    negatives = property(lambda self: self[3])


def mined_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    *,
    epsilon: float | None,
    similarity: str,
    self_ref: Tensor | None = None,
    ref_count: Tensor | None = None,
) -> MinedPairs:
    """:class:`MinedPairs` of a batch that is checked first."""
    labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
    rule = {"epsilon": epsilon, "similarity": similarity, "self_ref": self_ref, "ref_count": ref_count}
    return MinedPairs(embeddings, labels, ref_emb, ref_labels, **rule)


def _check_list(name: str, index: object) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"indices_tuple: {name}: expected an integer tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices_tuple: {name}: expected int64 or int32 indices, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"indices_tuple: {name}: expected one dimension, got shape {list(index.shape)}")


def _check_range(name: str, index: Tensor, rows: int, of: str) -> None:
    if index.numel() == 0:
        return
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= rows:
        got = least if least < 0 else most
        raise ValueError(f"indices_tuple: {name}: expected indices of the {rows} rows of {of}, got {got}")


def listed_pairs(
    indices_tuple: object, embeddings: Tensor, ref_emb: Tensor | None, *, check_range: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors, positives, anchors, negatives from pairs or triplets, int64 beside the embeddings.

    ``check_range`` looks at the indices, for which a GPU must be waited for.
    """
    if not isinstance(indices_tuple, Sequence | Iterable):
        raise TypeError(
            "indices_tuple: expected a tuple of 4 index tensors (pairs) or 3 (triplets), got "
            f"{type(indices_tuple).__name__}"
        )
    indices = tuple(indices_tuple)
    if len(indices) == 3:
        names = ("anchors", "positives", "negatives")
        equal = (0, 1), (0, 2)
    elif len(indices) == 4:
        names = _NAMES
        equal = (0, 1), (2, 3)
    else:
        raise ValueError(
            f"indices_tuple: expected 4 index tensors (pairs) or 3 (triplets), got {len(indices)}"
        )
    for name, index in zip(names, indices, strict=True):
        _check_list(name, index)
    for a, b in equal:
        if indices[a].shape != indices[b].shape:
            raise ValueError(
                f"indices_tuple: {names[b]}: expected as many as {names[a]}, {indices[a].shape[0]}; got "
                f"{indices[b].shape[0]}"
            )
    if check_range:
        columns, of = (embeddings, "embeddings") if ref_emb is None else (ref_emb, "ref_emb")
        for name, index in zip(names, indices, strict=True):
            if name.endswith("anchors"):
                _check_range(name, index, embeddings.shape[0], "embeddings")
            else:
                _check_range(name, index, columns.shape[0], of)
    indices = tuple(index.to(embeddings.device, torch.long).contiguous() for index in indices)
    return indices if len(indices) == 4 else (indices[0], indices[1], indices[0], indices[2])
