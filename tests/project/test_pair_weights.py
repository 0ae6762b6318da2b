"""dml_cuda.functional.pair_weights: the kept pairs of a batch, their similarities and their weights."""

import pytest
import torch
from cases.data import make_batch
from cases.losses import EVERY_LOSS, REDUCTIONS, SIMILARITIES, by_name
from oracle.pairs import brute_force

import dml_cuda
from dml_cuda import MultiSimilarityMiner
from dml_cuda.functional import PairWeights, pair_weights


def dense(weights, n, m):
    """``[n, m]`` weights, 0 where a pair is not kept."""
    w = torch.zeros(n, m, dtype=weights.pos_weights.dtype)
    for rows, cols, of_pairs in (
        (weights.pos_anchors, weights.positives, weights.pos_weights),
        (weights.neg_anchors, weights.negatives, weights.neg_weights),
    ):
        w.index_put_((rows, cols), of_pairs, accumulate=True)
    return w


@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("m", [None, 60])
def test_by_brute_force(loss, similarity, epsilon, m):
    """The pairs of brute force in the order of their rows; weights from the papers' derivatives by pair."""
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    ref_emb, ref_labels = (None, None) if m is None else make_batch(m, 6, dtype=torch.float64)
    refs = {"ref_emb": ref_emb, "ref_labels": ref_labels}
    module = loss.module(epsilon=epsilon, reduction="mean", **by_name(similarity), **loss.changed)
    found = pair_weights(module, embeddings, labels, **refs)
    assert isinstance(found, PairWeights)
    how = {"epsilon": epsilon, "similarity": similarity, "reduction": "mean"}
    truth = brute_force(loss.name, embeddings, labels, **refs, **how, **loss.changed)
    columns = labels if m is None else ref_labels
    kept, expected = torch.from_numpy(truth.kept), torch.from_numpy(truth.weights)
    same = labels[:, None] == columns
    for mask, fields in ((kept & same, found[:4]), (kept & ~same, found[4:])):
        rows, cols, similarities, weights = fields
        assert torch.equal(torch.stack([rows, cols], 1), mask.nonzero())
        assert similarities.shape == rows.shape
        torch.testing.assert_close(weights, expected[rows, cols], rtol=1e-9, atol=1e-12)
    if similarity == "cosine":
        assert found.pos_weights.min() < 0
        assert found.neg_weights.max() > 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities(similarity):
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    found = pair_weights(dml_cuda.CircleLoss(**by_name(similarity)), embeddings, labels)
    unit = torch.nn.functional.normalize(embeddings)
    expected = {
        "cosine": unit @ unit.T,
        "dot": embeddings @ embeddings.T,
        "euclidean": -torch.cdist(unit, unit),
        "euclidean_raw": -torch.cdist(embeddings, embeddings),
    }[similarity]
    torch.testing.assert_close(found.pos_similarities, expected[found.pos_anchors, found.positives])
    torch.testing.assert_close(found.neg_similarities, expected[found.neg_anchors, found.negatives])


@EVERY_LOSS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_make_the_gradient(loss, reduction):
    """On dot products: dL/dX = W Y and dL/dY = W' X, with the fused loss's own gradient."""
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    ref_emb, ref_labels = make_batch(60, 6, dtype=torch.float64)
    points = [(0.5 * x).requires_grad_() for x in (embeddings, ref_emb)]
    module = loss.module(epsilon=0.1, reduction=reduction, similarity="dot")
    refs = {"ref_emb": points[1], "ref_labels": ref_labels}
    gradients = torch.autograd.grad(module(points[0], labels, **refs).sum(), points)
    w = dense(pair_weights(module, points[0], labels, **refs), 40, 60)
    torch.testing.assert_close(w @ points[1], gradients[0])
    torch.testing.assert_close(w.T @ points[0], gradients[1])
    assert not w.requires_grad


@EVERY_LOSS
def test_of_mined_and_listed_pairs(loss):
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    options = {"similarity": "cosine"}
    mined = MultiSimilarityMiner(0.1)(embeddings, labels)
    inside = pair_weights(loss.module(epsilon=0.1, **options), embeddings, labels)
    shuffled = []
    for rows, cols in (mined[:2], mined[2:]):
        order = torch.randint(0, len(rows), (5 * len(rows),))  # repetitions, and all but surely every pair
        order = torch.cat([order, torch.arange(len(rows))])
        shuffled += [rows[order], cols[order].int()]
    for pairs in (mined, tuple(mined), shuffled):
        for given in (labels, None):
            found = pair_weights(loss.module(**options), embeddings, given, indices_tuple=pairs)
            if pairs is shuffled and loss.module.formula.repeats:  # each pair as often as listed
                assert len(found.positives) == len(shuffled[0])
                assert len(found.negatives) == len(shuffled[2])
            else:
                torch.testing.assert_close(tuple(found), tuple(inside))


@EVERY_LOSS
def test_modes_and_dtypes(loss):
    embeddings, labels = make_batch(40, 6, dtype=torch.bfloat16)
    expected = pair_weights(loss.module(), embeddings.float(), labels)
    assert expected.pos_weights.dtype == expected.neg_similarities.dtype == torch.float32
    modes = (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16))
    for mode in modes:
        with mode():
            found = pair_weights(loss.module(), embeddings, labels)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@EVERY_LOSS
def test_nothing_kept(loss):
    embeddings, labels = make_batch(8, 6, kind="distinct")
    found = pair_weights(loss.module(epsilon=0.1), embeddings, labels)
    assert [x.shape for x in found] == [(0,)] * 8


def test_errors():
    embeddings, labels = make_batch(8, 6)
    with pytest.raises(TypeError, match=r"^loss: expected a pair loss of dml_cuda.*Linear"):
        pair_weights(torch.nn.Linear(2, 2), embeddings, labels)
    with pytest.raises(ValueError, match=r"^labels: expected 8"):
        pair_weights(dml_cuda.CircleLoss(), embeddings, labels[:3])
    lists = (labels[:3],) * 4
    with pytest.raises(ValueError, match=r"^epsilon: expected None"):
        pair_weights(dml_cuda.CircleLoss(epsilon=0.1), embeddings, labels, indices_tuple=lists)
