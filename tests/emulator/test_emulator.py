"""The emulator computes what a GPU would, and has planted_bugs: it catches planted mistakes.

Both halves matter. A green kernel test means something only if a kernel that lacks a barrier, a wait
or a bound is seen to fail, under each schedule and whatever the seed.

What the emulator computes is compared with formulas; where there is a GPU, what that computes is too.
"""

import numpy as np
import pytest
import torch
from emulator.build import HERE, build, build_for_gpu, run

from tools.machine_code import find_nvcc

pytestmark = pytest.mark.long

SCHEDULES = ["round_robin", "warp_first"]
SEEDS = [0, 1, 2]
LANES = np.arange(32)
NAN_WORD = 0xFFFFFFFF

no_gpu = not torch.cuda.is_available() or find_nvcc() is None
anywhere = pytest.fixture(
    scope="module",
    params=["host", pytest.param("gpu", marks=pytest.mark.skipif(no_gpu, reason="needs a GPU and nvcc"))],
)


@pytest.fixture(scope="module")
def gemm_program():
    return build([HERE / "planted_bugs_gemm.cu"])


@pytest.fixture(scope="module")
def warp_program():
    return build([HERE / "planted_bugs_warp.cu"])


@pytest.fixture(scope="module")
def race_gemm_program():
    return build([HERE / "planted_bugs_gemm.cu"], sanitizer="thread")


@pytest.fixture(scope="module")
def race_warp_program():
    return build([HERE / "planted_bugs_warp.cu"], sanitizer="thread")


@anywhere
def gemm_anywhere(request):
    source = HERE / "planted_bugs_gemm.cu"
    return build([source]) if request.param == "host" else build_for_gpu(source)


@anywhere
def warp_anywhere(request):
    source = HERE / "planted_bugs_warp.cu"
    return build([source]) if request.param == "host" else build_for_gpu(source)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return request.param


# ---- a tensor-core matrix product ------------------------------------------------------------------

# The order of the enum in planted_bugs_gemm.cu.
MISTAKES = [
    "none", "reads_before_barrier", "refills_before_barrier", "skips_wait", "reads_other_row",
    "reads_beyond_global", "reads_beyond_shared", "reads_unwritten", "barrier_in_one_warp",
    "barrier_in_branches", "half_a_warp", "lanes_return", "misaligned",
]  # fmt: skip


def encode(values, dtype):
    """Rounds float32 values to the type; returns the bytes to send and what they stand for."""
    values = values.astype(np.float32)
    if dtype == "half":
        half = values.astype(np.float16)
        return half.tobytes(), half.astype(np.float64)
    if dtype == "bfloat16":  # truncated: any value of the type will do
        bits = values.view(np.uint32) >> 16
        return bits.astype(np.uint16).tobytes(), (bits << 16).view(np.float32).astype(np.float64)
    # The kernel sends all bits of a float; the product must ignore the lower 13.
    return values.tobytes(), (values.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)


def gemm(program, dtype="half", mistake="none", m=128, n=192, k=160, whole=False, **how):
    """Runs the product; returns the process, the result (None if it failed) and the truth."""
    draw = np.random.default_rng(m + n + k)
    shapes = [(m, k), (n, k)]
    inputs = [draw.integers(-4, 5, s) if whole else draw.standard_normal(s) for s in shapes]
    (a_bytes, a), (b_bytes, b) = (encode(x, dtype) for x in inputs)
    done = run(program, dtype, MISTAKES.index(mistake), m, n, k, stdin=a_bytes + b_bytes, **how)
    result = np.frombuffer(done.stdout, np.float32).reshape(m, n) if done.stdout else None
    return done, result, a @ b.T


@pytest.mark.parametrize("dtype", ["half", "bfloat16", "tf32"])
@pytest.mark.parametrize("k", [8, 32, 40, 160])
def test_product(gemm_anywhere, dtype, k, schedule):
    for seed in SEEDS:
        done, result, truth = gemm(gemm_anywhere, dtype, k=k, whole=True, schedule=schedule, seed=seed)
        assert done.returncode == 0, done.stderr.decode()
        assert np.array_equal(result, truth)  # small whole numbers: no rounding anywhere


@pytest.mark.parametrize("dtype", ["half", "bfloat16", "tf32"])
def test_product_rounds_as_tensor_cores_do(gemm_program, dtype):
    _, result, truth = gemm(gemm_program, dtype, k=160)
    error = np.abs(result - truth)
    assert 0 < error.max() < 160 * 2.0**-23 * np.abs(truth).max()
    # Truncated, not rounded: towards zero on average.
    assert np.mean((result - truth) * np.sign(truth)) < 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mistake",
    ["reads_before_barrier", "refills_before_barrier", "skips_wait", "reads_other_row", "reads_unwritten"],
)
def test_catches_a_wrong_result(gemm_program, mistake, schedule, seed):
    done, result, truth = gemm(gemm_program, mistake=mistake, whole=True, schedule=schedule, seed=seed)
    assert done.returncode == 0, done.stderr.decode()
    assert not np.array_equal(result, truth)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("reads_beyond_global", b"heap-buffer-overflow"),
        ("reads_beyond_shared", b"heap-buffer-overflow"),
        ("barrier_in_one_warp", b"divergent barrier"),
        ("barrier_in_branches", b"divergent barrier"),
        ("half_a_warp", b"divergent warp"),
        ("lanes_return", b"deadlock"),
        ("misaligned", b"is not aligned to 16 bytes"),
    ],
)
def test_stops_at_a_broken_rule(gemm_program, mistake, report, schedule, seed):
    done, result, _ = gemm(gemm_program, mistake=mistake, schedule=schedule, seed=seed)
    assert done.returncode != 0
    assert result is None
    assert report in done.stderr
    assert b"planted_bugs_gemm.cu:" in done.stderr  # it names the place


@pytest.mark.parametrize(
    ("mistake", "caught"),
    [("none", False), ("reads_before_barrier", True), ("refills_before_barrier", True)],
)
def test_race_detector(race_gemm_program, mistake, caught, schedule):
    # Even one block is enough here, and nobody has to overtake.
    done, _, _ = gemm(race_gemm_program, mistake=mistake, m=64, n=64, k=96, schedule=schedule)
    assert (done.returncode != 0) == caught, done.stderr.decode()
    assert (b"ThreadSanitizer: data race" in done.stderr) == caught


# ---- single functions --------------------------------------------------------------------------------


def words(program, name, **how):
    """The four words that each of 64 threads left."""
    done = run(program, name, **how)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.uint32).reshape(-1, 4)


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(warp_anywhere, matrices, transposed, schedule):
    out = words(warp_anywhere, f"ldmatrix_x{matrices}" + "_trans" * transposed, schedule=schedule)
    g, t = LANES // 4, LANES % 4
    for matrix in range(matrices):  # element (row, column) of matrix m is the number 64 m + 8 row + column
        low = 64 * matrix + (8 * (2 * t) + g if transposed else 8 * g + 2 * t)
        high = low + (8 if transposed else 1)
        expected = (low | high << 16).astype(np.uint32)
        assert np.array_equal(out[:32, matrix], expected)
        assert np.array_equal(out[32:, matrix], expected)
    assert not out[:, matrices:].any()


def test_shuffle(warp_anywhere, schedule):
    out = words(warp_anywhere, "shuffle", schedule=schedule)
    thread = np.arange(64)
    warp = thread // 32 * 32
    assert np.array_equal(out[:, 0], warp + (thread % 32 ^ 5))
    assert np.array_equal(out[:, 1], warp + 7)
    assert np.array_equal(out[:, 2], 4 * (warp + (thread % 32 ^ 16)) + 1)
    assert np.array_equal(out[:, 3], 2 * (warp + 31 - thread % 32) + 1)


def test_vote(warp_anywhere, schedule):
    out = words(warp_anywhere, "vote", schedule=schedule)
    thread = np.arange(64)
    for warp in range(2):
        mine = out[32 * warp : 32 * warp + 32]
        ballot = sum(1 << (i % 32) for i in range(32 * warp, 32 * warp + 32) if i % 3 == 0)
        assert (mine == [ballot, warp == 1, 0, 1]).all()
    assert len(out) == len(thread)


def test_copies_arrive_at_their_wait(warp_program, schedule):
    out = words(warp_program, "copy", schedule=schedule)
    first = 4 * np.arange(64) + 1
    assert np.array_equal(out[:, 0], 0x10001 * first)
    assert np.array_equal(out[:, 1], first + 1)  # 6 bytes are valid: the rest is zero
    assert not out[:, 2].any()
    assert (out[:, 3] == NAN_WORD).all()  # neither what was there nor what is to come


def test_the_portable_stack_switch(schedule):
    """Where there is no hand-written switch, ucontext does the same, slower."""
    program = build([HERE / "planted_bugs_warp.cu"], defines=["DML_EMULATOR_UCONTEXT"])
    assert (words(program, "exchange", schedule=schedule)[:, 0] == np.arange(64) ^ 1).all()


def test_races_within_a_warp_and_between_blocks(race_warp_program, schedule):
    for name, caught in {"exchange": False, "exchange_unsynced": True, "blocks_collide": True}.items():
        done = run(race_warp_program, name, schedule=schedule)
        assert (b"ThreadSanitizer: data race" in done.stderr) == caught, name


def test_missing_warp_barrier_shows(warp_program, schedule):
    expected = np.arange(64) ^ 1
    assert (words(warp_program, "exchange", schedule=schedule) == expected[:, None]).all()
    out = words(warp_program, "exchange_unsynced", schedule=schedule)
    assert not (out == expected[:, None]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("overlapping_arrays", b"overlap"),
        ("too_little_shared", b"does not fit in the 255 bytes"),
        ("too_much_shared", b"more shared memory than the device has"),
    ],
)
def test_shared_memory_is_checked(warp_program, name, message):
    done = run(warp_program, name)
    assert done.returncode == 3
    assert message in done.stderr


def test_a_grid_without_blocks_is_no_launch(warp_anywhere):
    assert not words(warp_anywhere, "no_blocks").any()


def test_the_seed_decides_the_schedule(gemm_program):
    """The same seed gives the same damage bit for bit, another seed another: failures can be replayed."""
    how = {"mistake": "refills_before_barrier", "schedule": "round_robin"}
    first, again, changed = (gemm(gemm_program, seed=seed, **how)[1] for seed in (4, 4, 5))
    assert np.array_equal(first, again, equal_nan=True)
    assert not np.array_equal(first, changed, equal_nan=True)


# ---- numbers -------------------------------------------------------------------------------------------


def convert(program, name, values):
    """Two words for each value."""
    done = run(program, name, len(values), stdin=values.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.uint32).reshape(-1, 2).T


def some_floats():
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 2**32, 20000, dtype=np.uint32)
    near = draw.standard_normal(20000).astype(np.float32)
    ties = np.arange(-70000, 70000, 7, dtype=np.float32) * np.float32(2.0**-15)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520, 2.0**-25, 3e-8], np.float32)
    return np.concatenate([bits.view(np.float32), near, ties, special])


def both_halves(pairs):
    return (pairs & 0xFFFF).astype(np.uint16), (pairs >> 16).astype(np.uint16)


def test_from_half(warp_anywhere):
    every = np.arange(1 << 16, dtype=np.uint32)
    out, _ = convert(warp_anywhere, "from_half", every)
    expected = every.astype(np.uint16).view(np.float16).astype(np.float32)
    assert np.array_equal(out.view(np.float32), expected, equal_nan=True)


def test_to_half(warp_anywhere):
    values = some_floats()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    low, high = both_halves(convert(warp_anywhere, "to_half", values)[0])
    assert np.array_equal(low.view(np.float16), expected, equal_nan=True)
    assert np.array_equal(high.view(np.float16), -expected, equal_nan=True)


def test_to_bfloat16(warp_anywhere):
    values = some_floats()
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    low, high = both_halves(convert(warp_anywhere, "to_bfloat16", values)[0])
    for half, sign in ((low, 1), (high, -1)):
        result = (half.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(result, sign * expected, equal_nan=True)


def tf32(bits):
    """What a tf32 product sees of these bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def test_split_tf32(warp_anywhere):
    values = some_floats()
    values = values[np.isfinite(values) & (np.abs(values) > 1e-30) & (np.abs(values) < 1e38)]
    big, small = convert(warp_anywhere, "split", values)
    assert not (big & 0x1FFF).any()
    assert np.max(np.abs((tf32(big) + tf32(small)) / values - 1)) <= 2.0**-23


def test_exp2_and_rounding_to_tf32(warp_anywhere):
    values = np.linspace(-126, 127.9, 40001, dtype=np.float32)
    power, rounded = convert(warp_anywhere, "exp2", values)
    assert np.max(np.abs(power.view(np.float32) / np.exp2(values.astype(np.float64)) - 1)) < 2.0**-21
    ties_away = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    assert np.array_equal(tf32(rounded), ties_away)
    below, _ = convert(warp_anywhere, "exp2", np.array([-130, -1000, -np.inf], np.float32))
    assert not below.any()  # subnormal results are flushed
