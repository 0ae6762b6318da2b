"""A row that is not finite gives NaN: no miner and no merge of partial results may hide it."""

import pytest
import torch
from cases.losses import EVERY_LOSS

import dml_cuda

NAN, INF = float("nan"), float("inf")
MINERS = {
    "MultiSimilarityMiner": lambda: dml_cuda.MultiSimilarityMiner(0.1),
    "BatchHardMiner": dml_cuda.BatchHardMiner,
    "PairMarginMiner": lambda: dml_cuda.PairMarginMiner(0.1, 1.0),
    "DistanceWeightedMiner": dml_cuda.DistanceWeightedMiner,
    **{
        f"BatchEasyHardMiner {pos} {neg}": lambda pos=pos, neg=neg: dml_cuda.BatchEasyHardMiner(pos, neg)
        for pos, neg in (
            ("hard", "easy"),
            ("easy", "semihard"),
            ("semihard", "hard"),
            ("all", "hard"),
            ("easy", "all"),
        )
    },
    "BatchEasyHardMiner within": lambda: dml_cuda.BatchEasyHardMiner("hard", "hard", (0.1, 1.2), (0.1, 1.2)),
    **{
        f"TripletMarginMiner {kind}": lambda kind=kind: dml_cuda.TripletMarginMiner(0.2, kind)
        for kind in ("all", "hard", "semihard", "easy")
    },
}
LOSSES = {
    "MultiSimilarityLoss": dml_cuda.MultiSimilarityLoss,
    "ContrastiveLoss": dml_cuda.ContrastiveLoss,
    "NTXentLoss": dml_cuda.NTXentLoss,
    "TripletMarginLoss": dml_cuda.TripletMarginLoss,
    "TripletMarginLoss swap": lambda **options: dml_cuda.TripletMarginLoss(swap=True, **options),
    "MarginLoss": dml_cuda.MarginLoss,
}


def batch_with(value, singleton, n=24, dim=6):
    """A batch with one row that is not finite, with a class of its own or not."""
    x, labels = torch.randn(n, dim, dtype=torch.float64), torch.arange(n) // 4
    row = 9
    x[row, 2] = value
    if singleton:
        labels[row] = 77
    return x, labels


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("singleton", [False, True])
def test_every_miner_and_loss(miner, loss, backend, value, singleton):
    x, labels = batch_with(value, singleton)
    mined = miner()(x, labels)
    loss_fn = loss(backend=backend)
    assert loss_fn(x, labels, mined).isnan()
    assert loss_fn(
        x, labels, tuple(miner()(x, labels))
    ).isnan()  # as pytorch-metric-learning's losses read it


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
@pytest.mark.parametrize("wrong", ["row", "reference"])
def test_references(miner, wrong):
    x, labels = torch.randn(12, 6), torch.arange(12) // 4
    refs, ref_labels = torch.randn(20, 6), torch.arange(20) // 5
    (x if wrong == "row" else refs)[3] = NAN
    for loss_fn in (dml_cuda.ContrastiveLoss(), dml_cuda.TripletMarginLoss(swap=True)):
        lists = tuple(miner()(x, labels, refs, ref_labels))
        assert loss_fn(x, labels, lists, refs, ref_labels).isnan()


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_finite_batches_mine_the_same(miner):
    """Nothing changes for them, nor for what lies beyond the valid references."""
    x, labels = torch.randn(12, 6), torch.arange(12) // 4
    mined = miner()(x, labels)
    if isinstance(mined, dml_cuda.MinedPairs):
        return
    columns = torch.cat([x, torch.full((3, 6), NAN)])
    masked = mined.for_batch(
        x,
        labels,
        columns,
        torch.cat([labels, labels[:3]]),
        self_index=torch.arange(12),
        num_valid_refs=torch.tensor(12),
    )
    assert all(torch.equal(a, b) for a, b in zip(mined, masked, strict=True))


def test_random_triplets():
    """Even where the row is in no triplet that was drawn."""
    x, labels = batch_with(NAN, singleton=True)
    for _ in range(5):
        assert dml_cuda.TripletMarginLoss(triplets_per_anchor=1)(x, labels).isnan()


# In different pieces of the rows, blocks and tiles of a batch of several thousand rows.
PLACES = (0, 1, 63, 64, 127, 128, 1000, 2047, 2048, 2500, 4095, 4096, 4199)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("value", [NAN, INF])
def test_anywhere_in_a_large_batch(place, epsilon, value):
    x, labels = torch.randn(4200, 3), torch.arange(4200) // 3
    x[place, 1] = value
    x.requires_grad_()
    loss = dml_cuda.MultiSimilarityLoss(epsilon=epsilon)(x, labels)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isnan()
    assert grad.isnan().all()


@EVERY_LOSS
@pytest.mark.parametrize("only", [0, 2500, 4199])
def test_one_row_with_pairs_in_a_large_batch(loss, only):
    """Only two rows have positives, in one piece of the rows, and a row elsewhere is not finite: the whole
    must learn it from that piece."""
    n, dim = 4200, 3
    x, labels = torch.randn(n, dim), torch.arange(n)
    labels[(only + 1) % n] = only
    x[(only + 700) % n] = NAN
    x.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        value = loss.module(reduction=reduction)(x, labels)
        (grad,) = torch.autograd.grad(value, x, torch.ones_like(value))
        assert value[only].isnan() if reduction == "none" else value.isnan()
        assert grad.isnan().all()
