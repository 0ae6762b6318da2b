"""The CUDA kernels on triplets, run on the host, against every triplet one by one."""

import math

import numpy as np
import pytest
import torch
from emulator import library
from emulator.build import HERE, ROOT, build
from emulator.build import run as run_program
from every_triplet import (
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


def check(s, labels, ref_labels, term, positives, negatives, numbers, own=None, ref_count=None, **options):
    n, columns = s.shape
    used = columns if ref_count is None else int(ref_count)
    beta = torch.rand(n, dtype=torch.float64) + 0.7
    strip = torch.full((n, columns + 3), math.nan, dtype=torch.float64)[:, :columns]
    strip.copy_(s)
    rows = library.TripletRows(
        strip, labels, ref_labels, own, ref_count, params=numbers, euclidean=True, seed=SEED, **options
    )
    sums, counts, by_beta = rows.losses(term, positives, negatives, beta)
    d = -s.numpy()[:, :used]
    own_columns = range(n) if ref_labels is None else [-1] * n if own is None else own.tolist()
    columns_labels = (labels if ref_labels is None else ref_labels).tolist()[:used]
    truth = triplet_truth(
        d,
        labels.tolist(),
        columns_labels,
        own_columns,
        beta.tolist(),
        int(SEED) % (1 << 64),
        term,
        positives,
        negatives,
        numbers,
    )
    assert counts.tolist() == truth[1].tolist()
    assert np.allclose(sums.numpy(), truth[0], rtol=1e-12, atol=1e-11)
    assert np.allclose(strip.numpy()[:, :used], weights_by_product(truth[2], d), rtol=1e-12, atol=1e-11)
    assert not strip[:, used:].any()
    if term == "margin":
        assert np.allclose(by_beta.numpy(), truth[3])
    return sums, strip


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_every_selection(term, positives, negatives):
    for k, gap in enumerate(INTERVALS.values()):
        case = batch(18, 4)
        schedule = SCHEDULES[k % len(SCHEDULES)]
        check(*case, term, positives, negatives, params(gap=gap, dim=5), schedule=schedule)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_equal_distances(term, negatives):
    for gap in ((-INF, INF), (-INF, 1.0), (0.0, 1.0)):
        case = batch(24, 3, integers=True)
        check(*case, term, "all", negatives, params(margin=1.0, gap=gap, pos=(1, 3), neg=(0, 2)))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_more_positives_than_threads(term, negatives):
    """Their runs are searched; and more columns than threads."""
    s, _, _ = batch(3, 2, m=700)
    labels, ref_labels = torch.tensor([0, 1, 5]), torch.randint(2, (700,))
    ref_labels[::3] = 0
    for gap in ((-INF, INF), (0.0, 0.2)):
        check(s, labels, ref_labels, term, "all", negatives, params(gap=gap, dim=5))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_references(negatives):
    s, labels, ref_labels = batch(6, 3, m=41)
    own = torch.tensor([4, -1, 0, 40, 7, 8])
    for ref_count in (None, 41, 30, 0):
        count = None if ref_count is None else torch.tensor([ref_count])
        check(s, labels, ref_labels, "hinge", "all", negatives, params(), own, count)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_odd_batches(negatives):
    for n, classes in ((1, 1), (2, 1), (3, 1), (9, 1), (9, 100)):
        check(*batch(n, classes), "hinge", "all", negatives, params())


def test_the_same_bits_in_any_order():
    results = []
    for schedule in SCHEDULES:
        torch.manual_seed(3)
        results.append(check(*batch(60, 2), "hinge", "all", "all", params(), schedule=schedule))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_strips_and_nothing_written():
    s, labels, _ = batch(20, 4)
    whole = library.TripletRows(s.clone(), labels, params=params())
    sums, counts, _ = whole.losses("hinge", "all", "all")
    part = library.TripletRows(s[7:12].clone(), labels, params=params(), first=7)
    before = part.s.clone()
    part_sums, part_counts, _ = part.losses("hinge", "all", "all", write=False)
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
    rows = library.TripletRows(x @ y.T, torch.zeros(7, dtype=torch.int64), torch.zeros(70, dtype=torch.int64))
    rows.make_distances(x, y)
    truth = -(x.double()[:, None] - y.double()).norm(dim=2)
    assert torch.allclose(rows.s.double(), truth, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=0)
    assert rows.s[2, 3] == 0


# ---- the sanitizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sanitizer", "schedule"),
    [("address", "round_robin"), ("address", "warp_first"), ("thread", "warp_first")],
)
def test_sanitizers_find_nothing(sanitizer, schedule):
    kernels = ROOT / "csrc" / "cuda" / "triplets.cu"
    program = build([HERE / "triplets_sanitized.cpp", kernels], sanitizer=sanitizer)
    done = run_program(program, schedule=schedule, seed=1)
    assert done.returncode == 0, done.stderr.decode()
