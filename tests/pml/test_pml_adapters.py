"""dml_cuda.pml: pytorch-metric-learning's own classes with our computation, and all else as it was."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from cases.data import make_batch, make_labels, make_points
from distributed.two_ranks import run_two_ranks

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import distributed  # noqa: E402

import dml_cuda.pml  # noqa: E402
from dml_cuda import MinedPairs  # noqa: E402

NAMES = ("MultiSimilarityLoss", "CircleLoss")
EVERY = pytest.mark.parametrize("name", NAMES)
DOT = {"normalize_embeddings": False}


def evaluate(loss_fn, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, miner=None):
    leaves = [x.detach().clone().requires_grad_() for x in (embeddings, ref_emb) if x is not None]
    refs = (leaves[1], ref_labels) if ref_emb is not None else ()
    if miner is not None:
        indices_tuple = miner(leaves[0], labels, *refs)
    value = loss_fn(leaves[0], labels, indices_tuple, *refs)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [
        value.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)),
    ]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)
    for f, e in zip(found[1:], expected[1:], strict=True):
        # PML's circle loss goes through torch's softplus, which takes exp(-20) = 2e-9 for 0.
        torch.testing.assert_close(f, e, rtol=0, atol=4e-9 * e.abs().max().item() + 1e-15)


def both(name, **options):
    return [getattr(module, name)(**copy.deepcopy(options)) for module in (dml_cuda.pml, losses)]


def compare(name, *batch, epsilon=None, times=1, **options):
    """Ours and theirs on one batch: the losses after it."""
    ours, theirs = both(name, **options)
    our_miner = their_miner = None
    if epsilon is not None:
        our_miner = dml_cuda.pml.MultiSimilarityMiner(epsilon)
        their_miner = miners.MultiSimilarityMiner(epsilon)
    for _ in range(times):
        found = evaluate(ours, *batch, miner=our_miner)
        assert_same(found, evaluate(theirs, *batch, miner=their_miner))
    return ours, theirs, found


@pytest.fixture
def computed_by_us(monkeypatch):
    """No distance matrix may be made by pytorch-metric-learning, and no pair be listed."""

    def refuse(*_):
        raise AssertionError("not fused")

    monkeypatch.setattr(MinedPairs, "_read", refuse)
    # Only while ours computes: theirs, called beside it, needs its matrix.
    compute = dml_cuda.pml.pair_losses._Fused.compute_loss
    matrix = distances.DotProductSimilarity.compute_mat

    def compute_loss(self, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distances.DotProductSimilarity, "compute_mat", refuse)
            return compute(self, *arguments)

    monkeypatch.setattr(dml_cuda.pml.pair_losses._Fused, "compute_loss", compute_loss)
    assert distances.DotProductSimilarity.compute_mat is matrix


REDUCERS = {
    "default": lambda: None,
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "nonzero": reducers.AvgNonZeroReducer,
    "class weighted": lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2, 40)),
    "threshold": lambda: reducers.ThresholdReducer(low=0.05, high=200.0),
    "per anchor": reducers.PerAnchorReducer,
    "per anchor, sum": lambda: reducers.PerAnchorReducer(reducer=reducers.SumReducer()),
    "multiple": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
    "multiple, default": lambda: reducers.MultipleReducers({}, reducers.AvgNonZeroReducer()),
}


@EVERY
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_reducers(name, reducer, epsilon, computed_by_us):
    labels = torch.cat([make_labels(60), torch.arange(30, 40)])
    embeddings = make_points(labels, 6, torch.float64)
    *_, found = compare(name, embeddings, labels, epsilon=epsilon, reducer=REDUCERS[reducer]())
    assert found[1].abs().max() > 0


@EVERY
def test_do_nothing_reducer(name):
    embeddings, labels = make_batch(20, 6, dtype=torch.float64)
    results = [loss(embeddings, labels)["loss"] for loss in both(name, reducer=reducers.DoNothingReducer())]
    torch.testing.assert_close(results[0]["losses"], results[1]["losses"])
    assert torch.equal(results[0]["indices"], results[1]["indices"])
    assert results[0]["reduction_type"] == results[1]["reduction_type"]


def test_every_reducer_is_tested():
    """All that there are, but for the divisor's, which asks for more than these losses give."""
    ours = {type(make()).__name__ for make in REDUCERS.values()} - {"NoneType"}
    theirs = {r for r in dir(reducers) if r.endswith("Reducer") or r.endswith("Reducers")} - {"BaseReducer"}
    assert theirs - ours == {"DoNothingReducer", "DivisorReducer"}
    embeddings, labels = make_batch(20, 6)
    for loss in both("CircleLoss", reducer=reducers.DivisorReducer()):
        with pytest.raises(KeyError):
            loss(embeddings, labels)


@pytest.mark.check
@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_many_batches(name, epsilon, computed_by_us):
    for seed in range(15):
        torch.manual_seed(seed)
        kind = ("few", "one", "distinct", "unequal")[seed % 4]
        embeddings, labels = make_batch(10 + 7 * seed, 6, kind, torch.float64, (0.3, 1.0)[seed % 2])
        compare(name, embeddings, labels, epsilon=epsilon)


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_ref_emb(name, epsilon, computed_by_us):
    for n, m in ((1, 9), (40, 90), (90, 40)):
        labels, ref_labels = make_labels(n), make_labels(m)
        points = make_points(torch.cat([labels, ref_labels]), 6, torch.float64)
        compare(name, points[:n], labels, None, points[n:], ref_labels, epsilon=epsilon)


@EVERY
def test_the_batch_as_its_own_references(name):
    """PML takes the self pairs out when the labels are the same object, whatever ref_emb is."""
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    other = make_points(labels, 6, torch.float64)
    compare(name, embeddings, labels, None, other, labels.clone())
    compare(name, embeddings, labels, None, other, labels)
    for ref_labels in (labels, labels.clone()):
        results = []
        for loss in both(name):
            leaf = embeddings.clone().requires_grad_()
            value = loss(leaf, labels, None, leaf, ref_labels)
            results.append([value.detach(), *torch.autograd.grad(value, leaf)])
        assert_same(*results)


@EVERY
@pytest.mark.parametrize("make", [
    lambda: miners.TripletMarginMiner(0.2),
    lambda: miners.BatchHardMiner(),
    lambda: miners.PairMarginMiner(0.2, 1.2),
    lambda: miners.MultiSimilarityMiner(0.1),
], ids=["triplet margin", "batch hard", "pair margin", "multi-similarity"])  # fmt: skip
def test_miners_of_pml(name, make):
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    ours, theirs = both(name)
    found, expected = (evaluate(loss, embeddings, labels, miner=make()) for loss in (ours, theirs))
    assert_same(found, expected)
    assert found[1].abs().max() > 0


@EVERY
def test_few_pairs(name):
    """With a single pair of each kind, or none, PML's losses are 0, and with two they are not."""
    embeddings = torch.randn(6, 4, dtype=torch.float64)
    for count in (0, 1, 2):
        lists = tuple(torch.tensor(x)[:count] for x in ([0, 1], [1, 2], [0, 1], [3, 4]))
        ours, theirs = both(name)
        found = evaluate(ours, embeddings, None, lists)
        assert_same(found, evaluate(theirs, embeddings, None, lists))
        assert (found[0] > 0) == (count == 2)
    for n, m in ((1, 1), (1, 2), (2, 1)):
        for ref_labels in (torch.zeros(m), torch.arange(m)):
            compare(name, embeddings[:n], torch.zeros(n).long(), None, embeddings[-m:], ref_labels.long())


@EVERY
def test_a_single_mined_pair_of_each_kind(name):
    """The one result that differs, as the module says: PML's is 0 here, ours what any other number gives."""
    angles = torch.tensor([0.0, 0.5, 2.0, 2.5], dtype=torch.float64)
    embeddings, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 2])
    ref_emb, ref_labels = embeddings[1:3], labels[1:3]
    miner = dml_cuda.pml.MultiSimilarityMiner(1.5)
    batch = embeddings[:2], torch.tensor([0, 5]), None, ref_emb, ref_labels
    found = evaluate(getattr(dml_cuda.pml, name)(), *batch, miner=miner)[0]
    assert (miner.num_pos_pairs, miner.num_neg_pairs) == (1, 1)
    assert found > 0
    assert evaluate(getattr(losses, name)(), *batch, miner=miners.MultiSimilarityMiner(1.5))[0] == 0


@EVERY
def test_our_pairs_in_losses_of_pml(name):
    """MinedPairs, of dml_cuda or of the adapter, are what PML's own losses take."""
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    others = (
        losses.ContrastiveLoss(),
        losses.TripletMarginLoss(),
        losses.NTXentLoss(),
        getattr(losses, name)(),
    )
    for loss in others:
        theirs = evaluate(loss, embeddings, labels, miner=miners.MultiSimilarityMiner(0.1))
        for miner in (dml_cuda.MultiSimilarityMiner(0.1), dml_cuda.pml.MultiSimilarityMiner(0.1)):
            assert_same(evaluate(loss, embeddings, labels, miner=miner), theirs)


def test_miner():
    """The pairs of PML's own, its counts, made when they are read."""
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    ref_emb, ref_labels = make_batch(90, 6, dtype=torch.float64)
    for refs in ((), (ref_emb, ref_labels)):
        options = {"collect_stats": True, "distance": distances.CosineSimilarity(collect_stats=True)}
        ours = dml_cuda.pml.MultiSimilarityMiner(0.1, **copy.deepcopy(options))
        theirs = miners.MultiSimilarityMiner(0.1, **copy.deepcopy(options))
        pairs, expected = ours(embeddings, labels, *refs), theirs(embeddings, labels, *refs)
        assert isinstance(pairs, MinedPairs)
        assert (ours.num_pos_pairs, ours.num_neg_pairs) == (theirs.num_pos_pairs, theirs.num_neg_pairs)
        assert ours.num_pos_pairs == len(pairs[0]) > 0
        for k in (0, 2):
            as_sets = [set(zip(x[k].tolist(), x[k + 1].tolist(), strict=True)) for x in (pairs, expected)]
            assert as_sets[0] == as_sets[1]
        assert ours.distance.initial_avg_ref_norm == pytest.approx(theirs.distance.initial_avg_ref_norm)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(other(embeddings, labels), MinedPairs)


def stats(module):
    return {
        f"{type(part).__name__}.{name}": getattr(part, name)
        for part in module.modules()
        for name in (*getattr(part, "_record_these", ()), *getattr(part, "_record_these_stats", ()))
    }


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_statistics(name, epsilon):
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    ref_emb, ref_labels = make_batch(90, 6, dtype=torch.float64)
    parts = {
        "collect_stats": True,
        "distance": distances.CosineSimilarity(collect_stats=True),
        "reducer": reducers.ThresholdReducer(low=0.05, collect_stats=True),
    }
    for refs in ((), (None, ref_emb, ref_labels)):
        ours, theirs, _ = compare(name, embeddings, labels, *refs, epsilon=epsilon, times=2, **parts)
        found, expected = stats(ours), stats(theirs)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected)
        assert found["CosineSimilarity.initial_avg_query_norm"] > 1
        assert found["ThresholdReducer.num_past_filter"] > 0


REGULARIZERS = {
    "Lp": regularizers.LpRegularizer,
    "center invariant": regularizers.CenterInvariantRegularizer,
    "zero mean": regularizers.ZeroMeanRegularizer,
}


@EVERY
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_regularizers(name, regularizer, computed_by_us):
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    options = {"embedding_regularizer": REGULARIZERS[regularizer](), "embedding_reg_weight": 0.3}
    ours, _, found = compare(name, embeddings, labels, epsilon=0.1, **options)
    *_, without = compare(name, embeddings, labels, epsilon=0.1)
    assert found[0] != without[0]
    assert ours.sub_loss_names() == ["loss", "embedding_reg_loss"]


def test_options_and_dot_products(computed_by_us):
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    batch = 0.4 * embeddings, labels
    dot = distances.DotProductSimilarity(normalize_embeddings=False)
    for options in ({"alpha": 1.0, "beta": 30.0, "base": 0.2}, {"distance": dot}):
        compare("MultiSimilarityLoss", *batch, **options)
    compare("CircleLoss", *batch, m=0.25, gamma=256)
    # The miner's own distance is cosine here and there: its pairs are another similarity's.
    miner = dml_cuda.pml.MultiSimilarityMiner(0.1, distance=dot)
    ours, theirs = both("MultiSimilarityLoss", distance=dot)
    expected = evaluate(theirs, *batch, miner=miners.MultiSimilarityMiner(0.1, distance=dot))
    assert_same(evaluate(ours, *batch, miner=miner), expected)


def test_falls_back_for_another_distance():
    """PML's own code computes, and one warning says so."""
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    for distance in (
        distances.LpDistance(p=1, normalize_embeddings=False),
        distances.LpDistance(power=2),
        distances.CosineSimilarity(power=2),
        distances.DotProductSimilarity(p=1),
    ):
        dml_cuda._warnings._given.clear()
        ours, theirs = both("MultiSimilarityLoss", distance=distance)
        miner = dml_cuda.pml.MultiSimilarityMiner(0.1, distance=distance)
        their_miner = miners.MultiSimilarityMiner(0.1, distance=distance)
        expected = evaluate(theirs, embeddings, labels, miner=their_miner)
        with pytest.warns(UserWarning, match="no kernel for Multi.*pytorch-metric-learning") as seen:
            found = [evaluate(ours, embeddings, labels, miner=miner) for _ in range(3)]
        assert len(seen) == 2  # the loss's and the miner's
        assert {w.filename for w in seen} == {__file__}
        for f in found:
            assert_same(f, expected)
        assert miner.num_pos_pairs > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both("CircleLoss")[0](embeddings, labels)


@EVERY
def test_instances_and_copies(name):
    ours, theirs = both(name)
    assert isinstance(ours, getattr(losses, name))
    assert isinstance(dml_cuda.pml.MultiSimilarityMiner(), miners.MultiSimilarityMiner)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    embeddings, labels = make_batch(20, 6)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(embeddings, labels), ours(embeddings, labels))


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_cross_batch_memory_of_pml(name, epsilon):
    pair = []
    for module, miner in (
        (dml_cuda.pml, dml_cuda.pml.MultiSimilarityMiner),
        (losses, miners.MultiSimilarityMiner),
    ):
        loss = getattr(module, name)()
        pair.append(losses.CrossBatchMemory(loss, 6, 100, None if epsilon is None else miner(epsilon)))
    for _ in range(6):
        embeddings, labels = make_batch(30, 6, dtype=torch.float64)
        found, expected = (evaluate(memory, embeddings, labels)[:2] for memory in (
            lambda e, y, *_, m=m: m(e, y) for m in pair))  # fmt: skip
        assert_same(found, expected)


@EVERY
@pytest.mark.parametrize("symmetric", [False, True])
def test_self_supervised_loss_of_pml(name, symmetric):
    views = torch.randn(2, 20, 6, dtype=torch.float64)
    found, expected = (losses.SelfSupervisedLoss(loss, symmetric)(*views) for loss in both(name))
    torch.testing.assert_close(found, expected)


@EVERY
def test_multiple_losses_of_pml(name):
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    found, expected = (
        evaluate(
            losses.MultipleLosses([loss, losses.ContrastiveLoss()], weights=[1, 0.5]), embeddings, labels
        )
        for loss in both(name)
    )
    assert_same(found, expected)


def test_distributed_loss_wrapper_alone():
    embeddings, labels = make_batch(40, 6)
    loss = dml_cuda.pml.CircleLoss()
    with pytest.warns(UserWarning, match="non-distributed"):
        assert torch.equal(
            distributed.DistributedLossWrapper(loss)(embeddings, labels), loss(embeddings, labels)
        )


# One of two processes: each rank's loss and gradient with ours and with PML's.
RANK = """
import sys
import torch
import torch.distributed as dist
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils import distributed
import dml_cuda.pml

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
for name in ("MultiSimilarityLoss", "CircleLoss"):
    for efficient in (False, True):
        for mined in (False, True):
            results = []
            for module, miner in ((dml_cuda.pml, dml_cuda.pml.MultiSimilarityMiner), (losses, miners.MultiSimilarityMiner)):
                torch.manual_seed(rank)
                labels = torch.randint(0, 6, (24,))
                embeddings = torch.randn(24, 6, dtype=torch.float64, requires_grad=True)
                loss = distributed.DistributedLossWrapper(getattr(module, name)(), efficient=efficient)
                pairs = None
                if mined:
                    pairs = distributed.DistributedMinerWrapper(miner(0.1), efficient=efficient)(embeddings, labels)
                value = loss(embeddings, labels, pairs)
                value.backward()
                results.append((value.detach(), embeddings.grad))
            assert results[0][1].abs().max() > 0
            torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=4e-9 * results[1][1].abs().max().item())
dist.destroy_process_group()
"""  # noqa: E501


def test_distributed_loss_wrapper(tmp_path):
    """Both of its settings, with and without a miner, on two processes."""
    run_two_ranks(RANK, tmp_path)


# --- Every adapter

# Each loss with distances it can have, and parameters for similarities or distances of about that size.
COSINE, DOT_PRODUCT = distances.CosineSimilarity, distances.DotProductSimilarity
EUCLIDEAN = distances.LpDistance
RAW = {"normalize_embeddings": False}
CASES = {
    "MS, euclidean": ("MultiSimilarityLoss", {"distance": EUCLIDEAN(), "beta": 10, "base": 1.0}),
    "MS, as they come": ("MultiSimilarityLoss", {"distance": EUCLIDEAN(**RAW), "beta": 2, "base": 3.0}),
    "contrastive": ("ContrastiveLoss", {}),
    "contrastive, as they come": (
        "ContrastiveLoss", {"distance": EUCLIDEAN(**RAW), "pos_margin": 0.5, "neg_margin": 3.0}),
    "contrastive, cosine": ("ContrastiveLoss", {"distance": COSINE(), "pos_margin": 0.9, "neg_margin": 0.2}),
    "contrastive, dot": (
        "ContrastiveLoss", {"distance": DOT_PRODUCT(**RAW), "pos_margin": 2, "neg_margin": 1}),
    "lifted": ("GeneralizedLiftedStructureLoss", {}),
    "lifted, as they come": (
        "GeneralizedLiftedStructureLoss", {"distance": EUCLIDEAN(**RAW), "neg_margin": 4.0}),
    "lifted, cosine": (
        "GeneralizedLiftedStructureLoss", {"distance": COSINE(), "neg_margin": 0.2, "pos_margin": 0.7}),
    "NT-Xent": ("NTXentLoss", {"temperature": 0.3}),
    "NT-Xent, euclidean": ("NTXentLoss", {"distance": EUCLIDEAN()}),
    "SupCon": ("SupConLoss", {}),
    "SupCon, euclidean": ("SupConLoss", {"distance": EUCLIDEAN(), "temperature": 0.3}),
    "SupCon, dot": ("SupConLoss", {"distance": DOT_PRODUCT(**RAW), "temperature": 2.0}),
}  # fmt: skip
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def close(found, expected):
    """PML's distances are sqrt(|x|^2 + |y|^2 - 2 x.y), its floor in a logarithm 1e-308."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-8, atol=1e-9)
    for f, e in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-7 * e.abs().max().item() + 1e-12)


@EVERY_CASE
@pytest.mark.parametrize("kind", ["few", "unequal"])
@pytest.mark.parametrize(
    ("refs", "mined"),
    [
        *itertools.product(("none", "others"), (None, "lazy", "pairs", "triplets")),
        # Not lazy: PML's miner then lists some pairs as both kinds.
        *itertools.product(("same labels",), (None, "pairs", "triplets")),
    ],
)
def test_cases(case, kind, refs, mined):
    name, options = CASES[case]
    labels = make_labels(24, kind)
    points = make_points(torch.cat([labels, labels]), 6, torch.float64)
    embeddings, ref_emb = points[:24], points[24:]
    others = {"none": (None, None), "others": (ref_emb, labels.flip(0)), "same labels": (ref_emb, labels)}[
        refs
    ]
    ours, theirs = both(name, **options)
    assert ours.is_fused()
    distance = copy.deepcopy(theirs.distance)
    our_miner, their_miner = {
        None: (None, None),
        "lazy": [
            m(0.2, distance=distance)
            for m in (dml_cuda.pml.MultiSimilarityMiner, miners.MultiSimilarityMiner)
        ],
        "pairs": (miners.PairMarginMiner(0.2, 1.2),) * 2,
        "triplets": (miners.TripletMarginMiner(0.3),) * 2,
    }[mined]
    batch = embeddings, labels, None, *others
    close(evaluate(ours, *batch, miner=our_miner), evaluate(theirs, *batch, miner=their_miner))


@EVERY_CASE
@pytest.mark.parametrize("reducer", REDUCERS)
def test_reducers_of_cases(case, reducer):
    """What the kernels lack for losses of pairs PML computes, with one warning."""
    name, options = CASES[case]
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    if reducer == "per anchor" or reducer == "per anchor, sum":
        embeddings, labels = embeddings[:40], labels % 40
    dml_cuda._warnings._given.clear()
    ours, theirs = both(name, **options, reducer=REDUCERS[reducer]())
    expected = evaluate(theirs, embeddings, labels)
    of_rows = name not in ("ContrastiveLoss", "NTXentLoss")
    known = reducer in ("default", "mean", "sum", "nonzero") or reducer.startswith("multiple")
    assert ours.is_fused() == (of_rows or known)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            close(evaluate(ours, embeddings, labels), expected)
    assert len(seen) == (0 if ours.is_fused() else 1)


@EVERY_CASE
def test_one_kind_only(case):
    """A batch without any negative, or without any positive; SupCon's loss is 0 there in PML."""
    name, options = CASES[case]
    embeddings = torch.randn(12, 6, dtype=torch.float64)
    ref_emb = torch.randn(9, 6, dtype=torch.float64)
    for labels in (torch.zeros(12).long(), torch.arange(12)):
        for refs in ((None, None), (ref_emb, labels[:9].clone()), (ref_emb, labels[:9] + 100)):
            ours, theirs = both(name, **options)
            close(
                evaluate(ours, embeddings, labels, None, *refs),
                evaluate(theirs, embeddings, labels, None, *refs),
            )
    none, some = torch.tensor([], dtype=torch.long), torch.tensor([0, 1, 1])
    for lists in ((some, some + 2, none, none), (none, none, some, some + 2), (none,) * 4):
        ours, theirs = both(name, **options)
        close(evaluate(ours, embeddings, None, lists), evaluate(theirs, embeddings, None, lists))


def test_supervised_contrastive_without_negatives():
    """The documented difference of the root class: its rows have their loss."""
    embeddings, labels = torch.randn(6, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    assert losses.SupConLoss()(embeddings, labels) == dml_cuda.pml.SupConLoss()(embeddings, labels) == 0
    s = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(embeddings).T / 0.1
    s = s[~torch.eye(6, dtype=torch.bool)].view(6, 5)
    expected = (torch.logsumexp(s, 1) - s.mean(1)).mean()
    torch.testing.assert_close(dml_cuda.SupConLoss()(embeddings, labels), expected)
    memory = dml_cuda.CrossBatchMemory(dml_cuda.pml.SupConLoss(), 4, 20)
    theirs = losses.CrossBatchMemory(losses.SupConLoss(), 4, 20)
    for labels in (torch.zeros(6).long(), torch.zeros(6).long(), torch.ones(6).long()):
        torch.testing.assert_close(
            memory(embeddings, labels), theirs(embeddings, labels), rtol=1e-8, atol=1e-9
        )


@EVERY_CASE
@pytest.mark.parametrize("ours_too", [False, True])
def test_cases_in_memories(case, ours_too):
    name, options = CASES[case]
    ours, theirs = both(name, **options)
    kind = dml_cuda.CrossBatchMemory if ours_too else losses.CrossBatchMemory
    memories = kind(ours, 6, 50), losses.CrossBatchMemory(theirs, 6, 50)
    for _ in range(4):
        embeddings, labels = make_batch(16, 6, dtype=torch.float64)
        found, expected = (
            evaluate(lambda e, y, *_, m=m: m(e, y), embeddings, labels)[:2] for m in memories)  # fmt: skip
        close(found, expected)


@EVERY_CASE
def test_copies_of_cases(case):
    name, options = CASES[case]
    ours = both(name, **options)[0]
    embeddings, labels = make_batch(20, 6)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.is_fused()
        assert torch.equal(other(embeddings, labels), ours(embeddings, labels))


@pytest.mark.check
def test_every_adapter_is_a_case():
    names = {name for name, _ in CASES.values()} | {"CircleLoss", "MultiSimilarityMiner"}
    names |= {"LiftedStructureLoss", "TupletMarginLoss"}  # test_rest_of_the_family.py has them
    # test_classifier.py has the class-level ones, test_triplets_pml.py those of triplets
    of_pairs = (losses.GenericPairLoss, miners.MultiSimilarityMiner)
    adapters = {name for name in dml_cuda.pml.__all__ if issubclass(getattr(dml_cuda.pml, name), of_pairs)}
    assert names == adapters
