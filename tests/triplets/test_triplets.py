"""The losses of triplets and their miners, against loops over every triplet in float64."""

import copy

import numpy as np
import pytest
import torch
from cases.data import make_batch, make_integer_batch
from cases.losses import SIMILARITIES, by_name
from cases.statistics import chi_squared_is_likely
from oracle import triplets as truth

import dml_cuda
from dml_cuda import (
    BatchEasyHardMiner,
    BatchHardMiner,
    DistanceWeightedMiner,
    MarginLoss,
    MinedTriplets,
    MultiSimilarityMiner,
    PairMarginMiner,
    SelectedPairs,
    TripletMarginLoss,
    TripletMarginMiner,
)
from dml_cuda.functional import margin_loss, triplet_margin_loss
from dml_cuda.miners.mined import Mined

EVERY_SIMILARITY = pytest.mark.parametrize("similarity", SIMILARITIES)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])
TERMS = {"hinge": {}, "softplus": {"smooth_loss": True}}
REDUCTIONS = {"mean_nonzero": 0, "mean": 1, "mean_valid": 1, "sum": None}


def evaluate(function, embeddings, *arguments, leaves=(), **options):
    """The value, and its gradients by the embeddings and the leaves."""
    x = embeddings.detach().clone().requires_grad_()
    value = function(x, *arguments, **options)
    return value.detach(), *torch.autograd.grad(value, (x, *leaves))


def never_list(monkeypatch):
    """From here on nobody may look at what a miner found."""
    monkeypatch.setattr(Mined, "_read", lambda self: pytest.fail("listed"))
    monkeypatch.setattr(Mined, "blocks", lambda *_, **__: pytest.fail("listed"))


def batches():
    """Odd ones among them: ties, one class, classes of one row, half the batch in one class, zero rows."""
    torch.manual_seed(1)
    found = {kind: make_batch(24, 5, kind, torch.float64) for kind in ("few", "one", "distinct", "unequal")}
    found["ties"] = make_integer_batch(24, 3, dtype=torch.float64)
    x, y = make_batch(24, 5, dtype=torch.float64)
    x = (4 * x).round() / 4  # dot products without rounding
    x[3], x[7], x[9:12] = 0.0, 0.0, x[9]
    return found | {"repeated and zero rows": (x, y)}


BATCHES = batches()
EVERY_BATCH = pytest.mark.parametrize("batch", BATCHES)


def expected_value(losses, counts, reduction):
    column = REDUCTIONS[reduction]
    return losses.sum() / (1 if column is None else max(counts[:, column].sum(), 1))


def assert_is(value, expected, steps=64):
    torch.testing.assert_close(
        value, torch.tensor(expected, dtype=value.dtype), rtol=steps * 2.3e-16, atol=1e-14
    )


# --- All triplets


@pytest.mark.check
@BACKENDS
@EVERY_BATCH
@pytest.mark.parametrize("term", TERMS)
@EVERY_SIMILARITY
def test_all_triplets(batch, term, similarity, backend):
    x, y = BATCHES[batch]
    d = truth.distances(x, x, similarity)
    triplets = list(truth.every_triplet(y.numpy()))
    losses, counts = truth.sums(d, triplets, term, 0.1)
    for reduction in REDUCTIONS:
        options = by_name(similarity) | TERMS[term] | {"reduction": reduction, "backend": backend}
        assert_is(triplet_margin_loss(x, y, margin=0.1, **options), expected_value(losses, counts, reduction))
    options |= {"reduction": "none"}
    torch.testing.assert_close(triplet_margin_loss(x, y, margin=0.1, **options), torch.tensor(losses))


@BACKENDS
@EVERY_BATCH
@EVERY_SIMILARITY
def test_all_triplets_of_margin_loss(batch, similarity, backend):
    x, y = BATCHES[batch]
    d = truth.distances(x, x, similarity)
    betas = torch.linspace(0.4, 0.9, int(y.max()) + 1, dtype=torch.float64)
    level = betas[y].numpy() * (1 if similarity.startswith("euclidean") else -1)
    losses, counts = truth.sums(d, truth.every_triplet(y.numpy()), "margin", 0.2, level)
    for reduction in REDUCTIONS:
        options = by_name(similarity) | {"reduction": reduction, "backend": backend}
        assert_is(margin_loss(x, y, beta=betas, **options), expected_value(losses, counts, reduction))


@BACKENDS
@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
@pytest.mark.parametrize("margin", [0.2, -0.1])
@EVERY_SIMILARITY
def test_triplets_within_a_margin(kind, margin, similarity, backend, monkeypatch):
    x, y = BATCHES["unequal"]
    d = truth.distances(x, x, similarity)

    def within(gap):
        if kind == "easy":
            return gap > margin
        return gap <= margin and {"hard": gap <= 0, "semihard": gap > 0, "all": True}[kind]

    triplets = [t for t in truth.every_triplet(y.numpy()) if within(d[t[0], t[2]] - d[t[0], t[1]])]
    miner = TripletMarginMiner(margin, kind, **by_name(similarity))
    assert list(zip(*(index.tolist() for index in miner(x, y)), strict=True)) == triplets
    with monkeypatch.context() as patch:
        never_list(patch)
        mined = miner(x, y)
        assert miner.num_triplets == len(triplets)
        for function, term, beta in (
            (triplet_margin_loss, "hinge", None),
            (margin_loss, "margin", np.full(len(x), 0.6 if similarity.startswith("euclid") else -0.6)),
        ):
            losses, counts = truth.sums(d, triplets, term, 0.3, beta)
            options = by_name(similarity) | {"margin": 0.3, "backend": backend}
            options |= {} if beta is None else {"beta": 0.6}
            value = function(x, y, indices_tuple=mined, **options)
            assert_is(value, expected_value(losses, counts, "mean_nonzero"))


def test_ties_at_the_ends_of_the_interval():
    """Integers: many triplets whose gap is the margin, or 0, exactly."""
    x, y = BATCHES["ties"]
    d = truth.distances(x, x, "dot")
    gaps = np.array([d[i, n] - d[i, p] for i, p, n in truth.every_triplet(y.numpy())])
    assert (gaps == 2).sum() > 50
    assert (gaps == 0).sum() > 50
    rules = {"all": gaps <= 2, "hard": gaps <= 0, "semihard": (gaps > 0) & (gaps <= 2), "easy": gaps > 2}
    for kind, which in rules.items():
        miner = TripletMarginMiner(2, kind, similarity="dot")
        miner(x, y)
        assert miner.num_triplets == which.sum()
        assert len(miner(x, y).anchors) == which.sum()


def test_more_triplets_than_int32():
    """Counted exactly, and neither listed nor looped over."""
    n = 2200
    y = torch.arange(n) % 2
    miner = TripletMarginMiner(10.0)
    miner(torch.randn(n, 2), y)
    count = n * (n // 2 - 1) * (n // 2)
    assert count > 2**31
    if dml_cuda._ops.devices.has_kernel(torch.device("cpu")):
        assert miner.num_triplets == count


# --- Selected triplets


STRATEGIES = [
    (p, n)
    for p in ("hard", "semihard", "easy", "all")
    for n in ("hard", "semihard", "easy", "all")
    if not ("semihard" in (p, n) and ("all" in (p, n) or p == n))
]
RANGES = ({}, {"allowed_pos_range": (0.5, 1.3), "allowed_neg_range": (0.6, 1.5)})
_NAMES = {"hard": "hardest", "easy": "easiest"}


@BACKENDS
@pytest.mark.parametrize("ranges", RANGES, ids=["", "ranges"])
@pytest.mark.parametrize("strategies", STRATEGIES, ids=lambda s: "-".join(s))
@pytest.mark.parametrize("batch", ["unequal", "ties", "one", "repeated and zero rows"])
def test_easy_and_hard(batch, strategies, ranges, backend):
    x, y = BATCHES[batch]
    exact = batch in ("ties", "repeated and zero rows")
    for similarity in ("dot",) if exact else ("euclidean", "dot"):
        d = truth.distances(x, x, similarity)
        spans = [ranges.get(f"allowed_{kind}_range", (-np.inf, np.inf)) for kind in ("pos", "neg")]
        if similarity == "dot":
            spans = [(-high, -low) for low, high in spans]
        chosen = [_NAMES.get(s, s) for s in strategies]
        triplets = list(truth.selected(d, truth.pairs(y.numpy()), *chosen, *spans))
        miner = BatchEasyHardMiner(*strategies, **ranges, similarity=similarity)
        mined = miner(x, y)
        assert isinstance(mined, SelectedPairs)
        losses, counts = truth.sums(d, triplets, "hinge", 0.1)
        options = {"margin": 0.1, "similarity": similarity, "backend": backend}
        expected = expected_value(losses, counts, "mean_nonzero")
        assert_is(triplet_margin_loss(x, y, indices_tuple=mined, **options), expected)
        if "all" not in strategies:
            assert list(zip(*(mined[k].tolist() for k in (0, 1, 3)), strict=True)) == triplets
            assert torch.equal(mined.pos_anchors, mined.neg_anchors)
        else:
            # A row that has but one kind lists it; it is in no triplet.
            anchors = {i for i, *_ in triplets}
            found = [set(zip(mined[k].tolist(), mined[k + 1].tolist(), strict=True)) for k in (0, 2)]
            for k, pairs in enumerate(found):
                assert {pair for pair in pairs if pair[0] in anchors} == {(t[0], t[1 + k]) for t in triplets}
        listed = tuple(mined)
        assert_is(triplet_margin_loss(x, y, indices_tuple=listed, **options), expected)


@BACKENDS
@EVERY_SIMILARITY
def test_batch_hard(similarity, backend, monkeypatch):
    for x, y in BATCHES.values():
        d = truth.distances(x, x, similarity)
        triplets = list(truth.selected(d, truth.pairs(y.numpy()), "hardest", "hardest"))
        losses, counts = truth.sums(d, triplets, "hinge", 0.1)
        miner = BatchHardMiner(**by_name(similarity))
        with monkeypatch.context() as patch:
            never_list(patch)
            options = by_name(similarity) | {"margin": 0.1, "backend": backend}
            value = triplet_margin_loss(x, y, indices_tuple=miner(x, y), **options)
        assert_is(value, expected_value(losses, counts, "mean_nonzero"))
        if similarity == "dot":  # elsewhere distances may tie in one rounding and not in another
            assert list(zip(*(index.tolist() for index in miner(x, y)), strict=True)) == triplets
        assert miner.num_triplets == len(triplets)


@pytest.mark.parametrize("similarity", ["euclidean", "cosine", "dot"])
def test_pair_margins(similarity):
    for x, y in BATCHES.values():
        miner = PairMarginMiner(0.3, 0.97, similarity=similarity)
        d = truth.distances(x, x, similarity)
        s = d if similarity == "euclidean" else -d
        expected = [[], []]
        for i, (ps, ns) in enumerate(truth.pairs(y.numpy())):
            far = (lambda v: v > 0.3) if similarity == "euclidean" else (lambda v: v < 0.3)
            near = (lambda v: v < 0.97) if similarity == "euclidean" else (lambda v: v > 0.97)
            clear = abs(s[i] - 0.3).min() > 1e-9 and abs(s[i] - 0.97).min() > 1e-9
            assert clear or similarity == "dot"
            expected[0] += [(i, p) for p in ps if far(s[i, p])]
            expected[1] += [(i, n) for n in ns if near(s[i, n])]
        mined = miner(x, y)
        for k in (0, 1):
            assert list(zip(mined[2 * k].tolist(), mined[2 * k + 1].tolist(), strict=True)) == expected[k]
        assert (miner.num_pos_pairs, miner.num_neg_pairs) == (len(expected[0]), len(expected[1]))
        crossed = [(i, p, n) for i, p in expected[0] for j, n in expected[1] if i == j]
        losses, counts = truth.sums(d, crossed, "hinge", 0.1)
        for given in (miner(x, y), tuple(miner(x, y))):
            value = triplet_margin_loss(x, y, indices_tuple=given, margin=0.1, similarity=similarity)
            assert_is(value, expected_value(losses, counts, "mean_nonzero"))


# --- Swap, listed triplets, triplets drawn uniformly


@BACKENDS
@EVERY_SIMILARITY
def test_swap(similarity, backend, monkeypatch):
    monkeypatch.setattr(dml_cuda.reference.triplets, "AREA", 500)  # several blocks
    x, y = BATCHES["unequal"]
    d = truth.distances(x, x, similarity)
    triplets = list(truth.every_triplet(y.numpy()))
    options = by_name(similarity) | {"margin": 0.2, "swap": True, "backend": backend}

    def expected(those):
        return expected_value(*truth.sums(d, those, "hinge", 0.2, between=d), "mean_nonzero")

    assert_is(triplet_margin_loss(x, y, **options), expected(triplets))
    within = [t for t in triplets if 0 < d[t[0], t[2]] - d[t[0], t[1]] <= 0.1]
    mined = TripletMarginMiner(0.1, "semihard", **by_name(similarity))(x, y)
    assert_is(triplet_margin_loss(x, y, indices_tuple=mined, **options), expected(within))
    assert_is(triplet_margin_loss(x, y, indices_tuple=tuple(mined), **options), expected(within))
    hard = list(truth.selected(d, truth.pairs(y.numpy()), "hardest", "hardest"))
    mined = BatchHardMiner(**by_name(similarity))(x, y)
    assert_is(triplet_margin_loss(x, y, indices_tuple=mined, **options), expected(hard))
    pairs = BatchEasyHardMiner("all", "hard", **by_name(similarity))(x, y)
    crossed = [(i, p, n) for i, p, n in truth.selected(d, truth.pairs(y.numpy()), "all", "hardest")]
    assert_is(triplet_margin_loss(x, y, indices_tuple=pairs, **options), expected(crossed))
    assert_is(triplet_margin_loss(x, y, indices_tuple=tuple(pairs), **options), expected(crossed))


@BACKENDS
@pytest.mark.parametrize("many", [300, 900])  # fewer, and more, than all pairs of 24 rows
def test_listed_triplets_in_any_order(many, backend):
    """As often as they are listed, whatever the order and the type of the indices."""
    x, y = BATCHES["few"]
    d = truth.distances(x, x, "euclidean")
    triplets = list(truth.every_triplet(y.numpy()))
    picked = torch.randint(len(triplets), (many,)).tolist()
    those = [triplets[k] for k in picked]
    losses, counts = truth.sums(d, those, "hinge", 0.2)
    indices = tuple(torch.tensor(each, dtype=torch.int32) for each in zip(*those, strict=True))
    found = [evaluate(triplet_margin_loss, x, y, indices_tuple=indices, margin=0.2, backend=backend)]
    assert_is(found[0][0], expected_value(losses, counts, "mean_nonzero"))
    rows = triplet_margin_loss(x, y, indices_tuple=indices, margin=0.2, reduction="none", backend=backend)
    torch.testing.assert_close(rows, torch.tensor(losses))
    losses, counts = truth.sums(d, those, "margin", 0.2, np.full(len(x), 1.2))
    assert_is(
        margin_loss(x, indices_tuple=indices, backend=backend), expected_value(losses, counts, "mean_nonzero")
    )


@pytest.mark.parametrize("references", [False, True])
def test_uniform_triplets(references):
    torch.manual_seed(3)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 3, 3])
    n, k = len(y), 4000
    rows = dml_cuda._ops.triplets.Rows(torch.randn(n, 2), y, None, None, None, None)
    columns, own, count = y, torch.arange(n), n
    if references:
        columns = torch.tensor([3, 1, 1, 0, 0, 5, 1, 0, 1, 1])  # the last two are not there yet
        own, count = torch.tensor([-1, 3, 4, 1, 2, -1, -1, -1, -1, 0]), 8
        rows = rows._replace(ref_emb=torch.randn(10, 2), ref_labels=columns, self_index=own)
        rows = rows._replace(num_valid_refs=torch.tensor(count))
    drawn = dml_cuda._inputs.random_triplets.random_triplets(rows, k)
    for i in range(n):
        positives = [j for j in range(count) if columns[j] == y[i] and j != own[i]]
        negatives = [j for j in range(count) if columns[j] != y[i]]
        mine = drawn.anchors == i
        assert mine.sum() == k
        assert bool(drawn.there[mine].all()) == bool(drawn.there[mine].any()) == bool(positives and negatives)
        if not (positives and negatives):
            continue
        for found, among in ((drawn.positives[mine], positives), (drawn.negatives[mine], negatives)):
            frequency = torch.bincount(found, minlength=n)[among]
            assert frequency.sum() == k
            assert chi_squared_is_likely(frequency, torch.full((len(among),), k / len(among)))


def test_triplets_per_anchor():
    x, y = BATCHES["unequal"]
    loss_fn = TripletMarginLoss(triplets_per_anchor=200, reduction="mean")
    torch.manual_seed(5)
    first = loss_fn(x, y)
    assert loss_fn(x, y) != first
    torch.manual_seed(5)
    assert loss_fn(x, y) == first
    everything = TripletMarginLoss(reduction="none")(x, y)
    d_counts = np.array([len(p) * len(n) for p, n in truth.pairs(y.numpy())])
    mean = (everything[d_counts > 0] / torch.tensor(d_counts[d_counts > 0])).mean()
    assert first == pytest.approx(mean.item(), rel=0.05)
    for loss in (
        loss_fn,
        TripletMarginLoss(triplets_per_anchor=5, swap=True),
        MarginLoss(triplets_per_anchor=5),
    ):
        value, gradient = evaluate(loss, x, y)
        assert value > 0
        assert gradient.abs().max() > 0


# --- Other columns


@BACKENDS
def test_references(backend):
    """With gradients to both sides; a row's own column left out, columns that are not there yet too."""
    torch.manual_seed(2)
    x, y = make_batch(14, 4, "unequal", torch.float64)
    ref, ref_y = make_batch(20, 4, "unequal", torch.float64)
    own = torch.randint(-1, 15, (14,))
    d = truth.distances(x, ref, "euclidean")[:, :15]
    kept = truth.every_triplet(y.numpy(), ref_y[:15].numpy(), own.numpy())
    losses, counts = truth.sums(d, kept, "hinge", 0.2)
    rule = {"selection": dml_cuda._ops.triplets.Selection(), "similarity": "euclidean"}
    mined = MinedTriplets(x, y, ref, ref_y, **rule, self_index=own, num_valid_refs=torch.tensor(15))
    value = triplet_margin_loss(
        x, y, ref_emb=ref, ref_labels=ref_y, indices_tuple=mined, margin=0.2, backend=backend
    )
    assert_is(value, expected_value(losses, counts, "mean_nonzero"))

    everything = truth.sums(
        truth.distances(x, ref, "euclidean"), truth.every_triplet(y.numpy(), ref_y.numpy()), "hinge", 0.2
    )
    options = {"ref_labels": ref_y, "margin": 0.2}
    assert_is(triplet_margin_loss(x, y, ref_emb=ref, **options), expected_value(*everything, "mean_nonzero"))
    gradients = []
    for which in (backend, "reference"):
        leaves = [each.clone().requires_grad_() for each in (x, ref)]
        value = triplet_margin_loss(leaves[0], y, ref_emb=leaves[1], **options, backend=which)
        gradients.append(torch.autograd.grad(value, leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# --- Gradients


LOSSES = {
    "triplet": TripletMarginLoss(margin=0.3),
    "smooth": TripletMarginLoss(margin=0.3, smooth_loss=True),
    "swap": TripletMarginLoss(margin=0.3, swap=True),
    "margin": MarginLoss(beta=1.1),
}
MINERS = {
    "none": None,
    "batch hard": BatchHardMiner(),
    "easy hard": BatchEasyHardMiner(),
    "semihard positive": BatchEasyHardMiner("semihard", "hard"),
    "semihard": TripletMarginMiner(0.5, "semihard"),
    "distance weighted": DistanceWeightedMiner(),
    "pairs": PairMarginMiner(),
    "multi-similarity": MultiSimilarityMiner(0.3, similarity="euclidean"),
}


@BACKENDS
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_finite_differences(loss, miner, backend):
    """The selection and the counts are constants: so are they in the differences."""
    x, y = make_batch(16, 4, "unequal", torch.float64)
    loss_fn, find = copy.deepcopy(LOSSES[loss]), MINERS[miner]
    loss_fn.backend = backend
    leaf = x.clone().requires_grad_()
    if find is None:
        indices, value = None, loss_fn(leaf, y)
    else:
        torch.manual_seed(9)
        lazy = find(leaf, y)
        value = loss_fn(leaf, y, lazy)
        indices = tuple(lazy)
    (gradient,) = torch.autograd.grad(value, leaf)
    loss_fn.backend = "reference"
    loss_fn.reduction = "sum"
    total = loss_fn(x, y, indices)
    scale = total / value.detach()
    step, direction = 1e-6, torch.randn_like(x)
    ends = [loss_fn(x + sign * step * direction, y, indices) for sign in (1, -1)]
    found = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum() * scale, found, rtol=1e-6, atol=1e-8)


@BACKENDS
@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
@pytest.mark.parametrize("classes", [None, 6])
def test_gradient_of_beta(similarity, classes, backend):
    x, y = make_batch(24, 4, dtype=torch.float64)
    loss_fn = MarginLoss(beta=0.8, learn_beta=True, num_classes=classes, nu=0.1, similarity=similarity)
    loss_fn.double().backend = backend
    for mined in (None, TripletMarginMiner(0.5, similarity=similarity)(x, y)):
        (gradient,) = torch.autograd.grad(loss_fn(x, y, mined), loss_fn.beta)
        assert gradient.abs().max() > 0
        for k in range(len(loss_fn.beta)):
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(loss_fn)
                moved.beta.data[k] += sign * 1e-7
                values.append(moved(x, y, mined))
            # Counts could jump; that they did not is part of what is tested.
            torch.testing.assert_close((values[0] - values[1]) / 2e-7, gradient[k], rtol=1e-5, atol=1e-7)


def test_second_derivatives_of_the_reference():
    x, y = make_batch(9, 3, dtype=torch.float64)
    loss_fn = TripletMarginLoss(smooth_loss=True, backend="reference")
    assert torch.autograd.gradgradcheck(lambda q: loss_fn(q, y), x.requires_grad_())


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, backend):
    x, y = make_batch(60, 16, dtype=dtype)

    def mined_loss(q, loss_fn, miner):
        return loss_fn(q, y, None if miner is None else miner(q, y))

    for loss_fn in (TripletMarginLoss(backend=backend), MarginLoss(backend=backend)):
        for miner in (None, BatchHardMiner(), TripletMarginMiner(0.1, "semihard")):
            found = evaluate(mined_loss, x, loss_fn, miner)
            assert [each.dtype for each in found] == [dtype] * 2
            expected = evaluate(mined_loss, x.double(), loss_fn, miner)
            for a, b in zip(found, expected, strict=True):
                eps = max(torch.finfo(dtype).eps, 1e-5)
                torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=4 * eps * float(b.abs().max()))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_small_batches(n):
    x, y = torch.randn(n, 3, requires_grad=True), torch.zeros(n, dtype=torch.long)
    losses = [TripletMarginLoss(**how) for how in ({}, {"swap": True}, {"triplets_per_anchor": 3})]
    for loss_fn in (*losses, MarginLoss(learn_beta=True, nu=0.5)):
        for miner in (None, *MINERS.values()):
            value = loss_fn(x, y, None if miner is None else miner(x, y))
            assert value == 0
            (gradient,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
            assert gradient.shape == x.shape
            assert not gradient.any()
