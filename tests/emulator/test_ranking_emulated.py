"""The CUDA kernels on ranks, run on the host, against the float64 truth of each row."""

import math

import numpy as np
import pytest
import torch
from cases.ranking import EVERY_RANKING, RANKINGS, classes_of
from emulator import library
from emulator.build import HERE, ROOT, build, is_seen, run
from oracle.ranking import ROWS

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

SCHEDULES = ("round_robin", 0), ("warp_first", 0), ("warp_first", 7)


def check(loss, s, labels, ref_labels=None, self_index=None, num_valid_refs=None, values=None, **options):
    values = {**loss.defaults, **(loss.smooth if values is None else values)}
    n, columns = s.shape
    used = columns if num_valid_refs is None else int(num_valid_refs)
    euclidean = options.pop("euclidean", False)
    block = torch.full((n, columns + 3), math.nan, dtype=s.dtype)[:, :columns]
    block.copy_(s)
    rows = library.TripletRows(
        block, labels, ref_labels, self_index, num_valid_refs, euclidean=euclidean, **options
    )
    factors = torch.linspace(0.5, 2, n, dtype=torch.float64)
    losses, counts, by_params = rows.rankings(loss.name, values, factors)
    own = range(n) if ref_labels is None else [-1] * n if self_index is None else self_index.tolist()
    col_labels = (labels if ref_labels is None else ref_labels).numpy()
    tolerance = 1e-11 if s.dtype == torch.float64 else 2e-5
    for i in range(n):
        kept = np.flatnonzero((np.arange(columns) < used) & (np.arange(columns) != own[i]))
        is_positive, expected = col_labels[kept] == int(labels[i]), np.zeros(columns)
        value, learned = 0.0, {}
        if is_positive.any():
            row = s[i, kept].double().numpy()
            value, expected[kept], learned = ROWS[loss.name](row, is_positive, **values)
        expected = expected * float(factors[i])
        if euclidean:  # by the product of unit rows, not by the distance
            expected = expected / -s[i].double().numpy()
        assert counts[i].tolist() == [float(losses[i]) != 0, is_positive.any()]
        assert abs(float(losses[i]) - value * float(factors[i])) < tolerance
        scale = max(1.0, np.abs(expected).max())
        assert np.abs(block[i].double().numpy() - expected).max() < tolerance * scale
        for k, name in enumerate(("temperature", "temperature_k")):
            truth = learned.get(name, 0.0) * float(factors[i])
            assert name not in learned or abs(float(by_params[i, k]) - truth) < tolerance * max(1, abs(truth))
    return losses, block


def similarities(n, m, dtype=torch.float64):
    return (torch.rand(n, m, dtype=torch.float64) * 1.8 - 0.9).to(dtype)


@EVERY_RANKING
@pytest.mark.parametrize("sizes", [(1, 2, 3, 5, 9), (14,), (1, 1, 1), (2, 2, 2)])
def test_classes(loss, sizes):
    labels = classes_of(*sizes)
    for schedule in SCHEDULES:
        check(loss, similarities(len(labels), len(labels)), labels, schedule=schedule)
    check(loss, similarities(len(labels), len(labels)), labels, values=loss.changed)


@EVERY_RANKING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_columns_and_positives_than_threads(loss, dtype):
    labels, ref_labels = torch.tensor([0, 1, 2]), classes_of(270, 300, 1)
    ref_labels = (ref_labels + 3) // 7
    check(loss, similarities(3, len(ref_labels), dtype), labels, ref_labels)


@EVERY_RANKING
def test_references(loss):
    labels, ref_labels = classes_of(3, 5, 4), classes_of(9, 1, 12)
    s = similarities(12, 22)
    check(loss, s, labels, ref_labels)
    same = (labels[:, None] == ref_labels).long()
    own = torch.where(torch.arange(12) % 3 > 0, same.argmax(1), -1)
    places = {"self_index": own, "num_valid_refs": torch.tensor(17)}
    check(loss, s, labels, ref_labels, **places)
    check(loss, s, labels, ref_labels, num_valid_refs=torch.tensor(0))


@pytest.mark.parametrize("loss", [x for x in RANKINGS.values() if x.learnable], ids=lambda x: x.name)
def test_distances(loss):
    labels = classes_of(4, 5, 6)
    check(loss, -(0.2 + torch.rand(15, 15, dtype=torch.float64)), labels, euclidean=True)


@EVERY_RANKING
def test_equal_similarities(loss):
    """Ties, and edges of bins, on which a column has no derivative."""
    labels = classes_of(5, 6, 3)
    s = torch.randint(-4, 5, (14, 14)).double() / 4
    check(loss, s, labels, values={"num_bins": 4} if loss.name == "fast_ap" else loss.smooth)


def test_more_bins_than_columns():
    check(RANKINGS["fast_ap"], similarities(6, 6), classes_of(3, 3), values={"num_bins": 40})


@EVERY_RANKING
def test_values_alone(loss):
    """Without weights the similarities stay, but for the positives'."""
    labels = classes_of(3, 4)
    s = similarities(7, 7)
    rows = library.TripletRows(s.clone(), labels)
    values = {**loss.defaults, **loss.smooth}
    losses = rows.rankings(loss.name, values, torch.ones(7, dtype=torch.float64), write=False)[0]
    written = library.TripletRows(s.clone(), labels)
    assert torch.equal(losses, written.rankings(loss.name, values, torch.ones(7, dtype=torch.float64))[0])


PROGRAM = [HERE / "ranking_planted_bugs.cpp", ROOT / "csrc" / "cuda" / "triplets" / "triplets.cu"]
RANKING = "cuda/triplets/ranking.cuh"
BUGS = {
    "a_positive_that_outranks_itself": (RANKING, "if (j == k) continue;", ""),
    "derivative_not_zeroed": (
        RANKING,
        "k += kTripletThreads) row.work.derivative[k] = 0;",
        "k += kTripletThreads) {}",
    ),
    "derivatives_read_before_the_barrier": (
        RANKING,
        "score.loss = 1 - share * sum;\n        block_sync();",
        "score.loss = 1 - share * sum;",
    ),
    "edges_read_before_the_barrier": (
        RANKING,
        "        block_sync();\n        RankingScore score;\n        score.loss",
        "        RankingScore score;\n        score.loss",
    ),
    "similarities_overwritten_before_they_are_read": (
        RANKING,
        "            block_sync();\n            for (int64_t k",
        "            for (int64_t k",
    ),
    "columns_that_are_not_valid": (RANKING, "if (row.count > 0 && j < row.columns)", "if (row.count > 0)"),
    "ranks_among_positives_alone": (
        RANKING,
        "rank = pos_rank + merge_sum(double(ranks));",
        "rank = pos_rank;",
    ),
    "weight_of_the_row_forgotten": (RANKING, "row.weight * score.by_temperature_k", "score.by_temperature_k"),
}


@pytest.fixture(scope="module")
def right():
    done = run(build(PROGRAM, sanitizer="none"), schedule="warp_first", seed=1)
    assert done.returncode == 0, done.stderr.decode()
    assert np.isfinite(np.frombuffer(done.stdout, np.float64)).all()
    return done.stdout


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_changes_the_result(bug, right):
    assert is_seen(PROGRAM, BUGS[bug], right)
