"""The CUDA kernels on triplets, run on the host, against every triplet one by one."""

import math

import numpy as np
import pytest
import torch
from emulator import library
from emulator.build import HERE, ROOT, SANITIZED, build
from emulator.build import run as run_program
from oracle.triplet_ops import (
    INF,
    INTERVALS,
    NEGATIVES,
    POSITIVES,
    TERMS,
    chosen,
    draw_weights,
    params,
    row_pairs,
    similarities,
    triplet_truth,
    uniform,
)

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

SCHEDULES = ("round_robin", 0), ("warp_first", 0), ("warp_first", 7)
SEED = torch.tensor([12345 - (1 << 62)])


def batch(n, classes, dim=5, m=None, integers=False):
    """Labels, and similarities [n, m] that are negated distances; or small integers, full of ties."""
    labels = torch.randint(classes, (n,))
    ref_labels = None if m is None else torch.randint(classes, (m,))
    points = [torch.randn(count, dim, dtype=torch.float64) for count in (n, m or n)]
    s = similarities(points[0], points[0] if m is None else points[1], "euclidean")
    if integers:
        s = -torch.randint(0, 4, s.shape).double()
    return s, labels, ref_labels


def weights_by_product(weights, d):
    """What the kernels leave: by the product of unit rows, not by the distance."""
    return np.where(d > 0, weights / np.where(d > 0, d, 1), 0.0)


def check(
    s,
    labels,
    ref_labels,
    term,
    positives,
    negatives,
    numbers,
    self_index=None,
    num_valid_refs=None,
    row_margins=True,
    **options,
):
    n, columns = s.shape
    used = columns if num_valid_refs is None else int(num_valid_refs)
    of_rows = torch.rand(n, dtype=torch.float64) + 0.7 if term == "margin" or row_margins else None
    block = torch.full((n, columns + 3), math.nan, dtype=torch.float64)[:, :columns]
    block.copy_(s)
    rows = library.TripletRows(
        block,
        labels,
        ref_labels,
        self_index,
        num_valid_refs,
        params=numbers,
        euclidean=True,
        seed=SEED,
        **options,
    )
    sums, counts, by_param = rows.losses(term, positives, negatives, of_rows)
    d = -s.numpy()[:, :used]
    self_columns = range(n) if ref_labels is None else [-1] * n if self_index is None else self_index.tolist()
    columns_labels = (labels if ref_labels is None else ref_labels).tolist()[:used]
    truth = triplet_truth(
        d,
        labels.tolist(),
        columns_labels,
        self_columns,
        None if of_rows is None else of_rows.tolist(),
        int(SEED) % (1 << 64),
        term,
        positives,
        negatives,
        numbers,
    )
    assert counts.tolist() == truth[1].tolist()
    assert np.allclose(sums.numpy(), truth[0], rtol=1e-12, atol=1e-11)
    assert np.allclose(block.numpy()[:, :used], weights_by_product(truth[2], d), rtol=1e-12, atol=1e-11)
    assert not block[:, used:].any()
    if of_rows is not None:
        assert np.allclose(by_param.numpy(), truth[3])
    return sums, block


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_every_selection(term, positives, negatives):
    for k, gap in enumerate(INTERVALS.values()):
        case = batch(18, 4)
        schedule = SCHEDULES[k % len(SCHEDULES)]
        how = {"row_margins": k % 2 == 0, "schedule": schedule}
        check(*case, term, positives, negatives, params(gap=gap, dim=5), **how)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_equal_distances(term, negatives):
    for gap in ((-INF, INF), (-INF, 1.0), (0.0, 1.0)):
        case = batch(24, 3, integers=True)
        check(*case, term, "all", negatives, params(margin=1.0, gap=gap, pos=(1, 3), neg=(0, 2)))


def more_than_threads(integers=False):
    """More columns than threads, and more positives."""
    s, _, _ = batch(3, 2, m=700, integers=integers)
    ref_labels = torch.randint(2, (700,))
    ref_labels[::3] = 0
    return s, torch.tensor([0, 1, 5]), ref_labels


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_more_positives_than_threads(term, negatives):
    """Their runs are searched."""
    case = more_than_threads()
    for gap in ((-INF, INF), (0.0, 0.2)):
        check(*case, term, "all", negatives, params(gap=gap, dim=5))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_some_of_many_columns(negatives):
    """Those within a range of distances, open on either side; one positive, the first of equals."""
    for neg in ((-INF, 1.5), (1.2, INF), (1.2, 1.5)):
        check(*more_than_threads(), "hinge", "hardest", negatives, params(neg=neg, pos=(0.5, 1.4), dim=5))
    for positives in ("hardest", "easiest"):
        s, labels, ref_labels = more_than_threads(integers=True)
        (members,) = (ref_labels == 0).nonzero(as_tuple=True)
        s[0, members[:-5]], s[0, members[-5:]] = -2.0, -(2.0 + (1 if positives == "hardest" else -1))
        check(s, labels, ref_labels, "hinge", positives, negatives, params(dim=5))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("gap", [(-INF, INF), (-INF, 1.0), (0.0, 1.0), (1.0, INF), (1.0, 1.0)])
def test_equal_distances_of_many_positives(term, gap):
    """The ends of runs, and of those of equal distances: which of them count is decided exactly."""
    check(*more_than_threads(integers=True), term, "all", "all", params(margin=1.0, gap=gap))


@pytest.mark.parametrize("negatives", ["all", "hardest"])
def test_far_apart(negatives):
    """Violations so far below 0 that log(1 + exp) of them is 0, and others that are not."""
    s, labels, _ = batch(30, 3)
    check(400 * s, labels, None, "softplus", "all", negatives, params(margin=0.1))


def test_draws_at_the_ends_of_the_cutoffs():
    """Distances 0 to 3 exactly: equal to a cutoff, and where the density has no logarithm."""
    for cutoffs in ((0.5, 1.0), (1.0, 1.5), (0.5, 3.5), (0.5, 2.0), (2.0, 3.5)):
        s, labels, _ = batch(24, 3, integers=True)
        numbers = params(cutoff=cutoffs[0], nonzero=cutoffs[1], dim=5)
        check(s, labels, None, "hinge", "all", "drawn", numbers)


def test_more_triplets_than_int32():
    """Every negative is nearer than every positive."""
    positives = negatives = 46_400
    ref_labels = torch.arange(positives + negatives) % 2
    d = torch.where(ref_labels == 0, 3.0, 1.0) + torch.rand(len(ref_labels), dtype=torch.float64)
    labels = torch.zeros(1, dtype=torch.int64)
    rows = library.TripletRows(-d[None], labels, ref_labels, params=params(margin=0.5))
    sums, counts, _ = rows.losses("hinge", "all", "all")
    assert positives * negatives > 1 << 31
    assert counts.tolist() == [[positives * negatives] * 2]
    d_p, d_n = d[ref_labels == 0].sum(), d[ref_labels == 1].sum()
    expected = negatives * d_p - positives * d_n + 0.5 * positives * negatives
    assert torch.allclose(sums[0], expected, rtol=1e-12)
    assert rows.s[0, ref_labels == 0].equal(torch.full((positives,), -float(negatives), dtype=torch.float64))
    assert rows.s[0, ref_labels == 1].equal(torch.full((negatives,), float(positives), dtype=torch.float64))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_references(negatives):
    s, labels, ref_labels = batch(6, 3, m=41)
    self_index = torch.tensor([4, -1, 0, 40, 7, 8])
    for num_valid_refs in (None, 41, 30, 0):
        count = None if num_valid_refs is None else torch.tensor([num_valid_refs])
        check(s, labels, ref_labels, "hinge", "all", negatives, params(), self_index, count)


@pytest.mark.check
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_odd_batches(negatives):
    for n, classes in ((1, 1), (2, 1), (3, 1), (9, 1), (9, 100)):
        check(*batch(n, classes), "hinge", "all", negatives, params())


@pytest.mark.parametrize("columns", [33, 34, 35, 36, 64])
def test_nothing_but_positives(columns):
    """They fill the workspace to its last place."""
    s, _, _ = batch(2, 1, m=columns)
    labels, ref_labels = torch.tensor([0, 0]), torch.zeros(columns, dtype=torch.int64)
    for term in TERMS:
        check(s, labels, ref_labels, term, "all", "all", params())


def rows_of_few_blocks():
    """So many columns that a block takes every other row: their workspaces have no room for more."""
    n, m = 4, 700_000
    s = -torch.rand(n, m, dtype=torch.float64) - 0.5
    labels, ref_labels = torch.arange(n) % 3, torch.randint(3, 400_000, (m,))
    for i in range(n):
        ref_labels[1000 * i : 1000 * i + 40 * (i % 2) + 3] = labels[i]
    return s, labels, ref_labels


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_blocks_of_several_rows(negatives):
    """Each row is what it is alone."""
    s, labels, ref_labels = rows_of_few_blocks()
    how = {"params": params(dim=5), "seed": SEED, "euclidean": True}
    whole = library.TripletRows(s.clone(), labels, ref_labels, **how, schedule=("warp_first", 3))
    sums, counts, _ = whole.losses("hinge", "all", negatives)
    for i in range(len(labels)):
        one = library.TripletRows(s[i : i + 1].clone(), labels, ref_labels, first=i, **how)
        one_sum, one_count, _ = one.losses("hinge", "all", negatives)
        assert one_sum[i].equal(sums[i])
        assert one_count[i].equal(counts[i])
        assert one.s.equal(whole.s[i : i + 1])


@pytest.mark.parametrize("rule", ["hardest", "easiest", "semihard", "drawn"])
def test_select_by_blocks_of_several_rows(rule):
    s, labels, ref_labels = rows_of_few_blocks()
    pairs = torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([1, 2, 1001, 2001, -1, 3002])
    how = {"params": params(dim=5), "seed": SEED}
    whole = library.TripletRows(s.clone(), labels, ref_labels, **how, schedule=("warp_first", 3))
    column, similarity = whole.select(rule, False, pairs)
    for i in range(len(labels)):
        one = library.TripletRows(s[i : i + 1].clone(), labels, ref_labels, first=i, **how)
        one_column, one_similarity = one.select(rule, False, pairs)
        its = pairs[0] == i
        assert one_column[its].equal(column[its])
        assert one_similarity[its].equal(similarity[its])


def test_the_same_bits_in_any_order():
    results = []
    for schedule in SCHEDULES:
        torch.manual_seed(3)
        results.append(check(*batch(60, 2), "hinge", "all", "all", params(), schedule=schedule))
    for result in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_row_blocks_and_nothing_written(negatives):
    s, labels, _ = batch(20, 4)
    whole = library.TripletRows(s.clone(), labels, params=params(), seed=SEED)
    sums, counts, _ = whole.losses("hinge", "all", negatives)
    part = library.TripletRows(s[7:12].clone(), labels, params=params(), first=7, seed=SEED)
    before = part.s.clone()
    part_sums, part_counts, _ = part.losses("hinge", "all", negatives, write=False)
    assert part_sums[7:12].equal(sums[7:12])
    assert part_sums[:7].isnan().all()
    assert part_sums[12:].isnan().all()
    assert part_counts[7:12].equal(counts[7:12])
    same = labels[7:12, None] == labels
    assert part.s[~same].equal(before[~same])  # only the positives' places are used


def test_floats():
    s, labels, _ = batch(40, 2)
    results = []
    for dtype in (torch.float32, torch.float64):
        rows = library.TripletRows(s.to(dtype), labels, params=params(), euclidean=True)
        results.append((*rows.losses("softplus", "all", "all")[:2], rows.s))
    (sums, counts, weights), (true_sums, true_counts, true_weights) = results
    assert torch.allclose(sums.double(), true_sums, rtol=1e-5)
    assert counts.equal(true_counts)
    assert torch.allclose(weights.double(), true_weights, rtol=1e-4, atol=1e-4)


# ---- select -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["hardest", "easiest", "semihard", "drawn"])
@pytest.mark.parametrize("of_positives", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_select(rule, of_positives, schedule):
    if of_positives and rule in ("semihard", "drawn"):
        pytest.skip("no rule of positives")
    for integers in (False, True):
        s, labels, _ = batch(22, 4, integers=integers)
        numbers = params(pos=(0.3, 1.5), neg=(0.0, 1.7), dim=5)
        same = (labels[:, None] == labels) & ~torch.eye(22, dtype=torch.bool)
        pairs = [x.contiguous() for x in same.nonzero().T]
        pairs[1][3] = -1
        expected, seen = [], {}
        for i, p in zip(*map(torch.Tensor.tolist, pairs), strict=True):
            d = (-s[i]).tolist()
            d = np.array(d)
            pos, neg = row_pairs(d, i, labels.tolist(), labels.tolist(), i, numbers)
            k = seen[i] = seen.get(i, -1) + 1
            if of_positives:
                column = chosen("farthest" if rule == "hardest" else "nearest", d, pos)
            elif p < 0:
                column = None
            else:
                name = {"hardest": "nearest", "easiest": "farthest"}.get(rule, rule)
                column = chosen(name, d, neg, d[p], uniform(int(SEED) % (1 << 64), i, k), numbers)
            expected.append((-1, -INF) if column is None else (column, float(s[i, column])))
        rows = library.TripletRows(s.clone(), labels, params=numbers, seed=SEED, schedule=schedule)
        column, similarity = rows.select(rule, of_positives, pairs)
        assert list(zip(column.tolist(), similarity.tolist(), strict=True)) == expected
        if rule in ("hardest", "easiest"):
            rows.s.copy_(s)
            column, _ = rows.select(rule, of_positives)
            known = {
                int(i): c for i, p, (c, _) in zip(*pairs, expected, strict=True) if of_positives or p >= 0
            }
            assert all(int(column[i]) == c for i, c in known.items())


@pytest.mark.parametrize("rule", ["hardest", "easiest", "semihard", "drawn"])
def test_select_in_a_row_block(rule):
    """Rows that are not the first, further apart than they are long; and positives that do not exist."""
    s, labels, _ = batch(22, 4)
    pairs = [x.contiguous() for x in (labels[:, None] == labels).nonzero().T]
    pairs[1][::5] = 22 + torch.arange(len(pairs[1][::5]))
    how = {"params": params(dim=5), "seed": SEED}
    whole = library.TripletRows(s.clone(), labels, **how)
    column, similarity = whole.select(rule, False, pairs)
    assert (column[::5] == -1).all()
    assert (similarity[::5] == -INF).all()
    block = torch.full((5, 25), math.nan, dtype=torch.float64)[:, :22].copy_(s[7:12])
    part = library.TripletRows(block, labels, first=7, **how)
    part_column, part_similarity = part.select(rule, False, pairs)
    its = (pairs[0] >= 7) & (pairs[0] < 12)
    assert part_column[its].equal(column[its])
    assert part_similarity[its].equal(similarity[its])
    assert part_similarity[~its].isnan().all()  # rows of other blocks keep their values


def test_draws_follow_their_distribution():
    s, _, _ = batch(1, 1, dim=8, m=600)
    labels, ref_labels = torch.tensor([0]), torch.ones(600, dtype=torch.int64)
    numbers = params(dim=8)
    draws = 3000
    pairs = torch.zeros(draws, dtype=torch.int64), torch.zeros(draws, dtype=torch.int64)
    rows = library.TripletRows(s.clone(), labels, ref_labels, params=numbers, seed=SEED)
    column, _ = rows.select("drawn", False, pairs)
    weights = draw_weights(-s[0].numpy(), *numbers[7:10])
    sums = np.cumsum(weights)
    u = np.array([uniform(int(SEED) % (1 << 64), 0, k) for k in range(draws)])
    assert (column.numpy() == np.searchsorted(sums, u * sums[-1], side="right")).mean() > 0.999


# ---- distances --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 31, 64, 130])
def test_distances(dim, dtype):
    x, y = torch.randn(7, dim, dtype=dtype), torch.randn(70, dim, dtype=dtype)
    y[3], y[40:50] = x[2], x[5] + 1e-4 * y[40:50]
    block = torch.full((7, 75), math.nan, dtype=dtype)[:, :70].copy_(x @ y.T)
    rows = library.TripletRows(block, torch.zeros(7, dtype=torch.int64), torch.zeros(70, dtype=torch.int64))
    rows.make_distances(x, y)
    assert torch.as_strided(block, (7, 5), (75, 1), 70).isnan().all()
    truth = -(x.double()[:, None] - y.double()).norm(dim=2)
    assert torch.allclose(rows.s.double(), truth, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=0)
    assert rows.s[2, 3] == 0


def test_more_distances_than_warps():
    x, y = torch.randn(34, 2, dtype=torch.float64), torch.randn(2100, 2, dtype=torch.float64)
    labels, ref_labels = (torch.zeros(n, dtype=torch.int64) for n in (34, 2100))
    rows = library.TripletRows(x @ y.T, labels, ref_labels)
    rows.make_distances(x, y)
    truth = -(x[:, None] - y).norm(dim=2)
    assert torch.allclose(rows.s, truth, rtol=1e-12, atol=1e-12)


# ---- the sanitizers ---------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize(("sanitizer", "schedule"), SANITIZED)
def test_sanitizers_find_nothing(sanitizer, schedule):
    kernels = ROOT / "csrc" / "cuda" / "triplets" / "triplets.cu"
    program = build([HERE / "triplets_sanitized.cpp", kernels], sanitizer=sanitizer)
    done = run_program(program, schedule=schedule, seed=1)
    assert done.returncode == 0, done.stderr.decode()
