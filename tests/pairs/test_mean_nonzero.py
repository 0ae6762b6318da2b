"""What "mean_nonzero" divides by: the losses that are not 0 as the dtype takes them.

A log(1 + x) that is computed from 1 + x is 0 for tiny x. The kernels compute it to the last digit, and count
as the reference and pytorch-metric-learning do in the same dtype.
"""

import math

import pytest
import torch
from cases.heads import EVERY_HEAD
from cases.losses import EVERY_LOSS, LOSSES, REDUCTIONS

import dml_cuda

IN_PML = [loss for loss in LOSSES.values() if loss.pml is not None]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def sparse_batch(dtype, n=64, dim=512):
    """Random rows of which few have a positive."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(n, dim, generator=random, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 10 * n, (n,), generator=random)


def separated_batch(dtype, classes=12, spread=0.05):
    """Orthogonal classes of 1 to 4 rows each, near each other: all their losses are small."""
    random = torch.Generator().manual_seed(4)
    labels = torch.arange(classes).repeat_interleave(torch.arange(classes) % 4 + 1)
    noise = torch.randn(len(labels), classes, generator=random, dtype=torch.float64)
    return (torch.eye(classes, dtype=torch.float64)[labels] + spread * noise).to(dtype), labels


BATCHES = {"sparse": sparse_batch, "separated": separated_batch}
ON_BATCH = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
# Settings with which the rows of the separated batch are so easy that float32 and float64 count differently.
EASY = {
    "multi_similarity": {"alpha": 40.0},
    "circle": {"gamma": 1500.0},
    "binomial_deviance": {"alpha": 400.0, "beta": 400.0},
    "nt_xent": {"temperature": 0.035},
    "sup_con": {"temperature": 0.035},
}


def listed(labels):
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(len(labels), dtype=torch.bool), ~same
    return (*positive.nonzero().unbind(1), *negative.nonzero().unbind(1))


@EVERY_LOSS
@DTYPES
@ON_BATCH
@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kernel_and_reference(loss, dtype, batch, easy, reduction):
    x, labels = batch(dtype)
    options = {**(EASY.get(loss.name, {}) if easy else {}), "reduction": reduction}
    expected = loss.module(**options, backend="reference")(x, labels)
    close = {
        "rtol": 2e-5 if dtype == torch.float32 else 1e-9,
        "atol": 1e-7 if dtype == torch.float32 else 1e-15,
    }
    torch.testing.assert_close(loss.module(**options, backend="fused")(x, labels), expected, **close)
    by_list = loss.module(**options, backend="fused")(x, None, listed(labels))
    torch.testing.assert_close(by_list, expected, **close)


@pytest.mark.parametrize("loss", IN_PML, ids=[loss.name for loss in IN_PML])
@DTYPES
@ON_BATCH
@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum"])
def test_kernel_and_pml(loss, dtype, batch, easy, reduction):
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning import losses, reducers

    x, labels = batch(dtype)
    options = EASY.get(loss.name, {}) if easy else {}
    reducer = {"mean": "MeanReducer", "mean_nonzero": "AvgNonZeroReducer", "sum": "SumReducer"}[reduction]
    expected = getattr(losses, loss.pml)(**options, reducer=getattr(reducers, reducer)())(x, labels)
    found = loss.module(**options, reduction=reduction)(x, labels)
    # Its NT-Xent takes the logarithm of a ratio near 1: an error of one rounding a pair.
    scale = len(x) if reduction == "sum" else 1
    close = (
        {"rtol": 5e-5, "atol": 2e-7 * scale}
        if dtype == torch.float32
        else {"rtol": 1e-9, "atol": 1e-14 * scale}
    )
    torch.testing.assert_close(found, expected, **close)


def test_the_reported_batch():
    """64 x 512 random rows of 1000 classes: nearly all rows are easy negatives only."""
    torch.manual_seed(0)
    x, labels = torch.randn(64, 512), torch.randint(0, 1000, (64,))
    found, reference = (
        dml_cuda.MultiSimilarityLoss(reduction="mean_nonzero", backend=backend)(x, labels)
        for backend in ("fused", "reference")
    )
    rows = dml_cuda.MultiSimilarityLoss(reduction="none")(x, labels)
    with_loss = rows[rows > 1e-6]
    assert 0 < len(with_loss) < 16
    torch.testing.assert_close(found, reference)
    torch.testing.assert_close(found, with_loss.mean())
    assert (rows > 0).sum() > len(with_loss)  # the others' losses are tiny, and stay as they are


def test_gradient_of_a_loss_that_does_not_count():
    """A row that is counted as 0 keeps its gradient, listed or not."""
    x, labels = separated_batch(torch.float64)
    options = {**EASY["multi_similarity"], "reduction": "mean_nonzero"}
    grads = []
    for backend, pairs in (("fused", None), ("reference", None), ("fused", listed(labels))):
        leaf = x.clone().requires_grad_()
        dml_cuda.MultiSimilarityLoss(**options, backend=backend)(leaf, labels, pairs).backward()
        grads.append(leaf.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-9, atol=1e-12)


@EVERY_HEAD
@DTYPES
@pytest.mark.parametrize("listed_rows", [False, True])
def test_heads(head, dtype, listed_rows):
    """Trained heads: rows at their own class's weight, some of them between two."""
    classes = dim = 16
    torch.manual_seed(0)
    x, labels = (y[:24] for y in separated_batch(dtype, 16, 0.02))
    x[::3] += 0.9 * x.roll(7, 0)[::3]
    pairs = (torch.arange(8), torch.arange(8), torch.arange(8)) if listed_rows else None
    values = {}
    for backend in ("fused", "reference"):
        module = head.make(classes, dim, reduction="mean_nonzero", backend=backend).to(dtype)
        with torch.no_grad():
            module.rows().copy_(torch.eye(classes).repeat_interleave(len(module.rows()) // classes, 0))
        values[backend] = module(x, labels, pairs)
    close = {"rtol": 5e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-15}
    torch.testing.assert_close(values["fused"], values["reference"], **close)
    if not head.pml:
        return
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    theirs = getattr(losses, head.name)(
        num_classes=classes, embedding_size=dim, reducer=reducers.AvgNonZeroReducer()
    )
    theirs = theirs.to(dtype)
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(values["fused"], theirs(x, labels, pairs), rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold(dtype):
    """A loss log(1 + x) counts from where 1 + x is not 1, on both sides of it."""
    half = torch.finfo(dtype).eps / 2
    for x, counts in ((half / 4, False), (half * 4, True)):
        # Two rows of one class and one that is farther: log(1 + exp(z)) with exp(z) = x.
        temperature = 0.01
        cosine = 1 + temperature * math.log(x)  # of the negative
        sine = math.sqrt(1 - cosine**2)
        points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [cosine, sine]], dtype=torch.float64).to(dtype)
        labels = torch.tensor([0, 0, 1])
        for backend in ("fused", "reference"):
            options = {"temperature": temperature, "backend": backend}
            total = dml_cuda.NTXentLoss(**options, reduction="sum")(points, labels)
            mean = dml_cuda.NTXentLoss(**options, reduction="mean_nonzero")(points, labels)
            assert total > 0  # the value stays
            torch.testing.assert_close(mean, total / 2 if counts else total)


def test_points_are_easy():
    """The batches are what they are said to be."""
    x, labels = separated_batch(torch.float64)
    rows = {
        dtype: dml_cuda.NTXentLoss(**EASY["nt_xent"], reduction="none")(x.to(dtype), labels)
        for dtype in (torch.float32, torch.float64)
    }
    half = {dtype: torch.finfo(dtype).eps / 2 for dtype in rows}
    assert (rows[torch.float64] > half[torch.float64]).sum() > (
        rows[torch.float32] > half[torch.float32]
    ).sum()
