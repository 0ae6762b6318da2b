"""The parts that stand in for pytorch-metric-learning's classes, beside what they replace.

What a part does is written once and run with the classes of either package.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dml_cuda

from .cases import DropInCase, make_batch
from .losses import CLASS_LOSSES
from .measure import available_bytes
from .peers import Maker, Step, Unavailable, loss_step, pml_losses, pml_miners, require_pml

_TRIPLETS_PER_ANCHOR = 100  # as pytorch-metric-learning's triplet losses take by default
_PML_BYTES_PER_PAIR = 64  # of batch and queue, about: to tell in time that memory is too small


class _Classes(NamedTuple):
    """What a package offers."""

    multi_similarity: type
    circle: type
    miner: type
    memory: type


def _ours() -> _Classes:
    return _Classes(
        dml_cuda.MultiSimilarityLoss,
        dml_cuda.CircleLoss,
        dml_cuda.MultiSimilarityMiner,
        dml_cuda.CrossBatchMemory,
    )


def _pml() -> _Classes:
    require_pml()
    return _Classes(
        pml_losses.MultiSimilarityLoss,
        pml_losses.CircleLoss,
        pml_miners.MultiSimilarityMiner,
        pml_losses.CrossBatchMemory,
    )


def _with_both(part: Callable[..., Step]) -> dict[str, Maker]:
    return {"fused": lambda *batch: part(_ours(), *batch), "pml": lambda *batch: part(_pml(), *batch)}


def _list(classes: _Classes, case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """The miner, and a look at its pairs."""
    miner = classes.miner(case.epsilon)

    def step():
        positives, _, negatives, _ = miner(embeddings, labels)
        return (torch.tensor([len(positives), len(negatives)]),)

    return step


def _count(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """The pairs that each row keeps, by the miner."""
    miner = dml_cuda.MultiSimilarityMiner(case.epsilon)
    return lambda: (torch.stack(miner(embeddings, labels).pair_counts()),)


def _count_listed(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """The pairs that each row keeps, from the pairs that pytorch-metric-learning's miner lists."""
    miner = _pml().miner(case.epsilon)

    def step():
        anchors = miner(embeddings, labels)[::2]
        return (torch.stack([torch.bincount(rows, minlength=case.n) for rows in anchors]),)

    return step


def _given(classes: _Classes, case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """A loss of pairs or triplets that pytorch-metric-learning listed beforehand."""
    require_pml()
    if case.part == "pairs":
        indices = pml_miners.MultiSimilarityMiner(case.epsilon)(embeddings, labels)
    else:
        from pytorch_metric_learning.utils.loss_and_miner_utils import get_random_triplet_indices

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            triplets = get_random_triplet_indices(labels.cpu(), t_per_anchor=_TRIPLETS_PER_ANCHOR)
        indices = tuple(index.to(labels.device) for index in triplets)
    loss_fn = getattr(classes, case.loss)()
    return loss_step(case, lambda x, y: loss_fn(x, y, indices), embeddings, labels)


def _mined(classes: _Classes, case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """A loss and its miner, as one writes them with either package."""
    loss_fn, miner = getattr(classes, case.loss)(), classes.miner(case.epsilon)
    return loss_step(case, lambda x, y: loss_fn(x, y, miner(x, y)), embeddings, labels)


def _fill(memory: nn.Module, embeddings: Tensor, labels: Tensor) -> None:
    """A full queue, without the steps that would fill it."""
    memory.to(embeddings.device)
    memory.embedding_memory.copy_(embeddings)
    memory.label_memory.copy_(labels)
    if isinstance(memory, dml_cuda.CrossBatchMemory):
        memory.count.fill_(len(labels))
    else:
        memory.has_been_filled = True


def _memory(classes: _Classes, case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """A batch against a full queue, which stays as it is: batches take turns, each replacing itself."""
    needed = case.n * case.columns * _PML_BYTES_PER_PAIR
    if classes.memory is not dml_cuda.CrossBatchMemory and needed > available_bytes(embeddings.device):
        raise Unavailable(f"needs {needed / 2**30:.1f} GiB")
    queue, queue_labels = make_batch(replace(case, n=case.columns), embeddings.device)
    queue = queue.detach()
    loss_fn, miner = getattr(classes, case.loss)(), classes.miner(case.epsilon)
    memory = classes.memory(loss_fn, case.d, case.columns, miner)
    _fill(memory, queue, queue_labels)
    turns = cycle(zip(queue.split(case.n), queue_labels.split(case.n), strict=True))

    def step():
        batch, batch_labels = next(turns)
        batch = batch.clone().requires_grad_()
        loss = memory(batch, batch_labels)
        return loss.detach(), *torch.autograd.grad(loss, batch)

    return step


def _classifier(make: Callable[..., nn.Module], case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """A class-level loss of ``case.columns`` classes, with the gradient of their weights."""
    head = make(num_classes=case.columns, embedding_size=case.d)
    (weight,) = head.parameters()
    # Drawn by themselves: filled in place they would depend on how a package lays its weights out.
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data.copy_(drawn)
    head.to(embeddings.device)
    classes = labels % case.columns

    def step():
        loss = head(embeddings, classes)
        return loss.detach(), *torch.autograd.grad(loss, (embeddings, weight))

    return step


def _fused_classifier(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    return _classifier(CLASS_LOSSES[case.loss], case, embeddings, labels)


def _dense_classifier(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """The readable PyTorch reference, which stores the matrix of rows and classes."""
    make = partial(CLASS_LOSSES[case.loss], backend="reference")
    return _classifier(make, case, embeddings, labels)


def _pml_classifier(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    require_pml()
    make = getattr(pml_losses, CLASS_LOSSES[case.loss].__name__, None)
    if make is None:
        raise Unavailable("pytorch-metric-learning has no such loss")
    return _classifier(make, case, embeddings, labels)


def _classifier_matmuls(case: DropInCase, embeddings: Tensor, labels: Tensor) -> Step:
    """The matmuls alone, into memory already there: S = X W^T, S W and S^T X."""
    x = F.normalize(embeddings.detach(), dim=1)
    w = F.normalize(torch.randn(case.columns, case.d, dtype=x.dtype).to(x.device), dim=1)
    s, by_row, by_class = x.new_empty(case.n, case.columns), torch.empty_like(x), torch.empty_like(w)

    def step():
        torch.mm(x, w.T, out=s)
        torch.mm(s, w, out=by_row)
        torch.mm(s.T, x, out=by_class)
        return ()

    return step


PARTS: dict[str, dict[str, Maker]] = {
    "list": _with_both(_list),
    "count": {"fused": _count, "pml": _count_listed},
    "pairs": _with_both(_given),
    "triplets": _with_both(_given),
    "mined": _with_both(_mined),
    "memory": _with_both(_memory),
    "classifier": {
        "matmuls": _classifier_matmuls,
        "fused": _fused_classifier,
        "reference": _dense_classifier,
        "pml": _pml_classifier,
    },
}
