"""The ranking losses beside pytorch-metric-learning's, and their adapters."""

import warnings

import pytest
import torch

pytest.importorskip("pytorch_metric_learning")

from cases.data import make_points
from cases.ranking import classes_of
from oracle.ranking import ranking_truth
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

import dml_cuda
from dml_cuda import pml

NAMES = ("FastAPLoss", "SmoothAPLoss")


def batch_of(name, dtype=torch.float64):
    """Smooth-AP is right for as many classes as each has members, one after another."""
    labels = classes_of(1, 2, 3, 5, 9) if name == "FastAPLoss" else torch.arange(25) // 5
    return make_points(labels, 6, dtype, 0.6), labels


def step(loss, embeddings, labels, *indices):
    leaf = embeddings.detach().clone().requires_grad_()
    value = loss(leaf, labels, *indices)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def same(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def no_warnings():
    dml_cuda._warnings._given.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dml_cuda has no kernel.*")
        yield


@pytest.mark.check
@pytest.mark.parametrize("bins", [10, 3, 25])
@pytest.mark.parametrize("ours", [dml_cuda.FastAPLoss, pml.FastAPLoss])
def test_fast_ap(bins, ours):
    batch = batch_of("FastAPLoss")
    same(step(ours(num_bins=bins), *batch), step(losses.FastAPLoss(num_bins=bins), *batch), 1e-7)


@pytest.mark.check
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_smooth_ap(temperature):
    batch = batch_of("SmoothAPLoss")
    ours, theirs = (base.SmoothAPLoss(temperature=temperature) for base in (pml, losses))
    same(step(ours, *batch), step(theirs, *batch), 1e-5)  # its ranks are float32


def test_smooth_ap_without_the_row_itself():
    """Where a row is ranked first by its own columns, that alone makes the difference."""
    embeddings, labels = batch_of("SmoothAPLoss")
    own = dml_cuda.SmoothAPLoss()(embeddings, labels, None, embeddings, labels)
    theirs = losses.SmoothAPLoss()(embeddings, labels)
    torch.testing.assert_close(own.float(), theirs)
    assert dml_cuda.SmoothAPLoss()(embeddings, labels) > own


def test_smooth_ap_of_any_classes():
    """Any sizes, which pytorch-metric-learning refuses, and any number and order, in which it is wrong."""
    embeddings, labels = batch_of("SmoothAPLoss")
    order = torch.randperm(len(labels))
    expected = losses.SmoothAPLoss()(embeddings, labels)
    torch.testing.assert_close(pml.SmoothAPLoss()(embeddings[order], labels[order]).float(), expected)
    assert abs(losses.SmoothAPLoss()(embeddings[order], labels[order]) - expected) > 1e-3
    truth = ranking_truth(
        "smooth_ap", embeddings[:20], labels[:20], ref_emb=embeddings[:20], ref_labels=labels[:20]
    )
    assert abs(pml.SmoothAPLoss()(embeddings[:20], labels[:20]) - truth.loss) < 1e-9
    assert abs(losses.SmoothAPLoss()(embeddings[:20], labels[:20]) - truth.loss) > 1e-3
    with pytest.raises(ValueError, match="same number of elements"):
        losses.SmoothAPLoss()(embeddings[1:], labels[1:])
    assert pml.SmoothAPLoss()(embeddings[1:], labels[1:]).isfinite()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "reducer",
    [
        reducers.MeanReducer(),
        reducers.SumReducer(),
        reducers.AvgNonZeroReducer(),
        reducers.ThresholdReducer(low=0.3),
        reducers.DoNothingReducer(),
        reducers.PerAnchorReducer(),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("mined", [False, True], ids=["", "mined"])
def test_reducers_and_miners(name, reducer, mined):
    """Of what a miner found only how often each row occurs counts: as its weight."""
    batch = batch_of(name)
    indices = [miners.MultiSimilarityMiner(0.1)(*batch)] if mined else []
    ours, theirs = (getattr(base, name)(reducer=reducer) for base in (pml, losses))
    assert ours.is_fused()
    if isinstance(reducer, reducers.DoNothingReducer):
        (found,), (expected,) = (loss(*batch, *indices).values() for loss in (ours, theirs))
        torch.testing.assert_close(found["losses"].to(expected["losses"]), expected["losses"])
        assert torch.equal(found["indices"], expected["indices"])
        return
    same(step(ours, *batch, *indices), step(theirs, *batch, *indices), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_regularizers_and_state(name):
    batch = batch_of(name)
    ours, theirs = (
        getattr(base, name)(embedding_regularizer=regularizers.LpRegularizer()) for base in (pml, losses)
    )
    same(step(ours, *batch), step(theirs, *batch), 1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(ours, getattr(losses, name))


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_the_replaced_class(name):
    embeddings, labels = batch_of(name)
    for base in (pml, losses):
        loss = getattr(base, name)()
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            loss(embeddings, labels, None, embeddings.clone(), labels)
        with pytest.raises(ValueError, match="labels are required"):
            loss(embeddings)


def test_what_the_kernels_cannot_compute():
    batch = batch_of("FastAPLoss")
    distance = distances.LpDistance(power=1)
    ours, theirs = (base.FastAPLoss(distance=distance) for base in (pml, losses))
    assert not ours.is_fused()
    with pytest.warns(UserWarning, match="pytorch-metric-learning computes it"):
        found = step(ours, *batch)
    same(found, step(theirs, *batch))


def test_no_positive():
    embeddings = torch.randn(5, 3)
    value, gradient = step(pml.FastAPLoss(), embeddings, torch.arange(5))
    assert value == 0
    assert not gradient.any()
