"""The ops on triplets against every triplet, one by one, in float64; and what PyTorch asks of an op."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases.triplets import Case, close
from oracle.triplet_ops import (
    INF,
    INTERVALS,
    NEGATIVES,
    POSITIVES,
    SIMILARITIES,
    TERMS,
    chosen,
    draw_weights,
    params,
    row_pairs,
    similarities,
    uniform,
)

from dml_cuda._ops.autograd import call
from dml_cuda.reference import triplets

pytestmark = pytest.mark.slow(70)

OPS = torch.ops.dml_cuda


# ---- against the truth ------------------------------------------------------------------------------------


@pytest.mark.check
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_every_selection(term, positives, negatives, similarity):
    case = Case(similarity=similarity)
    for gap in INTERVALS.values():
        for case.row_margins in (False, True):
            case.check(term, positives, negatives, params(gap=gap))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_references(term, negatives):
    case = Case(n=9, m=40, similarity="euclidean_raw")
    case.check(term, "all", negatives, params(margin=0.5))
    case.self_index = torch.tensor([3, -1, 5, 39, 0, 1, 2, -1, 20])
    case.ref_labels[case.self_index.clamp_min(0)] = torch.where(
        case.self_index >= 0, case.labels, case.ref_labels[case.self_index.clamp_min(0)]
    )
    case.check(term, "all", negatives, params(margin=0.5))
    case.num_valid_refs = torch.tensor(31)
    case.check(term, "hardest", negatives, params(margin=0.5))
    case.check(term, "all", negatives, params(margin=0.5))
    case.num_valid_refs = torch.tensor(0)
    case.check(term, "all", negatives, params(margin=0.5))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_a_class_of_half_the_batch(term, negatives):
    """Positives enough that their runs are searched; and all distances of a kind are allowed or not."""
    case = Case(n=130, classes=60, similarity="euclidean")
    case.labels[::2] = 7
    for gap in ("no miner", "semihard", "hard"):
        for case.row_margins in (False, True):
            case.check(term, "all", negatives, params(gap=INTERVALS[gap]))
    case.check(term, "all", negatives, params(pos=(0.9, 1.5), neg=(0.8, 1.6)))


def test_many_positives_and_semihard_negatives():
    case = Case(n=600, classes=2, similarity="euclidean")
    found = case.run("hinge", "all", "semihard", params())
    d = -similarities(case.x, case.x, "euclidean")
    same = case.labels[:, None] == case.labels
    farther = torch.where(~same[:, None, :] & (d[:, None, :] > d[:, :, None]), d[:, None, :], INF)
    gap = d - farther.min(-1).values + 0.1
    terms = torch.where(same & ~torch.eye(600, dtype=torch.bool), gap, -INF).relu()
    close(found[0], terms.sum(1), 1e-10)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_odd_batches(term, negatives):
    for n, classes in ((0, 1), (1, 1), (2, 1), (3, 1), (33, 1), (31, 100), (67, 3)):
        Case(n=n, classes=classes, dim=3).check(term, "all", negatives, params(dim=3))
    Case(n=5, m=0).check(term, "all", negatives, params())
    Case(n=0, m=5).check(term, "all", negatives, params())


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("positives", POSITIVES)
def test_equal_distances(term, positives, negatives):
    """Small integers, so that distances repeat exactly; ties go to the lowest column, limits are strict."""
    case = Case(n=40, classes=5, dim=2, similarity="dot")
    case.x = torch.randint(-2, 3, (40, 2), generator=torch.Generator().manual_seed(1)).double()
    case.row_params = torch.randint(-2, 3, (40,)).double()
    for gap in ((-INF, INF), (-INF, 1.0), (-INF, 0.0), (0.0, 1.0), (1.0, INF)):
        case.check(term, positives, negatives, params(margin=1.0, gap=gap, pos=(-3, 3), neg=(-3, 2)))


@pytest.mark.parametrize("similarity", ["euclidean", "euclidean_raw", "cosine"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_duplicates_and_zero_rows(similarity, negatives):
    case = Case(n=30, classes=4, similarity=similarity)
    case.x[7], case.x[21] = case.x[2], case.x[2]
    if negatives != "semihard":  # all are as far from a row of zeros, up to rounding
        case.x[3], case.x[4] = 0.0, 0.0
    case.check("hinge", "all", negatives, params(margin=0.3))
    case.check("margin", "all", negatives, params(margin=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("term", TERMS)
def test_other_dtypes(term, similarity, dtype):
    """Computed in float32 whatever the dtype; the truth starts from the same rounded numbers."""
    case = Case(n=50, dtype=dtype, similarity=similarity)
    case.check(term, "all", "all", params(), tolerance=2e-5, exact_counts=False)


def test_strided():
    case = Case(n=20)
    wide = torch.zeros(20, 16, dtype=torch.float64)
    wide[:, ::2] = case.x
    case.x = wide[:, ::2]
    case.labels = torch.stack([case.labels, case.labels], 1)[:, 0]
    case.check("hinge", "all", "all", params())


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_row_blocks(negatives):
    """So many columns that the rows go in several blocks, square and not, against the reference formula."""
    n, m = 17, 600_000  # of the rows 16 go together, and here 9 and 8
    case = Case(n=n, m=m, dim=4, classes=2000, dtype=torch.float64)
    numbers = params(dim=4)
    whole = case.run("hinge", "all", negatives, numbers)
    parts = []
    for rows in (slice(0, 9), slice(9, n)):
        some = Case(n=1, dim=4)
        some.x, some.labels, some.y, some.ref_labels = (
            case.x[rows],
            case.labels[rows],
            case.y,
            case.ref_labels,
        )
        parts.append(some.run("hinge", "all", negatives, numbers))
    if negatives == "drawn":  # which row it is takes part in the draw
        close(whole[0][:9], parts[0][0], 1e-12)
        return
    close(whole[0], torch.cat([p[0] for p in parts]), 1e-12)
    assert whole[1].equal(torch.cat([p[1] for p in parts]))
    close(whole[2], torch.cat([p[2] for p in parts]), 1e-10)
    close(whole[3], sum(p[3] for p in parts), 1e-10)


@pytest.mark.parametrize("n", [330, 1100])  # blocks of both sizes, and parts of one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_few_and_of_many_weights(n, dtype, instruction_set):
    """A class in the midst of others, and classes far from all: of W + W^T blocks are full, sparse or empty,
    and each is multiplied in its own way."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(n) // 3
    x = 9 * torch.randn(n // 3 + 1, 40, generator=random, dtype=torch.float64)[labels]
    x += torch.randn(x.shape, generator=random, dtype=torch.float64)
    x[: n // 4] = torch.randn(n // 4, 40, generator=random, dtype=torch.float64)
    x[:: n // 5] = x[1 :: n // 5][: len(x[:: n // 5])] * 0.5
    arguments = labels, *[None] * 6, "hinge", "all", "all", params(margin=0.3, dim=40), "euclidean"
    _, counts, gradient, *_ = OPS.triplet_loss(x.to(dtype), *arguments, True)
    sums, true_counts = triplets.triplet_loss(x.requires_grad_(), *arguments)
    (true_gradient,) = torch.autograd.grad(sums.sum(), x)
    close(gradient, true_gradient, 2e-5 if dtype == torch.float32 else 1e-11)
    assert counts.equal(true_counts) or dtype == torch.float32


# ---- select -----------------------------------------------------------------------------------------------

ROW_RULES = "hardest_positive", "easiest_positive", "hardest_negative", "easiest_negative"
PAIR_RULES = *ROW_RULES, "semihard_negative", "drawn_negative"


def select_truth(case, rule, numbers, pairs=None):
    y = case.x if case.y is None else case.y
    d = -similarities(case.x, y, case.similarity).numpy()
    ref_labels = (case.labels if case.y is None else case.ref_labels).tolist()
    found = []
    seen = {}
    for i, p in [(i, None) for i in range(len(d))] if pairs is None else pairs:
        pos, neg = row_pairs(d[i], i, case.labels.tolist(), ref_labels, i if case.y is None else -1, numbers)
        how, kind = rule.rsplit("_", 1)
        if kind == "positive":
            column = chosen("farthest" if how == "hardest" else "nearest", d[i], pos)
        else:
            k = seen[i] = seen.get(i, -1) + 1
            how = {"hardest": "nearest", "easiest": "farthest"}.get(how, how)
            u = uniform(int(case.seed) % (1 << 64), i, k)
            column = chosen(how, d[i], neg, None if p is None else d[i][p], u, numbers)
        found.append((-1, -INF) if column is None else (column, -d[i][column]))
    return found


def check_select(case, rule, numbers, pairs=None):
    anchors = positives = None
    if pairs is not None:
        anchors, positives = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    column, similarity = OPS.select(
        *case.points(), case.seed, rule, numbers, anchors, positives, case.similarity
    )
    expected = select_truth(case, rule, numbers, pairs)
    assert column.tolist() == [c for c, _ in expected]
    assert similarity.tolist() == pytest.approx([s for _, s in expected], abs=1e-12)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("rule", PAIR_RULES)
def test_select(rule, similarity):
    for n, m in ((40, None), (20, 70), (1, None), (0, None)):
        case = Case(n=n, m=m, similarity=similarity)
        ref_labels = case.labels if m is None else case.ref_labels
        same = case.labels[:, None] == ref_labels
        if m is None:
            same.fill_diagonal_(False)
        pairs = [tuple(p) for p in same.nonzero().tolist()]
        for numbers in (params(), params(pos=(0.5, 1.4), neg=(0.6, 1.2))):
            check_select(case, rule, numbers, pairs)
            if rule in ROW_RULES:
                check_select(case, rule, numbers)


def test_select_ties_go_to_the_lowest_column():
    case = Case(n=60, classes=4, dim=2, similarity="dot")
    case.x = torch.randint(-1, 2, (60, 2), generator=torch.Generator().manual_seed(2)).double()
    pairs = [tuple(p) for p in (case.labels[:, None] == case.labels).nonzero().tolist() if p[0] != p[1]]
    for rule in PAIR_RULES:
        check_select(case, rule, params(), pairs)
    case.x[:] = 1.0
    for rule in ROW_RULES:
        check_select(case, rule, params())


def test_select_without_a_positive_for_a_pair():
    case = Case(n=10, classes=2)
    column, similarity = OPS.select(
        *case.points(),
        case.seed,
        "semihard_negative",
        params(),
        torch.tensor([2, 2]),
        torch.tensor([-1, 3]),
        "euclidean",
    )
    assert column[0] == -1
    assert similarity[0] == -INF
    assert column[1] >= -1


@pytest.mark.parametrize("dim", [2, 3, 8, 128, 512])
@pytest.mark.parametrize("cutoffs", [(0.5, 1.4), (0.0, 3.0), (0.5, 0.6), (1.4, 1.4)])
def test_draw_follows_its_distribution(dim, cutoffs):
    """Chi-squared at a fixed seed: many pairs of the same anchor."""
    case = Case(n=2, m=40, dim=dim, classes=1)
    case.ref_labels = torch.arange(40).clamp_max(1) * 1
    case.labels[:] = 0
    case.y[20:] *= -1
    case.y[5] = case.x[0]
    numbers = params(cutoff=cutoffs[0], nonzero=cutoffs[1], dim=dim)
    draws = 20_000
    anchors = torch.zeros(draws, dtype=torch.int64)
    column, _ = OPS.select(
        *case.points(), case.seed, "drawn_negative", numbers, anchors, torch.zeros_like(anchors), "euclidean"
    )
    d = -similarities(case.x[:1], case.y[1:], "euclidean")[0].numpy()
    weights = draw_weights(d, *cutoffs, dim)
    if weights.sum() == 0:
        assert (column == -1).all()
        return
    expected = draws * weights / weights.sum()
    seen = np.bincount(column.numpy() - 1, minlength=39)
    assert (seen[weights == 0] == 0).all()
    # Rare columns together, so that the statistic is near its distribution.
    rare = expected < 10
    groups = [(seen[rare].sum(), expected[rare].sum())] if expected[rare].sum() > 1 else []
    groups += [(a, b) for a, b in zip(seen[~rare], expected[~rare], strict=True)]
    statistic, freedom = sum((a - b) ** 2 / b for a, b in groups), len(groups) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


# ---- what PyTorch asks of an op ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_a_bit(dtype):
    cases = [
        Case(n=700, dim=40, classes=175, dtype=dtype),
        Case(n=150, m=9000, dim=33, classes=300, dtype=dtype),
    ]
    cases[0].labels[:300] = 1
    for case, negatives, term in itertools.product(cases, NEGATIVES, ("hinge", "margin")):
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(case.run(term, "all", negatives, params(dim=40)))
        for other in results[1:]:
            assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.long
def test_every_instruction_set(instruction_set):
    case = Case(n=130, classes=60)
    case.labels[::2] = 7
    for term, negatives in itertools.product(TERMS, NEGATIVES):
        case.check(term, "all", negatives, params(gap=INTERVALS["all"]))


def op_arguments(case, term="hinge", negatives="all", **options):
    return (
        case.x.requires_grad_(),
        case.labels,
        None if case.y is None else case.y.requires_grad_(),
        *case.points()[3:],
        None if case.of_rows(term) is None else case.row_params.requires_grad_(),
        case.seed,
        term,
        "all",
        negatives,
        params(),
        case.similarity,
        options.get("save", True),
        options.get("save_ref", True),
    )


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("m", [None, 30])
def test_opcheck(term, m):
    arguments = op_arguments(Case(n=12, m=m, dtype=torch.float32), term)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(OPS.triplet_loss.default, arguments, test_utils=checks)


def test_opcheck_select():
    case = Case(n=12, dtype=torch.float32)
    arguments = (*case.points(), case.seed, "hardest_negative", params(), None, None, "cosine")
    torch.library.opcheck(OPS.select.default, arguments)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("m", [None, 14])
def test_gradcheck(term, m):
    case = Case(n=10, m=m, classes=3)
    case.row_margins = True
    leaves = [x.requires_grad_() for x in (case.x, case.y, case.row_params) if x is not None]
    assert torch.autograd.gradcheck(
        lambda *_: call("triplet_loss", *op_arguments(case, term))[0].sum(), leaves
    )


def test_autograd_scales_what_was_saved():
    case = Case(n=20, dtype=torch.float16)
    sums, counts, gradient, *_ = OPS.triplet_loss(*op_arguments(case))
    assert sums.requires_grad
    assert not counts.requires_grad
    assert not gradient.requires_grad
    (3 * sums.sum() / counts[:, 0].sum()).backward()
    expected = gradient * (3 / counts[:, 0].sum())
    torch.testing.assert_close(case.x.grad, expected.half())


def test_rows_cannot_be_weighted_apart():
    case = Case(n=20)
    sums, *_ = OPS.triplet_loss(*op_arguments(case))
    with pytest.raises(RuntimeError, match="weighted apart"):
        (sums * torch.arange(20)).sum().backward()
    sums, *_ = OPS.triplet_loss(*op_arguments(case))
    sums.backward(torch.full((20,), 2.0, dtype=torch.float64))  # not expanded, yet one number


def test_no_second_derivative():
    case = Case(n=20)
    sums, *_ = OPS.triplet_loss(*op_arguments(case))
    (first,) = torch.autograd.grad(sums.sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_gradient_that_was_not_saved():
    case = Case(n=20, m=9)
    sums, *_ = OPS.triplet_loss(*op_arguments(case, save_ref=False))
    with pytest.raises(RuntimeError, match="ref_emb"):
        sums.sum().backward()
    case.y = case.y.detach()
    arguments = list(op_arguments(case, save_ref=False))
    arguments[2] = case.y.detach()
    found = OPS.triplet_loss(*arguments)
    found[0].sum().backward()
    assert found[3].numel() == 0
    assert case.x.grad is not None


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def loss(x, labels, beta, seed):
        sums, counts, *_ = OPS.triplet_loss(
            x, labels, None, None, None, None, beta, seed, "margin", "all", "drawn", params(), "cosine", True
        )
        return sums.sum() / counts[:, 0].sum().clamp_min(1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 33):
        case = Case(n=n, dtype=torch.float32)
        results = []
        for function in (loss, compiled):
            x, beta = case.x.clone().requires_grad_(), case.row_params.clone().requires_grad_()
            value = function(x, case.labels, beta, case.seed)
            value.backward()
            results.append((value.detach(), x.grad, beta.grad))
        torch.testing.assert_close(*results)


def test_not_finite():
    case = Case(n=20)
    case.x[3, 2] = INF
    sums, _, gradient, *_ = case.run("hinge", "all", "all", params())
    assert sums.isnan().all()
    assert gradient.isnan().all()


def test_bad_input():
    case = Case(n=6)

    def run(**changed):
        names = "x labels y ref_labels self_index num_valid_refs row_params seed term positives negatives "
        names += "numbers similarity"
        good = [*case.points(), None, case.seed, "hinge", "all", "all", params(), "cosine"]
        arguments = dict(zip(names.split(), good, strict=True)) | changed
        return OPS.triplet_loss(*arguments.values(), True)

    for changed, message in (
        ({"term": "huber"}, "term: expected"),
        ({"positives": "drawn"}, "positives: expected"),
        ({"negatives": "softest"}, "negatives: expected"),
        ({"numbers": [1.0]}, "params: expected 10"),
        ({"similarity": "manhattan"}, "similarity"),
        ({"term": "margin"}, "row_params: expected"),
        ({"row_params": torch.ones(6, 1)}, "row_params: expected 6"),
        ({"term": "margin", "row_params": torch.ones(5)}, "row_params: expected 6"),
        ({"negatives": "drawn", "seed": None}, "seed: expected"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected one"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels"),
        ({"y": case.x}, "go together"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(**changed)
    with pytest.raises(TypeError, match="seed: expected int64"):
        run(seed=torch.zeros(1))

    def select(rule, anchors=None, positives=None):
        return OPS.select(*case.points(), case.seed, rule, params(), anchors, positives, "cosine")

    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="rule: expected"):
        select("best")
    with pytest.raises(ValueError, match="anchors: expected"):
        select("semihard_negative")
    with pytest.raises(ValueError, match="go together"):
        select("hardest_negative", index)
    with pytest.raises(ValueError, match="ascending"):
        select("hardest_negative", index.flip(0), index)
    with pytest.raises(IndexError, match="anchors"):
        select("hardest_negative", index + 6, index)
    with pytest.raises(IndexError, match="positives"):
        select("hardest_negative", index, index + 6)
