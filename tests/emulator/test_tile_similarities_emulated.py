"""Similarities of tiles from float16 parts: as accurate as float32 with two, as tf32 with one."""

import numpy as np
import pytest
from emulator.build import HERE, SANITIZED, build, run, with_change

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

COSINE, DOT, EUCLIDEAN = (0, 1), (0, 0), (1, 0)


@pytest.fixture(scope="module")
def program():
    return build([HERE / "tile_similarities.cu"])


def similarities(program, parts, x, y, kind, **how):
    sent = x.astype(np.float32).tobytes() + y.astype(np.float32).tobytes()
    done = run(program, parts, len(x), len(y), x.shape[1], *kind, stdin=sent, **how)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), len(y)).astype(np.float64)


def lengths(x):
    return np.sqrt((x.astype(np.float64) ** 2).sum(1))


def cosines(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x / lengths(x)[:, None]) @ (y / lengths(y)[:, None]).T


def draw_points(count, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


# Sums are truncated as those of tensor cores are. Two parts are as good as float32, one as tf32.
@pytest.mark.parametrize(
    ("parts", "dim", "most"),
    [
        *[(2, dim, 5e-7) for dim in (64, 128, 512, 2048)],
        (1, 64, 3e-4), (1, 128, 2e-4), (1, 512, 1.2e-4), (1, 2048, 7e-5),
    ],
)  # fmt: skip
def test_accuracy_of_cosines(program, parts, dim, most):
    x = draw_points(128, dim)
    x[64:] = x[:64] + 0.1 * x[64:]  # near ones, whose products have one sign
    truth = cosines(x, x)
    error = np.abs(similarities(program, parts, x, x, COSINE) - truth).max()
    norms = 1 / np.sqrt((x * x).sum(1))
    in_float32 = np.abs(x @ x.T * np.outer(norms, norms) - truth).max()
    print(f"{dim} dimensions: {error:.1e} with {parts} parts, {in_float32:.1e} in float32")
    assert error < most


@pytest.mark.parametrize("schedule", ["round_robin", "warp_first"])
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (130, 5, 31), (3, 140, 33), (129, 130, 97)])
def test_shapes(program, n, m, dim, schedule):
    x, y = draw_points(n, dim), draw_points(m, dim, 1)
    found = similarities(program, 2, x, y, COSINE, schedule=schedule)
    assert np.abs(found - cosines(x, y)).max() < 5e-7


def rows_of_all_kinds(dim):
    """Of very unequal length; with one component 2^16 times the rest; with denormal components; of zeros."""
    x = draw_points(9, dim)
    x[0] *= 1e-11
    x[1] *= 1e-30 * 1e11  # still a row: those of at most 1e-12 count as 0
    x[2] *= 1e30
    x[3] *= 1e18
    x[4, 3] *= 2.0**16
    x[5] = 0
    x[5, :2] = 1, 1e-40
    x[6] = 0
    x[7, ::2] *= 2.0**-20
    return x


def test_cosines_of_rows_of_all_kinds(program):
    x = rows_of_all_kinds(100)
    found = similarities(program, 2, x, x, COSINE)
    length = lengths(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        truth = np.where(np.minimum.outer(length, length) > 1e-12, cosines(x, x), 0)
    assert np.abs(found - truth).max() < 4e-7


def test_products_of_rows_of_all_kinds(program):
    """Relative to the rows' lengths. Where squares overflow the row is as good as not finite."""
    x = np.delete(rows_of_all_kinds(100), 2, axis=0)
    found = similarities(program, 2, x, x, DOT)
    truth = x.astype(np.float64) @ x.astype(np.float64).T
    size = np.outer(lengths(x), lengths(x))
    inside = size > 1e-30
    assert inside.sum() == 48
    assert (np.abs(found - truth) / np.where(inside, size, 1))[inside].max() < 4e-7
    assert not found[~inside & (size < 1e-40)].any()


def test_distances_of_rows_of_all_kinds(program):
    x = rows_of_all_kinds(60)[[0, 1, 3, 4, 5, 6, 7, 8]]
    found = -similarities(program, 2, x, x, EUCLIDEAN)
    wide = x.astype(np.float64)
    truth = np.sqrt(((wide[:, None] - wide) ** 2).sum(2))
    assert (np.abs(found - truth) <= 3e-6 * truth).all()


def test_not_finite(program):
    """0, until the batch becomes NaN in the end; other rows are not touched."""
    x = draw_points(140, 40)
    x[3, 5], x[130, 7] = np.nan, np.inf
    found = similarities(program, 2, x, x, COSINE)
    others = np.delete(np.arange(140), [3, 130])
    assert not found[[3, 130]].any()
    assert np.abs(found[np.ix_(others, others)] - cosines(x[others], x[others])).max() < 5e-7


def test_sanitizers_find_nothing():
    x, y = draw_points(130, 65), draw_points(3, 65)
    for sanitizer, schedule in SANITIZED:
        similarities(
            build([HERE / "tile_similarities.cu"], sanitizer=sanitizer), 2, x, y, COSINE, schedule=schedule
        )


MATH, IMAGES = "cuda/common/math.cuh", "cuda/common/images.cuh"
SCALED = "for (float& x : step) x *= kSmallScale;\n        mma<__half>(step, a.big[0]"
BUGS = {
    "small_parts_forgotten": (MATH, "a.small[step], view.part(1)", "a.small[step], view"),
    "small_not_scaled": (MATH, SCALED, "mma<__half>(step, a.big[0]"),
    "other_half_of_a_block": (IMAGES, "slice % kSlices * kChunks", "0 * kChunks"),
    "swizzle_of_slices": (IMAGES, "kSliceBytes>(row, chunk)", "kSliceBytes>(row, chunk ^ row % 2)"),
    "rows_of_another_tile": (IMAGES, "Layout::block(image, tile, 0)", "Layout::block(image, 0, 0)"),
    "scaled_the_wrong_way": ("cuda/pairs/write_image.cuh", "= reciprocal_of_power(up)", "= up"),
    "not_scaled_by_the_column": (
        "cuda/pairs/tile_group.cuh",
        "* factors[kTile + c + e]",
        "* norms[kTile + c + e]",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_catches_a_planted_bug(bug):
    x, y = draw_points(130, 97) * 3, draw_points(140, 97, 1) * 5
    broken = build([HERE / "tile_similarities.cu"], sanitizer="none", folders=[with_change(*BUGS[bug])])
    assert np.abs(similarities(broken, 2, x, y, COSINE) - cosines(x, y)).max() > 1e-5
