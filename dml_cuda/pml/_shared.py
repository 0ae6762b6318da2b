"""Distances and reducers of pytorch-metric-learning, translated into the options of dml_cuda."""

from typing import Any

import torch
from torch import Tensor

try:
    from pytorch_metric_learning import distances, reducers
except ImportError as error:
    raise ImportError(
        'dml_cuda.pml needs pytorch-metric-learning 2.9: pip install "pytorch-metric-learning>=2.9,<3"'
    ) from error

from .._warnings import warn_once

_REDUCTIONS = {
    reducers.MeanReducer: "mean",
    reducers.AvgNonZeroReducer: "mean_nonzero",
    reducers.SumReducer: "sum",
}


def similarity_options(distance: distances.BaseDistance) -> dict[str, Any] | None:
    """The options equivalent to a distance, or None if the kernels do not support it."""
    if distance.power != 1 or (distance.p != 2 and distance.normalize_embeddings):
        return None
    kind = type(distance)
    if kind is distances.LpDistance and distance.p == 2:
        return {"similarity": "euclidean", "normalize_embeddings": bool(distance.normalize_embeddings)}
    if kind in (distances.CosineSimilarity, distances.DotProductSimilarity):
        return {"similarity": "cosine" if distance.normalize_embeddings else "dot"}
    return None


def warn_unsupported(module: torch.nn.Module, reason: str) -> None:
    """Warns once for each class and reason."""
    kind = f"{type(module).__name__} with {reason}"
    warn_once(f"dml_cuda has no kernel for {kind}: pytorch-metric-learning computes it")


def collect_norms(distance: distances.BaseDistance, embeddings: Tensor, ref_emb: Tensor) -> None:
    """Collects the statistics of norms that a distance collects when it is called."""
    distance.reset_stats()
    if distance.collect_stats:
        points = embeddings, ref_emb
        distance.set_default_stats(*points, *(distance.maybe_normalize(x) for x in points))


def reducer_of(reducer: reducers.BaseReducer, name: str) -> reducers.BaseReducer:
    """The reducer of the sub-loss ``name``."""
    if type(reducer) is reducers.MultipleReducers:
        return dict(reducer.reducers.items()).get(name, reducer.default_reducer)
    return reducer


def reduction_name(reducer: reducers.BaseReducer, name: str) -> str | None:
    """The reduction equivalent to the reducer of the sub-loss ``name``, or None if there is none."""
    reducer = reducer_of(reducer, name)
    if getattr(reducer, "collect_stats", False):
        return None
    if isinstance(reducer, reducers.AvgNonZeroReducer) and (reducer.low, reducer.high) != (0, None):
        return None
    return _REDUCTIONS.get(type(reducer))
