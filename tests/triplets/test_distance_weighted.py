"""Distance-weighted sampling: frequencies of the draws against the exact distribution."""

import numpy as np
import pytest
import torch
from cases.data import make_batch
from cases.statistics import chi_squared_is_likely
from oracle import triplets as truth

import dml_cuda
from dml_cuda import DistanceWeightedMiner, MarginLoss, TripletMarginLoss
from dml_cuda._ops.triplets import Rows, Selection, select
from dml_cuda.miners.mined import Mined
from dml_cuda.reference import triplets

DIMS = (3, 4, 16, 128, 512)


def probabilities(x, y, cutoff, nonzero_loss_cutoff):
    """``[N, N]`` how likely each column is drawn for a row; zeros where none is."""
    d = truth.distances(x, x, "euclidean")
    logs = np.full(d.shape, -np.inf)
    for i, (_, negatives) in enumerate(truth.pairs(y.numpy())):
        for j in negatives:
            logs[i, j] = truth.log_weights(d[i, j], x.shape[1], cutoff, nonzero_loss_cutoff)
    most = logs.max(1, keepdims=True)
    weights = np.exp(logs - np.where(np.isinf(most), 0, most))
    return torch.tensor(weights / np.maximum(weights.sum(1, keepdims=True), 1e-300))


def spread_batch(n, dim, dtype=torch.float64):
    """Rows of two kinds of classes, far and near, so that all distances from 0.2 to 1.9 are there."""
    torch.manual_seed(dim)
    y = torch.arange(n) // 4
    x = torch.nn.functional.normalize(torch.randn(n, dim, dtype=dtype), dim=1)
    near = torch.rand(n, 1, dtype=dtype)
    return near * x[:1] + (1 - near) * x, y[torch.randperm(n)]


def draw(x, y, times, cutoff, nonzero_loss_cutoff):
    """``[N, N]`` how often each column is drawn for a row."""
    selection = Selection(negatives="drawn", cutoff=cutoff, nonzero_loss_cutoff=nonzero_loss_cutoff)
    n = len(x)
    rows = Rows(x, y, None, None, None, None)
    anchors = torch.arange(n).repeat_interleave(times)
    seed = torch.tensor([20241123])
    drawn = select(
        "drawn_negative", rows, selection, "euclidean", seed=seed, anchors=anchors, positives=anchors
    )
    there = drawn >= 0
    counts = torch.bincount(anchors[there] * n + drawn[there], minlength=n * n).view(n, n)
    assert bool((counts.sum(1) % times == 0).all())  # a row has all of its draws, or none
    return counts


@pytest.mark.parametrize("cutoffs", [(0.5, 1.4), (0.3, 1.0), (0.9, 1.1), (0.5, 2.5), (0.6, 0.6)])
@pytest.mark.parametrize("dim", DIMS)
def test_frequencies(dim, cutoffs):
    x, y = spread_batch(24, dim)
    expected = probabilities(x, y, *cutoffs)
    times = 3000
    counts = draw(x, y, times, *cutoffs)
    has_any = expected.sum(1) > 0
    assert torch.equal(counts.sum(1) > 0, has_any)
    if cutoffs == (0.6, 0.6):
        assert not has_any.any()
    if cutoffs == (0.3, 1.0) and dim >= 16:
        assert not has_any.all()  # rows that a cutoff leaves empty are tested
        assert has_any.any()
    assert not counts[expected == 0].any()
    for i in has_any.nonzero()[:, 0].tolist():
        assert chi_squared_is_likely(counts[i], expected[i] * times), i


def test_equal_rows_and_zero_rows():
    x, y = spread_batch(20, 8)
    x[:3], x[5] = x[4], 0.0
    expected = probabilities(x, y, 0.5, 1.4)
    counts = draw(x, y, 4000, 0.5, 1.4)
    for i in (expected.sum(1) > 0).nonzero()[:, 0].tolist():
        assert chi_squared_is_likely(counts[i], expected[i] * 4000), i


def test_many_dimensions_leave_no_row_out():
    """Weights that underflow beside another row's are still weights of their own row."""
    x, y = spread_batch(40, 512, torch.float32)
    expected = probabilities(x, y, 0.2, 1.4)
    counts = draw(x, y, 10, 0.2, 1.4)
    assert torch.equal(counts.sum(1) > 0, expected.sum(1) > 0)


def test_the_same_distribution_as_pytorch_metric_learnings():
    """Negatives that its miner draws for each row, by our probabilities."""
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    for dim, cutoffs in ((3, (0.5, 1.4)), (16, (0.5, 1.4)), (64, (0.7, 1.2))):
        x, y = spread_batch(24, dim)
        expected = probabilities(x, y, *cutoffs)
        theirs = miners.DistanceWeightedMiner(*cutoffs)
        counts = torch.zeros(24, 24, dtype=torch.long)
        for _ in range(400):
            anchors, _, negatives = theirs(x, y)
            counts += torch.bincount(anchors * 24 + negatives, minlength=24 * 24).view(24, 24)
        drawn = counts.sum(1)
        assert torch.equal(drawn > 0, expected.sum(1) > 0)
        for i in (drawn > 0).nonzero()[:, 0].tolist():
            assert chi_squared_is_likely(counts[i], expected[i] * drawn[i]), (dim, i)


def test_uniform_numbers():
    """As the hash of the contract has them, computed in Python's integers."""
    mask = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed in (0, 1, 2**62 + 12345):
        rows, draws = torch.arange(50), torch.arange(50).flip(0) ** 2
        found = triplets.uniform(torch.tensor([seed]), rows, draws)
        for i, k, u in zip(rows.tolist(), draws.tolist(), found.tolist(), strict=True):
            x = mix((mix((seed + golden * (i + 1)) & mask) + golden * (k + 1)) & mask)
            assert u == ((x >> 40) + 0.5) * 2**-24


def test_repeatable_and_fresh():
    x, y = make_batch(64, 16)
    miner, loss_fn = DistanceWeightedMiner(nonzero_loss_cutoff=1.8), MarginLoss()
    torch.manual_seed(1)
    first, second = miner(x, y), miner(x, y)
    values = [loss_fn(x, y, mined) for mined in (first, second)]
    assert not torch.equal(first.negatives, second.negatives)
    assert values[0] != values[1]
    torch.manual_seed(1)
    again = miner(x, y), miner(x, y)
    assert [loss_fn(x, y, mined) for mined in again] == values
    for a, b in zip((first, second), again, strict=True):
        assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))
    # One for each positive pair, in order.
    same = (y[:, None] == y) & ~torch.eye(64, dtype=torch.bool)
    anchors, positives = same.nonzero(as_tuple=True)
    assert torch.equal(first.anchors, anchors)
    assert torch.equal(first.positives, positives)
    assert bool((y[first.negatives] != y[first.anchors]).all())


@pytest.mark.parametrize("loss_fn", [MarginLoss(), TripletMarginLoss(0.3), TripletMarginLoss(0.3, swap=True)])
def test_a_loss_sees_the_very_draws_that_are_listed(loss_fn, monkeypatch):
    x, y = make_batch(48, 12, dtype=torch.float64)
    mined = DistanceWeightedMiner(nonzero_loss_cutoff=1.8)(x, y)
    with monkeypatch.context() as patch:
        if not getattr(loss_fn, "swap", False):
            patch.setattr(Mined, "_read", lambda self: pytest.fail("listed"))
        value = loss_fn(x, y, mined)
    torch.testing.assert_close(value, loss_fn(x, y, tuple(mined)))
    reference = type(loss_fn)(**{**loss_fn._values, "backend": "reference"})
    torch.testing.assert_close(reference(x, y, mined), value)


def test_the_seed_comes_from_the_devices_generator():
    x, y = make_batch(16, 4)
    state = torch.random.get_rng_state()
    mined = DistanceWeightedMiner()(x, y)
    assert not torch.equal(torch.random.get_rng_state(), state)
    assert mined.seed.shape == (1,)
    assert mined.seed.dtype == torch.int64
    other = dml_cuda.MinedTriplets(x, y, selection=mined.selection, similarity="euclidean", seed=mined.seed)
    assert all(torch.equal(a, b) for a, b in zip(mined, other, strict=True))
