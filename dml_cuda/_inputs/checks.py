"""Argument checks. Every error names the argument, what was expected and what was passed."""

import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from torch import Tensor

from . import autocast as _autocast
from .traced import is_traced

Similarity = Literal["cosine", "dot", "euclidean"]
Reduction = Literal["mean", "mean_nonzero", "mean_valid", "sum", "none"]
Backend = Literal["auto", "fused", "reference"]
SIMILARITIES: tuple[str, ...] = get_args(Similarity)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
BACKENDS: tuple[str, ...] = get_args(Backend)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, one of {', '.join(choices)}; got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_number(name: str, value: object) -> None:
    """A finite number. Uses comparisons, which torch.compile can trace for symbolic numbers."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not isinstance(value, int | float):  # NumPy compares its shorter types in their own range
        value = float(value)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_above_zero(name: str, value: object) -> None:
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")


def is_per_class(value: object) -> bool:
    """Whether a parameter has a number for each class."""
    return isinstance(value, Tensor) and value.ndim == 1 and value.shape[0] != 1


def check_parameter(
    name: str, value: object, check: Callable[[str, object], None], per_class: bool = False
) -> None:
    """A parameter of a loss: a number, or a tensor with one, whose value is checked where it can be known
    without waiting for a device. ``per_class``: or one for each class."""
    if not isinstance(value, Tensor) or check is check_flag:
        check(name, value)
        return
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    of_classes = per_class and is_per_class(value)
    # [1] as fully_shard takes it, which has no place for a scalar.
    if not of_classes and (value.numel() != 1 or value.ndim > 1):
        shape, or_classes = list(value.shape), ", or [C]" if per_class else ""
        raise ValueError(f"{name}: expected one number, a tensor of shape [] or [1]{or_classes}, got {shape}")
    is_sharded = hasattr(value, "full_tensor")  # a DTensor, whose number other processes would have to send
    if value.device.type == "cpu" and value.numel() > 0 and not is_traced(value) and not is_sharded:
        for extreme in value.detach().aminmax() if of_classes else (value,):
            check(name, extreme.item())


def check_count(name: str, value: object, least: int = 1) -> None:
    """A whole number of any integer type, NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _check_points(name: str, points: object) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(
            f"{name}: expected a floating-point tensor of shape [rows, D], got {type(points).__name__}"
        )
    if points.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {points.dtype}")
    if points.ndim != 2:
        raise ValueError(f"{name}: expected shape [rows, D], got {list(points.shape)}")


def _check_labels(name: str, labels: object, points_name: str, points: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected an integer tensor of shape [rows], got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"{name}: expected shape [{points.shape[0]}], got {list(labels.shape)}")
    rows = points.shape[0]
    if labels.shape[0] != rows:
        raise ValueError(
            f"{name}: expected {rows} labels, one for each row of {points_name}; got {labels.shape[0]}"
        )


def check_points(embeddings: Tensor, ref_emb: Tensor | None) -> None:
    """Raises TypeError or ValueError unless these can be rows and columns."""
    _check_points("embeddings", embeddings)
    if ref_emb is None:
        return
    _check_points("ref_emb", ref_emb)
    dim, dtype, device = embeddings.shape[1], embeddings.dtype, embeddings.device
    if ref_emb.shape[1] != dim:
        raise ValueError(f"ref_emb: expected {dim} columns as embeddings have, got {ref_emb.shape[1]}")
    if ref_emb.dtype != dtype and not _autocast.is_on(device):  # which promotes to the wider
        raise TypeError(f"ref_emb: expected {dtype} as embeddings have, got {ref_emb.dtype}")
    if ref_emb.device != device:
        raise ValueError(f"ref_emb: expected device {device} as embeddings have, got {ref_emb.device}")


def check_batch(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Raises TypeError or ValueError for an invalid batch; returns its labels on its device."""
    check_points(embeddings, ref_emb)
    _check_labels("labels", labels, "embeddings", embeddings)
    if labels.device != embeddings.device:
        labels = labels.to(embeddings.device)
    if ref_emb is None and ref_labels is None:
        return labels, None
    if ref_labels is None:
        raise ValueError("ref_labels: expected labels for the rows of ref_emb, got None")
    if ref_emb is None:
        raise ValueError("ref_emb: expected embeddings for ref_labels, got None")
    _check_labels("ref_labels", ref_labels, "ref_emb", ref_emb)
    if ref_labels.device != embeddings.device:
        ref_labels = ref_labels.to(embeddings.device)
    return labels, ref_labels
