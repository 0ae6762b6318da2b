"""Planted bugs in the kernels on tiles, of learned parameters and of early launches, are seen."""

import pytest
import torch
from emulator import library
from emulator.build import HERE, ROOT, build, with_change
from emulator.build import run as run_program

pytestmark = [pytest.mark.slow(150), pytest.mark.long]

INSTANTIATIONS = ROOT / "csrc" / "cuda" / "instantiations"
SOURCES = [
    HERE / "tile_planted_bugs.cpp",
    *(INSTANTIATIONS / f"{x}.cu" for x in ("merge", "look_float", "matrix_rows", "learned_params")),
]


def build_with(change=None, **options):
    folders = [HERE / "one_formula", *([with_change(*change)] if change else [])]
    return build(SOURCES, defines=["DML_CUSTOM_FORMULA"], folders=folders, **options)


UNITS = {"mma": [], "wgmma": ["wgmma"]}  # the program's arguments


def run_unit(unit, change=None, *, sanitizer, **how):
    return run_program(build_with(change, sanitizer=sanitizer), *UNITS[unit], **how)


@pytest.fixture(scope="module")
def right():
    """What the program prints by either unit."""
    done = {unit: run_unit(unit, sanitizer="none") for unit in UNITS}
    for unit in UNITS:
        assert done[unit].returncode == 0, done[unit].stderr.decode()
    return {unit: done[unit].stdout for unit in UNITS}


TERMS, LEARNED = "cuda/pairs/terms_by_params.cuh", "cuda/pairs/learned_params.cuh"
TICKET = "*last = take_ticket(by_params.ticket) + 1 == gridDim.x"
BUGS = {
    "ticket_not_zeroed_in_forward": (LEARNED, "    if (threadIdx.x == 0) *ticket = 0;\n", ""),
    "ticket_not_zeroed_in_backward": (TERMS, "    *by_params.ticket = 0;", "    //"),
    "summed_one_block_early": (TERMS, TICKET, TICKET.replace("+ 1", "+ 2")),
    "rows_left_out": (TERMS, "totals[k] + sum;", "totals[k];"),
    "groups_left_out": (TERMS, "(by_params.first ? 0.0 : slot) + totals[k]", "totals[k]"),
    "terms_of_another_parameter": (TERMS, "totals[k] += double(sum)", "totals[0] += double(sum)"),
}


# ---- weights times points by wgmma -------------------------------------------------------------------------

TILE_PRODUCT, HOPPER = "cuda/hopper/tile_product.cuh", "cuda/hopper/gradients.cuh"
WGMMA_BUGS = {
    "scale_of_another_row": (HOPPER, "WgmmaTile::row(2)", "WgmmaTile::row(1)"),
    "scales_of_another_tile": (HOPPER, "scales + tiles.slot(tile(slice))", "scales + tile(slice)"),
    "weights_of_the_other_half": (HOPPER, "Transposed ? 0 : half, half", "Transposed ? 0 : half, 0"),
    "points_of_the_other_half": (HOPPER, "block, slice % 2}", "block, 0}"),
    "weights_for_rows_of_columns": (
        HOPPER,
        "consume(product, sums, weights.image(1))",
        "consume(product, sums, weights.image(0))",
    ),
    "points_of_another_panel": (HOPPER, "2 * int(blockIdx.x)", "int(blockIdx.x)"),
    "columns_listed_over_rows": (HOPPER, "lists + kListSize", "lists"),
    "stage_kept_between_products": (TILE_PRODUCT, "if (slices > 0) release(turn_.stage_before());", ""),
    "not_joined_at_the_scale": (TILE_PRODUCT, "scale.of[i / 2 % 2]", "scale.of[i % 2]"),
}


RARE_WGMMA = WGMMA_BUGS.keys() - {
    "scales_of_another_tile", "weights_of_the_other_half", "stage_kept_between_products",
}  # fmt: skip
OF_UNITS = {"mma": BUGS, "wgmma": WGMMA_BUGS}


@pytest.mark.parametrize(
    ("unit", "bug"),
    [
        pytest.param(unit, bug, marks=[pytest.mark.whole] * (bug in RARE_WGMMA))
        for unit, bugs in OF_UNITS.items()
        for bug in bugs
    ],
)
def test_a_planted_bug_changes_the_gradient(unit, bug, right):
    done = run_unit(unit, OF_UNITS[unit][bug], sanitizer="none", schedule="warp_first", seed=1)
    assert done.returncode != 0 or done.stdout != right[unit]


# ---- between blocks, and between launches ------------------------------------------------------------------

WAIT = "    wait_for_previous_kernel();\n"
EXTREMES, GRADIENT = "cuda/pairs/find_extremes.cuh", "cuda/pairs/tile_backward.cuh"
SIMILARITIES, FINISH = "cuda/pairs/tile_similarities.cuh", "cuda/pairs/finish_gradient.cuh"
MERGES, REDUCE = "cuda/pairs/merge_kernels.cuh", "cuda/pairs/reduce.cuh"
# Where kernels begin that follow one of their own op.
BEGINS = {
    "tile_similarities": (SIMILARITIES, "const __grid_constant__ TileNeed<Acc> need) {\n"),
    "find_extremes": (EXTREMES, "Partials<Acc> partials, Acc* tile_extremes) {\n"),
    "accumulate": ("cuda/pairs/accumulate.cuh", "uint8_t* kept, bool count_zeros) {\n"),
    "merge_sums": (MERGES, "               Results<Acc> results) {\n"),
    "reduce_results": (REDUCE, "                   Acc* result) {\n"),
    "add_gradients": (GRADIENT, "GroupWeights<WeightLayout<Math>> weights) {\n"),
    "merge_gradient": (MERGES, "int64_t size, Acc* sums) {\n"),
    "finish_gradient": (FINISH, "                    Out* grad) {\n"),
    "sum_terms_by_params": (TERMS, "const __grid_constant__ ByParams<Acc> by_params) {\n"),
}


def before_wait(kernel, more):
    """The change that makes a kernel do more before it waits."""
    header, head = BEGINS[kernel]
    return header, head + WAIT, head + more + WAIT


def without_wait(kernel):
    header, head = BEGINS[kernel]
    return header, head + WAIT, head


RACES = {
    "ticket_without_fence": (
        TERMS,
        TICKET,
        "*last = __atomic_fetch_add(by_params.ticket, 1u, __ATOMIC_RELAXED) + 1 == gridDim.x",
    ),
    "sum_written_behind_the_ticket": (
        TERMS,
        f"{TICKET};\n    block_sync();",
        f"{TICKET};\n    by_params.sums[blockIdx.x] = totals[0];\n    block_sync();",
    ),
    "results_read_before_the_wait": before_wait("reduce_results", "    *result = results.data[0];\n"),
    "weights_read_before_the_wait": before_wait(
        "add_gradients", "    if (weights.scales[0][0] > 1e30f) return;\n"
    ),
    "partials_written_before_the_merge_has_read_them": before_wait(
        "find_extremes", "    if (threadIdx.x == 0) partials.data[0] = 0;\n"
    ),
    "workspace_written_before_gradients_are_finished": before_wait(
        "sum_terms_by_params", "    if (threadIdx.x == 0) by_params.sums[blockIdx.x] = 0;\n"
    ),
}
RARER = "partials_written_before_the_merge_has_read_them", "weights_read_before_the_wait"


@pytest.mark.parametrize("unit", UNITS)
def test_no_race_between_blocks(unit, right):
    """Nor between a kernel and the one after it that need not have waited."""
    done = run_unit(unit, sanitizer="blocks", schedule="warp_first", seed=1)
    assert done.returncode == 0, done.stderr.decode()[:3000]
    assert done.stdout == right[unit]


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=[pytest.mark.whole] * (bug in RARER)) for bug in RACES]
)
def test_a_planted_race_between_blocks_is_seen(bug):
    done = run_program(build_with(RACES[bug], sanitizer="blocks"), schedule="warp_first", seed=1)
    assert done.returncode == 1
    assert b"race between blocks" in done.stderr


@pytest.mark.parametrize(
    "kernel",
    [pytest.param(k, marks=[pytest.mark.whole] * (k not in ("merge_sums", "add_gradients"))) for k in BEGINS],
)
def test_every_dependent_kernel_waits(kernel):
    done = run_program(build_with(without_wait(kernel), sanitizer="none"))
    assert done.returncode == 1
    assert b"did not wait for the kernel before it" in done.stderr


FORWARD = [
    *("prepare_rows", "write_image", "tile_similarities", "find_extremes", "merge_extremes", "accumulate"),
    *("merge_sums", "reduce_results"),
]
BACKWARD = ["write_image", "pair_weights", "add_gradients", "finish_gradient"]


@pytest.mark.parametrize("wgmma", [0, 1], ids=["mma", "wgmma"])
@pytest.mark.parametrize("learns", [False, True])
def test_launches_that_may_begin_early(learns, wgmma):
    """Those that follow one of their own op: not the first of forward, nor the first of backward."""
    engine = library.Engine(
        torch.randn(300, 8), torch.arange(300) // 2, tuning={"matrix_bytes": 0, "wgmma": wgmma}, epsilon=0.1,
        learns=learns,
    )  # fmt: skip
    forward = ["make_formula"] * learns + FORWARD
    backward = BACKWARD + ["sum_terms_by_params"] * learns
    if wgmma:
        other = {"tile_similarities": "wgmma_similarities", "add_gradients": "wgmma_gradients"}
        forward, backward = ([other.get(name, name) for name in names] for names in (forward, backward))
    launches = engine.launches()
    assert all(name in symbol for name, (symbol, *_) in zip(forward + backward, launches, strict=True)), (
        launches
    )
    two_blocks = 164 * 1024 // 2 - 1024  # of a multiprocessor of sm_80
    assert all(
        launch[3] <= two_blocks for launch in launches if "weights" in launch[0] or "extremes" in launch[0]
    )
    first = [0, len(forward)]
    assert [launch[4] for launch in launches] == [k not in first for k in range(len(launches))]
