"""Factors of the rows' losses: given row by row, or class by class."""

import torch
from torch import Tensor

from .traced import is_traced


def check_factors(name: str, weights: object, shape: str) -> None:
    """Raises TypeError or ValueError unless ``weights`` is one dimension of numbers without a gradient."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name}: expected a floating-point tensor of shape {shape}, got {got}")
    if weights.ndim != 1:
        raise ValueError(f"{name}: expected shape {shape}, got {list(weights.shape)}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected no gradient, as the losses give none; pass {name}.detach()")


def check_row_weights(weights: object, embeddings: Tensor) -> None:
    """Raises TypeError or ValueError unless ``weights`` has a number for each row of embeddings."""
    rows = embeddings.shape[0]
    check_factors("row_weights", weights, f"[{rows}]")
    if weights.shape[0] != rows:
        raise ValueError(
            f"row_weights: expected {rows} numbers, one for each row of embeddings; got {weights.shape[0]}"
        )
    if weights.device != embeddings.device:
        raise ValueError(f"row_weights: expected on {embeddings.device}, got on {weights.device}")


def weights_of_rows(
    class_weights: Tensor | None, labels: Tensor | None, row_weights: Tensor | None, *, ignore_negative: bool
) -> Tensor | None:
    """``[N]`` the factors of the rows' losses; ``None`` where there are none.

    A label without a class is an error on the CPU; on a GPU, where looking would synchronise, its loss is
    NaN. With ``ignore_negative`` negative labels are rows without a class.
    """
    if class_weights is None:
        return row_weights
    if labels is None:
        raise ValueError("labels: expected them with class_weights, got None")
    if not isinstance(labels, Tensor):
        return row_weights  # the batch's own check says what is wrong
    labels, classes = labels.long(), class_weights.shape[0]
    known = labels < classes if ignore_negative else (labels >= 0) & (labels < classes)
    if labels.device.type == "cpu" and not is_traced(labels) and not bool(known.all()):
        wrong = int(labels[~known][0])
        raise ValueError(f"labels: expected classes in [0, {classes}) as class_weights has, got {wrong}")
    weights = class_weights.to(labels.device)[labels.clamp(0, max(classes - 1, 0))]
    weights = torch.where(known, weights, torch.nan)
    return weights if row_weights is None else weights * row_weights
