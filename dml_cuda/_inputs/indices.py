"""Pairs and triplets as index tensors, in the format of pytorch-metric-learning's miners."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

NAMES = ("pos_anchors", "positives", "neg_anchors", "negatives")
TRIPLET_NAMES = ("anchors", "positives", "negatives")


def _check_list(name: str, index: object) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"indices_tuple: {name}: expected an integer tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32) and index.numel() > 0:  # torch.tensor([]) is float
        raise TypeError(f"indices_tuple: {name}: expected int64 or int32 indices, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"indices_tuple: {name}: expected one dimension, got shape {list(index.shape)}")


def _check_range(name: str, index: Tensor, rows: int, points: str) -> None:
    if index.numel() == 0:
        return
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= rows:
        got = least if least < 0 else most
        raise ValueError(f"indices_tuple: {name}: expected indices of the {rows} rows of {points}, got {got}")


def _check_kinds(indices: tuple[Tensor, ...], columns: int) -> None:
    positives, negatives = (indices[k] * columns + indices[k + 1] for k in (0, 2))
    both = positives[torch.isin(positives, negatives)]
    if both.numel() > 0:
        row, column = divmod(int(both[0]), columns)
        raise ValueError(
            f"indices_tuple: expected each pair to be positive or negative, got ({row}, {column}) as both"
        )


def index_lists(indices_tuple: object) -> tuple[Tensor, ...]:
    """The 3 or 4 lists of ``indices_tuple``, NumPy arrays as tensors. Raises TypeError or ValueError."""
    expected = "indices_tuple: expected a tuple of 4 index tensors (pairs) or 3 (triplets)"
    if isinstance(indices_tuple, Tensor | np.ndarray):  # which unpacks into its rows
        kind, shape = type(indices_tuple).__name__, list(indices_tuple.shape)
        hint = "; pass its columns, tuple(x.T)" if shape[1:] in ([3], [4]) else ""
        raise TypeError(f"{expected}, got one {kind} of shape {shape}{hint}")
    if not isinstance(indices_tuple, Sequence | Iterable):
        raise TypeError(f"{expected}, got {type(indices_tuple).__name__}")
    lists = tuple(indices_tuple)
    if len(lists) not in (3, 4):
        raise ValueError(f"indices_tuple: expected 4 index tensors (pairs) or 3 (triplets), got {len(lists)}")
    lists = tuple(torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in lists)
    for name, index in zip(TRIPLET_NAMES if len(lists) == 3 else NAMES, lists, strict=True):
        _check_list(name, index)
    return lists


def listed_indices(
    indices_tuple: object, embeddings: Tensor, ref_emb: Tensor | None, *, check_range: bool
) -> tuple[Tensor, ...]:
    """Index tensors of triplets (3) or pairs (4), int64, on the device of the embeddings.

    ``check_range`` raises ValueError for an index out of range; it synchronises with a GPU.
    """
    indices = index_lists(indices_tuple)
    names, equal = (TRIPLET_NAMES, ((0, 1), (0, 2))) if len(indices) == 3 else (NAMES, ((0, 1), (2, 3)))
    for a, b in equal:
        if indices[a].shape != indices[b].shape:
            raise ValueError(
                f"indices_tuple: {names[b]}: expected as many indices as {names[a]}, {indices[a].shape[0]}; "
                f"got {indices[b].shape[0]}"
            )
    if check_range:
        columns, points = (embeddings, "embeddings") if ref_emb is None else (ref_emb, "ref_emb")
        for name, index in zip(names, indices, strict=True):
            if name.endswith("anchors"):
                _check_range(name, index, embeddings.shape[0], "embeddings")
            else:
                _check_range(name, index, columns.shape[0], points)
    return tuple(index.to(embeddings.device, torch.long).contiguous() for index in indices)


def listed_pairs(
    indices_tuple: object,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    *,
    check_range: bool,
    check_kinds: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors, positives, anchors, negatives of pairs or triplets; see :func:`listed_indices`.

    ``check_kinds`` raises ValueError for a pair that is listed as positive and as negative; it synchronises.
    """
    indices = listed_indices(indices_tuple, embeddings, ref_emb, check_range=check_range)
    pairs = indices if len(indices) == 4 else (indices[0], indices[1], indices[0], indices[2])
    if check_kinds:
        _check_kinds(pairs, (embeddings if ref_emb is None else ref_emb).shape[0])
    return pairs
