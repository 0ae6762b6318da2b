"""Losses that are made of other formulas' kernels: lifted structure, ranked list and N-pairs loss."""

from itertools import product

import pytest
import torch
from cases.accuracy import assert_as_accurate
from cases.data import make_batch, make_labels, make_points
from cases.losses import by_name
from oracle import dense

import dml_cuda
from dml_cuda.functional import pair_weights

KINDS = {"lifted": dml_cuda.LiftedStructureLoss, "ranked": dml_cuda.RankedListLoss}
# On distances, and on cosines or products.
OPTIONS = {
    "lifted": ({"neg_margin": 1.2, "pos_margin": 0.1}, {"neg_margin": 0.3, "pos_margin": 0.8}),
    "ranked": (
        {"margin": 0.5, "Tn": 3.0, "imbalance": 0.4, "alpha": 1.3, "Tp": 1.5},
        {"margin": 0.5, "Tn": 3.0, "imbalance": 0.4, "alpha": 0.1, "Tp": 1.5},
    ),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def options_of(kind, similarity):
    return OPTIONS[kind][not similarity.startswith("euclidean")]


def expected(kind, s, positive, negative, reduction, similarity, square):
    """The loss by brute force, from similarities."""
    options = options_of(kind, similarity)
    sign = -1 if similarity.startswith("euclidean") else 1
    if kind == "lifted":
        levels = sign * options["neg_margin"], sign * options["pos_margin"]
        rows, counts = dense.lifted_structure(s, positive, negative, *levels, square)
    else:
        rows = dense.ranked_list(
            s, positive, negative, *(options[name] for name in ("margin", "Tn", "imbalance")),
            sign * options["alpha"], options["Tp"],
        )  # fmt: skip
        counts = torch.ones(len(rows))
    if reduction in ("none", "sum"):
        return rows if reduction == "none" else rows.sum()
    if reduction == "mean_nonzero":
        assert kind == "ranked"
        counts = (rows != 0).long()
    return rows.sum() / counts.sum().clamp(min=1)


def gradients(value, leaves):
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def assert_same(found, wanted, rtol=1e-10):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=rtol * float(b.abs().max() if b.numel() else 0) + 1e-14
        )


def points_of(n, m=None, dim=6):
    labels = make_labels(n + (m or 0))
    points = make_points(labels, dim, torch.float64)
    first = points[:n].clone().requires_grad_()
    if m is None:
        return first, labels, None, None
    return first, labels[:n], points[n:].clone().requires_grad_(), labels[n:]


@EVERY
@pytest.mark.parametrize("similarity", ["euclidean", "euclidean_raw", "cosine", "dot"])
@pytest.mark.parametrize("m", [None, 45])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_brute_force(kind, similarity, m, reduction):
    x, labels, y, ref_labels = points_of(33, m)
    leaves = [x] if y is None else [x, y]
    s = dense.measured(x, x if y is None else y, similarity)
    masks = dense.pairs_of(labels, ref_labels)
    wanted = gradients(expected(kind, s, *masks, reduction, similarity, y is None), leaves)
    for backend in ("fused", "reference"):
        loss_fn = KINDS[kind](
            **options_of(kind, similarity), **by_name(similarity), reduction=reduction, backend=backend
        )
        assert_same(gradients(loss_fn(x, labels, ref_emb=y, ref_labels=ref_labels), leaves), wanted)


@EVERY
@pytest.mark.parametrize(
    ("n", "classes"), [(0, 1), (1, 1), (2, 1), (3, 3), (31, 31), (40, 1), (300, 4), (700, 90)]
)
def test_sizes(kind, n, classes):
    """As the dense reference: no row, one class, all distinct, more than a block."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(-3, classes - 3, (n,), generator=generator)
    options = options_of(kind, "euclidean")
    for reduction in ("mean", "mean_valid", "mean_nonzero", "none"):
        fused, plain = (
            KINDS[kind](**options, reduction=reduction, backend=backend) for backend in ("fused", "reference")
        )
        assert_same(gradients(fused(x, labels), [x]), gradients(plain(x, labels), [x]))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
def test_accuracy(kind, dtype, similarity):
    """As accurate as plain PyTorch in the same dtype."""
    x, labels = make_batch(150, 24, dtype=dtype)
    found = []
    for points, backend in ((x, "fused"), (x.float(), "reference"), (x.double(), "reference")):
        leaf = points.clone().requires_grad_()
        loss_fn = KINDS[kind](**options_of(kind, similarity), similarity=similarity, backend=backend)
        found.append(gradients(loss_fn(leaf, labels), [leaf]))
    assert found[0][0].dtype == dtype
    for name, fused, plain, truth in zip(("loss", "gradient"), *found, strict=True):
        assert_as_accurate(name, fused, plain, truth)


@EVERY
def test_mined_listed_and_rules_agree(kind):
    x, labels, *_ = points_of(60)
    options = options_of(kind, "euclidean")
    pairs = dml_cuda.MultiSimilarityMiner(0.1, similarity="euclidean")(x, labels)
    lists = tuple(index.clone() for index in tuple(pairs))
    plain = KINDS[kind](**options)
    wanted = gradients(KINDS[kind](**options, epsilon=0.1, backend="reference")(x, labels), [x])
    assert_same(gradients(KINDS[kind](**options, epsilon=0.1)(x, labels), [x]), wanted)
    assert_same(gradients(plain(x, labels, pairs), [x]), wanted)
    assert_same(gradients(plain(x, None, lists), [x]), wanted)
    every = tuple(index for mask in dense.pairs_of(labels) for index in mask.nonzero().unbind(1))
    assert_same(gradients(plain(x, None, every), [x]), gradients(plain(x, labels), [x]))


@EVERY
def test_weights_make_the_gradient(kind):
    x, labels, y, ref_labels = points_of(30, 40)
    loss_fn = KINDS[kind](**options_of(kind, "dot"), similarity="dot", reduction="sum")
    value, by_x, by_y = gradients(loss_fn(x, labels, ref_emb=y, ref_labels=ref_labels), [x, y])
    found = pair_weights(loss_fn, x, labels, ref_emb=y, ref_labels=ref_labels)
    w = torch.zeros(30, 40, dtype=torch.float64)
    w[found.pos_anchors, found.positives] = found.pos_weights
    w[found.neg_anchors, found.negatives] = found.neg_weights
    assert value.ndim == 0
    torch.testing.assert_close(0.5 * (w @ y), by_x)  # of the first upstream, 0.5
    torch.testing.assert_close(0.5 * (w.T @ x), by_y)


@EVERY
def test_a_memory_is_ref_emb(kind):
    """The queue's valid part, without the pair of a row and its own copy."""
    memory = dml_cuda.CrossBatchMemory(
        KINDS[kind](**options_of(kind, "euclidean"), reduction="sum"), 6, memory_size=50
    )
    queue, queued = torch.zeros(50, 6), torch.zeros(50, dtype=torch.long)
    for first in (0, 20):
        x, labels = make_batch(20, 6)
        own = torch.arange(first, first + 20)
        queue[own], queued[own] = x, labels
        leaf = x.clone().requires_grad_()
        s = dense.measured(leaf.double(), queue.double(), "euclidean")
        positive, negative = (mask.clone() for mask in dense.pairs_of(labels, queued))
        positive[torch.arange(20), own] = False
        positive[:, first + 20 :] = negative[:, first + 20 :] = False
        wanted = expected(kind, s, positive, negative, "sum", "euclidean", False)
        found = gradients(memory(leaf, labels), [leaf])
        wanted = gradients(wanted, [leaf])
        for value, truth in zip(found, wanted, strict=True):
            torch.testing.assert_close(value.double(), truth.double(), rtol=1e-4, atol=1e-5)


@EVERY
def test_parameters_that_learn(kind):
    x, labels, *_ = points_of(40)
    options = options_of(kind, "euclidean")
    for name in options:
        found = []
        for backend in ("fused", "reference"):
            value = torch.nn.Parameter(torch.tensor(options[name], dtype=torch.float64))
            loss_fn = KINDS[kind](**{**options, name: value}, backend=backend)
            found.append(gradients(loss_fn(x, labels), [value, x]))
        assert_same(*found)


@EVERY
def test_row_and_class_weights(kind):
    x, labels, *_ = points_of(40)
    weights = torch.rand(40, dtype=torch.float64)
    options = {**options_of(kind, "euclidean"), "reduction": "sum"}
    rows = KINDS[kind](**{**options, "reduction": "none"})(x, labels)
    torch.testing.assert_close(KINDS[kind](**options)(x, labels, row_weights=weights), (rows * weights).sum())


@EVERY
def test_compiled_with_other_sizes(kind):
    torch._dynamo.reset()
    loss_fn = KINDS[kind](**options_of(kind, "euclidean"))
    fast = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 61):
        x, labels, *_ = points_of(n)
        assert_same(gradients(fast(x, labels), [x]), gradients(loss_fn(x, labels), [x]))
    torch._dynamo.reset()


@EVERY
def test_repeatable_and_nan(kind):
    x, labels, *_ = points_of(500)
    loss_fn = KINDS[kind](**options_of(kind, "euclidean"))
    first, second = (gradients(loss_fn(x, labels), [x]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        x[3, 2] = torch.nan
    assert loss_fn(x, labels).isnan()


def test_shares_of_a_square_batch():
    """As DistributedLoss gives them to each process: the columns are all rows."""
    x, labels, *_ = points_of(40)
    loss_fn = dml_cuda.LiftedStructureLoss(reduction="none")
    from dml_cuda._inputs.batch import Batch
    from dml_cuda._ops.evaluate import compute

    found = []
    for rows in (slice(0, 15), slice(15, 40)):
        batch = Batch(x[rows], labels[rows], x, labels, torch.arange(40)[rows], mine_self_pair=False)
        found.append(compute(loss_fn.call, batch))
    assert_same(gradients(torch.cat(found), [x]), gradients(loss_fn(x, labels), [x]))


@pytest.mark.parametrize("margin", [0.4, 1.0])
def test_ranked_list_defaults(margin):
    loss_fn = dml_cuda.RankedListLoss(margin=margin, Tn=2)
    assert loss_fn.alpha == 1 + margin / 2
    with pytest.raises(ValueError, match=r"imbalance: expected a number from 0 to 1, got 1\.5"):
        dml_cuda.RankedListLoss(imbalance=1.5)


# ---- N-pairs --------------------------------------------------------------------------------------------


def n_pairs(x, labels, similarity):
    """``{anchor: loss}`` of the classes with two rows or more."""
    firsts = {}
    for i, label in enumerate(labels.tolist()):
        firsts.setdefault(label, []).append(i)
    pairs = [rows[:2] for rows in firsts.values() if len(rows) > 1]
    anchors, positives = (torch.tensor([pair[k] for pair in pairs], dtype=torch.long) for k in (0, 1))
    s = dense.measured(x[anchors], x[positives], similarity)
    return anchors, torch.logsumexp(s, 1) - s.diagonal() if len(pairs) else s.sum(1)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "euclidean_raw"])
@pytest.mark.parametrize(("n", "classes"), [(0, 1), (1, 1), (5, 1), (5, 40), (60, 20), (60, 60)])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_n_pairs(similarity, n, classes, backend):
    generator = torch.Generator().manual_seed(n + classes)
    x = torch.randn(n, 7, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(-2, classes - 2, (n,), generator=generator)
    for reduction in ("none", "sum", "mean"):
        anchors, losses = n_pairs(x, labels, similarity)
        value = losses.sum() / (max(len(losses), 1) if reduction == "mean" else 1) + 0 * x.sum()
        if reduction == "none":
            value = x.new_zeros(n).index_put((anchors,), losses) + 0 * x.sum(1)
        loss_fn = dml_cuda.NPairsLoss(**by_name(similarity), reduction=reduction, backend=backend)
        assert_same(gradients(loss_fn(x, labels), [x]), gradients(value, [x]))


def test_n_pairs_of_lists():
    x, labels, *_ = points_of(30)
    positive, negative = dense.pairs_of(labels)
    lists = (*positive.nonzero().flip(0).unbind(1), *negative.nonzero().unbind(1))
    seen, chosen = set(), []
    for a, p in zip(lists[0].tolist(), lists[1].tolist(), strict=True):
        if int(labels[a]) not in seen:
            seen.add(int(labels[a]))
            chosen.append((a, p))
    anchors, positives = torch.tensor(chosen).unbind(1)
    s = dense.measured(x[anchors], x[positives], "cosine")
    wanted = (torch.logsumexp(s, 1) - s.diagonal()).mean()
    assert_same(gradients(dml_cuda.NPairsLoss()(x, labels, lists), [x]), gradients(wanted, [x]))
    with pytest.raises(ValueError, match="ref_emb: expected None"):
        dml_cuda.NPairsLoss()(x, labels, None, x, labels)


def test_n_pairs_compiled():
    torch._dynamo.reset()
    fast = torch.compile(dml_cuda.NPairsLoss(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, kind in product((40, 61), ("few", "distinct")):
        labels = make_labels(n) if kind == "few" else torch.arange(n)
        x = make_points(labels, 6, torch.float64).requires_grad_()
        loss_fn = dml_cuda.NPairsLoss()
        assert_same(gradients(fast(x, labels), [x]), gradients(loss_fn(x, labels), [x]))
    torch._dynamo.reset()


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "dot"])
@pytest.mark.parametrize("epsilon", [None, 0.2])
def test_tuplet_margin_as_on_a_gpu(similarity, epsilon, monkeypatch):
    """Which composes it: here too, beside the kernel."""
    x, labels, y, ref_labels = points_of(60, 45)
    labels[-1] = 99  # a row without a positive
    margin, scale = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (20.0, 6.0))
    batches = [
        {},
        {"ref_emb": y, "ref_labels": ref_labels},
        {"ref_emb": y, "ref_labels": torch.full_like(ref_labels, int(labels[0]))},  # no negative
    ]
    found = {}
    for composed in (False, True):
        monkeypatch.setattr(dml_cuda.TupletMarginLoss.formula, "composed", composed)
        for k, (batch, reduction) in enumerate(product(batches, ("mean", "mean_nonzero", "none"))):
            how = {"similarity": similarity, "epsilon": epsilon, "reduction": reduction}
            loss_fn = dml_cuda.TupletMarginLoss(margin=margin, scale=scale, **how)
            leaves = [x, margin, scale, *([y] if batch else [])]
            found.setdefault(k, []).append(gradients(loss_fn(x, labels, **batch), leaves))
    for kernel, composed in found.values():
        assert_same(composed, kernel)


def test_on_which_device_a_formula_is_composed():
    devices = torch.device("cpu"), torch.device("cuda")
    tuplet, lifted, circle = (
        [cls.formula.is_composed(device) for device in devices]
        for cls in (dml_cuda.TupletMarginLoss, dml_cuda.LiftedStructureLoss, dml_cuda.CircleLoss)
    )
    assert (tuplet, lifted, circle) == ([False, True], [True, True], [False, False])
