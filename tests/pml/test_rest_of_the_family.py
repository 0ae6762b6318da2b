"""Losses that are no formula of one row, and the adapters of the rest of the family, against PML 2.9."""

import warnings

import pytest
import torch
from cases.data import make_batch

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, miners, reducers

import dml_cuda
from dml_cuda import pml

CASES = {
    "LiftedStructureLoss": ({}, {"neg_margin": 0.7, "pos_margin": 0.3}),
    "RankedListLoss": (
        {"margin": 0.4, "Tn": 4},
        {"margin": 0.6, "Tn": 2, "imbalance": 0.3, "alpha": 1.4, "Tp": 1},
    ),
    "NPairsLoss": ({},),
    "NCALoss": ({}, {"softmax_scale": 8}),
    "TupletMarginLoss": ({}, {"margin": 20, "scale": 16}),
}
EVERY = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, cases in CASES.items() for options in cases]
)
LISTS = [name for name in CASES if name != "RankedListLoss"]  # which PML's does not take


def value_and_gradient(loss_fn, embeddings, labels, indices=None):
    leaf = embeddings.clone().requires_grad_()
    value = loss_fn(leaf, labels, indices)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_same(ours, theirs, *batch):
    for found, expected in zip(
        value_and_gradient(ours, *batch), value_and_gradient(theirs, *batch), strict=True
    ):
        largest = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * largest + 1e-15)


@pytest.fixture(autouse=True)
def no_warnings():
    """An adapter that leaves the computation to PML says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dml_cuda has no kernel")
        yield


@pytest.mark.check
@EVERY
@pytest.mark.parametrize("kind", ["few", "unequal"])
def test_pmls_results(name, options, kind):
    for n in (2, 9, 40):
        batch = make_batch(n, 12, kind, torch.float64)
        theirs, ours = getattr(losses, name)(**options), getattr(dml_cuda, name)(**options)
        if not (name == "NCALoss" and n == 2 and kind == "unequal"):  # no positive: PML gives NaN
            assert_same(ours, theirs, *batch)
            assert_same(getattr(pml, name)(**options), theirs, *batch)


@EVERY
def test_distances(name, options):
    kinds = {
        "cosine": (distances.CosineSimilarity(), {"similarity": "cosine"}),
        "dot": (distances.DotProductSimilarity(normalize_embeddings=False), {"similarity": "dot"}),
        "euclidean": (distances.LpDistance(), {"similarity": "euclidean"}),
        "raw": (
            distances.LpDistance(normalize_embeddings=False),
            {"similarity": "euclidean", "normalize_embeddings": False},
        ),
    }
    if name == "RankedListLoss":
        kinds = {kind: kinds[kind] for kind in ("euclidean", "raw")}
    if name in ("TupletMarginLoss", "NCALoss"):  # test_pml.py has them
        kinds = {"cosine": kinds["cosine"]}
    embeddings, labels = make_batch(40, 12, dtype=torch.float64)
    for distance, measured in kinds.values():
        theirs = getattr(losses, name)(**options, distance=distance)
        assert_same(getattr(dml_cuda, name)(**options, **measured), theirs, 0.5 * embeddings, labels)
        assert_same(getattr(pml, name)(**options, distance=distance), theirs, 0.5 * embeddings, labels)


@EVERY
def test_reducers_of_adapters(name, options):
    batch = make_batch(40, 12, dtype=torch.float64)
    makers = [reducers.MeanReducer, reducers.SumReducer, reducers.AvgNonZeroReducer]
    if name in ("RankedListLoss", "NPairsLoss", "NCALoss"):  # rows: whatever the reducer
        makers.append(lambda: reducers.ThresholdReducer(low=0.1))
    for make in makers:
        theirs = getattr(losses, name)(**options, reducer=make())
        assert_same(getattr(pml, name)(**options, reducer=make()), theirs, *batch)


@pytest.mark.parametrize("name", LISTS)
def test_listed_pairs_and_triplets(name):
    """As PML takes them; NCA of dml_cuda chooses pairs by them, its adapter weighs rows."""
    options = CASES[name][-1]
    embeddings, labels = make_batch(40, 12, dtype=torch.float64)
    pairs = miners.MultiSimilarityMiner(epsilon=0.1)(embeddings, labels)
    triplets = miners.TripletMarginMiner(margin=0.1)(embeddings, labels)
    again = tuple(torch.cat([index, index[:20]]) for index in pairs)
    for indices in (pairs, triplets, again):
        theirs = getattr(losses, name)(**options)
        if name != "NCALoss":
            assert_same(getattr(dml_cuda, name)(**options), theirs, embeddings, labels, indices)
        assert_same(getattr(pml, name)(**options), theirs, embeddings, labels, indices)


@EVERY
def test_state_dicts_and_float32(name, options):
    theirs, ours = getattr(losses, name)(**options), getattr(dml_cuda, name)(**options)
    assert ours.state_dict() == theirs.state_dict() == {}
    embeddings, labels = make_batch(60, 32)
    found, expected = (value_and_gradient(loss_fn, embeddings, labels) for loss_fn in (ours, theirs))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4 * float(expected[1].abs().max()))


def test_what_pml_goes_on_computing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not pml.NCALoss(distance=distances.LpDistance(power=1)).is_fused()
        assert not pml.RankedListLoss(0.4, 2, distance=distances.CosineSimilarity()).is_fused()
        assert not pml.LiftedStructureLoss(reducer=reducers.ThresholdReducer(low=0.1)).is_fused()
    assert pml.NPairsLoss().is_fused()
    module = pml.NPairsLoss()
    embeddings, labels = make_batch(40, 12)
    module(embeddings, labels)
    assert module.num_pairs == 10
