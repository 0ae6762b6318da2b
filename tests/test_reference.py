"""The reference against brute force in float64: then it can stand for the truth on larger batches."""

import pytest
import torch
from accuracy import FUNCTIONS, evaluate
from data import LABELS, make_batch, make_integer_batch, make_labels, make_points
from truth import brute_force

from dml_cuda import reference

REDUCTIONS = ("mean", "mean_nonzero", "mean_valid", "sum", "none")


def close(actual, expected, what):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=lambda m: f"{what}: {m}")


def compare(loss, embeddings, labels, *, upstream=None, reduction="none", **options):
    function = getattr(reference, FUNCTIONS[loss])
    value, grad_emb, grad_ref = evaluate(
        function, embeddings, labels, upstream=upstream, reduction=reduction, **options
    )
    truth = brute_force(loss, embeddings, labels, upstream=upstream, reduction=reduction, **options)
    close(value, truth.losses if reduction == "none" else truth.loss, "loss")
    close(grad_emb, truth.grad_emb, "gradient")
    if grad_ref is not None:
        close(grad_ref, truth.grad_ref, "gradient to ref_emb")
    return truth


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_rows_and_gradients(loss, similarity, epsilon):
    for kind in LABELS:
        embeddings, labels = make_batch(23, 5, kind, torch.float64)
        truth = compare(
            loss, embeddings, labels, similarity=similarity, epsilon=epsilon, upstream=torch.randn(23)
        )
        # Only the losses that need both kinds of pair may be 0 everywhere, and only where there is one kind.
        assert (truth.losses > 0).any() or kind in ("one", "distinct")


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(loss, reduction):
    labels = torch.cat([make_labels(12), torch.arange(100, 105)])  # five rows without a positive
    embeddings = make_points(labels, 6, torch.float64, spread=0.3)
    truths = [compare(loss, embeddings, labels, reduction=reduction, epsilon=e) for e in (None, -0.2)]
    rows = truths[1].kept.any(axis=1).sum()
    assert 0 < rows < 17, "mining must leave some rows out for the reductions to differ"


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_rectangular(loss, epsilon):
    embeddings, labels = make_batch(9, 5, dtype=torch.float64)
    ref_labels = make_labels(14)
    ref_emb = make_points(ref_labels, 5, torch.float64)
    compare(loss, embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, epsilon=epsilon)
    # Passed as columns, the same points are no longer the same rows: (i, i) is a positive pair.
    truth = compare(loss, embeddings, labels, ref_emb=embeddings, ref_labels=labels, epsilon=None)
    assert truth.kept.diagonal().all()


def test_options():
    embeddings, labels = make_batch(17, 4, dtype=torch.float64)
    compare("multi_similarity", embeddings, labels, alpha=3.0, beta=40.0, base=0.2, epsilon=0.3)
    for detach_weights in (True, False):
        compare("circle", embeddings, labels, m=0.25, gamma=256.0, detach_weights=detach_weights)
        # Dot products beyond 1 + m and below -m close the relus.
        compare("circle", embeddings, labels, similarity="dot", detach_weights=detach_weights)


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_mining_is_strict(loss):
    """Integer dot products and an integer epsilon: a pair at the threshold is exactly there."""
    embeddings, labels = make_integer_batch(40, dtype=torch.float64)
    for epsilon in (0, 1, -1):
        truth = compare(loss, embeddings, labels, similarity="dot", epsilon=epsilon)
        looser = brute_force(loss, embeddings, labels, similarity="dot", epsilon=epsilon + 1e-9)
        assert (looser.kept & ~truth.kept).any(), "no pair lies on a threshold"


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_zero_rows_and_duplicates(loss):
    embeddings, labels = make_batch(16, 4, dtype=torch.float64)
    embeddings[3] = 0
    embeddings[7] = embeddings[5]
    compare(loss, embeddings, labels)
    compare(loss, embeddings, labels, ref_emb=embeddings[:6], ref_labels=labels[:6])


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize(("n", "m"), [(0, None), (1, None), (0, 3), (3, 0), (0, 0)])
def test_empty(loss, n, m):
    embeddings, labels = make_batch(n, 3, dtype=torch.float64)
    rectangle = {}
    if m is not None:
        ref_labels = make_labels(m)
        rectangle = {"ref_emb": make_points(ref_labels, 3, torch.float64), "ref_labels": ref_labels}
    for reduction in REDUCTIONS:
        for epsilon in (None, 0.1):
            compare(loss, embeddings, labels, reduction=reduction, epsilon=epsilon, **rectangle)


def test_gradients_by_finite_differences():
    embeddings, labels = make_batch(7, 3, "unequal", torch.float64)
    embeddings.requires_grad_()

    def multi_similarity(x):
        return reference.multi_similarity_loss(x, labels)

    def circle(x):
        return reference.circle_loss(x, labels, gamma=4.0, detach_weights=False)

    for function in (multi_similarity, circle):
        assert torch.autograd.gradcheck(function, embeddings)
        assert torch.autograd.gradgradcheck(function, embeddings)


def test_detached_weights_change_the_gradient_alone():
    embeddings, labels = make_batch(12, 4, dtype=torch.float64)
    detached = evaluate(reference.circle_loss, embeddings, labels, detach_weights=True)
    attached = evaluate(reference.circle_loss, embeddings, labels, detach_weights=False)
    assert detached[0] == attached[0]
    assert (detached[1] - attached[1]).abs().max() > 1e-3


def test_nan_reaches_the_loss():
    embeddings, labels = make_batch(12, 4)
    for bad in (float("nan"), float("inf")):
        embeddings[4, 1] = bad
        for loss in FUNCTIONS.values():
            for epsilon in (None, 0.1):
                assert getattr(reference, loss)(embeddings, labels, epsilon=epsilon).isnan()
