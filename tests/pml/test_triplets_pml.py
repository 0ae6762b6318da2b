"""The losses and miners of triplets beside pytorch-metric-learning's, which they stand in for."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from cases.data import make_batch, make_integer_batch, make_labels, make_points

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

import dml_cuda  # noqa: E402
import dml_cuda.pml  # noqa: E402
from dml_cuda.miners.mined import Mined  # noqa: E402

DISTANCES = {
    "euclidean": (distances.LpDistance, {}),
    "raw": (lambda: distances.LpDistance(normalize_embeddings=False), {"normalize_embeddings": False}),
    "cosine": (distances.CosineSimilarity, {"similarity": "cosine"}),
    "dot": (lambda: distances.DotProductSimilarity(normalize_embeddings=False), {"similarity": "dot"}),
}
LOSSES = {
    "triplet": ("TripletMarginLoss", {}),
    "wide": ("TripletMarginLoss", {"margin": 0.4}),
    "swap": ("TripletMarginLoss", {"swap": True}),
    "smooth": ("TripletMarginLoss", {"smooth_loss": True, "margin": 0.0}),
    "margin": ("MarginLoss", {}),
    "margin, other": ("MarginLoss", {"margin": 0.3, "beta": 0.7}),
    "margin, learnt": ("MarginLoss", {"learn_beta": True, "nu": 0.2}),
    "margin, classes": ("MarginLoss", {"learn_beta": True, "nu": 0.2, "num_classes": 12}),
    "margin, fixed classes": ("MarginLoss", {"num_classes": 12}),
}
MINERS = {
    "none": None,
    "batch hard": ("BatchHardMiner", {}),
    "easy hard": ("BatchEasyHardMiner", {}),
    "hard semihard": ("BatchEasyHardMiner", {"pos_strategy": "hard", "neg_strategy": "semihard"}),
    "semihard hard": ("BatchEasyHardMiner", {"pos_strategy": "semihard", "neg_strategy": "hard"}),
    "semihard easy": ("BatchEasyHardMiner", {"pos_strategy": "semihard", "neg_strategy": "easy"}),
    "all easy": ("BatchEasyHardMiner", {"pos_strategy": "all", "neg_strategy": "easy"}),
    "hard all": ("BatchEasyHardMiner", {"pos_strategy": "hard", "neg_strategy": "all"}),
    "all all": ("BatchEasyHardMiner", {"pos_strategy": "all", "neg_strategy": "all"}),
    "ranges": ("BatchEasyHardMiner", {"allowed_pos_range": [0.1, 1.2], "allowed_neg_range": [0.4, 1.3]}),
    "triplets": ("TripletMarginMiner", {}),
    "hard triplets": ("TripletMarginMiner", {"type_of_triplets": "hard"}),
    "semihard triplets": ("TripletMarginMiner", {"type_of_triplets": "semihard", "margin": 0.3}),
    "easy triplets": ("TripletMarginMiner", {"type_of_triplets": "easy"}),
    "pair margins": ("PairMarginMiner", {}),
    "multi-similarity": ("MultiSimilarityMiner", {}),
}
EVERY_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)
EVERY_MINER = pytest.mark.parametrize("miner", MINERS)


def make(table, case, distance="euclidean"):
    """Ours, the adapter and theirs."""
    if table[case] is None:
        return None, None, None
    name, options = table[case]
    make_distance, ours = DISTANCES[distance]
    theirs = getattr(losses if hasattr(losses, name) else miners, name)
    return (
        getattr(dml_cuda, name)(**options, **{"similarity": "euclidean", **ours}),
        getattr(dml_cuda.pml, name)(**options, distance=make_distance()),
        theirs(**options, distance=make_distance()),
    )


def evaluate(loss_fn, embeddings, labels, indices=None, ref_emb=None, ref_labels=None):
    """The value, and its gradients by embeddings, ref_emb and parameters; a miner may stand for indices."""
    x = embeddings.detach().clone().requires_grad_()
    refs = () if ref_emb is None else (ref_emb.detach().clone().requires_grad_(), ref_labels)
    indices = indices(x, labels, *refs) if callable(indices) else indices
    value = loss_fn(x, labels, indices, *refs)
    leaves = x, *refs[:1], *(p for p in loss_fn.parameters() if p.requires_grad)
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    return value.detach().view(()), *gradients


def assert_same(found, expected, rtol=1e-9):
    for a, b in zip(found, expected, strict=True):
        # They sum the gradient of a float32 beta in float32, triplet by triplet.
        close = 2e-5 if a.dtype == torch.float32 else rtol
        close = {"rtol": close, "atol": close * float(b.abs().max()) + 1e-14, "check_dtype": False}
        torch.testing.assert_close(a, b, **close)


@pytest.fixture
def nothing_listed(monkeypatch):
    """A way to forbid it for a while."""

    def refuse(*_, **__):
        raise AssertionError("listed")

    def forbid(patch):
        patch.setattr(Mined, "_read", refuse)

    return forbid


@EVERY_DISTANCE
@EVERY_MINER
@EVERY_LOSS
def test_values_and_gradients(loss, miner, distance, nothing_listed, monkeypatch):
    torch.manual_seed(4)
    labels = torch.cat([make_labels(30, "unequal"), torch.arange(5, 11)])
    embeddings = make_points(labels, 6, torch.float64)
    ours, adapter, theirs = make(LOSSES, loss, distance)
    our_miner, their_adapter, their_miner = make(MINERS, miner, distance)
    listed = None if their_miner is None else their_miner(embeddings, labels)
    expected = evaluate(theirs, embeddings, labels, listed)
    assert adapter.is_fused()
    for loss_fn, found in ((ours, our_miner), (adapter, their_adapter)):
        with monkeypatch.context() as patch:
            if loss != "swap" and miner not in ("multi-similarity", "semihard hard", "semihard easy"):
                nothing_listed(patch)
            assert_same(evaluate(loss_fn, embeddings, labels, found), expected)
        if listed is not None:
            assert_same(evaluate(loss_fn, embeddings, labels, listed), expected)
    if listed is not None:  # and their loss takes ours
        assert_same(evaluate(theirs, embeddings, labels, our_miner), expected)


@EVERY_DISTANCE
@pytest.mark.parametrize("miner", [name for name in MINERS if name not in ("none", "multi-similarity")])
def test_lists(miner, distance):
    """The same lists in the same order, the same numbers; ties among them for dot products of integers."""
    batches = [make_batch(40, 5, kind, torch.float64) for kind in ("few", "unequal", "one", "distinct")]
    if distance == "dot":
        batches.append(make_integer_batch(40, 3, dtype=torch.float64))
    ours, adapter, theirs = make(MINERS, miner, distance)
    for embeddings, labels in batches:
        expected = theirs(embeddings, labels)
        for miner_fn in (ours, adapter):
            found = miner_fn(embeddings, labels)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
            names = ("num_triplets",) if len(expected) == 3 else ("num_pos_pairs", "num_neg_pairs")
            for name in names:
                assert getattr(miner_fn, name) == getattr(theirs, name)
        # Before anybody looked, too.
        adapter(embeddings, labels)
        assert [getattr(adapter, name) for name in names] == [getattr(theirs, name) for name in names]


@EVERY_DISTANCE
@pytest.mark.parametrize("miner", [name for name in MINERS if name not in ("none", "multi-similarity")])
def test_collected_statistics(miner, distance):
    embeddings, labels = make_batch(40, 5, "unequal", torch.float64)
    ours, adapter, theirs = make(MINERS, miner, distance)
    for each in (ours, adapter, theirs):
        each.collect_stats = True
        each(embeddings, labels)
    for name in ours.stats:
        expected = pytest.approx(getattr(theirs, name, 0), rel=1e-9, abs=1e-12)
        assert getattr(ours, name) == expected, name
        assert getattr(adapter, name, 0) == expected, name


@pytest.mark.check
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("miner", [name for name in MINERS if name != "multi-similarity"])
@pytest.mark.parametrize("loss", ["triplet", "smooth", "margin, classes"])
def test_references(loss, miner, distance):
    torch.manual_seed(5)
    labels, ref_labels = (torch.randint(0, 12, (size,)) for size in (18, 31))
    embeddings, ref_emb = (make_points(each, 5, torch.float64) for each in (labels, ref_labels))
    ours, adapter, theirs = make(LOSSES, loss, distance)
    our_miner, their_adapter, their_miner = make(MINERS, miner, distance)
    refs = ref_emb, ref_labels
    expected = evaluate(theirs, embeddings, labels, their_miner, *refs)
    for loss_fn, miner_fn in ((ours, our_miner), (adapter, their_adapter)):
        assert_same(evaluate(loss_fn, embeddings, labels, miner_fn, *refs), expected)


def test_the_same_labels_object_for_two_views():
    """There row i of both is the same point."""
    labels = make_labels(20)
    embeddings, ref_emb = (make_points(labels, 5, torch.float64) for _ in range(2))
    for loss in ("triplet", "margin"):
        for miner in ("none", "batch hard", "semihard triplets", "pair margins"):
            _, adapter, theirs = make(LOSSES, loss)
            _, adapted, their_miner = make(MINERS, miner)
            expected = evaluate(theirs, embeddings, labels, their_miner, ref_emb, labels)
            assert_same(evaluate(adapter, embeddings, labels, adapted, ref_emb, labels), expected)


PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss", "NTXentLoss", "SupConLoss")


@pytest.mark.parametrize("miner", [name for name in MINERS if name != "none"])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_losses_of_pairs_take_what_the_miners_find(loss, miner):
    embeddings, labels = make_batch(24, 5, dtype=torch.float64)
    our_miner, adapted, their_miner = make(MINERS, miner)
    listed = their_miner(embeddings, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = evaluate(getattr(losses, loss)(), embeddings, labels, listed)
        for loss_fn in (getattr(dml_cuda, loss)(), getattr(dml_cuda.pml, loss)()):
            for found in (our_miner, adapted, listed):
                assert_same(evaluate(loss_fn, embeddings, labels, found), expected, rtol=2e-8)


def test_pairs_with_their_own_distances_and_any_anchor_order():
    """Their tuples need not be in the order of the anchors."""
    embeddings, labels = make_batch(20, 5, dtype=torch.float64)
    pairs = miners.PairMarginMiner(0.1, 1.5)(embeddings, labels)
    orders = [torch.randperm(len(pairs[k])) for k in (0, 2)]
    mixed = tuple(index[orders[k // 2]] for k, index in enumerate(pairs))
    for loss in LOSSES:
        ours, adapter, theirs = make(LOSSES, loss)
        expected = evaluate(theirs, embeddings, labels, mixed)
        assert_same(evaluate(ours, embeddings, labels, mixed), expected)
        assert_same(evaluate(adapter, embeddings, labels, mixed), expected)


REDUCERS = {
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "nonzero": reducers.AvgNonZeroReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=0.05),
    "class weighted": lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2, 12)),
    "divisor": reducers.DivisorReducer,
    "multiple": lambda: reducers.MultipleReducers({}, reducers.SumReducer()),
}


@pytest.mark.parametrize("miner", ["none", "semihard triplets"])
@pytest.mark.parametrize(
    ("loss", "reducer"),
    [
        (loss, reducer)
        for loss in ("triplet", "margin", "margin, learnt", "margin, classes")
        for reducer in REDUCERS
        if (loss, reducer) != ("triplet", "divisor")  # which has none
    ],
)
def test_reducers(loss, miner, reducer):
    """Those that weigh triplets apart are left to them, the others computed here."""
    embeddings, labels = make_batch(24, 5, dtype=torch.float64)
    name, options = LOSSES[loss]
    adapter, theirs = (
        getattr(module, name)(**options, reducer=REDUCERS[reducer]()) for module in (dml_cuda.pml, losses)
    )
    _, adapted, their_miner = make(MINERS, miner)
    fused = {"mean", "sum", "multiple"} | ({"nonzero"} if loss == "triplet" else {"divisor"})
    assert adapter.is_fused() == (reducer in fused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(
            evaluate(adapter, embeddings, labels, adapted), evaluate(theirs, embeddings, labels, their_miner)
        )


def test_regularisers_and_statistics_stay():
    embeddings, labels = make_batch(20, 5, dtype=torch.float64)
    how = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    for name in ("TripletMarginLoss", "MarginLoss"):
        ours, theirs = (getattr(module, name)(**how) for module in (dml_cuda.pml, losses))
        assert_same(evaluate(ours, embeddings, labels), evaluate(theirs, embeddings, labels))


def test_what_a_subclass_overrides_is_used():
    embeddings, labels = make_batch(20, 5, dtype=torch.float64)

    class Mine(dml_cuda.pml.MarginLoss):
        def compute_reg_loss(self, *_):
            return {"losses": torch.tensor(3.0), "indices": None, "reduction_type": "already_reduced"}

    class Miner(dml_cuda.pml.BatchEasyHardMiner):
        def get_positives(self, *arguments):
            return super().get_positives(*arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not Mine().is_fused()
        torch.testing.assert_close(Mine()(embeddings, labels), losses.MarginLoss()(embeddings, labels) + 3)
        assert isinstance(Miner()(embeddings, labels), tuple)


@pytest.mark.parametrize("distance", [distances.SNRDistance, lambda: distances.LpDistance(p=1)])
def test_other_distances_are_left_to_them(distance):
    embeddings, labels = make_batch(20, 5, dtype=torch.float64)
    dml_cuda._warnings._given.clear()
    ours = dml_cuda.pml.TripletMarginLoss(distance=distance())
    miner = dml_cuda.pml.BatchHardMiner(distance=distance())
    with pytest.warns(UserWarning, match="pytorch-metric-learning computes it"):
        found = evaluate(ours, embeddings, labels)
    assert_same(found, evaluate(losses.TripletMarginLoss(distance=distance()), embeddings, labels))
    with pytest.warns(UserWarning, match="pytorch-metric-learning computes it"):
        assert isinstance(miner(embeddings, labels), tuple)
    assert miner.num_triplets == len(miners.BatchHardMiner(distance=distance())(embeddings, labels)[0])


@pytest.mark.parametrize(
    "miner", ["none", "batch hard", "semihard triplets", "pair margins", "multi-similarity"]
)
@pytest.mark.parametrize("loss", ["triplet", "smooth", "margin", "margin, classes"])
def test_cross_batch_memory(loss, miner):
    """Each kind of memory with each kind of loss and miner, as the queue fills and wraps around."""
    ours, adapter, theirs = make(LOSSES, loss)
    our_miner, adapted, their_miner = make(MINERS, miner)
    memories = [
        losses.CrossBatchMemory(theirs, 5, 50, their_miner),
        dml_cuda.CrossBatchMemory(ours, 5, 50, our_miner),
        dml_cuda.CrossBatchMemory(adapter, 5, 50, adapted),
        losses.CrossBatchMemory(adapter, 5, 50, adapted),
        dml_cuda.CrossBatchMemory(theirs, 5, 50, our_miner),
    ]
    torch.manual_seed(6)
    for n in (16, 16, 20, 12, 30):
        labels = torch.randint(0, 12, (n,))
        embeddings = make_points(labels, 5, torch.float64)
        expected, *others = (evaluate(memory, embeddings, labels) for memory in memories)
        for found in others:
            assert_same(found, expected)


def test_easy_positives_of_a_memory_are_not_the_rows_own_copies():
    """Of pytorch-metric-learning's they are: the row loses its pair."""
    labels = torch.arange(20) // 4
    embeddings = make_points(labels, 5, torch.float64)
    memory = dml_cuda.CrossBatchMemory(dml_cuda.TripletMarginLoss(), 5, 40, dml_cuda.BatchEasyHardMiner())
    expected = dml_cuda.TripletMarginLoss()(
        embeddings, labels, dml_cuda.BatchEasyHardMiner()(embeddings, labels)
    )
    torch.testing.assert_close(memory(embeddings, labels), expected)


def test_copies_and_checkpoints():
    embeddings, labels = make_batch(20, 5)
    for name in ("margin, learnt", "margin, classes"):
        ours, adapter, theirs = make(LOSSES, name)
        with torch.no_grad():
            theirs.beta.mul_(0.9)
        assert ours.state_dict().keys() == theirs.state_dict().keys() == {"beta"}
        for each in (ours, adapter):
            each.load_state_dict(theirs.state_dict())
            expected = theirs(embeddings, labels)
            file = io.BytesIO(pickle.dumps(each))
            for other in (each, copy.deepcopy(each), pickle.load(file)):
                torch.testing.assert_close(other(embeddings, labels), expected)
    for case in LOSSES:
        _, adapter, theirs = make(LOSSES, case)
        assert isinstance(adapter, type(theirs))
        copy.deepcopy(adapter)(embeddings, labels).backward() if list(adapter.parameters()) else None
    for case in MINERS:
        ours, adapter, theirs = make(MINERS, case)
        for each in (ours, adapter):
            if each is not None:
                each(embeddings, labels)
                other = pickle.loads(pickle.dumps(copy.deepcopy(each)))
                for a, b in zip(other(embeddings, labels), each(embeddings, labels), strict=True):
                    assert torch.equal(a, b)


def test_distance_weighted_adapter():
    embeddings, labels = make_batch(40, 8, dtype=torch.float64)
    miner = dml_cuda.pml.DistanceWeightedMiner(nonzero_loss_cutoff=1.8)
    for loss_fn, theirs in (
        (dml_cuda.pml.MarginLoss(), losses.MarginLoss()),
        (dml_cuda.pml.TripletMarginLoss(), losses.TripletMarginLoss()),
    ):
        mined = miner(embeddings, labels)
        found = loss_fn(embeddings, labels, mined)
        torch.testing.assert_close(found, theirs(embeddings, labels, tuple(mined)))
        assert miner.num_triplets == len(mined.anchors)
    with pytest.raises(AssertionError):
        dml_cuda.pml.DistanceWeightedMiner(distance=distances.CosineSimilarity())


def test_triplets_drawn_for_each_anchor():
    """The same expectation, of independent draws."""
    embeddings, labels = make_batch(40, 5, dtype=torch.float64)
    means = []
    for module in (dml_cuda, dml_cuda.pml, losses):
        loss_fn = module.TripletMarginLoss(triplets_per_anchor=400)
        means.append(float(loss_fn(embeddings, labels)))
    assert means[0] == pytest.approx(means[2], rel=0.03)
    assert means[1] == pytest.approx(means[2], rel=0.03)


@pytest.mark.check
def test_every_adapter_is_a_case():
    names = {case[0] for table in (LOSSES, MINERS) for case in table.values() if case is not None}
    names |= {"DistanceWeightedMiner"}
    theirs = losses.TripletMarginLoss, losses.MarginLoss, miners.BaseMiner
    assert names == {name for name in dml_cuda.pml.__all__ if issubclass(getattr(dml_cuda.pml, name), theirs)}
