"""The CUDA kernels, run on the host from their own source, against brute force in float64.

Buffers are surrounded by NaN on the way in and by guards on the way out, and filled with NaN before the
kernels write to them.
"""

from itertools import product

import pytest
import torch
from cases.cuda import (
    ARITHMETICS,
    BY_NAME,
    CIRCLE,
    CIRCLE_NOT_DETACHED,
    FORMULAS,
    LARGE_NUMBER,
    MS,
    NT_XENT,
    SUP_CON,
    Arithmetic,
    Case,
    check,
    make,
    make_from_refs,
    of_similarity,
    relative_error,
    surrounded,
)
from emulator import library
from emulator.build import HERE, ROOT, SANITIZED, build
from emulator.build import run as run_program
from oracle.pairs import ROWS

import dml_cuda
from dml_cuda._ops.arguments import OpOptions

pytestmark = [pytest.mark.slow(300), pytest.mark.long]

PAIRS = ROOT / "csrc" / "cuda" / "indexed" / "listed_pairs.cu"
ROW_KERNELS = [
    ROOT / "csrc" / "cuda" / "instantiations" / f"{name}.cu"
    for name in ("merge", "look_float", "matrix_rows", "learned_params")
]
# MATRIX is what small batches take; LARGE_MATRIX multiplies large tiles, has a block for each row, and cuts
# gradients into panels and parts. Both leave similarities in a matrix; the others visit tiles.
MATRIX = {}
LARGE_MATRIX = {"small_tile_pairs": 0, "long_row": 0, "whole_line": 0, "gradient_blocks": 6}
# LARGE computes every tile again and has wide panels past 64 dimensions; CACHED has narrow panels and lines
# shared among thread blocks.
LARGE = {"matrix_bytes": 0, "tile_group": 2, "cache_bytes": 0, "wide_blocks": 0, "line_blocks": 0}
CACHED = {"matrix_bytes": 0, "tile_group": 2, "cache_bytes": 1 << 30, "split_slots": 1}
# As LARGE, with products by wgmma.
WGMMA = {**LARGE, "wgmma": 1}
PORTABLE = {"matrix": MATRIX, "large_matrix": LARGE_MATRIX, "large": LARGE, "cached": CACHED}
PATHS = {**PORTABLE, "wgmma": WGMMA}
SCHEDULES = [("round_robin", 0), ("round_robin", 1), ("warp_first", 2), ("warp_first", 3)]

by_path = pytest.mark.parametrize("path", PATHS)
by_portable_path = pytest.mark.parametrize("path", PORTABLE)
by_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda a: a.name)
by_formula = pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula[0])
by_loss = pytest.mark.parametrize("loss", [MS, CIRCLE], ids=["ms", "circle"])
F32, F64, BF16, F16 = BY_NAME["f32"], BY_NAME["f64"], BY_NAME["bf16"], BY_NAME["f16"]


def engine(case, arithmetic, path="matrix", tuning=(), **options):
    loss, params = case.loss
    return library.Engine(
        case.q, case.labels, case.r, case.ref_labels, case.self_index, case.num_valid_refs,
        loss=loss, params=params, epsilon=case.epsilon, similarity=case.similarity, reduction=case.reduction,
        return_sums=case.return_sums, mine_self_pair=case.mine_self_pair, precision=arithmetic.precision,
        tuning={**PATHS[path], **dict(tuning)}, **options,
    )  # fmt: skip


def run(case, arithmetic, path="matrix", needs=(True, True), **options):
    e = engine(case, arithmetic, path, **options)
    loss = e.forward()
    upstream = case.upstream if torch.is_tensor(case.upstream) else torch.tensor([float(case.upstream)])
    return loss, e.backward(upstream, *needs)


def verify(case, arithmetic, path, **options):
    check(case, arithmetic, *run(case, arithmetic, path, **options))


@by_loss
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("m", [None, 150], ids=["square", "rect"])
@by_arithmetic
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large", "wgmma"])
def test_every_kernel(path, arithmetic, m, epsilon, loss):
    """Each path, arithmetic, loss, shape of the matrix, with and without mining."""
    n = 70 if path == "matrix" else 260  # 3 or 5 tiles a side: several tile groups, the last one partial
    schedule = SCHEDULES[(n + (m or 0) + len(arithmetic.name)) % 4]
    verify(make(n, 33, arithmetic, m=m, epsilon=epsilon, loss=loss), arithmetic, path, schedule=schedule)


def test_every_formula_has_its_cases():
    assert sorted(name for name, _ in FORMULAS) == sorted(library.formulas()) == sorted(ROWS)


@pytest.mark.check
@by_formula
def test_one_case_of_every_formula(formula):
    verify(of_similarity(formula, "cosine", 40, 16, F64, m=50, epsilon=0.1), F64, "matrix")


@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("m", [None, 90], ids=["square", "rect"])
@pytest.mark.parametrize("similarity", library.SIMILARITIES)
@by_portable_path
@by_formula
def test_every_formula(formula, path, similarity, m, epsilon):
    n = 60 if path == "matrix" else 140
    verify(of_similarity(formula, similarity, n, 16, F64, m=m, epsilon=epsilon), F64, path)
    if path != "cached" and m is not None:  # square ones are below, in every arithmetic
        verify(of_similarity(formula, similarity, n, 16, F32, m=m, epsilon=epsilon), F32, path)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "euclidean_raw"])
@pytest.mark.parametrize(
    "arithmetic", [a for a in ARITHMETICS if a.dtype != torch.float64], ids=lambda a: a.name
)
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large", "wgmma"])
@by_formula
def test_every_formula_in_every_arithmetic(formula, path, arithmetic, similarity):
    verify(
        of_similarity(formula, similarity, 70 if path == "matrix" else 140, 24, arithmetic), arithmetic, path
    )


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum", "none"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large"])
@by_formula
def test_reductions_of_every_formula(formula, path, epsilon, reduction):
    upstream = torch.randn(140, generator=torch.Generator().manual_seed(1)) if reduction == "none" else -2.5
    # Many classes: some rows have no positive, and some summands are 0.
    case = make(140, 12, F64, classes=60, epsilon=epsilon, loss=formula)
    case.reduction, case.upstream = reduction, upstream
    verify(case, F64, path)


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum"])
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large"])
@by_formula
def test_parts_and_counts_before_they_are_divided(formula, path, reduction):
    case = make(140, 12, F64, m=60, classes=40, loss=formula, reduction=reduction)
    case.return_sums, case.upstream = True, torch.tensor([0.7, -0.3, 5.0, 5.0], dtype=torch.float64)
    value, grads = run(case, F64, path)
    assert value.shape == (4,)
    check(case, F64, value, grads)


EASY = [
    ("multi_similarity", (40.0, 50.0, 0.5)),
    ("nt_xent", (0.035,)),
    ("circle", (0.4, 1500.0, 1.0)),
    ("margin_softmax", (32.0, 0.0, 1.0, 0.0)),
    ("proxy_anchor", (0.1, 48.0)),
]


@pytest.mark.parametrize("loss", EASY, ids=[name for name, _ in EASY])
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large"])
@pytest.mark.parametrize("arithmetic", [F32, F64], ids=str)
def test_losses_that_round_to_zero(loss, path, arithmetic):
    """Orthogonal classes: "mean_nonzero" counts as the CPU's kernels do in the same dtype."""
    labels = torch.arange(16).repeat_interleave(torch.arange(16) % 4 + 1)
    noise = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(2))
    x = (torch.eye(16)[labels] + 0.05 * noise).to(arithmetic.dtype)
    case = Case(x, labels, loss=loss, reduction="mean_nonzero", return_sums=True)
    parts = slice(2, 4 if loss[0] == "proxy_anchor" else 3)
    counts = engine(case, arithmetic, path).forward()[parts]
    options = OpOptions(*loss, reduction="mean_nonzero", return_sums=True)
    expected = torch.ops.dml_cuda.pair_loss(x, labels, *[None] * 5, *options)[0][parts]
    assert counts.tolist() == expected.tolist()
    if arithmetic is F32:
        assert min(expected) < len(labels)  # some are 0


@pytest.mark.parametrize("mine_self_pair", [True, False])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@by_portable_path
@by_formula
def test_whether_mining_sees_a_row_itself(formula, path, epsilon, mine_self_pair):
    for arithmetic in (F64,) if path == "cached" else (F64, F32):
        case = make_from_refs(
            130, 20, arithmetic, m=140, loss=formula, epsilon=epsilon, mine_self_pair=mine_self_pair
        )
        verify(case, arithmetic, path)


SQUARES = [(1, 3), (2, 1), (3, 31), (31, 64), (33, 65), (65, 129), (127, 7), (129, 66), (151, 36)]
RECTANGLES = [(1, 5, 1), (1, 40, 130), (17, 65, 3), (64, 128, 64), (129, 2, 127)]


@pytest.mark.parametrize(("n", "d", "m"), [*((n, d, None) for n, d in SQUARES), *RECTANGLES])
@pytest.mark.parametrize("arithmetic", [F64, F32, F16, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large", "wgmma"])
def test_awkward_sizes(path, arithmetic, n, d, m):
    # In one dimension all similarities are 1 or -1, and mining bounds are met exactly or not at all.
    verify(make(n, d, arithmetic, m=m, classes=3, epsilon=0.15, loss=MS), arithmetic, path)
    verify(make(n, d, arithmetic, m=m, classes=3, loss=CIRCLE, amid=LARGE_NUMBER), arithmetic, path)


@pytest.mark.parametrize("arithmetic", [F64, F32, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize(
    ("d", "offset", "gap"),
    [
        *[(41, *apart) for apart in ((0, 7), (1, 0), (2, 6), (3, 1), (4, 12), (8, 8))],  # packed
        *[(40, 0, 7), (40, 4, 0), (40, 1, 8)],  # so are these
        *[(40, 0, 8), (40, 8, 24), (8, 16, 8), (72, 0, 8), (136, 8, 0)],  # used as they are
    ],
)
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large"])
def test_strides_and_alignment(path, d, offset, gap, arithmetic):
    for amid in (torch.nan, LARGE_NUMBER):
        case = make(70, d, arithmetic, m=40, offset=offset, gap=gap, epsilon=0.1, amid=amid)
        assert case.q.stride() == (d + gap, 1)
        verify(case, arithmetic, path)


@pytest.mark.parametrize("m", [None, 40], ids=["square", "rect"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_rows_that_are_not_aligned_are_packed(dtype, m):
    """Their copy is part of both workspaces, and as large as the inputs."""
    item = torch.empty(0, dtype=dtype).element_size()

    def workspaces(d, offset=0, gap=0):
        case = make(70, d, Arithmetic("", dtype), m=m, offset=offset, gap=gap)
        return engine(case, F64 if dtype == torch.float64 else F32).ask_sizes()[1:]

    none = workspaces(64)
    assert workspaces(64, offset=16 // item) == none
    assert workspaces(64, gap=16 // item) == none
    for d, offset, gap in ((64, 1, 0), (64, 0, 1), (63, 0, 0), (63, 0, 1)):
        extra = [a - b for a, b in zip(workspaces(d, offset, gap), none, strict=True)]
        assert extra == [(70 + (m or 0)) * 64 * item] * 2


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum", "none"])
@pytest.mark.parametrize("m", [None, 90], ids=["square", "rect"])
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large", "wgmma"])
@by_loss
def test_reductions(loss, path, m, reduction):
    upstream = torch.randn(150, generator=torch.Generator().manual_seed(1)) if reduction == "none" else -2.5
    # Many classes: some rows have no positive, so that the three means differ.
    case = make(150, 12, F32, m=m, classes=60, epsilon=0.05 if loss is MS else None, loss=loss)
    case.reduction, case.upstream = reduction, upstream
    loss_value, grads = run(case, F32, path)
    assert loss_value.shape == ((150,) if reduction == "none" else ())
    check(case, F32, loss_value, grads)


@pytest.mark.parametrize("reduction", ["mean", "mean_valid"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("some", [False, True], ids=["every_row", "some_rows"])
@pytest.mark.parametrize("arithmetic", [F64, F32, BF16], ids=lambda a: a.name)
@by_path
@by_loss
def test_a_row_that_is_itself_among_the_references(loss, path, arithmetic, some, epsilon, reduction):
    n, m = (50, 70) if path == "matrix" else (140, 290)
    if epsilon is None and reduction == "mean":
        n, m = m, n
    case = make_from_refs(n, 20, arithmetic, m=m, some=some, epsilon=epsilon, loss=loss, reduction=reduction)
    verify(case, arithmetic, path)


@pytest.mark.parametrize("epsilon", [0.3, None], ids=["mined", "all"])
@by_portable_path
def test_a_row_whose_copy_among_the_references_is_an_older_one(path, epsilon):
    """A pair of equal points has no gradient; this one has, and must be left out all the same."""
    n, m = (30, 50) if path == "matrix" else (70, 140)
    case = make_from_refs(n, 12, F64, m=m, loss=MS)
    case.epsilon = epsilon
    case.r.add_(torch.randn(m, 12, generator=torch.Generator().manual_seed(1)))
    verify(case, F64, path)


@pytest.mark.parametrize("count", [-3, 0, 1, 37, 128, 150, 290, 1000])
@pytest.mark.parametrize("arithmetic", [F64, F32, BF16], ids=lambda a: a.name)
@by_path
def test_the_first_references_only(path, arithmetic, count):
    """The others may hold anything: a queue that is being filled."""
    n, m = (50, 180) if path == "matrix" else (140, 290)
    for epsilon, loss in ((0.1, MS), (None, CIRCLE)):
        case = make_from_refs(n, 20, arithmetic, m=m, some=True, loss=loss, reduction="mean_valid")
        case.epsilon, case.num_valid_refs = epsilon, torch.tensor(count)
        case.r[max(count, 0) :] = torch.nan
        case.ref_labels[max(count, 0) :] = case.labels[0]
        value, grads = run(case, arithmetic, path, tuning={"sum_bytes": 128 * 20 * 4})
        check(case, arithmetic, value, grads)
        assert not grads[1][max(count, 0) :].any()


@by_path
@by_loss
def test_a_row_whose_only_positive_is_itself(loss, path):
    """Mined with a positive, it keeps its negatives: a loss for multi-similarity, none for circle loss."""
    case = make_from_refs(30, 4, F32, m=150, classes=3, epsilon=0.5, loss=loss, reduction="none")
    case.upstream = torch.ones(30)
    alone = (case.labels[:, None] == case.ref_labels[None, :]).sum(1) == 1
    assert alone.any()
    assert not alone.all()
    losses, grads = run(case, F32, path)
    assert torch.equal(losses[alone] > 0, torch.full_like(losses[alone], loss is MS, dtype=torch.bool))
    check(case, F32, losses, grads)


@by_portable_path
@pytest.mark.parametrize("loss", [MS, CIRCLE, CIRCLE_NOT_DETACHED], ids=["ms", "circle", "not_detached"])
def test_dot_products(loss, path):
    case = make(140, 9, F64, loss=loss, similarity="dot", spread=0.3)
    case.q.mul_(0.3)
    verify(case, F64, path)


@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large", "wgmma"])
def test_only_the_gradients_asked_for(path):
    case = make(140, 20, F32, m=150, epsilon=0.1)
    loss, (grad_q, none) = run(case, F32, path, needs=(True, False))
    assert none is None
    check(case, F32, loss, (grad_q, None))
    loss, (none, grad_r) = run(case, F32, path, needs=(False, True))
    assert none is None
    check(case, F32, loss, (None, grad_r))
    loss, grads = run(case, F32, path, save_for_backward=False, needs=(False, False))
    check(case, F32, loss, grads)


@pytest.mark.parametrize("arithmetic", [F32, F16, F64], ids=lambda a: a.name)
@by_path
def test_the_same_bits_in_any_order(path, arithmetic):
    """Whatever the order of warps and blocks, and twice in a row: no result depends on it."""
    case = make(150, 33, arithmetic, m=None, epsilon=0.1, reduction="none", upstream=torch.rand(150))
    first = None
    for schedule in SCHEDULES:
        e = engine(case, arithmetic, path, schedule=schedule)
        results = [e.forward(), e.backward(case.upstream)[0], e.backward(case.upstream)[0]]
        assert torch.equal(results[1], results[2])
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
    check(case, arithmetic, first[0], (first[1], None))


@pytest.mark.parametrize("arithmetic", [F32, BF16, F64], ids=lambda a: a.name)
@pytest.mark.parametrize("m", [None, 150], ids=["square", "rect"])
@pytest.mark.parametrize("d", [40, 130])
def test_neither_the_cache_nor_wide_panels_change_a_bit(d, m, arithmetic):
    case = make(260, d, arithmetic, m=m, epsilon=0.1)
    whole_lines = {"split_slots": 1 << 20}  # parts of a line are added up in another order
    (loss, grads), (cached_loss, cached_grads) = (
        run(case, arithmetic, path, tuning=whole_lines) for path in ("large", "cached")
    )
    assert torch.equal(loss, cached_loss)
    for a, b in zip(grads, cached_grads, strict=True):
        assert a is b or torch.equal(a, b)
    check(case, arithmetic, cached_loss, cached_grads)


@pytest.mark.whole
@pytest.mark.parametrize(("sanitizer", "schedule"), SANITIZED)
@pytest.mark.parametrize(
    "sources", [("pair_loss_sanitized.cpp", *ROW_KERNELS), ("listed_pairs_sanitized.cpp", PAIRS)]
)
def test_sanitizers_find_nothing(sources, sanitizer, schedule):
    """No address out of bounds, no misalignment, no overflow; no race within a block or between blocks."""
    program = build([HERE / source for source in sources], sanitizer=sanitizer)
    done = run_program(program, schedule=schedule, seed=1, timeout=900)
    assert done.returncode == 0, done.stderr.decode()


def test_tiles_without_kept_pairs_are_known_and_skipped():
    """Two pairs of classes, each pair near each other and far from the rest: tiles between the two pairs
    hold nothing that mining keeps, those within one do."""
    g = torch.Generator().manual_seed(0)
    corner = torch.zeros(2, 8)
    corner[0, 0] = corner[1, 1] = 1
    labels = torch.arange(4).repeat_interleave(64)
    q = surrounded(corner[labels // 2] + 0.05 * torch.randn(256, 8, generator=g))
    case = Case(q, labels, epsilon=0.1)
    for path in ("large", "cached"):
        e = engine(case, F32, path)
        loss = e.forward()
        assert e.kept(3) == [True, False, True]  # of 128 x 128: (0, 0), (0, 1), (1, 1)
        check(case, F32, loss, e.backward())
    # Well separated, no row keeps anything: the loss and the gradient are exactly 0.
    far = Case(
        surrounded(torch.eye(4, 8)[labels] + 0.05 * torch.randn(256, 8, generator=g)), labels, epsilon=0.1
    )
    e = engine(far, F32, "large")
    assert e.forward() == 0
    assert not any(e.kept(3))
    assert not e.backward()[0].any()


def two_dimensional(angles, labels):
    """Points on the unit circle, so that similarities are cosines of differences."""
    angles = torch.as_tensor(angles, dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    return surrounded(points), torch.as_tensor(labels)


@pytest.mark.parametrize("m", [None, 64], ids=["square", "rect"])
@pytest.mark.parametrize("who", ["row", "column", "nobody"])
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_tiles_that_one_line_or_one_kind_keeps_alive(kind, who, m):
    """Tiles are 64 x 64 in float64. In that of rows 0..63 and columns 64..127 mining keeps what one line or
    one kind gives, or nothing."""
    n = 128
    labels = torch.arange(n) % 64  # rows i and i + 64 are a class
    angles = 3.0 * (torch.arange(n) % 64) / 64
    generator = torch.Generator().manual_seed(2)
    angles = angles + 0.002 * torch.rand(n, generator=generator)
    if kind == "negative":  # classes of the first half come twice there, so that positives are at hand
        labels[:64] = torch.arange(64) // 2
        labels[64:] = 100 + torch.arange(64) // 2
        angles[:64] = 0.001 * torch.arange(64) % 2 + 3.0 * (torch.arange(64) // 2) / 64
        angles[64:] = angles[:64] + 0.02
    if who == "row":
        angles[3] += 0.05
    elif who == "column":
        angles[64 + 3] += 0.05
    q, labels = two_dimensional(angles, labels)
    case = Case(q, labels, epsilon=1e-5)
    if m is not None:
        case = Case(q[:64], labels[:64], q[64:], labels[64:], epsilon=1e-5)
    for path in ("large", "cached"):
        verify(case, F64, path)


@pytest.mark.parametrize("m", [None, 64], ids=["square", "rect"])
def test_tiles_of_kept_positives_alone_and_of_kept_negatives_alone(m):
    """A row has its negatives at 0.6 in one tile, its positive at 0.4 among negatives at 0 in another."""
    identity, side = torch.eye(64).repeat(2, 1), torch.eye(2).repeat_interleave(64, 0)
    q = surrounded(torch.cat([0.4**0.5 * identity, 0.6**0.5 * side], 1).double())
    labels = torch.arange(128) % 64
    case = Case(q, labels, epsilon=0.01)
    if m is not None:  # the first half against all, without the pairs of rows and themselves
        case = Case(q[:64], labels[:64], q, labels, torch.arange(64), epsilon=0.01, mine_self_pair=False)
    for path in ("large", "cached"):
        loss, grads = run(case, F64, path)
        assert loss > 0.1
        check(case, F64, loss, grads)


def test_a_reduction_of_more_numbers_than_threads():
    """1024 threads reduce the results, a slot for every 32 rows, and look at the references' norms."""
    n = 33_000
    q, labels = two_dimensional(torch.arange(n) % 97 / 50.0, torch.arange(n) % 3)
    r, ref_labels = two_dimensional([0.3, 1.1], [0, 1])
    verify(Case(q, labels, r, ref_labels, loss=("binomial_deviance", (2.0, 40.0, 0.5))), F64, "large")
    case = Case(r, ref_labels, q[:1100], labels[:1100])
    verify(case, F64, "large")
    case.r = surrounded(case.r)
    case.r[1099, 1] = torch.nan  # the reduction must see the last of them
    assert run(case, F64, "large")[0].isnan()


@pytest.mark.parametrize("formula", [MS, CIRCLE, NT_XENT, SUP_CON], ids=lambda formula: formula[0])
@pytest.mark.parametrize("arithmetic", [F64, F32], ids=lambda a: a.name)
@pytest.mark.parametrize("path", ["large", "cached"])
def test_lines_far_below_the_tiles_largest_term(path, arithmetic, formula):
    """Some rows' terms are some hundred below those of other rows of their tile, forward and backward:
    relative to the tile's they would vanish."""
    name, _ = formula
    sharp = {
        "multi_similarity": (2.0, 2e4, 0.5),
        "circle": (0.4, 9e3, 1.0),
        "nt_xent": (1e-4,),
        "sup_con": (1e-4,),
    }[name]
    g = torch.Generator().manual_seed(0)
    angles = 0.01 * torch.rand(140, generator=g).double()
    angles[::20] = 0.4 * torch.arange(1, 8)  # alone
    labels = torch.arange(140) % 5
    q, labels = two_dimensional(angles, labels)
    case = Case(surrounded(q.to(arithmetic.dtype)), labels, loss=(name, sharp), similarity="cosine")
    loss, (grad, _) = run(case, arithmetic, path)
    truth, true_grad, _ = case.truth(arithmetic)
    # A float32 similarity is off by 1e-7, and so an exponential by 20,000 times as much.
    tolerance = 1e-10 if arithmetic is F64 else 1e-2
    assert relative_error(loss, truth) <= tolerance
    assert relative_error(grad, true_grad) <= tolerance


def test_labels_that_differ_in_one_half_only():
    """Labels are compared by 32 bits where the other 32 agree within a tile, and else otherwise."""
    case = make(140, 8, F64, classes=4)
    small = (case.labels - case.labels.min()) // 1234567890123
    assert small.unique().tolist() == [0, 1, 2, 3]
    results = []
    for labels in (small, small - 2, small << 32, (small << 32) + 5, small + (7 << 40), small * (2**32 + 1)):
        case.labels = labels
        results.append(run(case, F64, "large")[0])
    assert all(torch.equal(results[0], result) for result in results[1:])
    verify(case, F64, "large")


@pytest.mark.parametrize("similarity", ["euclidean", "euclidean_raw"])
@pytest.mark.parametrize("m", [None, 60], ids=["square", "rect"])
@by_path
def test_near_and_equal_points(path, m, similarity):
    """Distances from 0 up: no digit is lost to the difference of squares, no gradient is not finite."""
    case = make(140, 6, F32, m=m, loss=("contrastive", (-0.001, -1.0)), similarity=similarity)
    case.q[20:40] = case.q[:20]
    case.labels[20:40] = case.labels[:20]
    case.q[40:60] = case.q[:20] * (1 + 1e-4 * torch.randn(20, 6))
    case.labels[40:60] = case.labels[:20]
    loss, grads = run(case, F32, path)
    truth, *true_grads = case.truth(F32)
    assert relative_error(loss, truth) <= 2e-6
    for got, want in zip(grads, true_grads, strict=True):
        if got is not None:
            assert got.isfinite().all()
            # 1 / d magnifies what a sum of weights times points is rounded to.
            assert relative_error(got, want) <= 2e-3


@by_path
@by_loss
@pytest.mark.parametrize("m", [None, 140], ids=["square", "rect"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_poisons_the_batch(bad, m, loss, path):
    case = make(
        150, 12, F32, m=m, classes=40, loss=loss, epsilon=0.1 if loss is MS else None, reduction="none"
    )
    case.upstream = torch.ones(150)
    case.labels[3] = 77  # has no positive
    (case.q if m is None else case.r)[5, 2] = bad
    loss_value, grads = run(case, F32, path)
    refs = case.labels if m is None else case.ref_labels
    same = case.labels[:, None] == refs[None, :]
    if m is None:
        same.fill_diagonal_(False)
    both = same.any(1) & ((case.labels[:, None] != refs[None, :]).any(1))
    assert torch.equal(loss_value.isnan(), both)
    assert (loss_value[~both] == 0).all()
    assert all(g.isnan().all() for g in grads if g is not None)


@by_path
def test_not_finite_where_no_row_has_its_pairs(path):
    """All points are of one class, so circle loss asks for nothing: 0, with a gradient of 0."""
    q = surrounded(torch.randn(140, 12))
    q[5, 2] = float("nan")
    loss, grads = run(Case(q, torch.zeros(140, dtype=torch.int64), loss=CIRCLE), F32, path)
    assert loss == 0
    assert not grads[0].any()


@pytest.mark.parametrize("arithmetic", [F32, BF16, F64], ids=lambda a: a.name)
@pytest.mark.parametrize("m", [None, 30], ids=["square", "rect"])
@by_path
def test_zero_rows(path, m, arithmetic):
    case = make(40, 12, arithmetic, m=m)
    for points in (case.q, case.r if m else case.q):
        points[4] = 0
        points[7] = 0
        points[9] *= 1e-14  # so short that it counts as one of them
    loss, grads = run(case, arithmetic, path)
    check(case, arithmetic, loss, grads)
    for grad in grads[: 1 if m is None else 2]:
        assert not grad[4].any()
        assert not grad[7].any()
        assert not grad[9].any()


@pytest.mark.parametrize(("arithmetic", "scale"), [(F32, 1e25), (BF16, 1e25), (F64, 1e200), (F32, 1e-11)])
@by_path
def test_very_long_and_short_rows(path, arithmetic, scale):
    """Their bare dot products overflow, or their squares do; cosines do not care, and gradients are as much
    shorter as rows are longer."""
    case = make(40, 12, arithmetic)
    reference, (gradient, _) = run(case, arithmetic, path)
    case.q[::3] *= scale
    loss, (scaled, _) = run(case, arithmetic, path)
    assert relative_error(loss, case.truth(arithmetic)[0]) <= arithmetic.loss_tolerance
    assert relative_error(loss, reference.double()) <= (1e-2 if arithmetic is BF16 else 1e-5)
    scaled[::3] *= scale
    assert relative_error(scaled, gradient.double()) <= (5e-2 if arithmetic is BF16 else 1e-4)


def test_dot_products_that_overflow_are_not_finite():
    case = make(40, 12, F32, similarity="dot")
    case.q[3] = 1e20
    loss, grads = run(case, F32, "matrix")
    assert loss.isnan()
    assert grads[0].isnan().all()


@pytest.mark.parametrize(
    ("n", "d", "m"), [(0, 4, None), (5, 0, None), (0, 4, 3), (3, 4, 0), (0, 0, 0), (2000, 3, 0)]
)
@pytest.mark.parametrize("arithmetic", [F32, F16, F64], ids=lambda a: a.name)
@by_loss
def test_empty(loss, arithmetic, n, d, m):
    q, labels = torch.zeros(n, d, dtype=arithmetic.dtype), torch.zeros(n, dtype=torch.int64)
    r, ref_labels = (
        (None, None) if m is None else (torch.zeros(m, d, dtype=arithmetic.dtype), torch.zeros(m).long())
    )
    case = Case(q, labels, r, ref_labels, loss=loss)
    value, grads = run(case, arithmetic)
    want = case.truth(arithmetic)[0]
    assert relative_error(value, want) < 1e-6
    assert not any(g.any() for g in grads if g is not None)


@pytest.mark.parametrize("classes", ["one", "all_different", "unequal"])
@by_path
@by_loss
def test_classes(loss, path, classes):
    n = 200
    labels = {
        "one": torch.zeros(n, dtype=torch.int64),
        "all_different": torch.arange(n),
        "unequal": torch.cat([torch.zeros(150), torch.ones(40), torch.arange(2, 12)]).long(),
    }[classes]
    case = make(n, 24, F32, loss=loss)
    case.labels = labels
    loss_value, grads = run(case, F32, path)
    check(case, F32, loss_value, grads)
    if loss is CIRCLE and classes != "unequal":
        assert loss_value == 0
        assert not grads[0].any()


@by_path
def test_duplicates_are_pairs(path):
    case = make(140, 16, F32, epsilon=0.1, seed=3)
    case.q[70:] = case.q[:70]
    case.labels[70:] = case.labels[:70]
    verify(case, F32, path)


def engine_of_sizes(dtype, n, m, d, **options):
    """An engine without data, to ask for sizes; m is None where square."""
    e = library.Engine(torch.empty(0, d, dtype=dtype), torch.empty(0, dtype=torch.int64), **options)
    batch = e.arguments.batch
    batch.embeddings.count, batch.ref_emb.count = n, n if m is None else m
    batch.square = m is None
    return e


ROW_COUNTS = (100, 1025, 2900, 4096, 5000, 30_000, 200_000, 700_000, 1_000_000, 3_000_000)


@by_arithmetic
@pytest.mark.parametrize("d", [1, 33, 128, 1024, 16_384, 100_000])
def test_memory_stays_bounded(arithmetic, d):
    """Inputs, gradient, 64 bytes a row and 64 MiB, by the sizes that the engine itself asks for; and a copy
    of rows that are not aligned. The images of two tiles of 128 rows and the float32 sums for 16-bit
    gradients of one, the least there can be, count beyond 20,000 dimensions."""
    row_bytes = d * arithmetic.dtype.itemsize
    packed = 0 if row_bytes % 16 == 0 else -(-row_bytes // 16) * 16
    least_images = 2 * 128 * row_bytes if d > 20_000 else 0
    least_sums = 128 * 4 * d if arithmetic.dtype.itemsize == 2 and d > 20_000 else 0
    for n in ROW_COUNTS:
        for m in (None, 1, 300, 4096, *ROW_COUNTS[-4:]):
            e = engine_of_sizes(arithmetic.dtype, n, m, d, precision=arithmetic.precision)
            saved, forward, backward = e.ask_sizes()
            allowed = (64 + packed) * (n + (m or 0)) + (64 << 20) + least_images
            assert saved + forward <= allowed, (n, m)
            assert saved + backward <= allowed + least_sums, (n, m)


def test_one_group_of_sums_where_it_fits():
    """16-bit gradients of usual batches are summed all at once, as the others are in place."""
    weights = engine_of_sizes(torch.float16, 5120, None, 512, tuning={"sum_bytes": 0}).ask_sizes()[2]
    sums = engine_of_sizes(torch.float16, 5120, None, 512).ask_sizes()[2] - weights + 128 * 512 * 4
    assert sums == 5120 * 512 * 4
    one_tile = engine_of_sizes(torch.float16, 1_000_000, None, 512, tuning={"sum_bytes": 0}).ask_sizes()[2]
    images, weights = 24 << 20, 16 << 20
    assert one_tile <= images + weights + 128 * 512 * 4


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("m", [None, 300], ids=["square", "rect"])
@pytest.mark.parametrize("arithmetic", [F16, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize("path", ["large", "cached"])
def test_sums_in_several_groups(path, arithmetic, m, tiles):
    """n is 4 tiles, m 3: groups of one tile's rows, of two, and of two and one."""
    sums_of = {"sum_bytes": tiles * 128 * 33 * 4}
    for epsilon, loss in ((0.1, MS), (None, CIRCLE)):
        case = make(400, 33, arithmetic, m=m, epsilon=epsilon, loss=loss)
        value, grads = run(case, arithmetic, path, tuning=sums_of)
        check(case, arithmetic, value, grads)
        if m is None:
            continue
        for needs in ((True, False), (False, True)):
            _, only = run(case, arithmetic, path, needs=needs, tuning=sums_of)
            for got, want, needed in zip(only, grads, needs, strict=True):
                assert torch.equal(got, want) if needed else got is None


SHARED = [  # tuning, blocks of half a multiprocessor, dimensions, blocks that share a line of 17 tiles
    ({}, 512, 9, 8),
    ({"split_slots": 18}, 512, 9, 1),
    ({"split_slots": 3}, 512, 9, 5),
    ({"split_slots": 1}, 512, 9, 17),
    ({"split_slots": 1}, 6, 9, 2),  # so few that each has 6 tiles or more
    ({"split_slots": 2, "wide_blocks": 1}, 34, 100, 8),  # of wide panels
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tuning", "blocks", "d", "parts"), SHARED)
def test_blocks_that_share_a_line(tuning, blocks, d, parts, transposed):
    """A few rows against many columns, mined, or many against a few, all pairs: blocks have parts of the
    lines of the few, and their sums are merged."""
    epsilon = None if transposed else 0.1
    for arithmetic in (F32, BF16, F64) if d < 64 else (F32, BF16):  # float64 has no wide panels
        tile = 64 if arithmetic is F64 else 128
        few, many = tile - 9, 17 * tile - 3
        n, m = (many, few) if transposed else (few, many)
        case = make(n, d, arithmetic, m=m, epsilon=epsilon, classes=40, spread=0.4)
        # Where registers leave one block a multiprocessor, half as many share.
        lines = blocks if arithmetic is BF16 else 2 * blocks
        path = {"matrix_bytes": 0, "cache_bytes": 0, "line_blocks": lines, **tuning}
        e = engine(case, arithmetic, tuning=path)
        launches = e.launches()
        assert [grid[2] for name, grid, *_ in launches if "add_gradients" in name] == [parts]
        assert sum("merge_gradient" in name for name, *_ in launches) == (parts > 1)
        value, grads = e.forward(), e.backward(torch.tensor([1.0]))
        check(case, arithmetic, value, grads)
        for needs in ((True, False), (False, True)):
            only = e.backward(torch.tensor([1.0]), *needs)
            assert all(x is None or torch.equal(x, y) for x, y in zip(only, grads, strict=True))


def test_shared_lines_take_little_memory():
    """At most 4 MiB, and not where the other workspaces leave less than four times as much."""
    for n, m, d in ((512, 65_536, 128), (512, 65_536, 4096), (4096, 4096, 64), (512, 16_384, 1024)):
        sizes = [
            engine_of_sizes(torch.float32, n, m, d, tuning=tuning).ask_sizes()[2]
            for tuning in ({}, {"split_slots": 1 << 20})
        ]
        assert 0 <= sizes[0] - sizes[1] <= 4 << 20
        if d == 128:
            assert sizes[0] - sizes[1] == 12 * 512 * 128 * 4  # thirteen blocks a line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("save", "cache"), [(True, -1), (True, 1 << 30), (True, 0), (False, -1)])
def test_the_fake_kernel_tells_the_same_sizes(save, cache, dtype):
    """torch.compile plans with what dml_cuda._ops says of the saved tensors."""
    sizes = (0, 1, 100, 256, 257, 512, 513, 1024, 3000, 4096, 4097, 100_000, 3_000_000)
    itemsize = 8 if dtype == torch.float64 else 4
    for n, m, d in product(sizes, (None, *sizes), (16, 128, 129, 512)):
        e = engine_of_sizes(dtype, n, m, d, save_for_backward=save, tuning={"cache_bytes": cache})
        of = "cuda", n, n if m is None else m, m is None, False, itemsize, save, cache
        assert dml_cuda._C.saved_bytes(*of) == e.ask_sizes()[0], (n, m, d)
        if d == 16:
            e.arguments.options.learned = 1  # an address that is not read
            assert dml_cuda._C.saved_bytes(*of, len(e.params)) == e.ask_sizes()[0], (n, m)


# ---- pairs given as lists -------------------------------------------------------------------------------

by_float = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def listed(n, m, pairs, dtype, d=5, offset=0):
    """x, y, and pairs of their rows, sorted by row; the third row has none."""
    rows = torch.randint(n, (pairs,)).sort().values if n else torch.zeros(0, dtype=torch.int64)
    rows[rows == 2] = 3 if n > 3 else 0
    points = [surrounded(torch.randn(count, d, dtype=dtype), offset) for count in (n, m)]
    return *points, rows.sort().values, torch.randint(max(m, 1), (len(rows),))


def offsets_of(rows, n):
    return torch.searchsorted(rows, torch.arange(n + 1))


def close(x, truth, dtype):
    """Within a few steps of dtype of sums whose terms are of order 1."""
    scale = truth[truth.isfinite()].abs().max().clamp_min(1.0) if truth.isfinite().any() else 1.0
    return torch.allclose(x.double(), truth, 0.0, float(16 * torch.finfo(dtype).eps * scale), equal_nan=True)


@by_float
@pytest.mark.parametrize("offset", [0, 1, 2], ids="offset={}".format)
@pytest.mark.parametrize("d", [0, 1, 3, 4, 31, 64, 129, 132, 512])
def test_products_and_sums_of_listed_pairs(d, offset, dtype):
    x, y, rows, cols = listed(9, 7, 60, dtype, d, offset)
    products = library.pair_products(x, y, rows, cols)
    assert close(products, (x.double()[rows] * y.double()[cols]).sum(1), dtype)
    sums = library.pair_sums(products, y, cols, offsets_of(rows, 9))
    truth = torch.zeros(9, d, dtype=torch.float64)
    truth.index_add_(0, rows, products.double()[:, None] * y.double()[cols])
    assert close(sums, truth, dtype)
    assert not sums[2].any()


@by_float
def test_more_listed_pairs_than_warps(dtype):
    x, y, rows, cols = listed(1500, 40, 2500, dtype)
    offsets = offsets_of(rows, 1500)
    products = library.pair_products(x, y, rows, cols)
    assert close(products, (x.double()[rows] * y.double()[cols]).sum(1), dtype)
    sums = library.pair_sums(products, y, cols, offsets)
    truth = torch.zeros(1500, 5, dtype=torch.float64)
    truth.index_add_(0, rows, products.double()[:, None] * y.double()[cols])
    assert close(sums, truth, dtype)
    logs = library.segment_logsumexp(products, offsets, False)
    assert close(logs.exp(), torch.zeros(1500).double().index_add_(0, rows, products.double().exp()), dtype)


@by_float
@pytest.mark.parametrize("d", [5, 64])
def test_listed_indices_out_of_range(d, dtype):
    """They are not followed, which the sanitizers watch: what depends on them is NaN, and nothing else."""
    x, y, rows, cols = listed(9, 7, 60, dtype, d)
    wrong = torch.tensor([0, 11, 12, 13])
    good = torch.ones(60, dtype=torch.bool)
    good[wrong] = good[59] = False
    cols[wrong] = torch.tensor([-1, 7, 2**62, -(2**63)])
    rows[59] = 9
    assert torch.equal(library.pair_products(x, y, rows, cols).isnan(), ~good)
    rows[59] = 8
    offsets = offsets_of(rows, 9)
    sums = library.pair_sums(torch.zeros(60, dtype=dtype), y, cols, offsets)
    touched = torch.zeros(9, dtype=torch.bool)
    touched[rows[wrong]] = True
    assert torch.equal(sums.isnan(), touched[:, None].expand(9, d))
    offsets[4] = 61
    for result in (
        library.pair_sums(torch.zeros(60, dtype=dtype), y, cols.clamp(0, 6), offsets)[:, 0],
        library.segment_logsumexp(torch.zeros(60, dtype=dtype), offsets, True),
    ):
        assert torch.equal(result.isnan().nonzero()[:, 0], torch.tensor([3, 4]))


@by_float
def test_listed_pairs_give_the_same_bits_in_any_order(dtype):
    """And wherever the points lie: reading 16 bytes at once adds up in the same order."""
    results = []
    for offset, schedule in zip((0, 1, 0, 2), SCHEDULES, strict=True):
        torch.manual_seed(0)
        x, y, rows, cols = listed(20, 20, 200, dtype, 132, offset)
        offsets = offsets_of(rows, 20)
        products = library.pair_products(x, y, rows, cols, schedule)
        sums = library.pair_sums(products, y, cols, offsets, schedule)
        results.append((products, sums, library.segment_logsumexp(products, offsets, True, schedule)))
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@by_float
@pytest.mark.parametrize("plus_one", [False, True], ids=["plain", "plus_one"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 80.0, 1e4])
def test_log_sum_exp_of_segments(scale, plus_one, dtype):
    lengths = torch.tensor([0, 1, 31, 0, 32, 33, 400, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logits = scale * torch.randn(int(offsets[-1]), dtype=dtype) - scale
    plain = [torch.logsumexp(s, 0) for s in logits.double().split(lengths.tolist())]
    # log(1 + e^x), of which log1p keeps the smallest, and which is x where e^x overflows
    truth = [x.exp().log1p() if x < 500 else x for x in plain] if plus_one else plain
    got = library.segment_logsumexp(logits, offsets, plus_one)
    info = torch.finfo(dtype)
    assert torch.allclose(got.double(), torch.stack(truth), 8 * info.eps, info.tiny)


@by_float
@pytest.mark.parametrize("plus_one", [False, True], ids=["plain", "plus_one"])
def test_gradient_of_log_sum_exp(plus_one, dtype):
    lengths = [0, 1, 31, 2, 33, 400, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    logits = 5 * torch.randn(sum(lengths), dtype=dtype)
    logits[32:34] = -torch.inf
    grad = torch.randn(len(lengths), dtype=dtype)
    value = library.segment_logsumexp(logits, offsets, plus_one)
    got = library.segment_softmax(grad, logits, value, offsets)
    one = torch.zeros(int(plus_one), dtype=torch.float64)
    parts = [torch.cat([s, one]).softmax(0)[: len(s)] for s in logits.double().split(lengths)]
    parts[3] = torch.zeros(2, dtype=torch.float64)  # not NaN, though there was nothing
    truth = torch.cat([g * p for g, p in zip(grad.double(), parts, strict=True)])
    assert torch.allclose(got.double(), truth, 64 * torch.finfo(dtype).eps, torch.finfo(dtype).eps)


@by_float
def test_log_sum_exp_of_what_is_not_finite(dtype):
    inf, nan = torch.inf, torch.nan
    segments = [[], [-inf, -inf], [-inf, 2.0], [inf, 1.0, -inf], [1.0, nan], [nan, inf], [nan], [-60.0]]
    offsets = torch.tensor([0] + [len(s) for s in segments]).cumsum(0)
    logits = torch.cat([torch.tensor(s, dtype=dtype) for s in segments])
    plain = library.segment_logsumexp(logits, offsets, False)
    assert plain.tolist()[:4] == [-inf, -inf, 2.0, inf]
    assert plain[4:7].isnan().all()
    assert plain[7] == -60.0
    with_one = library.segment_logsumexp(logits, offsets, True)
    assert with_one.tolist()[:2] == [0.0, 0.0]
    assert with_one[2] == torch.tensor(2.0, dtype=torch.float64).exp().log1p().to(dtype)
    assert with_one[3] == inf
    assert with_one[4:7].isnan().all()
    assert torch.allclose(with_one[7].double(), torch.tensor(-60.0).double().exp(), 1e-6, 0.0)


@by_float
def test_no_listed_pairs(dtype):
    x, y, rows, cols = listed(4, 3, 0, dtype)
    assert library.pair_products(x, y, rows, cols).shape == (0,)
    zeros = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(
        library.pair_sums(torch.zeros(0, dtype=dtype), y, cols, zeros), torch.zeros(4, 5).to(dtype)
    )
    assert library.pair_sums(torch.zeros(0, dtype=dtype), y, cols, zeros[:1]).shape == (0, 5)
    assert library.segment_logsumexp(torch.zeros(0, dtype=dtype), zeros[:1], True).shape == (0,)
    # Points there are none of, either: every index is out of range.
    none = torch.zeros(0, 5, dtype=dtype)
    assert library.pair_products(none, none, zeros, zeros).isnan().all()
