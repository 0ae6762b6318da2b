"""dml_cuda.functional.pair_weights: the kept pairs of a batch, their similarities and their weights."""

import pytest
import torch
from brute_force import kept_masks, pair_masks, similarities
from data import make_batch
from truth import ROWS

import dml_cuda
from dml_cuda import MultiSimilarityMiner
from dml_cuda.functional import PairWeights, pair_weights

LOSSES = {"multi_similarity": dml_cuda.MultiSimilarityLoss, "circle": dml_cuda.CircleLoss}
EVERY = pytest.mark.parametrize("loss", LOSSES)


def dense(weights, n, m):
    """``[n, m]`` weights, 0 where a pair is not kept."""
    w = torch.zeros(n, m, dtype=weights.pos_weights.dtype)
    w[weights.pos_anchors, weights.positives] = weights.pos_weights
    w[weights.neg_anchors, weights.negatives] = weights.neg_weights
    return w


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("m", [None, 60])
def test_by_brute_force(loss, epsilon, m):
    """The pairs of brute force in the order of their rows; weights from the papers' derivatives by pair."""
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    ref_emb, ref_labels = (None, None) if m is None else make_batch(m, 6, dtype=torch.float64)
    module = LOSSES[loss](epsilon=epsilon, reduction="sum")
    found = pair_weights(module, embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    assert isinstance(found, PairWeights)
    s = similarities(embeddings, embeddings if m is None else ref_emb, True, None)
    kept = kept_masks(s, *pair_masks(labels, ref_labels), epsilon)
    expected = torch.zeros_like(s)
    for i in range(40):
        cols = [mask[i].nonzero()[:, 0] for mask in kept]
        _, *derivatives = ROWS[loss](*(s[i, c].tolist() for c in cols))
        for c, d in zip(cols, derivatives, strict=True):
            expected[i, c] = torch.tensor(d, dtype=torch.float64)
    for mask, fields in zip(kept, (found[:4], found[4:]), strict=True):
        rows, cols, sims, weights = fields
        assert torch.equal(torch.stack([rows, cols], 1), mask.nonzero())
        torch.testing.assert_close(sims, s[rows, cols])
        torch.testing.assert_close(weights, expected[rows, cols], rtol=1e-9, atol=1e-15)
    assert (found.pos_weights <= 0).all()
    assert (found.neg_weights >= 0).all()
    assert found.neg_weights.max() > 0


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum", "none"])
def test_weights_make_the_gradient(loss, reduction):
    """On dot products: dL/dX = W Y and dL/dY = W' X, with the fused loss's own gradient."""
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    ref_emb, ref_labels = make_batch(60, 6, dtype=torch.float64)
    points = [(0.5 * x).requires_grad_() for x in (embeddings, ref_emb)]
    module = LOSSES[loss](epsilon=0.1, reduction=reduction, similarity="dot")
    refs = {"ref_emb": points[1], "ref_labels": ref_labels}
    gradients = torch.autograd.grad(module(points[0], labels, **refs).sum(), points)
    w = dense(pair_weights(module, points[0], labels, **refs), 40, 60)
    torch.testing.assert_close(w @ points[1], gradients[0])
    torch.testing.assert_close(w.T @ points[0], gradients[1])
    assert not w.requires_grad


@EVERY
def test_of_mined_and_listed_pairs(loss):
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    mined = MultiSimilarityMiner(0.1)(embeddings, labels)
    inside = pair_weights(LOSSES[loss](epsilon=0.1), embeddings, labels)
    shuffled = []
    for rows, cols in (mined[:2], mined[2:]):
        order = torch.randint(0, len(rows), (5 * len(rows),))  # repetitions, and all but surely every pair
        order = torch.cat([order, torch.arange(len(rows))])
        shuffled += [rows[order], cols[order].int()]
    for pairs in (mined, tuple(mined), shuffled):
        for given in (labels, None):
            found = pair_weights(LOSSES[loss](), embeddings, given, indices_tuple=pairs)
            torch.testing.assert_close(tuple(found), tuple(inside))


@EVERY
def test_modes_and_dtypes(loss):
    embeddings, labels = make_batch(40, 6, dtype=torch.bfloat16)
    expected = pair_weights(LOSSES[loss](), embeddings.float(), labels)
    assert expected.pos_weights.dtype == expected.neg_similarities.dtype == torch.float32
    modes = (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16))
    for mode in modes:
        with mode():
            found = pair_weights(LOSSES[loss](), embeddings, labels)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@EVERY
def test_nothing_kept(loss):
    embeddings, labels = make_batch(8, 6, kind="distinct")
    found = pair_weights(LOSSES[loss](epsilon=0.1), embeddings, labels)
    assert [x.shape for x in found] == [(0,)] * 8


def test_errors():
    embeddings, labels = make_batch(8, 6)
    with pytest.raises(TypeError, match=r"^loss: expected a MultiSimilarityLoss or CircleLoss.*Linear"):
        pair_weights(torch.nn.Linear(2, 2), embeddings, labels)
    with pytest.raises(ValueError, match=r"^labels: expected 8"):
        pair_weights(dml_cuda.CircleLoss(), embeddings, labels[:3])
    lists = (labels[:3],) * 4
    with pytest.raises(ValueError, match=r"^epsilon: expected None"):
        pair_weights(dml_cuda.CircleLoss(epsilon=0.1), embeddings, labels, indices_tuple=lists)
