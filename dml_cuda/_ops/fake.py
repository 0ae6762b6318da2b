"""Registers fake kernels: what torch.compile learns of an op's results without running it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  loading it registers torch.ops.dml_cuda


def fake_kernel(name: str) -> Callable[[Callable], Callable]:
    """Registers a function of an op's arguments, given as one object with the names of the schema."""
    arguments = getattr(torch.ops.dml_cuda, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments}

    def register(results: Callable[[SimpleNamespace], Any]) -> Callable:
        def fake(*given, **named):
            return results(SimpleNamespace(**{**defaults, **dict(zip(names, given, strict=False)), **named}))

        torch.library.register_fake(f"dml_cuda::{name}", fake)
        return results

    return register


def has_columns(points: Tensor) -> bool:
    """Whether points ``[N, D]`` are the columns of a matrix with contiguous rows, as csrc/torch/columns.h
    says."""
    (rows, dim), (row, column) = points.shape, points.stride()
    return rows > 1 and dim > 1 and row == 1 and column >= rows


def gradient_if(needed: bool, points: Tensor | None, source: Tensor) -> Tensor:
    """A gradient of ``points``, in columns where they are, or ``[0]`` where none is needed."""
    if needed and points is not None and has_columns(points):
        return source.new_empty(points.shape[::-1]).T
    return like_if(needed, points, source)


def like_if(needed: bool, points: Tensor | None, source: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient of ``points`` where it is needed, else ``[0]``, as the ops return it."""
    shape = points.shape if needed and points is not None else (0,)
    return source.new_empty(shape, dtype=dtype)
