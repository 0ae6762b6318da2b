"""The table of ranking losses, and batches of classes of many sizes."""

from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from cases.losses import _not_positive

import dml_cuda
from dml_cuda import functional


@dataclass(frozen=True)
class Ranking:
    """A ranking loss by its name in the op."""

    name: str
    module: type
    defaults: dict  # every parameter
    changed: dict  # every parameter, at another value than its default
    smooth: dict = field(default_factory=dict)  # with which finite differences see the derivative
    learnable: tuple[str, ...] = ()
    similarities: tuple[str, ...] = ("cosine", "dot", "euclidean", "euclidean_raw")
    wrong: dict = field(default_factory=dict)  # as in cases/losses.py

    @cached_property
    def function(self):
        return getattr(functional, f"{self.name}_loss")


def _wrong_cutoffs():
    return {
        "ks number": ({"ks": 4}, TypeError, ["ks", "tuple", "int"]),
        "ks empty": ({"ks": ()}, ValueError, ["ks", "1 to 64", "0"]),
        "ks too many": ({"ks": tuple(range(1, 66))}, ValueError, ["ks", "1 to 64", "65"]),
        "ks 0": ({"ks": (1, 0)}, ValueError, ["ks", "at least 1", "0"]),
        "ks fraction": ({"ks": (1.5,)}, TypeError, ["ks", "integer", "float"]),
    }


RANKINGS = {
    loss.name: loss
    for loss in (
        Ranking(
            "smooth_ap",
            dml_cuda.SmoothAPLoss,
            {"temperature": 0.01},
            {"temperature": 0.05},
            smooth={"temperature": 0.3},
            learnable=("temperature",),
            wrong=_not_positive("temperature"),
        ),
        Ranking(
            "recall_at_k",
            dml_cuda.RecallAtKLoss,
            {"ks": (1, 2, 4, 8, 16), "temperature": 0.01, "temperature_k": 1.0},
            {"ks": (1, 3), "temperature": 0.05, "temperature_k": 2.0},
            smooth={"temperature": 0.3, "temperature_k": 3.0},
            learnable=("temperature", "temperature_k"),
            wrong={**_not_positive("temperature", "temperature_k"), **_wrong_cutoffs()},
        ),
        Ranking(
            "fast_ap",
            dml_cuda.FastAPLoss,
            {"num_bins": 10},
            {"num_bins": 17},
            similarities=("cosine",),
            wrong={
                "num_bins 0": ({"num_bins": 0}, ValueError, ["num_bins", "at least 1", "0"]),
                "num_bins fraction": ({"num_bins": 2.5}, TypeError, ["num_bins", "integer", "float"]),
                "similarity dot": ({"similarity": "dot"}, ValueError, ["similarity", "cosine", "dot"]),
            },
        ),
    )
}
EVERY_RANKING = pytest.mark.parametrize("loss", RANKINGS.values(), ids=RANKINGS)


def classes_of(*sizes):
    """Shuffled labels of classes of these sizes."""
    labels = torch.cat([torch.full((size,), 7 * k - 3) for k, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels))].long()
