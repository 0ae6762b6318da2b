"""The log-sum-exp over each row's negatives, which other losses are made of."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .._inputs.checks import check_above_zero
from .._ops.evaluate import of_rows
from ._formula import Formula, Pairs


class NegativesLSE(Formula):
    """log sum exp(s / temperature) over a row's negatives, 0 without any."""

    name = "negatives_lse"
    parameters: ClassVar = {"temperature": check_above_zero}

    @staticmethod
    def row(pos: Pairs, neg: Pairs, temperature: float) -> Tensor:
        return torch.where(neg.count > 0, neg.lse(neg.s / temperature), 0.0)


def _have_negatives(labels: Tensor, batch: Any) -> Tensor:
    """``[N]`` whether rows of these labels have a negative among the batch's columns."""
    columns = batch.labels if batch.ref_labels is None else batch.ref_labels
    if columns.shape[0] == 0:
        return torch.zeros_like(labels, dtype=torch.bool)
    columns = columns.long()
    if batch.num_valid_refs is not None:
        places = torch.arange(columns.shape[0], device=columns.device)
        columns = torch.where(places < batch.num_valid_refs, columns, columns[0])
    return (columns.amin() != labels) | (columns.amax() != labels)


def negatives_lse(call: Any, batch: Any, temperature: float | Tensor) -> Tensor:
    """``[N]`` log sum exp(s / temperature) over each row's negatives by the kernel, -inf without any."""
    value = of_rows(call, NegativesLSE, [temperature], batch)
    return torch.where(_have_negatives(batch.labels.long(), batch), value, -torch.inf)
