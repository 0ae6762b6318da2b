"""Parity with pytorch-metric-learning: the same loss and gradient, with and without its miner."""

import pytest
import torch
from data import LABELS, make_batch, make_labels, make_points

from dml_cuda import CircleLoss, MultiSimilarityLoss

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import losses, miners, reducers  # noqa: E402

PAIRS = {
    "multi_similarity": (
        MultiSimilarityLoss,
        losses.MultiSimilarityLoss,
        {"alpha": 2, "beta": 50, "base": 0.5},
    ),
    "multi_similarity, paper": (
        MultiSimilarityLoss,
        losses.MultiSimilarityLoss,
        {"alpha": 2, "beta": 40, "base": 0.5},
    ),
    "circle": (CircleLoss, losses.CircleLoss, {"m": 0.4, "gamma": 80}),
    "circle, faces": (CircleLoss, losses.CircleLoss, {"m": 0.25, "gamma": 256}),
}
EVERY = pytest.mark.parametrize("name", PAIRS)


def value_and_gradients(loss_fn, embeddings, labels, miner=None, ref_emb=None, ref_labels=None):
    leaves = [embeddings.clone().requires_grad_()]
    if ref_emb is not None:
        leaves.append(ref_emb.clone().requires_grad_())
    columns = {"ref_emb": leaves[1], "ref_labels": ref_labels} if ref_emb is not None else {}
    indices = None if miner is None else miner(leaves[0], labels, **columns)
    value = loss_fn(leaves[0], labels, indices, **columns)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(name, embeddings, labels, epsilon, *, reducer=None, reduction=None, **columns):
    ours, theirs, options = PAIRS[name]
    mine = ours(
        **options, epsilon=epsilon, backend="fused", **({"reduction": reduction} if reduction else {})
    )
    miner = None if epsilon is None else miners.MultiSimilarityMiner(epsilon=epsilon)
    actual = value_and_gradients(mine, embeddings, labels, **columns)
    expected = value_and_gradients(theirs(**options, reducer=reducer), embeddings, labels, miner, **columns)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-11)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        # PML's circle loss goes through torch's softplus, which takes exp(-20) = 2e-9 for 0.
        relative = 4e-9 if theirs is losses.CircleLoss else 1e-11
        torch.testing.assert_close(a, e, rtol=0, atol=relative * e.abs().max().item() + 1e-15)
    return actual


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1, 0.0])
def test_many_batches(name, epsilon):
    for seed in range(25):
        torch.manual_seed(seed)
        n = int(torch.randint(2, 170, ()))
        spread = (0.3, 1.0)[seed % 2]
        value, *_ = compare(name, *make_batch(n, 12, LABELS[seed % 4], torch.float64, spread), epsilon)
        assert torch.isfinite(value)


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_ref_emb(name, epsilon):
    for n, m in ((1, 9), (40, 150), (150, 40)):
        labels, ref_labels = make_labels(n), make_labels(m)
        points = make_points(torch.cat([labels, ref_labels]), 10, torch.float64)
        compare(name, points[:n], labels, epsilon, ref_emb=points[n:], ref_labels=ref_labels)


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum"])
def test_reducers(name, reduction):
    reducer = {
        "mean": reducers.MeanReducer(),
        "mean_nonzero": reducers.AvgNonZeroReducer(),
        "sum": reducers.SumReducer(),
    }[reduction]
    labels = torch.cat([make_labels(60), torch.arange(100, 110)])
    embeddings = make_points(labels, 10, torch.float64)
    compare(name, embeddings, labels, 0.1, reducer=reducer, reduction=reduction)


def test_float32():
    """In PML users' own dtype, on PML's own benchmark shape."""
    embeddings, labels = make_batch(512, 128)
    for name in ("multi_similarity", "circle"):
        ours, theirs, options = PAIRS[name]
        actual = value_and_gradients(ours(**options), embeddings, labels)
        expected = value_and_gradients(theirs(**options), embeddings, labels)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
        largest = expected[1].abs().max().item()
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-4 * largest)
