"""Unusual but valid inputs of the fused losses: layouts, label types, empty batches, who needs a gradient."""

import pytest
import torch
from cases.accuracy import evaluate
from cases.data import make_batch, make_labels, make_points
from cases.losses import LOSSES

INTEGERS = ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"]
EVERY = pytest.mark.parametrize("function", [loss.function for loss in LOSSES.values()], ids=LOSSES)


def gradient(function, leaf, view, labels, **options):
    """Loss and gradient to a leaf, through some view of it."""
    leaf = leaf.clone().requires_grad_()
    value = function(view(leaf), labels, backend="fused", **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def identity(x):
    return x


@EVERY
def test_layouts(function):
    """Strided, transposed and offset views give what their contiguous copies give, to the bit."""
    labels = make_labels(140)
    views = {
        "transposed": (torch.randn(9, 140), lambda x: x.T),
        "every second row": (torch.randn(280, 9), lambda x: x[::2]),
        "every third column": (torch.randn(140, 27), lambda x: x[:, 1::3]),
        "offset": (torch.randn(145, 12), lambda x: x[5:, 3:]),
        "one column": (torch.randn(140, 7), lambda x: x[:, 2:3]),
        "from three dimensions": (torch.randn(140, 2, 9), lambda x: x[:, 1]),
    }
    for name, (leaf, view) in views.items():
        for epsilon in (None, 0.1):
            actual = gradient(function, leaf, view, labels, epsilon=epsilon)
            expected = gradient(function, leaf, lambda x, view=view: view(x).clone(), labels, epsilon=epsilon)
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a, e), name


@EVERY
def test_expanded(function):
    """One row, or one column, standing for many: the gradient sums over the copies."""
    labels = make_labels(30)
    for leaf, view in (
        (torch.randn(1, 9), lambda x: x.expand(30, 9)),
        (torch.randn(30, 1), lambda x: x.expand(30, 9)),
        (torch.randn(1, 1), lambda x: x.expand(30, 9)),
    ):
        actual = gradient(function, leaf, view, labels, similarity="dot")
        expected = gradient(function, leaf, lambda x, view=view: view(x).clone(), labels, similarity="dot")
        torch.testing.assert_close(actual, expected)


@EVERY
def test_ref_emb_layouts(function):
    labels, ref_labels = make_labels(20), make_labels(140)
    embeddings, leaf = torch.randn(20, 9), torch.randn(9, 280)
    actual, expected = (
        gradient(
            lambda r, _, **k: function(embeddings, labels, ref_emb=r, ref_labels=ref_labels, **k),
            leaf,
            view,
            None,
        )
        for view in (lambda x: x.T[::2], lambda x: x.T[::2].clone())
    )
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@EVERY
@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_types(function, dtype):
    embeddings = torch.randn(40, 5)
    labels = torch.randint(0, 2, (40,))
    typed = labels.to(getattr(torch, dtype))
    for backend in ("fused", "reference"):
        expected = function(embeddings, labels, backend=backend)
        assert torch.equal(function(embeddings, typed, backend=backend), expected)
        rectangle = {"ref_emb": embeddings, "backend": backend}
        expected = function(embeddings, labels, ref_labels=labels, **rectangle)
        assert torch.equal(function(embeddings, typed, ref_labels=typed, **rectangle), expected)
        assert torch.equal(function(embeddings, labels, ref_labels=typed, **rectangle), expected)


@EVERY
def test_label_values(function):
    """Only equality of labels counts: they may be negative, at the ends of int64, strided, in any order."""
    embeddings, labels = make_batch(140, 5)
    expected = evaluate(function, embeddings, labels, epsilon=0.1)
    ends = torch.iinfo(torch.int64)
    renamed = torch.randint(-(2**62), 2**62, (35,))
    renamed[:4] = torch.tensor([ends.min, ends.max, 0, -1])
    strided = torch.stack([renamed[labels], renamed[labels] + 1], dim=1)[:, 0]
    for relabelled in (renamed[labels], strided, labels - 10**15):
        actual = evaluate(function, embeddings, relabelled, epsilon=0.1)
        torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-5, atol=1e-6)
    # Neighbours that float64 cannot tell apart are different classes.
    pair = torch.tensor([2**53, 2**53 + 1])
    assert torch.equal(function(torch.eye(2), pair), function(torch.eye(2), torch.tensor([0, 1])))


@EVERY
def test_order_of_rows_does_not_matter(function):
    embeddings, labels = make_batch(300, 16, dtype=torch.float64)
    order = torch.randperm(300)
    direct = evaluate(function, embeddings, labels, epsilon=0.1, reduction="none")
    permuted = evaluate(function, embeddings[order], labels[order], epsilon=0.1, reduction="none")
    torch.testing.assert_close(permuted[0], direct[0][order])
    torch.testing.assert_close(permuted[1], direct[1][order])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "dim", "m"),
    [(0, 4, None), (1, 4, None), (5, 0, None), (0, 0, None), (0, 4, 3), (3, 4, 0), (3, 0, 3)],
)
def test_empty(function, dtype, n, dim, m):
    """Nothing to pair: the loss and gradient are the reference's, attached, finite and of the right shape."""
    labels = torch.arange(n) % 2
    embeddings = torch.randn(n, dim).to(dtype)
    rectangle = {}
    if m is not None:
        rectangle = {"ref_emb": torch.randn(m, dim).to(dtype), "ref_labels": torch.arange(m) % 2}
    for reduction in ("mean", "mean_nonzero", "mean_valid", "sum", "none"):
        for epsilon in (None, 0.1):
            options = {"reduction": reduction, "epsilon": epsilon, **rectangle}
            fused = evaluate(function, embeddings, labels, backend="fused", **options)
            expected = evaluate(function, embeddings, labels, backend="reference", **options)
            for actual, like in zip(fused, expected, strict=True):
                if like is not None:
                    torch.testing.assert_close(actual, like)
            assert torch.isfinite(fused[0]).all()


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_no_pairs_of_one_kind(function, epsilon):
    """One class has no negatives, distinct classes no positives: still finite, and 0 where it must be."""
    for kind in ("one", "distinct"):
        batch = make_batch(150, 8, kind)
        value, grad, _ = evaluate(function, *batch, epsilon=epsilon)
        if epsilon is not None:
            assert value == 0
            assert (grad == 0).all()
        expected = evaluate(function, *batch, epsilon=epsilon, backend="reference")
        torch.testing.assert_close((value, grad), expected[:2])


@EVERY
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_partial_gradients(function, wanted):
    """Who asks for a gradient does not change what the others get."""
    labels, ref_labels = make_labels(140), make_labels(150)
    points = make_points(torch.cat([labels, ref_labels]), 9)
    embeddings, ref_emb = points[:140], points[140:]
    _, *expected = evaluate(function, embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, epsilon=0.1)
    leaves = [p.clone().requires_grad_(w) for p, w in zip((embeddings, ref_emb), wanted, strict=True)]
    value = function(leaves[0], labels, ref_emb=leaves[1], ref_labels=ref_labels, epsilon=0.1)
    assert value.requires_grad == any(wanted)
    if any(wanted):
        value.backward()
    for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
        if want:
            assert torch.equal(leaf.grad, gradient)
        else:
            assert leaf.grad is None


@EVERY
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(function, similarity, bad):
    """A NaN or infinite coordinate gives a NaN loss and gradient, wherever it stands."""
    embeddings, labels = make_batch(140, 6)
    spoilt = embeddings.clone()
    spoilt[77, 3] = bad
    for epsilon in (None, 0.1):
        for reduction in ("mean", "mean_nonzero", "mean_valid", "sum"):
            options = {"epsilon": epsilon, "similarity": similarity, "reduction": reduction}
            value, grad, _ = evaluate(function, spoilt, labels, **options)
            assert value.isnan()
            assert grad.isnan().any()
            value, *_ = evaluate(function, embeddings, labels, ref_emb=spoilt, ref_labels=labels, **options)
            assert value.isnan()
    clean = evaluate(function, embeddings, labels)
    assert torch.isfinite(clean[1]).all()


@EVERY
@pytest.mark.parametrize("epsilon", [0, -0.3, -10, 10, 1e30])
def test_epsilon_of_any_size(function, epsilon):
    """Beyond 2 every pair of a row with both kinds is kept; below -2 none is."""
    embeddings, labels = make_batch(140, 6, dtype=torch.float64)
    fused = evaluate(function, embeddings, labels, epsilon=epsilon, backend="fused")
    expected = evaluate(function, embeddings, labels, epsilon=epsilon, backend="reference")
    torch.testing.assert_close(fused[0], expected[0])
    torch.testing.assert_close(fused[1], expected[1])
    assert (fused[0] == 0) == (epsilon == -10)
