"""The reference against the truth in float64: then it can stand for the truth on larger batches."""

import numpy as np
import pytest
import torch
from cases.accuracy import evaluate
from cases.data import LABELS, make_batch, make_integer_batch, make_labels, make_points
from cases.losses import EVERY_LOSS, LOSSES, REDUCTIONS, SIMILARITIES, by_name
from oracle.pairs import brute_force

from dml_cuda import functional


def close(actual, expected, what):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    atol = 1e-12 * max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=atol, msg=lambda m: f"{what}: {m}")


def compare(
    loss, embeddings, labels, *, upstream=None, reduction="none", similarity="cosine", indices=None, **options
):
    how = {"reduction": reduction, "backend": "reference", **by_name(similarity)}
    found = evaluate(
        loss.function, embeddings, labels, upstream=upstream, indices_tuple=indices, **how, **options
    )
    truth = brute_force(
        loss.name,
        embeddings,
        labels,
        upstream=upstream,
        reduction=reduction,
        similarity=similarity,
        indices=indices,
        **options,
    )
    close(found[0], truth.losses if reduction == "none" else truth.loss, "loss")
    close(found[1], truth.grad_emb, "gradient")
    if found[2] is not None:
        close(found[2], truth.grad_ref, "gradient to ref_emb")
    return truth


@pytest.mark.check
@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_rows_and_gradients(loss, similarity, epsilon):
    for kind in LABELS:
        embeddings, labels = make_batch(23, 5, kind, torch.float64)
        for parameters in ({}, loss.changed):
            truth = compare(
                loss,
                embeddings,
                labels,
                similarity=similarity,
                epsilon=epsilon,
                upstream=torch.randn(23),
                **parameters,
            )
            # Only losses that need both kinds of pair may be 0 everywhere, and only where there is one kind.
            assert (truth.losses > 0).any() or kind in ("one", "distinct")


@EVERY_LOSS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(loss, reduction):
    labels = torch.cat([make_labels(12), torch.arange(100, 105)])  # five rows without a positive
    embeddings = make_points(labels, 6, torch.float64, spread=0.3)
    for similarity in ("cosine", "euclidean"):
        options = {"reduction": reduction, "similarity": similarity}
        truths = [compare(loss, embeddings, labels, epsilon=e, **options) for e in (None, -0.2)]
        rows = truths[1].kept.any(axis=1).sum()
        assert 0 < rows < 17, "mining must leave some rows out for the reductions to differ"


@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_rectangular(loss, similarity, epsilon):
    embeddings, labels = make_batch(9, 5, dtype=torch.float64)
    ref_labels = make_labels(14)
    ref_emb = make_points(ref_labels, 5, torch.float64)
    options = {"epsilon": epsilon, "similarity": similarity}
    compare(loss, embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, **options)
    # Passed as columns, the same points are no longer the same rows: (i, i) is a positive pair.
    options["epsilon"] = None
    truth = compare(loss, embeddings, labels, ref_emb=embeddings, ref_labels=labels, **options)
    assert truth.kept.diagonal().all()


@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "none"])
def test_listed_pairs(loss, similarity, reduction):
    """Some pairs, some of them again: each loss counts those as pytorch-metric-learning does."""
    embeddings, labels = make_batch(11, 5, dtype=torch.float64)
    ref_emb, ref_labels = make_batch(14, 5, dtype=torch.float64)
    same = labels[:, None] == ref_labels
    lists = []
    for mask in (same, ~same):
        rows, cols = mask.nonzero(as_tuple=True)
        some = torch.randint(0, len(rows), (len(rows),))
        lists += [rows[some], cols[some]]
    options = {"similarity": similarity, "reduction": reduction, "indices": tuple(lists)}
    compare(loss, embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, **options)


def test_parameters():
    embeddings, labels = make_batch(17, 4, dtype=torch.float64)
    for detach_weights in (True, False):
        # Dot products beyond 1 + m and below -m close the relus.
        compare(LOSSES["circle"], embeddings, labels, similarity="dot", detach_weights=detach_weights)


@EVERY_LOSS
def test_normalize_embeddings(loss):
    """The similarity's own default, and the other choice, which may be another similarity."""
    embeddings, labels = make_batch(17, 4, dtype=torch.float64)

    def value(**options):
        return loss.function(embeddings, labels, backend="reference", reduction="sum", **options)

    cosine, dot, euclidean = (value(similarity=name) for name in ("cosine", "dot", "euclidean"))
    assert value(similarity="cosine", normalize_embeddings=True) == cosine
    assert value(similarity="cosine", normalize_embeddings=False) == dot
    assert value(similarity="dot", normalize_embeddings=True) == cosine
    assert value(similarity="dot", normalize_embeddings=False) == dot
    assert value(similarity="euclidean", normalize_embeddings=True) == euclidean
    raw = value(similarity="euclidean", normalize_embeddings=False)
    assert len({x.item() for x in (cosine, dot, euclidean, raw)}) == 4


@EVERY_LOSS
def test_mining_is_strict(loss):
    """Integer dot products and an integer epsilon: a pair at the threshold is exactly there."""
    embeddings, labels = make_integer_batch(40, dtype=torch.float64)
    for epsilon in (0, 1, -1):
        truth = compare(loss, embeddings, labels, similarity="dot", epsilon=epsilon)
        looser = brute_force(loss.name, embeddings, labels, similarity="dot", epsilon=epsilon + 1e-9)
        assert (looser.kept & ~truth.kept).any(), "no pair lies on a threshold"


@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_zero_rows_and_duplicates(loss, similarity):
    embeddings, labels = make_batch(16, 4, dtype=torch.float64)
    embeddings[3] = 0
    embeddings[7] = embeddings[5]
    compare(loss, embeddings, labels, similarity=similarity)
    refs = {"ref_emb": embeddings[:6], "ref_labels": labels[:6]}
    compare(loss, embeddings, labels, similarity=similarity, **refs)


@EVERY_LOSS
@pytest.mark.parametrize("similarity", ["euclidean", "euclidean_raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-6, 1e-3, 0.1])
def test_near_pairs(loss, similarity, dtype, distance):
    """Far from the origin, near each other: distances to the last digits, gradients finite at 0 too."""
    embeddings, labels = make_batch(12, 6, dtype=torch.float64)
    embeddings[:6] = embeddings[6:] + distance * torch.randn(6, 6, dtype=torch.float64)
    labels[:3] = labels[6:9]
    if similarity == "euclidean_raw":
        embeddings = embeddings + 10
    embeddings = embeddings.to(dtype)
    how = {"backend": "reference", "reduction": "none", **by_name(similarity)}
    losses, gradient, _ = evaluate(loss.function, embeddings, labels, **how)
    truth = brute_force(loss.name, embeddings, labels, similarity=similarity)
    # An error of a distance, which a logit multiplies: unit rows have one of a few units in the last place.
    size = 1 if similarity == "euclidean" else 30
    error = np.abs(losses.double().numpy() - truth.losses).max()
    assert error <= 200 * size * torch.finfo(dtype).eps * max(1.0, np.abs(truth.losses).max())
    assert gradient.isfinite().all()


def test_distances_of_near_pairs():
    """Seen through hinges that are the distances: right to a few units in the last place, however small."""
    x = torch.randn(40, 16)
    y = x + torch.logspace(-7, 0, 40)[:, None] * torch.randn(40, 16)
    each = torch.arange(40)
    lists = each, each, each[:0], each[:0]
    for pairs in ({"ref_labels": each}, {"indices_tuple": lists}):
        options = {"similarity": "euclidean", "normalize_embeddings": False, "reduction": "none", **pairs}
        found = functional.contrastive_loss(
            x, each, ref_emb=y, neg_margin=-1e9, backend="reference", **options
        )
        torch.testing.assert_close(found.double(), (x.double() - y.double()).norm(dim=1), rtol=3e-6, atol=0)


@EVERY_LOSS
@pytest.mark.parametrize(("n", "m"), [(0, None), (1, None), (0, 3), (3, 0), (0, 0)])
def test_empty(loss, n, m):
    embeddings, labels = make_batch(n, 3, dtype=torch.float64)
    rectangle = {}
    if m is not None:
        ref_labels = make_labels(m)
        rectangle = {"ref_emb": make_points(ref_labels, 3, torch.float64), "ref_labels": ref_labels}
    for reduction in REDUCTIONS:
        for epsilon in (None, 0.1):
            for similarity in ("cosine", "euclidean"):
                options = {"reduction": reduction, "epsilon": epsilon, "similarity": similarity}
                compare(loss, embeddings, labels, **options, **rectangle)


@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_derivatives_by_finite_differences(loss, similarity):
    embeddings, labels = make_batch(7, 3, "unequal", torch.float64)
    labels[-1] = 100  # a row without positives

    def value(x):
        how = {"reduction": "sum", "backend": "reference", **by_name(similarity), **loss.smooth}
        return loss.function(x, labels, **how)

    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(value, embeddings)
    assert torch.autograd.gradgradcheck(value, embeddings)


def test_detached_weights_change_the_gradient_alone():
    embeddings, labels = make_batch(12, 4, dtype=torch.float64)
    detached, attached = (
        evaluate(functional.circle_loss, embeddings, labels, detach_weights=d, backend="reference")
        for d in (True, False)
    )
    assert detached[0] == attached[0]
    assert (detached[1] - attached[1]).abs().max() > 1e-3


@EVERY_LOSS
def test_nan_reaches_the_loss(loss):
    embeddings, labels = make_batch(12, 4)
    for bad in (float("nan"), float("inf")):
        embeddings[4, 1] = bad
        for epsilon in (None, 0.1):
            for similarity in ("cosine", "euclidean"):
                how = {"epsilon": epsilon, "similarity": similarity, "backend": "reference"}
                assert loss.function(embeddings, labels, **how).isnan()
