"""sm_90a on the emulator: mbarriers, bulk copies, wgmma, the products made of them; planted bugs are seen."""

import numpy as np
import pytest
import torch
from emulator.build import HERE, SANITIZED, build, build_for_gpu, run, with_change

from tools.machine_code import find_nvcc

pytestmark = [pytest.mark.slow(150), pytest.mark.long]

SCHEDULES = ["round_robin", "warp_first"]
SEEDS = [0, 1, 2]
TARGET = "-gencode=arch=compute_90a,code=sm_90a"
BLOCK_ROWS, BLOCK_COLUMNS, TILE, SLICE = 128, 64, 128, 64
LAYOUTS = ["product", "gradient", "transposed"]
# Type, parts, whether a slice and a row have a scale.
KINDS = [("half", 1, 0), ("half", 2, 0), ("bfloat16", 1, 0), ("half", 1, 1), ("half", 2, 1)]

no_hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or not find_nvcc()
on_hopper = pytest.mark.skipif(no_hopper, reason="needs a Hopper GPU and nvcc")
anywhere = pytest.fixture(scope="module", params=["host", pytest.param("gpu", marks=on_hopper)])


def build_anywhere(name, request):
    source = HERE / f"{name}.cu"
    return build([source]) if request.param == "host" else build_for_gpu(source, TARGET)


schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def blocks(size, of):
    return -(-size // of)


def image(parts):
    """The image of a matrix of 16-bit words, given as its parts: the layout of swizzle.cuh, stated again."""
    rows, columns = parts[0].shape
    down, across = blocks(rows, BLOCK_ROWS), blocks(columns, BLOCK_COLUMNS)
    padded = np.zeros((len(parts), down * BLOCK_ROWS, across * BLOCK_COLUMNS), np.uint16)
    padded[:, :rows, :columns] = [part.view(np.uint16) for part in parts]
    chunks = padded.reshape(len(parts), down, BLOCK_ROWS, across, 8, 8).transpose(1, 3, 0, 2, 4, 5)
    swizzled = np.empty_like(chunks, order="C")
    for row in range(BLOCK_ROWS):
        for chunk in range(8):
            swizzled[..., row, chunk ^ (row % 8), :] = chunks[..., row, chunk, :]
    return swizzled.tobytes(), (down, across)


def encode(values, dtype, parts):
    """16-bit parts of a matrix, and what they stand for."""
    values = values.astype(np.float32)
    if dtype == "bfloat16":  # truncated: any value of the type will do
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
        return [words], (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    big = values.astype(np.float16)
    if parts == 1:
        return [big], big.astype(np.float64)
    small = ((values - big.astype(np.float32)) * 2048).astype(np.float16)
    return [big, small], big.astype(np.float64) + small.astype(np.float64) / 2048


def multiply(
    program, layout="product", dtype="half", parts=1, scaled=0, m=256, n=128, k=456, whole=False, **how
):
    """Runs C = A B, or scaled C_ij = sum_k 2^(k // 64 % 3 + i % 5) a_ik b_kj; returns the process, the result
    (None if it failed) and the truth."""
    draw = np.random.default_rng(m + n + k)
    values = [draw.integers(-4, 5, s) if whole else draw.standard_normal(s) for s in ((m, k), (k, n))]
    if whole and parts == 2:  # big parts of 5 to 7 and small ones that are not lost, and all sums exact
        values = [v % 3 + 5 + draw.integers(-1, 2, v.shape) / 2.0**10 for v in values]
        values = [v * draw.choice([-1, 1], v.shape) for v in values]
    a_parts, a = encode(values[0], dtype, parts)
    b_parts, b = encode(values[1], dtype, parts)
    up = 2.0 ** (np.arange(m)[:, None] % TILE % 5 + np.arange(k) // SLICE % 3) if scaled else 1.0
    truth = (up * a) @ b
    if parts == 2:  # small times small is left out
        truth -= (up * (a - a_parts[0])) @ (b - b_parts[0])
    if layout == "transposed":
        a_parts = [np.ascontiguousarray(part.T) for part in a_parts]
    if layout == "product":
        b_parts = [np.ascontiguousarray(part.T) for part in b_parts]
    (a_bytes, a_blocks), (b_bytes, b_blocks) = image(a_parts), image(b_parts)
    tiles = blocks(m, TILE), blocks(n, TILE)
    arguments = [dtype, layout, parts, scaled, *tiles, blocks(k, SLICE), *a_blocks, *b_blocks]
    done = run(program, *arguments, stdin=a_bytes + b_bytes, **how)
    result = np.frombuffer(done.stdout, np.float32) if done.stdout else None
    if result is not None:
        result = result.reshape(tiles[0] * TILE, tiles[1] * TILE)[:m, :n]
    return done, result, truth


# ---- the tile product -------------------------------------------------------------------------------------


@anywhere
def products(request):
    return build_anywhere("hopper_products", request)


@schedules
@pytest.mark.parametrize(("dtype", "parts", "scaled"), KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(products, layout, dtype, parts, scaled, schedule):
    """Fewer slices than stages, as many, and more; tiles that are not whole."""
    for seed, (m, n, k) in enumerate([(128, 128, 64), (100, 70, 40), (129, 60, 192), (130, 200, 456)]):
        how = {"dtype": dtype, "parts": parts, "scaled": scaled, "schedule": schedule, "seed": seed}
        done, result, truth = multiply(products, layout, m=m, n=n, k=k, whole=True, **how)
        assert done.returncode == 0, done.stderr.decode()
        assert np.array_equal(result, truth)  # no rounding anywhere


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_rounds_as_tensor_cores_do(products, layout):
    errors = {}
    for parts in (1, 2):
        _, result, truth = multiply(products, layout, parts=parts)
        errors[parts] = (result - truth) * np.sign(truth)
        assert 0 < np.abs(errors[parts]).max() < 456 * 2.0**-23 * np.abs(truth).max()
    assert errors[1].mean() < 0  # truncated, not rounded: towards zero on average
    assert np.abs(errors[2]).mean() < np.abs(errors[1]).mean() / 2  # of shorter sums


@pytest.mark.parametrize(("sanitizer", "schedule"), SANITIZED)
def test_sanitizers_find_nothing(sanitizer, schedule):
    program = build([HERE / "hopper_products.cu"], sanitizer=sanitizer)
    for layout, parts, scaled in [
        ("product", 1, 0),
        ("product", 2, 0),
        ("transposed", 1, 1),
        ("gradient", 2, 1),
    ]:
        done, result, truth = multiply(
            program, layout, parts=parts, scaled=scaled, m=130, n=60, k=300, whole=True, schedule=schedule
        )
        assert done.returncode == 0, done.stderr.decode()
        assert np.array_equal(result, truth)


TILE_PRODUCT, WGMMA = "cuda/hopper/tile_product.cuh", "cuda/common/wgmma.cuh"
WAIT_FULL = "mbarrier_wait(&full_[turn_.stage], turn_.parity);"
WAIT_EMPTY = "mbarrier_wait(&empty_[turn_.stage], turn_.parity ^ 1);"
EXPECT = "mbarrier_arrive_expect(full, bytes);"
RELEASE = "if (slice > 0) release(turn_.stage_before());"
OFFSETS = "kMajor == Major::kMn ? next_columns : 16, kPatternBytes);"
SWAPPED = "kPatternBytes, kMajor == Major::kMn ? next_columns : 16);"
MULTIPLY = "multiply<kA, kB>(sums, a, b, 0, 0, true);"
RESULT = None


def bug(header, old, new, report=b"", layout="product", parts=1):
    """A change of a header, and what the report then says: b"" where the result may be wrong instead, RESULT
    where that alone shows the bug. Seen with this layout and as many parts."""
    return (header, old, new), report, layout, parts


BUGS = {
    "no_wait_on_full": bug(TILE_PRODUCT, WAIT_FULL, ""),
    "wrong_parity_of_full": bug(TILE_PRODUCT, WAIT_FULL, WAIT_FULL.replace("parity", "parity ^ 1")),
    "no_wait_on_empty": bug(TILE_PRODUCT, WAIT_EMPTY, ""),
    "wrong_parity_of_empty": bug(TILE_PRODUCT, WAIT_EMPTY, WAIT_EMPTY.replace(" ^ 1", ""), b"deadlock"),
    "stage_released_early": bug(TILE_PRODUCT, RELEASE, "release(turn_.stage);", b"overwrites what the wgmma"),
    "expects_too_little": bug(TILE_PRODUCT, EXPECT, EXPECT.replace("bytes", "bytes - 16")),
    "expects_too_much": bug(TILE_PRODUCT, EXPECT, EXPECT.replace("bytes", "bytes + 16"), b"deadlock"),
    "no_init_fence": bug(TILE_PRODUCT, "fence_mbarrier_init();", "", b"without a fence"),
    "no_barrier_after_init": bug(TILE_PRODUCT, "block_sync();", "", b"initialis"),
    "offsets_swapped": bug(WGMMA, OFFSETS, SWAPPED, RESULT),
    "offsets_swapped_of_n_major": bug(WGMMA, OFFSETS, SWAPPED, RESULT, "gradient"),
    "no_swizzle": bug(WGMMA, "kSwizzle128 = 1;", "kSwizzle128 = 0;", RESULT),
    "other_swizzle": bug(WGMMA, "kSwizzle128 = 1;", "kSwizzle128 = 2;", b"of a pattern"),
    "a_not_transposed": bug(TILE_PRODUCT, "wgmma<T, kA,", "wgmma<T, Major::kK,", layout="transposed"),
    "b_not_transposed": bug(TILE_PRODUCT, "wgmma<T, kA, kB>", "wgmma<T, kA, Major::kK>", layout="gradient"),
    "b_transposed": bug(TILE_PRODUCT, "wgmma<T, kA, kB>", "wgmma<T, kA, Major::kMn>"),
    "step_of_64_bytes_along_k": bug(WGMMA, "? kWgmmaK * 2 :", "? kWgmmaK * 4 :", b"of a pattern"),
    "array_not_on_1024": bug(TILE_PRODUCT, "pattern_aligned_array<U>", "shared_array<U>", b"of a pattern"),
    "operand_not_on_1024": bug(
        TILE_PRODUCT, "(stages_ + kOperandBytes,", "(stages_ + kOperandBytes + 128,", b"of a pattern"
    ),
    "parts_swapped": bug(TILE_PRODUCT, "(a, part_a *", "(a, (1 - part_a) *", RESULT, parts=2),
    "reads_under_wait_one": bug(
        TILE_PRODUCT, "wgmma_wait<0>(sums);", "wgmma_wait<1>(sums);", b"nobody waited for the wgmma"
    ),
    "read_before_wait": bug(
        TILE_PRODUCT,
        "wgmma_wait<0>(sums);",
        "{ const float early = sums[7]; wgmma_wait<0>(sums); sums[7] = early; }",
        RESULT,
    ),
    "no_wait": bug(TILE_PRODUCT, "wgmma_wait<0>(fresh);\n#pragma", "#pragma", b"were written while", parts=2),
    "no_commit": bug(TILE_PRODUCT, f"{MULTIPLY}\n                wgmma_commit();", MULTIPLY, b"the wgmma at"),
    "touched_in_flight": bug(
        TILE_PRODUCT, "wgmma_wait<1>();", "sums[3] *= 2.0f; wgmma_wait<1>();", b"were written while"
    ),
    "written_after_fence": bug(
        TILE_PRODUCT, "wgmma_fence(sums);", "wgmma_fence(sums); sums[5] = 1.0f;", b"between wgmma_fence and"
    ),
    "no_fence": bug(TILE_PRODUCT, "wgmma_fence(sums);", "", b"no wgmma_fence"),
    "no_second_fence": bug(
        TILE_PRODUCT,
        "kSmallScale;\n                    wgmma_fence(fresh);",
        "kSmallScale;",
        b"no wgmma_fence",
        parts=2,
    ),
    "one_warp_elsewhere": bug(
        TILE_PRODUCT, MULTIPLY, f"if (warp_id() != 5 || slice != 1) {MULTIPLY}", b"divergent warpgroup"
    ),
    "one_warp_stops": bug(
        TILE_PRODUCT, MULTIPLY, f"if (warp_id() == 2 && slice == slices - 1) return; {MULTIPLY}", b"deadlock"
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_catches_a_planted_bug(bug):
    """Under each schedule, and whatever the seed."""
    change, report, layout, parts = BUGS[bug]
    program = build([HERE / "hopper_products.cu"], sanitizer="none", folders=[with_change(*change)])
    for schedule in SCHEDULES:
        for seed in SEEDS:
            how = {"schedule": schedule, "seed": seed, "whole": True}
            done, result, truth = multiply(program, layout, parts=parts, m=130, n=200, **how)
            if done.returncode == 0:
                assert not report, (schedule, seed)
                assert not np.array_equal(result, truth), (schedule, seed)
            else:
                assert report is not RESULT, done.stderr.decode()
                assert report in done.stderr, done.stderr.decode()
                assert b"tile_product.cuh:" in done.stderr  # it names the place


# ---- single primitives -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def primitives():
    return build([HERE / "hopper_primitives.cu"])


@pytest.fixture(scope="module")
def race_primitives():
    return build([HERE / "hopper_primitives.cu"], sanitizer="thread")


def words(program, name, **how):
    """The two words that each of 128 threads left."""
    done = run(program, name, **how)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.uint32).reshape(-1, 2).T


THREAD = np.arange(128)


@schedules
def test_bulk_copy(primitives, schedule):
    first = set()
    for seed in range(16):
        (during, *_), after = words(primitives, "copy", schedule=schedule, seed=seed)
        assert during == 0xFFFFFFFF
        assert np.array_equal(after[1:], 1000 + THREAD[1:])
        first.add(int(after[0]))
    assert first == {1000, 77}  # the source is read when the copy lands


@schedules
def test_barriers(primitives, race_primitives, schedule):
    for program in (primitives, race_primitives):
        for seed in SEEDS:
            other, last = words(program, "meet", schedule=schedule, seed=seed)
            assert np.array_equal(other, THREAD ^ 63)
            assert np.array_equal(last, ((THREAD + 64) % 128 ^ 63) + 1)
            other, own = words(program, "phases", schedule=schedule, seed=seed)
            assert np.array_equal(other, 400 + (THREAD + 37) % 128)
            assert np.array_equal(own, 400 + THREAD)


@schedules
@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("one_warp_missing", b"barrier 2 of 64 threads"),
        ("unaligned", b"not multiples of 16"),
        ("too_many_arrivals", b"more arrivals"),
        ("not_initialised", b"was not initialised"),
        ("written_over", b"was written over"),
        ("named_zero", b"its number is 1 to 15"),
        ("not_fenced", b"without a fence"),
        ("not_landed", b"had not landed"),
    ],
)
def test_a_broken_rule_ends_the_launch(primitives, name, report, schedule):
    done = run(primitives, name, schedule=schedule)
    assert done.returncode == 3
    assert report in done.stderr
    assert b"hopper_primitives.cu:" in done.stderr


def test_a_deadlock_names_the_mbarrier():
    change, *_ = BUGS["expects_too_much"]
    program = build([HERE / "hopper_products.cu"], sanitizer="none", folders=[with_change(*change)])
    done, _, _ = multiply(program)
    report = done.stderr.decode()
    assert "256 threads wait at the mbarrier at shared address 99328" in report  # of 3 x 32 KB, behind 1 KB
    assert "in phase 0, which lacks 0 of 1 arrivals and 16 bytes" in report
    assert "1 threads wait at the mbarrier" in report  # the producer


# ---- descriptors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def addresses():
    return build([HERE / "operand_addresses.cpp"], sanitizer="none")


@pytest.mark.parametrize("is_mn_major", [False, True])
@pytest.mark.parametrize(("mode", "bits"), [(0, 0), (1, 3), (2, 2), (3, 1)])
def test_descriptor(addresses, mode, bits, is_mn_major):
    """The canonical layouts, as strides of chunks of 8 elements (PTX ISA, "Strides"): bits 4 and up of an
    address are xored with as many from bit 7 on."""
    start, leading, stride = 0x5000, 0x8000, 0x800
    descriptor = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62
    found = np.frombuffer(run(addresses, descriptor, int(is_mn_major)).stdout, np.uint32).reshape(64, 16)
    wide = 2**bits  # chunks across a row
    mn, k = np.ogrid[:64, :16]
    if is_mn_major:
        chunk, inside, row = mn // 8, mn % 8, k
        column, more = chunk % wide, chunk // wide
        apart = (stride, leading) if mode == 0 else (leading, stride)
        byte = 16 * column + more * apart[0] + row % 8 * 16 * wide + row // 8 * apart[1]
    else:
        chunk, inside, row = k // 8, k % 8, mn
        byte = chunk * (leading if mode == 0 else 16) + row % 8 * 16 * wide + row // 8 * stride
    byte = start + byte + 2 * inside
    assert np.array_equal(found, byte ^ (byte >> 7 & (wide - 1)) << 4)
    assert len(np.unique(found)) == 64 * 16  # no two elements in one place
