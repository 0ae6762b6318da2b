"""Losses of triplets and their miners, beside pytorch-metric-learning's and beside a loss of pairs."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from torch import Tensor, nn

import dml_cuda

from .cases import ROWS_PER_CLASS, DropInCase, make_batch
from .losses import LOSSES
from .measure import available_bytes
from .peers import Maker, Step, Unavailable, loss_step, pml_losses, pml_miners, require_pml

_PML_BYTES_PER_TRIPLET = 80  # indices and numbers, about: to tell in time that memory is too small


def _miner(miners: ModuleType, case: DropInCase) -> nn.Module | None:
    if case.part == "semihard":
        return miners.TripletMarginMiner(type_of_triplets="semihard")
    if case.part == "batch_hard":
        return miners.BatchHardMiner()
    if case.part == "distance_weighted":
        return miners.DistanceWeightedMiner()
    return miners.MultiSimilarityMiner(case.epsilon) if case.loss == "multi_similarity" else None


def _step(
    losses: ModuleType, miners: ModuleType, case: DropInCase, embeddings: Tensor, labels: Tensor
) -> Step:
    loss_fn, miner = getattr(losses, LOSSES[case.loss].__name__)(), _miner(miners, case)
    refs = ()
    if case.columns is not None:
        queue, queue_labels = make_batch(replace(case, n=case.columns), embeddings.device, seed=1)
        refs = queue.detach(), queue_labels

    def value(x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(x, y, None if miner is None else miner(x, y, *refs), *refs)

    return loss_step(case, value, embeddings, labels)


def _check_triplets(case: DropInCase, embeddings: Tensor) -> None:
    """pytorch-metric-learning lists every triplet, of which its miners choose."""
    columns = case.columns or case.n
    triplets = case.n * ROWS_PER_CLASS * columns
    if case.part in ("batch_hard", "distance_weighted") or case.loss == "multi_similarity":
        return
    needed = triplets * _PML_BYTES_PER_TRIPLET
    if needed > available_bytes(embeddings.device):
        raise Unavailable(f"needs {needed / 2**30:,.0f} GiB")


def _ours(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    return _step(dml_cuda, dml_cuda, case, embeddings, labels)


def _theirs(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    require_pml()
    _check_triplets(case, embeddings)
    return _step(pml_losses, pml_miners, case, embeddings, labels)


_BOTH: dict[str, Callable[..., Step]] = {"fused": _ours, "pml": _theirs}
TRIPLET_PARTS: dict[str, dict[str, Maker]] = dict.fromkeys(
    ("every", "semihard", "batch_hard", "distance_weighted", "bank"), _BOTH
)
