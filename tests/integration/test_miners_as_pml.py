"""What every miner has, as pytorch-metric-learning's do: collect_stats and three counters."""

import inspect

import pytest
import torch

import dml_cuda
from dml_cuda import losses, miners
from dml_cuda.miners.pairs import Miner

NAMES = [name for name in dml_cuda.__all__ if name.endswith("Miner")]
COUNTERS = ("num_pos_pairs", "num_neg_pairs", "num_triplets")


@pytest.mark.parametrize("name", NAMES)
def test_counters(name):
    miner = getattr(dml_cuda, name)()
    assert [getattr(miner, counter) for counter in COUNTERS] == [0, 0, 0]
    lists = tuple(miner(torch.randn(12, 4), torch.arange(12) // 3))
    expected = [0, 0, len(lists[0])] if len(lists) == 3 else [len(lists[0]), len(lists[2]), 0]
    assert [getattr(miner, counter) for counter in COUNTERS] == expected
    theirs = pytest.importorskip("pytorch_metric_learning.miners")
    if name != "DistanceWeightedMiner":  # draws
        twin = getattr(theirs, name)()
        twin(torch.randn(12, 4), torch.arange(12) // 3)
        assert [bool(getattr(twin, counter, 0)) for counter in COUNTERS] == [
            bool(count) for count in expected
        ]


@pytest.mark.parametrize("name", NAMES)
def test_collect_stats(name):
    kind = getattr(dml_cuda, name)
    assert "collect_stats" in inspect.signature(kind).parameters
    assert kind().collect_stats is False
    miner = kind(collect_stats=True)
    miner(torch.randn(12, 4), torch.arange(12) // 3)
    assert miner.collect_stats is True
    assert all(isinstance(getattr(miner, stat), float) for stat in kind.stats)
    miner.collect_stats = False
    with pytest.raises(TypeError, match="collect_stats: expected True or False, got int"):
        miner.collect_stats = 1


def test_every_miner_is_under_miners():
    public = {
        name for name, value in vars(dml_cuda).items() if isinstance(value, type) and issubclass(value, Miner)
    }
    results = {"MinedPairs", "MinedTriplets", "PairCounts", "SelectedPairs"}
    assert set(miners.__all__) == set(dir(miners)) == public | results
    assert all(getattr(miners, name) is getattr(dml_cuda, name) for name in miners.__all__)


def test_every_loss_is_under_losses():
    public = {name for name in dml_cuda.__all__ if name.endswith("Loss")}
    assert set(losses.__all__) == set(dir(losses)) == public
    assert all(getattr(losses, name) is getattr(dml_cuda, name) for name in losses.__all__)
    with pytest.raises(AttributeError, match=r"dml_cuda\.losses"):
        losses.NoLoss  # noqa: B018


def test_type_checkers_see_the_same_names():
    for package in (losses, miners):
        stub = (inspect.getsourcefile(package) or "") + "i"
        with open(stub) as file:
            shown = {line.rsplit(" as ", 1)[1].strip() for line in file}
        assert shown == set(package.__all__)
