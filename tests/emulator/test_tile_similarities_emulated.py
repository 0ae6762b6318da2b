"""Similarities of tiles from images, by mma and by wgmma: as accurate as float32 from two float16 parts, as
tf32 from one, whatever the rows; odd shapes, strides and addresses; planted bugs."""

import numpy as np
import pytest
from emulator.build import HERE, SANITIZED, build, build_for_gpu, run, with_change
from emulator.test_hopper_emulated import TARGET, on_hopper

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

COSINE, DOT, EUCLIDEAN = (0, 1), (0, 0), (1, 0)
SOURCES = [HERE / "tile_similarities.cu"]

by_unit = pytest.mark.parametrize("wgmma", [0, 1], ids=["mma", "wgmma"])


@pytest.fixture(scope="module", params=["host", pytest.param("gpu", marks=on_hopper)])
def program(request):
    return build(SOURCES) if request.param == "host" else build_for_gpu(SOURCES[0], TARGET)


def words(x, kind):
    """The bytes of points, and what they stand for."""
    x = np.asarray(x, np.float32)
    if kind == "bfloat16":
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    x = x.astype(np.float16 if kind == "half" else np.float32)
    return x.tobytes(), x.astype(np.float64)


def similarities(program, kind, x, y, of, wgmma=0, **how):
    sent = words(x, kind)[0] + words(y, kind)[0]
    dim = x.shape[1]
    done = run(program, kind, wgmma, len(x), len(y), dim, dim, 0, *of, stdin=sent, **how)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), len(y)).astype(np.float64)


def lengths(x):
    return np.sqrt((x.astype(np.float64) ** 2).sum(1))


def cosines(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x / lengths(x)[:, None]) @ (y / lengths(y)[:, None]).T


def draw_points(count, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


# Sums are truncated as those of tensor cores are.
@by_unit
@pytest.mark.parametrize(
    ("kind", "dim", "most"),
    [
        *[("float", dim, 5e-7) for dim in (64, 128, 512, 2048)],
        ("high", 64, 3e-4), ("high", 128, 2e-4), ("high", 512, 1.2e-4), ("high", 2048, 7e-5),
    ],
)  # fmt: skip
def test_accuracy_of_cosines(program, kind, dim, most, wgmma):
    x = draw_points(128, dim)
    x[64:] = x[:64] + 0.1 * x[64:]  # near ones, whose products have one sign
    truth = cosines(x, x)
    error = np.abs(similarities(program, kind, x, x, COSINE, wgmma) - truth).max()
    norms = 1 / np.sqrt((x * x).sum(1))
    in_float32 = np.abs(x @ x.T * np.outer(norms, norms) - truth).max()
    print(f"{dim} dimensions: {error:.1e} for {kind}, {in_float32:.1e} in float32")
    assert error < most


@by_unit
@pytest.mark.parametrize("schedule", ["round_robin", "warp_first"])
@pytest.mark.parametrize("kind", ["float", "half", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "m", "dim", "stride", "offset"),
    [(1, 1, 1, 1, 0), (130, 5, 31, 31, 1), (70, 257, 200, 208, 8), (129, 130, 97, 100, 3)],
)
def test_shapes(program, kind, n, m, dim, stride, offset, wgmma, schedule):
    """Rows of any dimension, so far apart, from any address on."""
    draw = np.random.default_rng(n + m)
    sent, points = [], []
    for rows in (n, m):
        memory, values = words(draw.normal(size=offset + rows * stride), kind)
        sent.append(memory)
        points.append(values[offset:].reshape(rows, stride)[:, :dim])
    done = run(
        program, kind, wgmma, n, m, dim, stride, offset, *COSINE, stdin=b"".join(sent), schedule=schedule
    )
    assert done.returncode == 0, done.stderr.decode()
    found = np.frombuffer(done.stdout, np.float32).reshape(n, m)
    # bfloat16 and float16 as they come: their products are summed in long, truncated sums.
    assert np.abs(found - cosines(*points)).max() < (5e-7 if kind == "float" else 2e-6)


def rows_of_all_kinds(dim):
    """Of very unequal length; with one component 2^16 times the rest; with denormal components; of zeros."""
    x = draw_points(9, dim)
    x[0] *= 1e-11
    x[1] *= 1e-30 * 1e11  # those of at most 1e-12 count as 0 for cosines
    x[2] *= 1e30
    x[3] *= 1e18
    x[4, 3] *= 2.0**16
    x[5] = 0
    x[5, :2] = 1, 1e-40
    x[6] = 0
    x[7, ::2] *= 2.0**-20
    return x


@by_unit
def test_cosines_of_rows_of_all_kinds(program, wgmma):
    x = rows_of_all_kinds(100)
    found = similarities(program, "float", x, x, COSINE, wgmma)
    length = lengths(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        truth = np.where(np.minimum.outer(length, length) > 1e-12, cosines(x, x), 0)
    assert np.abs(found - truth).max() < 4e-7


@by_unit
def test_products_of_rows_of_all_kinds(program, wgmma):
    """Relative to the rows' lengths. Where squares overflow the row is as good as not finite."""
    x = np.delete(rows_of_all_kinds(100), 2, axis=0)
    found = similarities(program, "float", x, x, DOT, wgmma)
    truth = x.astype(np.float64) @ x.astype(np.float64).T
    size = np.outer(lengths(x), lengths(x))
    inside = size > 1e-30
    assert inside.sum() == 48
    assert (np.abs(found - truth) / np.where(inside, size, 1))[inside].max() < 4e-7
    assert not found[~inside & (size < 1e-40)].any()


@by_unit
def test_distances_of_rows_of_all_kinds(program, wgmma):
    x = rows_of_all_kinds(60)[[0, 1, 3, 4, 5, 6, 7, 8]]
    found = -similarities(program, "float", x, x, EUCLIDEAN, wgmma)
    wide = x.astype(np.float64)
    truth = np.sqrt(((wide[:, None] - wide) ** 2).sum(2))
    assert (np.abs(found - truth) <= 3e-6 * truth).all()


@by_unit
def test_not_finite(program, wgmma):
    """0, until the batch becomes NaN in the end; other rows are not touched."""
    x = draw_points(140, 40)
    x[3, 5], x[130, 7] = np.nan, np.inf
    found = similarities(program, "float", x, x, COSINE, wgmma)
    others = np.delete(np.arange(140), [3, 130])
    assert not found[[3, 130]].any()
    assert np.abs(found[np.ix_(others, others)] - cosines(x[others], x[others])).max() < 5e-7


@by_unit
def test_sanitizers_find_nothing(wgmma):
    x, y = draw_points(130, 65), draw_points(3, 65)
    for sanitizer, schedule in SANITIZED:
        similarities(build(SOURCES, sanitizer=sanitizer), "float", x, y, COSINE, wgmma, schedule=schedule)


MATH, IMAGES, WRITE = "cuda/common/math.cuh", "cuda/common/images.cuh", "cuda/pairs/write_image.cuh"
SCALED = "for (float& x : step) x *= kSmallScale;\n        mma<__half>(step, a.big[0]"
BUGS = {
    "small_parts_forgotten": (MATH, "a.small[step], view.part(1)", "a.small[step], view"),
    "small_not_scaled": (MATH, SCALED, "mma<__half>(step, a.big[0]"),
    "other_half_of_a_block": (IMAGES, "slice % kSlices * kChunks", "0 * kChunks"),
    "swizzle_of_slices": (IMAGES, "kSliceBytes>(row, chunk)", "kSliceBytes>(row, chunk ^ row % 2)"),
    "rows_of_another_tile": (IMAGES, "Layout::block(image, tile, 0)", "Layout::block(image, 0, 0)"),
    "scaled_the_wrong_way": (WRITE, "= reciprocal_of_power(up)", "= up"),
    "columns_past_the_last": (WRITE, "d + e < cols ? row[d + e] : T(0.0f)", "row[d + e]"),
    "rows_taken_for_aligned": (WRITE, "is_aligned && d + kElements", "d + kElements"),
    "not_scaled_by_the_column": (
        "cuda/pairs/tile_similarities.cuh", "* factors[kTile + c + e]", "* norms[kTile + c + e]",
    ),
}  # fmt: skip
WGMMA_BUGS = {
    "no_swizzle": (
        "cuda/common/swizzle.cuh", "(chunk ^ (row / kRowsOfBanks % kChunks))", "chunk",
    ),
    "sums_of_the_other_warpgroup": (
        "cuda/hopper/tile_product.cuh", "/ kWarpgroupSize * kWgmmaM", "/ kWarpgroupSize * 0",
    ),
    "stages_written_over": ("cuda/hopper/similarities.cuh", "    ConsumerSync{}();", "    "),
}  # fmt: skip


@pytest.mark.parametrize("bug", [*BUGS, *WGMMA_BUGS])
def test_catches_a_planted_bug(bug):
    x, y = draw_points(130, 97) * 3, draw_points(140, 97, 1) * 5
    wgmma = bug in WGMMA_BUGS
    changed = [with_change(*(WGMMA_BUGS if wgmma else BUGS)[bug])]
    seen_by = [
        ("none", "round_robin"),
        ("none", "warp_first"),
        ("address", "warp_first"),
        ("thread", "warp_first"),
    ]
    for sanitizer, schedule in seen_by:
        broken = build(SOURCES, sanitizer=sanitizer, folders=changed)
        sent = words(x, "float")[0] + words(y, "float")[0]
        done = run(broken, "float", int(wgmma), 130, 140, 97, 97, 0, *COSINE, stdin=sent, schedule=schedule)
        if done.returncode != 0:
            return
        found = np.frombuffer(done.stdout, np.float32).reshape(130, 140)
        if not np.abs(found - cosines(x, y)).max() < 1e-5:
            return
    pytest.fail("nothing was seen")
