"""The matrix path on the emulator: its launches, its memory, and that planted bugs are seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import library
from emulator.build import COMMON, HERE, ROOT, _compile, build, cached, run, with_change

pytestmark = [pytest.mark.slow(150), pytest.mark.long]

SOURCES = [HERE / "matrix_planted_bugs.cpp", ROOT / "csrc" / "cuda" / "instantiations" / "matrix_rows.cu"]


def engine_of_sizes(n, m=None, d=128, dtype=torch.float32, **options):
    """An engine without data; m is None where square."""
    e = library.Engine(torch.empty(0, d, dtype=dtype), torch.empty(0, dtype=torch.int64), **options)
    batch = e.arguments.batch
    batch.embeddings.count, batch.ref_emb.count, batch.square = n, n if m is None else m, m is None
    return e


def build_with(change=None, defines=(), **options):
    """The program that shows bugs, with one planted: (header, old text, new text)."""
    folders = [HERE / "one_formula", *([with_change(*change)] if change else [])]
    return build(SOURCES, defines=["DML_CUSTOM_FORMULA", *defines], folders=folders, **options)


def launched(e, **wanted):
    kernels = "similarities", "finish_matrix_rows", "finish_matrix_gradient", "matrix_gradient"
    return [next(k for k in kernels if k in name) for name, *_ in e.launches(**wanted)]


FORWARD = ["similarities", "finish_matrix_rows"]
ONE, TWO = ["matrix_gradient"], ["matrix_gradient", "finish_matrix_gradient"]


@pytest.mark.parametrize(
    ("d", "dtype", "backward"),
    [
        *[(d, torch.float32, ONE) for d in (4, 64, 128)],
        *[(d, torch.float32, TWO) for d in (132, 512, 2048)],
        *[(128, dtype, ONE) for dtype in (torch.float64, torch.float16, torch.bfloat16)],
        *[(512, dtype, TWO) for dtype in (torch.float64, torch.float16, torch.bfloat16)],
    ],
)
def test_two_launches_forward_and_one_or_two_back(d, dtype, backward):
    """For every batch of up to 1024 rows, also against other rows with both gradients."""
    for n in range(1, 1025, 1 if d in (128, 512) and dtype == torch.float32 else 31):
        assert launched(engine_of_sizes(n, d=d, dtype=dtype)) == FORWARD + backward
        if n % 31 == 1:
            assert launched(engine_of_sizes(n, 1025 - n, d, dtype)) == FORWARD + backward


def test_the_matrix_path_serves_up_to_32_mib():
    for n, m, dtype in (
        (2896, None, torch.float32),
        (512, 16_384, torch.bfloat16),
        (2048, None, torch.float64),
    ):
        e = engine_of_sizes(n, m, dtype=dtype)
        assert launched(e)[:2] == FORWARD
        assert 32 << 20 >= n * (m or n) * (8 if dtype == torch.float64 else 4) > 31 << 20
        assert e.ask_sizes()[0] <= 34 << 20  # saved
        more = engine_of_sizes(n + 1, m and m + 1, dtype=dtype)
        assert not any("matrix" in name for name, *_ in more.launches())


@pytest.fixture(scope="module")
def right():
    done = run(build_with(), schedule="warp_first", seed=1)
    assert done.returncode == 0, done.stderr.decode()
    values = np.frombuffer(done.stdout, np.float32)
    assert np.isfinite(values[: 1 + 192 * 8]).all()
    assert values[0] > 0
    return done.stdout


ROWS, GRADIENT = "cuda/matrix/rows.cuh", "cuda/matrix/gradient.cuh"
BUGS = {
    "counter_not_zeroed": (
        "cuda/matrix/similarities.cuh",
        "if (blockIdx.x == 0 && threadIdx.x == 0) *task.ticket = 0;",
        "",
    ),
    "derivatives_of_the_wrong_side": (
        GRADIENT,
        "const Acc u = across[k * Traits::kAcrossPitch + r];",
        "const Acc u = along[r * Traits::kPitch + k];",
    ),
    "chunk_skipped_that_its_rows_occupy": (GRADIENT, "task.saved.is_occupied(i, chunk)", "false"),
    "chunk_skipped_that_the_line_occupies": (
        GRADIENT,
        "task.saved.is_occupied(j, row0 / kChunk)",
        "false",
    ),
    "columns_that_are_not_valid": (
        ROWS,
        "used = rows_in_use(task.num_valid_refs, task.refs)",
        "used = task.refs",
    ),
    "weights_read_before_the_barrier": (
        GRADIENT,
        "                block_sync();\n                product.template add",
        "                product.template add",
    ),
    "results_reduced_one_block_early": (
        ROWS,
        "take_ticket(task.ticket) + 1 == gridDim.x",
        "take_ticket(task.ticket) + 2 == gridDim.x",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_changes_the_result(bug, right):
    program = build_with(BUGS[bug], sanitizer="none")
    done = run(program, schedule="warp_first", seed=1)
    assert done.returncode != 0 or done.stdout != right


def test_no_race_within_a_block():
    """ThreadSanitizer; between blocks it sees little, as a fiber that serves two blocks orders them."""
    done = run(build_with(sanitizer="thread"), schedule="warp_first", seed=1)
    assert done.returncode == 0, done.stderr.decode()[:3000]


TICKET = "*last = take_ticket(task.ticket) + 1 == gridDim.x"
RELAXED = "*last = __atomic_fetch_add(task.ticket, 1u, __ATOMIC_{}) + 1 == gridDim.x"
BEFORE_TICKET = "= sum;\n    }\n    block_sync();\n"
WAIT_FOR = "wait_for_previous_kernel();\n"
FINISH = "constexpr int kRows = kFinishThreads / kWarpSize;\n    "
RACES = {
    "ticket_without_fence": (ROWS, TICKET, RELAXED.format("RELAXED")),
    "ticket_that_only_releases": (ROWS, TICKET, RELAXED.format("RELEASE")),
    "ticket_that_only_acquires": (ROWS, TICKET, RELAXED.format("ACQUIRE")),
    "ticket_without_the_barrier_before_it": (ROWS, BEFORE_TICKET, BEFORE_TICKET.replace("block_sync();", "")),
    "read_before_the_wait": (
        ROWS,
        WAIT_FOR,
        "const Acc norm = task.saved.query_norms[blockIdx.x];\n    "
        + WAIT_FOR
        + "    if (norm < 0) return;\n",
    ),
    "ticket_zeroed_before_the_wait": (
        ROWS,
        WAIT_FOR,
        "if (blockIdx.x == 0 && threadIdx.x == 0) *task.ticket = 0;\n    " + WAIT_FOR,
    ),
    "parts_read_without_a_wait": (
        GRADIENT,
        FINISH + WAIT_FOR,
        FINISH + "if (blockIdx.x > 0) wait_for_previous_kernel();\n",
    ),
    "only_one_thread_waits": (ROWS, WAIT_FOR, "if (threadIdx.x == 0) wait_for_previous_kernel();\n"),
}


def test_no_race_between_blocks(right):
    """Nor between a kernel and the one after it that need not have waited."""
    done = run(build_with(sanitizer="blocks"), schedule="warp_first", seed=1)
    assert done.returncode == 0, done.stderr.decode()[:3000]
    assert done.stdout == right


RARER = "ticket_that_only_releases", "ticket_that_only_acquires", "ticket_zeroed_before_the_wait"


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=[pytest.mark.whole] * (bug in RARER)) for bug in RACES]
)
def test_a_planted_race_between_blocks_is_seen(bug):
    done = run(build_with(RACES[bug], sanitizer="blocks"), schedule="warp_first", seed=1)
    assert done.returncode == 1
    assert b"race between blocks" in done.stderr


def test_every_block_of_a_dependent_launch_waits():
    """Else the launch after it might begin before the one before it has ended."""
    done = run(build_with((ROWS, WAIT_FOR, ""), sanitizer="none"))
    assert done.returncode == 1
    assert b"did not wait for the kernel before it" in done.stderr


def test_launches_that_may_begin_early():
    """A kernel that follows one of its own op, never the first of an op."""
    for d, dependent in ((128, [False, True, False]), (512, [False, True, False, True])):
        assert [launch[4] for launch in engine_of_sizes(512, d=d).launches()] == dependent


def test_the_driver_is_asked_once_for_each_device():
    """Of shared memory again for more, or after a refusal; what was granted is never taken back."""
    done = run(build([HERE / "known_kernels.cpp"], sanitizer="none"))
    assert done.returncode == 0
    asked = done.stdout.decode().splitlines()
    assert asked[:6] == ["0 0 60", "0 0 70", "0 1 60", "1 0 60", "1 1 90", "1 1 90"]
    assert asked[6:] == ["0 0 version", "0 1 version"]


def test_the_stand_alone_driver():
    """What a GPU runs first (tools/bench_kernels.cu), on the emulator: every formula by both paths against
    tiles in float64; times and constants only run."""
    driver = _compile(ROOT / "tools" / "bench_kernels.cu", [*COMMON, "-O1"])
    library.load()
    engine = Path(library.load()._name)
    program = cached([driver, engine], ["g++", "-rdynamic", str(driver), str(engine)], suffix="")
    done = run(program)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()[-2000:]
    for option in ("dependent", "wgmma"):
        asked = run(program, option, "times")
        assert [json.loads(line)[option] for line in asked.stdout.splitlines()] == [1] * 6
    by_wgmma = [json.loads(line) for line in run(program, "wgmma", "cases").stdout.splitlines()]
    assert all(line["good"] and line["wgmma"] for line in by_wgmma)
    assert {line["path"] for line in by_wgmma} == {"matrix", "tiles"}
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    checked = [line for line in lines if "check" in line]
    assert {line["check"] for line in checked} == set(library.formulas())
    assert all(line["good"] for line in checked)
    assert sum("times" in line for line in lines) == 6
    assert sum("constant" in line for line in lines) == 9
