"""What a miner returns: the batch and the rule that mines it, as a list that is computed when read."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .._inputs import autocast as _autocast
from ..reference.pairs import first_columns, full_precision, similarity_matrix, without_self
from .lazy_list import LazyList

# Similarities computed together while listing: a block should stay in the CPU's cache, and keep a GPU busy.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 24

_BATCH = ("embeddings", "ref_emb", "labels", "ref_labels")


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one, or views of the same memory."""
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
    """How many in-place changes a tensor has seen, or None where that is unknown."""
    if x is None or torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


class IndexBuffer:
    """Indices collected part by part, ``[size]`` int64.

    The buffer doubles, so there are few and large allocations. Many small ones between the large temporary
    ones of each block of similarities can fragment the CPU allocator, which then never reuses the large ones.
    """

    def __init__(self, device: torch.device) -> None:
        self._storage = torch.empty(0, dtype=torch.long, device=device)
        self._size = 0

    def append(self, part: Tensor) -> None:
        size = self._size + part.shape[0]
        if size > self._storage.shape[0]:
            self._storage = torch.cat([self.view(), self._storage.new_empty(2 * size - self._size)])
        self._storage[self._size : size] = part
        self._size = size

    def view(self) -> Tensor:
        return self._storage[: self._size]


class Mined(LazyList):
    """The pairs or triplets that a miner found in a batch, as index tensors that are computed when read.

    Until then it holds the batch and the mining rule. A loss of dml_cuda that gets it with the same batch
    applies the rule in its kernel, and the indices are never computed. It unpacks, indexes and has the length
    of pytorch-metric-learning's tuple, so that library's losses accept it. Reading it synchronises with the
    device.

    The rule refers to the batch as it was. If embeddings or labels have been changed in place since, using
    the rule raises RuntimeError, unless the indices were read before: they stay as they were found. Code
    compiled by ``torch.compile`` cannot detect such a change: there, read first. Copies and pickles hold
    indices only.

    Subclasses define ``rule`` and ``_compute``.
    """

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
        # Detached, since indices should not keep a graph alive. A compiler and the transforms of torch.func,
        # however, recognise a tensor by identity only.
        compiling = torch.compiler.is_compiling()
        traced = compiling or torch._C._are_functorch_transforms_active()
        keep = (lambda x: x) if traced else Tensor.detach
        self.embeddings = keep(embeddings)
        self.ref_emb = None if ref_emb is None else keep(ref_emb)
        # By these a compiler that traces a loss recognises the points that an eager miner was given.
        points = embeddings, ref_emb
        self._points = None if compiling else tuple(x if x is None else weakref.ref(x) for x in points)
        self.labels = labels
        self.ref_labels = ref_labels
        self.self_index, self.num_valid_refs = self_index, num_valid_refs  # as in reference.pair_loss
        self.only_lists = False  # whether the rule no longer stands for the indices
        self._versions = self._batch_versions()

    def _has_points(self, embeddings: Tensor, ref_emb: Tensor | None) -> bool:
        """Whether these are the points that were mined."""
        if torch.compiler.is_compiling() and self._points is not None:
            rows, columns = self._points
            return rows() is embeddings and (ref_emb is None if columns is None else columns() is ref_emb)
        return _is_same(self.embeddings, embeddings) and _is_same(self.ref_emb, ref_emb)

    def rule_applies(self, embeddings: Tensor, ref_emb: Tensor | None) -> bool:
        """Whether a loss of these points may apply the rule instead of using the indices.

        Raises:
            RuntimeError: the batch was changed in place, and the indices had not been read before.
        """
        if not self._has_points(embeddings, ref_emb):
            return False
        if not self._computed:
            self._check_unchanged()
            return True
        return not (self.only_lists or torch.compiler.is_compiling() or self._changed())

    def _batch_versions(self) -> tuple[int | None, ...]:
        return tuple(version(getattr(self, name)) for name in _BATCH)

    def _changed(self) -> list[str]:
        """The names of the batch's tensors that are known to have been changed in place."""
        versions = zip(_BATCH, self._versions, self._batch_versions(), strict=True)
        return [name for name, was, now in versions if None not in (was, now) and was != now]

    def _check_unchanged(self) -> None:
        if changed := self._changed():
            raise RuntimeError(
                f"indices_tuple: expected the batch that was mined, but {' and '.join(changed)} changed in "
                "place since; use or read what the miner returned before that"
            )

    @property
    def rule(self) -> dict[str, Any]:
        """The keyword arguments with which the class mines another batch by the same rule."""
        return {"similarity": self.similarity}

    def for_batch(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
        num_valid_refs: Tensor | None = None,
    ) -> Self:
        """The same rule for another batch."""
        options = {"self_index": self_index, "num_valid_refs": num_valid_refs}
        return type(self)(embeddings, labels, ref_emb, ref_labels, **self.rule, **options)

    def blocks(self, measured: bool) -> Iterator[tuple[int, Tensor | None, Tensor, Tensor]]:
        """Yields blocks of rows: the first row, similarities ``[rows, M]`` (None unless ``measured``), and
        masks ``[rows, M]`` of positives and negatives. Positives include the pairs with ``self_index``."""
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
        """Rows ``[N, D]`` and columns ``[M, D]`` as :func:`similarity_matrix` expects them."""
        x, *refs = (full_precision(matrix, self.similarity) for matrix in self.points_of_one_type())
        return x, refs[0] if refs else x

    def points_of_one_type(self) -> list[Tensor]:
        """Rows ``[N, D]``, and columns ``[M, D]`` where they are others."""
        points = [self.embeddings] if self.ref_emb is None else [self.embeddings, self.ref_emb]
        dtype = torch.promote_types(points[0].dtype, points[-1].dtype)  # they differ under autocast only
        return [matrix.to(dtype) for matrix in points]

    def without_self_pairs(self, begin: int, positive: Tensor) -> Tensor:
        """The mask ``[rows, M]`` of a block from row ``begin`` on, without the pairs with ``self_index``."""
        if self.self_index is None:
            return positive
        return without_self(positive, self.self_index[begin : begin + positive.shape[0]])

    def counts(self) -> tuple[int, ...]:
        """The numbers of positive and of negative pairs, or of triplets; synchronises with the device."""
        return tuple(len(self[k]) for k in range(0, len(self.names), 2 if len(self.names) == 4 else 3))

    def _read(self) -> None:
        if not self._computed:
            self._check_unchanged()
        super()._read()

    def _on_replaced(self) -> None:
        self.only_lists = True

    def __reduce__(self) -> tuple:
        restore, (kind, state, items) = super().__reduce__()
        # A copy cannot detect changes of the batch, so it is its indices.
        return restore, (kind, state | {"_points": None, "only_lists": True}, items)

    def _describe(self) -> str:
        """The rule, for ``repr``."""
        return f"similarity={self.similarity!r}"

    def __repr__(self) -> str:
        columns = self.embeddings if self.ref_emb is None else self.ref_emb
        rows = self.embeddings.shape[0]
        return f"{type(self).__name__}({self._describe()}, rows={rows}, columns={columns.shape[0]})"
