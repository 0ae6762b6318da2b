"""The CUDA kernels on classes with several centres, run on the host: schedules, sanitizers and planted bugs.
Their results are compared in tests/cuda/test_centers_torch_side.py."""

import pytest
from emulator.build import HERE, ROOT, SANITIZED, build, is_seen, run

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

PROGRAM = [HERE / "centers_program.cpp", ROOT / "csrc" / "cuda" / "centers" / "centers.cu"]
ROWS, LENGTHS, FORMULA = "cuda/centers/rows.cuh", "cuda/centers/lengths.cuh", "core/centers.h"
BUGS = {
    "tile_read_before_the_barrier": (
        ROWS,
        "shared[at] = s * factor; });\n                block_sync();",
        "shared[at] = s * factor; });",
    ),
    "tile_overwritten_before_it_is_read": (
        ROWS,
        "            if (!tile.staged) continue;\n            block_sync();",
        "            if (!tile.staged) continue;",
    ),
    "weights_that_are_not_scaled_again": (ROWS, "s = shared[at] * factor;", "s = shared[at];"),
    "next_class_forgotten": (ROWS, "                ++c;", ""),
    "first_block_forgotten": (ROWS, "if (!block.is_first()) state.others", "if (false) state.others"),
    "rows_without_a_class": (ROWS, "block.s[row * width + e] = T(0);", "{}"),
    "the_own_class_among_the_others": (
        ROWS,
        "        } else {\n            others.merge",
        "        }\n        {\n            others.merge",
    ),
    "threads_without_a_class": (ROWS, "others.empty() ? T(0) : ", ""),
    "derivatives_of_the_first_block_alone": (
        ROWS,
        "by_params[kCenterParams * row + 1] +=",
        "by_params[kCenterParams * row + 1] =",
    ),
    "own_weight_without_its_derivative": (ROWS, "            by_value *= similarity.by_s;\n", ""),
    "sums_read_before_the_barrier": (
        LENGTHS,
        "    shared[threadIdx.x] = sum;\n    block_sync();",
        "    shared[threadIdx.x] = sum;",
    ),
    "tiny_lengths": (LENGTHS, "length <= tiny ? T(0) : T(1) / length", "T(1) / length"),
    "largest_not_taken_out": (FORMULA, "below = s - before.most, e", "below = s, e"),
}


@pytest.fixture(scope="module")
def right():
    done = run(build(PROGRAM, sanitizer="none"), schedule="warp_first", seed=1)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_changes_the_result(bug, right):
    assert is_seen(PROGRAM, BUGS[bug], right)


def test_every_schedule_gives_the_same_bits(right):
    program = build(PROGRAM, sanitizer="none")
    for schedule, seed in (("round_robin", 0), ("warp_first", 0), ("warp_first", 7)):
        assert run(program, schedule=schedule, seed=seed).stdout == right


@pytest.mark.whole
@pytest.mark.parametrize(("sanitizer", "schedule"), SANITIZED)
def test_sanitizers_find_nothing(sanitizer, schedule):
    done = run(build(PROGRAM, sanitizer=sanitizer), schedule=schedule, seed=1)
    assert done.returncode == 0, done.stderr.decode()
