"""Factors of the rows' losses, row by row or class by class."""

import pytest
import torch
from cases.data import make_batch, make_labels
from cases.heads import EVERY_HEAD
from cases.losses import EVERY_LOSS, REDUCTIONS

import dml_cuda


def parts(value, *leaves):
    up = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, up)]


@pytest.mark.check
@EVERY_LOSS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
@pytest.mark.parametrize("m", [None, 90], ids=["square", "rectangular"])
def test_as_the_reference(loss, reduction, epsilon, m):
    embeddings, labels = make_batch(140, 12, dtype=torch.float64)
    leaf = embeddings.requires_grad_()
    refs = {} if m is None else {"ref_emb": torch.randn(m, 12).double(), "ref_labels": make_labels(m)}
    weights = torch.rand(140, dtype=torch.float64) * (torch.arange(140) % 3 > 0)
    both = [
        parts(
            loss.function(
                leaf,
                labels,
                row_weights=weights,
                reduction=reduction,
                epsilon=epsilon,
                backend=backend,
                **refs,
            ),
            leaf,
        )
        for backend in ("fused", "reference")
    ]
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@EVERY_LOSS
def test_they_multiply_the_losses_of_rows(loss):
    embeddings, labels = make_batch(60, 12, dtype=torch.float64)
    weights = torch.rand(60, dtype=torch.float64)
    made = loss.module(reduction="none")
    weighted = made(embeddings, labels, row_weights=weights)
    torch.testing.assert_close(weighted, weights * made(embeddings, labels), rtol=1e-12, atol=0)
    ones = torch.ones(60)
    for reduction in REDUCTIONS:
        made.reduction = reduction
        assert torch.equal(made(embeddings, labels, row_weights=ones), made(embeddings, labels))


@EVERY_LOSS
def test_listed_pairs(loss):
    embeddings, labels = make_batch(40, 12, dtype=torch.float64)
    pairs = dml_cuda.MultiSimilarityMiner()(embeddings, labels)
    listed = tuple(torch.as_tensor(x) for x in pairs)
    weights = torch.rand(40, dtype=torch.float64)
    whole, by_lists = (
        loss.function(embeddings, labels, indices_tuple=given, row_weights=weights, similarity="cosine")
        for given in (pairs, listed)
    )
    torch.testing.assert_close(whole, by_lists, rtol=1e-9, atol=1e-12)


@EVERY_LOSS
def test_class_weights(loss):
    embeddings, labels = make_batch(60, 12, dtype=torch.float64)
    of_classes = torch.rand(int(labels.max()) + 1, dtype=torch.float64)
    made = loss.module(class_weights=of_classes)
    assert made(embeddings, labels) == loss.module()(embeddings, labels, row_weights=of_classes[labels])
    assert made(embeddings, labels) == loss.function(embeddings, labels, class_weights=of_classes)
    rows = torch.rand(60, dtype=torch.float64)
    both = made(embeddings, labels, row_weights=rows)
    expected = loss.module()(embeddings, labels, row_weights=rows * of_classes[labels])
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 2\) as class_weights has"):
        loss.module(class_weights=torch.ones(2))(embeddings, labels + 2)
    assert f"class_weights=tensor of {len(of_classes)}" in repr(made)


@EVERY_HEAD
def test_heads(head):
    torch.manual_seed(0)
    module = head.make(5, 8, reduction="none").double()
    embeddings, labels = torch.randn(30, 8, dtype=torch.float64), torch.randint(-1, 5, (30,))
    rows, classes = torch.rand(30, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    if head.name == "ProxyAnchorLoss":
        with pytest.raises(
            ValueError, match="row_weights: expected None, as the losses are those of proxies"
        ):
            module(embeddings, labels, row_weights=rows)
        return
    plain = module(embeddings, labels)
    torch.testing.assert_close(module(embeddings, labels, row_weights=rows), plain * rows, rtol=1e-12, atol=0)
    module.class_weights = classes
    factors = rows * classes[labels.clamp(min=0)]
    weighted = module(embeddings, labels, row_weights=rows)
    torch.testing.assert_close(weighted, plain * factors, rtol=1e-12, atol=0)
    module.reduction = "mean"
    weighted = module(embeddings, labels, row_weights=rows)
    torch.testing.assert_close(weighted, (plain * factors).sum() / 30, rtol=1e-12, atol=0)


def test_bad_input():
    embeddings, labels = make_batch(20, 8)
    loss = dml_cuda.MultiSimilarityLoss()
    for weights, error, message in (
        (
            torch.ones(19),
            ValueError,
            "row_weights: expected 20 numbers, one for each row",
        ),
        (torch.ones(20, 1), ValueError, r"row_weights: expected shape \[20\], got \[20, 1\]"),
        (torch.ones(20, dtype=torch.long), TypeError, "row_weights: expected a floating-point tensor"),
        ([1.0] * 20, TypeError, "row_weights: expected a floating-point tensor of shape .20., got list"),
        (torch.ones(20, requires_grad=True), ValueError, "row_weights: expected no gradient"),
    ):
        with pytest.raises(error, match=message):
            loss(embeddings, labels, row_weights=weights)
    with pytest.raises(TypeError, match="class_weights: expected a floating-point tensor"):
        dml_cuda.MultiSimilarityLoss(class_weights=[1.0, 2.0])
