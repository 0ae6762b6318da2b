"""Rows against a block of columns at a time on the CUDA kernels, run on the host from their own source,
against brute force in float64 over all columns at once."""

from dataclasses import replace

import pytest
import torch
from cases.cuda import (
    BY_NAME,
    CIRCLE,
    CONTRASTIVE,
    FORMULAS,
    LARGE_NUMBER,
    MARGIN_SOFTMAX,
    MS,
    NT_XENT,
    SUP_CON,
    check,
    make,
    make_from_refs,
    of_similarity,
    surrounded,
)
from emulator import library
from emulator.build import HERE, ROOT, SANITIZED, build
from emulator.build import run as run_program
from emulator.ring import CONTEXT, Blocks, stages
from emulator.test_cuda_emulated import SCHEDULES, by_arithmetic, by_formula

from dml_cuda import _C

pytestmark = [pytest.mark.slow(100), pytest.mark.long]

F32, F64, BF16, F16 = BY_NAME["f32"], BY_NAME["f64"], BY_NAME["bf16"], BY_NAME["f16"]
KERNELS = [
    ROOT / "csrc" / "cuda" / f"{name}.cu"
    for name in ("ring/rows", "instantiations/merge", "instantiations/look_float")
]
UNEVEN = (70, 0, 1, 129, 40)  # columns of the blocks, in the order in which they come


def split(case, counts):
    """The columns of a case as blocks of `counts` columns, with self_index relative to each block."""
    blocks, first = [], 0
    for count in counts:
        of_block = slice(first, first + count)
        self_index = None if case.self_index is None else case.self_index - first
        points = surrounded(case.r[of_block]) if count else case.r[:0].clone()
        blocks.append((points, case.ref_labels[of_block].clone(), self_index))
        first += count
    assert first == len(case.r)
    return blocks


def engine(case, arithmetic, counts, **options):
    loss, params = case.loss
    return Blocks(
        case.q, case.labels, split(case, counts), loss=loss, params=params, epsilon=case.epsilon,
        similarity=case.similarity, reduction=case.reduction, precision=arithmetic.precision, **options,
    )  # fmt: skip


def with_sums(case):
    """The case with parts and counts as its result, and another upstream gradient for each part."""
    upstream = torch.tensor([0.7, -0.3, 0.0, 0.0], dtype=torch.float64)
    return replace(case, return_sums=True, upstream=upstream)


def above(rows):
    """The gradient of each row's parts."""
    return torch.tensor([[0.7], [-0.3]], dtype=torch.float64).expand(2, rows)


def verify(case, arithmetic, counts=UNEVEN, **options):
    e = engine(case, arithmetic, counts, **options)
    losses = e.forward()
    grads = e.backward(above(len(case.q)))
    compare(case, arithmetic, losses, grads)
    return e, losses, grads


def compare(case, arithmetic, losses, grads):
    case = with_sums(case)
    by_rows, by_blocks = grads
    grads = by_rows.to(case.q.dtype), torch.cat(by_blocks).to(case.q.dtype)
    # The wider sums, rounded as the ring rounds them once all are there.
    check(case, arithmetic, losses.double().sum(1), grads)


def columns(n, arithmetic, counts=UNEVEN, d=17, **options):
    return make(n, d, arithmetic, m=sum(counts), **options)


@pytest.mark.parametrize("loss", [MS, CIRCLE, CONTRASTIVE, NT_XENT], ids=lambda loss: loss[0])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@by_arithmetic
def test_every_arithmetic(arithmetic, epsilon, loss):
    schedule = SCHEDULES[(len(arithmetic.name) + len(loss[0])) % 4]
    verify(columns(140, arithmetic, epsilon=epsilon, loss=loss), arithmetic, schedule=schedule)


@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("similarity", library.SIMILARITIES)
@by_formula
def test_every_formula(formula, similarity, epsilon):
    for arithmetic in (F64, F32):
        case = of_similarity(formula, similarity, 70, 16, arithmetic, m=sum(UNEVEN), epsilon=epsilon)
        verify(case, arithmetic)


def test_stages_are_those_that_python_asks_for():
    for name, _ in FORMULAS:
        assert (name in CONTEXT) == _C.formula_facts(name)[1]["context"]


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@by_formula
def test_reductions(formula, epsilon, reduction):
    # Many classes: some rows have no positive, and some summands are 0.
    verify(columns(70, F64, classes=60, epsilon=epsilon, loss=formula, reduction=reduction), F64)


@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@by_formula
def test_each_row_weighted_apart(formula, epsilon):
    case = columns(70, F64, loss=formula, epsilon=epsilon, reduction="none")
    case.upstream = torch.randn(70, generator=torch.Generator().manual_seed(1))
    e = engine(case, F64, UNEVEN)
    losses = e.forward()[:2].sum(0)
    by_rows, by_blocks = e.backward(case.upstream.expand(2, 70))
    check(case, F64, losses, (by_rows, torch.cat(by_blocks)))


@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@by_formula
def test_rows_among_the_columns(formula, epsilon):
    """Their own column is no pair and not mined with, whatever block it is in, or outside all."""
    for arithmetic in (F64, F32):
        m = sum(UNEVEN)
        case = make_from_refs(90, 20, arithmetic, m=m, loss=formula, epsilon=epsilon, mine_self_pair=False)
        if formula != MARGIN_SOFTMAX:  # whose angle has no digits where a row meets itself
            case.self_index[6::5] = -1
            case.self_index[:4] = torch.tensor([m, -m, 2**63 - 1, -(2**63)])
        verify(case, arithmetic)


@pytest.mark.parametrize(
    ("n", "d", "counts"),
    [
        (1, 3, (1,)),
        (1, 3, (1, 1, 1, 2)),
        (2, 2, (3, 130)),
        (33, 65, (31, 0, 33)),
        (128, 64, (128, 128)),
        (129, 129, (127, 1, 129)),
        (300, 8, (300, 300)),
        (5, 40, (600, 3)),
    ],
)
@pytest.mark.parametrize("arithmetic", [F64, F32, F16, BF16], ids=lambda a: a.name)
def test_awkward_sizes(arithmetic, n, d, counts):
    verify(columns(n, arithmetic, counts, d, classes=3, epsilon=0.15, loss=MS), arithmetic, counts)
    case = columns(n, arithmetic, counts, d, classes=3, loss=CIRCLE, amid=LARGE_NUMBER)
    verify(case, arithmetic, counts, wide_blocks=1 << 20)


@pytest.mark.parametrize(("n", "count"), [(70, 2200), (2200, 70)], ids=["long block", "short block"])
def test_lines_that_are_shared(n, count):
    """By nine blocks of the gradient's launch, each with a part of the 18 tiles."""
    case = columns(n, F32, (count,), d=9, epsilon=0.1)
    e, *_ = verify(case, F32, (count,), tile_group=-1, wide_blocks=-1)
    alone = engine(case, F32, (count,), tile_group=-1, wide_blocks=0)
    assert e.sizes(e.blocks[0])[2] - alone.sizes(alone.blocks[0])[2] == 8 * 128 * 9 * 4


def test_one_dimension():
    """Of rows as they come, as the gradient of a unit row is 0 there."""
    for similarity, arithmetic in (("dot", F64), ("dot", F32), ("euclidean_raw", F64)):
        verify(of_similarity(MS, similarity, 31, 1, arithmetic, m=133), arithmetic, (3, 130))


@pytest.mark.parametrize("counts", [(0,), (0, 0), ()])
@by_formula
def test_no_column_at_all(formula, counts):
    for epsilon in (None, 0.1):
        case = make(20, 5, F64, loss=formula, epsilon=epsilon)
        e = Blocks(
            case.q, case.labels, [(case.q[:0], case.labels[:0], None) for _ in counts],
            loss=formula[0], params=formula[1], epsilon=epsilon,
        )  # fmt: skip
        assert not e.forward()[:2].any()
        assert not e.backward(torch.ones(2, 20))[0].any()


def test_no_row_at_all():
    case = make(20, 5, F64)
    for epsilon in (None, 0.1):
        e = Blocks(case.q[:0], case.labels[:0], [(case.q, case.labels, None)], epsilon=epsilon)
        assert e.forward().shape == (4, 0)
        assert not e.backward(torch.ones(2, 0))[1][0].any()


@pytest.mark.parametrize("arithmetic", [F64, F32, BF16], ids=lambda a: a.name)
def test_only_the_gradients_asked_for(arithmetic):
    counts = (130, 70)
    case = columns(140, arithmetic, counts, epsilon=0.1)
    e, _, (by_rows, by_blocks) = verify(case, arithmetic, counts)
    alone, nothing = e.backward(above(140), need_block=False)
    assert nothing == [None, None]
    assert torch.equal(alone, by_rows)
    none, alone = e.backward(above(140), need_rows=False)
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(alone, by_blocks, strict=True))


@pytest.mark.parametrize("arithmetic", [F32, F16, F64], ids=lambda a: a.name)
@pytest.mark.parametrize("loss", [MS, NT_XENT, SUP_CON], ids=lambda loss: loss[0])
def test_the_same_bits_in_any_order(loss, arithmetic):
    """Whatever the order of warps and blocks, and twice in a row; with extremes or without."""
    case = columns(150, arithmetic, epsilon=0.1, loss=loss)
    first = None
    for schedule, extremes in zip(SCHEDULES, (True, False, True, True), strict=True):
        _, losses, (by_rows, by_blocks) = verify(case, arithmetic, schedule=schedule, extremes=extremes)
        results = [losses, by_rows, *by_blocks]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_one_block_is_the_whole_engine():
    """To the bit what the engine makes of all columns in one call."""
    for loss in (MS, NT_XENT, CONTRASTIVE):
        for epsilon in (None, 0.1):
            case = columns(140, F32, (290,), epsilon=epsilon, loss=loss)
            _, losses, (by_rows, by_blocks) = verify(case, F32, (290,))
            whole = library.Engine(
                case.q, case.labels, case.r, case.ref_labels, loss=loss[0], params=loss[1], epsilon=epsilon,
                reduction="none", tuning={"matrix_bytes": 0, "tile_group": 2, "cache_bytes": 0},
            )  # fmt: skip
            assert torch.equal(whole.forward(), losses[:2].sum(0))
            one_part = torch.equal(losses[1], torch.zeros_like(losses[1]))
            grad_q, grad_r = whole.backward(torch.full((140,), 0.7, dtype=torch.float64))
            assert one_part == (loss is not CONTRASTIVE)
            if one_part:
                assert torch.equal(grad_q, by_rows)
                assert torch.equal(grad_r, by_blocks[0])


def test_blocks_that_mining_emptied_are_known_and_skipped():
    """Rows of two classes near each other; one block holds those classes, the other two far from both."""
    g = torch.Generator().manual_seed(0)
    corner = torch.zeros(2, 8)
    corner[0, 0] = corner[1, 1] = 1

    def points(labels):
        return surrounded(corner[labels // 2] + 0.05 * torch.randn(len(labels), 8, generator=g))

    labels, near, far = torch.arange(128) % 2, torch.arange(128) % 2, 2 + torch.arange(256) % 2
    q = points(labels)
    blocks = [(points(near), near, None), (points(far), far, None)]
    e = Blocks(q, labels, blocks, epsilon=0.1)
    losses = e.forward()
    assert losses[0].sum() > 0
    assert [(flags & 1).tolist() for flags in e.found] == [[1], [0, 0]]
    for points_of_far in blocks[1][:1]:  # a tile that is skipped is not read
        points_of_far.fill_(torch.nan)
    by_rows, by_blocks = e.backward(torch.ones(2, 128))
    # What is not finite has no gradient, but nothing of the far block has come into the rows' sums.
    assert not by_blocks[1].any()
    assert by_rows.isfinite().all()


@pytest.mark.parametrize("mistake", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["rows", "block"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("loss", [CIRCLE, NT_XENT, MS], ids=lambda loss: loss[0])
def test_what_is_not_finite(loss, epsilon, where, mistake):
    """Each row that has the pairs it needs becomes NaN, and no gradient does: the ring adds that.

    Circle loss needs pairs of both kinds, NT-Xent a positive, multi-similarity either; mining needs both.
    """
    case = columns(70, F64, epsilon=epsilon, loss=loss)
    case.labels[5] = 77  # no positive
    (case.q if where == "rows" else case.r)[3, 2] = mistake
    e = engine(case, F64, UNEVEN)
    losses = e.forward()
    expected = torch.ones(70, dtype=torch.bool)
    expected[5] = loss is MS and epsilon is None
    assert torch.equal(losses[0].isnan(), expected)
    by_rows, by_blocks = e.backward(torch.ones(2, 70))
    assert all(x.isfinite().all() for x in (by_rows, *by_blocks))


@pytest.mark.parametrize("square", [True, False])
def test_tiles_in_which_no_row_has_a_derivative(square):
    """Though pairs were kept: exponentials relative to nobody's value must not become NaN times 0."""
    labels = torch.arange(130) % 2
    q = surrounded(torch.eye(2, 8, dtype=torch.float64)[labels] + 1e-3 * torch.randn(130, 8).double())
    settled = ("lifted_structure", (10.0, -10.0))
    if square:
        e = library.Engine(
            q, labels, loss=settled[0], params=settled[1], tuning={"matrix_bytes": 0, "cache_bytes": 0}
        )
        assert e.forward() == 0
        assert not e.backward()[0].any()
        return
    e = Blocks(q, labels, [(q, labels, torch.arange(130))], loss=settled[0], params=settled[1])
    assert not e.forward()[:2].any()
    by_rows, by_blocks = e.backward(torch.ones(2, 130))
    assert not by_rows.any()
    assert not by_blocks[0].any()


def test_very_long_rows():
    """Whose weights leave the range of a float without a common factor."""
    for similarity in ("cosine", "euclidean"):
        case = of_similarity(MS, similarity, 70, 16, F32, m=sum(UNEVEN))
        case.q.mul_(1e15)
        case.r[:100].mul_(1e14)
        verify(case, F32)


def test_every_block_without_extremes():
    """As where there are too many tiles to know them."""
    for loss in (MS, NT_XENT):
        verify(columns(140, F64, epsilon=0.1, loss=loss), F64, extremes=False)


@pytest.mark.parametrize("d", [5, 40, 130])
def test_rows_that_must_be_packed(d):
    for arithmetic in (F32, BF16):
        case = columns(70, arithmetic, d=d, offset=1, gap=3, epsilon=0.1)
        verify(case, arithmetic)


def test_sizes_are_as_said():
    """Memory beside the points: bounded, whatever the sizes."""

    def sizes(n, m, dtype=torch.float32, similarity="cosine", d=64):
        x = torch.empty(0, d, dtype=dtype)
        labels = torch.empty(0, dtype=torch.long)
        e = Blocks(x, labels, [], similarity=similarity, tile_group=-1, wide_blocks=-1)
        arguments = e.arguments((x, labels, None))
        arguments.batch.embeddings.count, arguments.batch.ref_emb.count = n, m
        e.arguments = lambda block=None: arguments
        return e.sizes()

    for dtype in library.SCALARS:
        acc = 8 if dtype == torch.float64 else 4
        side = 64 if dtype == torch.float64 else 128
        for similarity in library.SIMILARITIES:
            numbers, forward, backward, extremes, kept = sizes(1_000_000, 1_000_000, dtype, similarity)
            assert numbers == 4 + 6 * 1_000_000
            assert forward <= (56 << 20) + 2_000_000 * acc
            assert backward <= (62 << 20) + 11_000_000 * acc
            tiles = -((-1_000_000 // side) ** 2)
            assert extremes == 0
            assert kept == 0
        numbers, _, _, extremes, kept = sizes(20_000, 30_000, dtype)
        tiles = -(-20_000 // side) * -(-30_000 // side)
        assert (extremes, kept) == (2 * tiles * acc, tiles)
    assert sizes(0, 5)[1:] == sizes(5, 0)[1:] == [0, 0, 0, 0]


def test_stages_of_another_formula_are_refused():
    case = columns(20, F64)
    for loss, epsilon, stage in (
        (MS, None, "hardest"),
        (MS, None, "negatives"),
        (MS, 0.1, "positives"),
        (NT_XENT, None, "both"),
    ):
        e = Blocks(case.q, case.labels, [], loss=loss[0], params=loss[1], epsilon=epsilon)
        state, raw = library.poisoned(e.sizes()[0], torch.float64)
        assert stage not in stages(loss[0], epsilon is not None)
        with pytest.raises(RuntimeError, match="not a stage"):
            e.turn(stage, state, raw)
        with pytest.raises(RuntimeError, match="not a stage"):
            e.add(stage, (case.r, case.ref_labels, None), state, None, None)


@pytest.mark.whole
@pytest.mark.parametrize(("sanitizer", "schedule"), SANITIZED)
def test_sanitizers_find_nothing(sanitizer, schedule):
    """No address out of bounds, no misalignment, no overflow; no race within a block or between blocks."""
    program = build([HERE / "ring_sanitized.cpp", *KERNELS], sanitizer=sanitizer)
    done = run_program(program, schedule=schedule, seed=1)
    assert done.returncode == 0, done.stderr.decode()
