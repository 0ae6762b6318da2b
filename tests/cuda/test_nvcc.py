"""nvcc compiles every kernel for every architecture: no spills, and tensor cores where they are meant."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
from emulator.build import HERE

from tools import control_flow, machine_code, machine_record
from tools.control_flow import global_bytes, kinds, multiply_adds

needs_nvcc = pytest.mark.skipif(machine_code.find_nvcc() is None, reason="nvcc is not installed")

# The kinds of arithmetic that multiply on tensor cores (csrc/cuda/math.cuh), as kernels name them.
TENSOR_CORES = re.compile(r"\b(HalfMath|Tf32Math)\b")
# Kernels that carry such a name but multiply no tiles.
NO_PRODUCT = re.compile(r"^(finish|fold|norms|reduce)")


@pytest.fixture(scope="module")
def compiled():
    """The kernels of a source for an architecture, compiled once."""
    assert machine_code.find_nvdisasm(), "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"
    return lambda source, architecture, flags=machine_code.FLAGS: machine_code.analyse(
        source, architecture, flags
    )


# ---- our kernels ---------------------------------------------------------------------------------------


COUNTED_FOR = "90a"  # the architecture whose code is counted below


@pytest.fixture(scope="module")
def compiled_ahead(compiled):
    """As above, with everything compiled two at a time; what does not compile is reported by its test. For
    other architectures than the one that is counted, what is on record of the same sources is taken."""

    def is_on_record(source, architecture):
        return (
            architecture != COUNTED_FOR
            and machine_record.is_of_this_nvcc()
            and machine_record.is_current(source)
        )

    def find(source, architecture):
        if is_on_record(source, architecture):
            return machine_record.kernels(source, architecture)
        return compiled(source, architecture)

    def attempt(item):
        with suppress(machine_code.CompileError):
            find(*item)

    with ThreadPoolExecutor(2) as pool:
        work = [(source, a) for source in machine_code.sources() for a in machine_code.ARCHITECTURES]
        list(pool.map(attempt, work))
    return find


@needs_nvcc
@pytest.mark.parametrize("source", machine_code.sources(), ids=lambda path: path.stem)
def test_what_is_on_record_is_so(compiled_ahead, source):
    """csrc/cuda/machine_code.json is of these sources, and says of sm_90a what nvcc has just made."""
    if not machine_record.is_of_this_nvcc():
        pytest.skip(f"the record is of {machine_record.read()['nvcc']}, this is {machine_code.nvcc_build()}")
    assert machine_record.is_current(source), "other sources than on record: `make ptxas` writes it anew"
    assert machine_record.depends(source) == machine_record.read()["sources"][source.name]["depends"]
    made = [machine_record.facts(kernel) for kernel in compiled_ahead(source, COUNTED_FOR)]
    assert made == [machine_record.facts(kernel) for kernel in machine_record.kernels(source, COUNTED_FOR)]


def test_a_record_of_other_sources_is_not_taken(monkeypatch, tmp_path):
    """Not of a file that has changed, is gone, or is compiled otherwise."""
    (tmp_path / "a.cu").write_text("a")
    (tmp_path / "b.cuh").write_text("b")
    monkeypatch.setattr(machine_record, "ROOT", tmp_path)
    names = ["a.cu", "b.cuh"]
    known = {"sources": {"a.cu": {"depends": names, "digest": machine_record.digest(names)}}}
    monkeypatch.setattr(machine_record, "read", lambda: known)
    source = tmp_path / "a.cu"
    assert machine_record.is_current(source)
    assert not machine_record.is_current(tmp_path / "b.cu")
    (tmp_path / "b.cuh").write_text("c")
    assert not machine_record.is_current(source)
    (tmp_path / "b.cuh").unlink()
    assert not machine_record.is_current(source)
    (tmp_path / "b.cuh").write_text("b")
    assert machine_record.is_current(source)
    monkeypatch.setattr(machine_code, "FLAGS", (*machine_code.FLAGS, "-DOTHER"))
    assert not machine_record.is_current(source)


@needs_nvcc
@pytest.mark.parametrize("architecture", machine_code.ARCHITECTURES)
@pytest.mark.parametrize("source", machine_code.sources(), ids=lambda path: path.stem)
def test_kernels(compiled_ahead, source, architecture):
    for kernel in compiled_ahead(source, architecture):
        where = f"{kernel.name} for sm_{architecture}"
        assert kernel.spill_bytes == 0, where
        assert kernel.max_threads > 0, f"{where} has no __launch_bounds__"
        assert kernel.blocks_per_multiprocessor > 0, where
        if TENSOR_CORES.search(kernel.name) and not NO_PRODUCT.search(kernel.name):
            assert machine_code.matrix_instructions(kernel).get("HMMA", 0) > 0, where
        elif "SimtMath" in kernel.name:
            assert not machine_code.matrix_instructions(kernel), where


# Instructions for each HMMA, all that stands in a product's loop: of the similarities, of the gradient.
MOST_IN_A_LOOP = {
    "HalfMath<__half>": (3, 7),  # whose gradient is a product in tf32
    "HalfMath<__nv_bfloat16>": (3, 4),
    "Tf32Math<float,false>": (5, 7),
    "Tf32Math<float,true>": (4.5, 6),
}


@needs_nvcc
@pytest.mark.parametrize("source", machine_code.sources(), ids=lambda path: path.stem)
def test_loops_of_products(compiled_ahead, source):
    compiled_ahead(source, COUNTED_FOR)
    for name, flow in machine_code.flows(source).items():
        (kernel,) = [machine_code.shorten(x) for x in machine_code.demangle([name]).values()]
        kind = next(
            (i for i, k in enumerate(("find|accumulate|pair_w", "add_gr")) if re.match(k, kernel)), None
        )
        if kind is None or "SimtMath" in kernel:
            continue
        math = "HalfMath<__half>" if "__half" in kernel else None
        math = math or next(m for m in MOST_IN_A_LOOP if kernel.partition("<")[2].startswith(m))
        assert len(flow.product_loops) == (1, 2)[kind], kernel
        for loop in flow.product_loops:
            assert loop.in_code / kinds(loop.counts)["HMMA"] <= MOST_IN_A_LOOP[math][kind], kernel


# Instructions for each of a thread's pairs, in all of a kernel but its products: of multi-similarity, of
# circle loss. With "cached" where the similarities come from the cache. A little above what is counted today.
MOST_FOR_A_PAIR = {
    "find_extremes": (28, 28),
    "accumulate": (48, 51),
    "accumulate cached": (39, 43),
    "pair_weights": (50, 59),
    "pair_weights cached": (42, 50),
    "row_block_forward": (194, 202),  # of the longest strips, 512 columns
    "row_block_backward": (204, 220),
}


@needs_nvcc
@pytest.mark.parametrize("source", machine_code.sources(), ids=lambda path: path.stem)
def test_what_a_pair_takes(compiled_ahead, source):
    compiled_ahead(source, COUNTED_FOR)
    of_formulas = machine_code.hot_flows([source], COUNTED_FOR)
    counted = set()
    for place, formula in enumerate(machine_code.FORMULAS):
        names = machine_code.demangle(list(of_formulas[formula]))
        for symbol, (_, flow, cached) in of_formulas[formula].items():
            kernel = machine_code.shorten(names[symbol])
            kind = kernel.partition("<")[0]
            if not TENSOR_CORES.search(kernel) or kind not in MOST_FOR_A_PAIR:
                continue
            pairs = machine_code.pairs_of(kernel, flow)
            counts = {kind: flow, f"{kind} cached": cached}
            for what in counts.keys() & MOST_FOR_A_PAIR.keys():
                a_pair = counts[what].counts.total() / pairs
                # A way that was lost to the analysis would look like a kernel that does nothing.
                assert MOST_FOR_A_PAIR[what][place] / 2 < a_pair <= MOST_FOR_A_PAIR[what][place], (
                    kernel,
                    what,
                )
                counted.add(what)
    if re.match("kernels_(?!f64|folds)", source.stem):
        assert counted == MOST_FOR_A_PAIR.keys()


@needs_nvcc
def test_folds_wait_for_memory_a_few_times(compiled_ahead):
    """Over the 64 tiles of a tile group: 3 microseconds of waiting at most."""
    (source,) = [path for path in machine_code.sources() if path.stem == "kernels_folds"]
    compiled_ahead(source, COUNTED_FOR)
    flows = machine_code.flows(source, formula="multi_similarity")
    names = machine_code.demangle(list(flows))
    waits = {
        machine_code.shorten(names[symbol]).partition("<")[0]: flow.waits
        for symbol, flow in flows.items()
        if "float" in names[symbol] and "fold" in names[symbol]
    }
    assert waits.keys() == {"fold_extremes", "merge_gradient", "fold_sums", "fold_weights"}
    for name, n in waits.items():  # parts of a gradient are few, and come eight at a time
        assert (2 if name == "merge_gradient" else 5) <= n <= 3e-6 / machine_code.L2_SECONDS, waits


# Microseconds that the issue slots alone allow, forward and backward (tools/issue_slots.py).
MOST_OF_ISSUE_SLOTS = {
    "4096 x 512, mined, bf16": 65,
    "4096 x 512, mined, tf32": 140,
    "4096 x 512, mined, 3 x tf32": 280,
    "512 x 65,536 x 128, mined, tf32, no gradient to refs": 400,
}


@needs_nvcc
def test_whole_problems_by_issue_slots(compiled_ahead):
    from tools import issue_slots

    of_formula = machine_code.hot_flows(machine_code.sources(), COUNTED_FOR)["multi_similarity"]
    bounds = {bound.problem: 1e6 * bound.issue_slots for bound in issue_slots.bounds(of_formula)}
    assert bounds.keys() == MOST_OF_ISSUE_SLOTS.keys()
    for problem, microseconds in bounds.items():
        assert MOST_OF_ISSUE_SLOTS[problem] / 2 < microseconds <= MOST_OF_ISSUE_SLOTS[problem], bounds


# ---- the primitives ------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("architecture", machine_code.ARCHITECTURES)
def test_primitives_become_the_instructions_meant(compiled, architecture):
    """The emulator's own product is CUDA like any other: 4 warps, 64 x 64 tiles, 64 bytes along k."""
    kernels = {k.name: k.instructions for k in compiled(HERE / "planted_bugs_gemm.cu", architecture)}
    products = {
        "gemm<__half,(Mistake)0>": "HMMA.16816.F32",
        "gemm<__nv_bfloat16,(Mistake)0>": "HMMA.16816.F32.BF16",
        "gemm<Tf32,(Mistake)0>": "HMMA.1688.F32.TF32",
    }
    for name, product in products.items():
        instructions = kernels[name]
        assert instructions[product] == 16, instructions  # 8 tiles of 8 columns, twice along k
        assert sum(n for i, n in instructions.items() if i.startswith("LDSM.16.M88.4")) == 2 + 4
        assert sum(n for i, n in instructions.items() if i.startswith("LDSM.16.M88.2")) == 8
        assert any(i.startswith("LDGSTS") and "128" in i for i in instructions)
        assert any(i.startswith("BAR.SYNC") for i in instructions)


@needs_nvcc
def test_transposing_loads(compiled):
    kernels = {k.name: k.instructions for k in compiled(HERE / "planted_bugs_warp.cu", "80")}
    loads = ["LDSM.16.M88.4", "LDSM.16.MT88.4", "LDSM.16.M88.2", "LDSM.16.MT88.2"]
    for kind, load in enumerate(loads):
        assert kernels[f"load_matrix<{kind}>"][load] == 1


# ---- the checks themselves -----------------------------------------------------------------------------

HUNGRY = """
// Keeps 64 values alive across a barrier: more than 32 registers hold, which is all that 20 blocks leave.
__global__ void __launch_bounds__(96, BLOCKS) hungry(float* data) {
    __shared__ float other[1];
    float kept[64];
    for (int i = 0; i < 64; ++i) kept[i] = data[i * 96 + threadIdx.x];
    if (threadIdx.x == 0) other[0] = kept[3];
    __syncthreads();
    for (int i = 0; i < 64; ++i) data[i * 96 + threadIdx.x] = kept[i] * other[0] * kept[63 - i];
}
"""


@needs_nvcc
def test_sees_spills(compiled, tmp_path):
    source = tmp_path / "hungry.cu"
    source.write_text(HUNGRY)
    (roomy,) = compiled(source, "80", (*machine_code.FLAGS, "-DBLOCKS=1"))
    (tight,) = compiled(source, "80", (*machine_code.FLAGS, "-DBLOCKS=20"))
    assert roomy.spill_bytes == 0
    assert roomy.registers > 64
    assert tight.spill_bytes > 0
    assert tight.registers <= 34
    assert tight.max_threads == 96
    assert tight.static_shared_bytes == 4
    assert not machine_code.matrix_instructions(tight)


COUNTED = """
__global__ void __launch_bounds__(32) counted(float* data, int rounds) {
    float x = data[threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {  // times: 8
        x *= data[32 + i];
    }
    if (x != x) {  // rare: not a number
        for (int i = 0; i < rounds; ++i) data[i] = data[i + 1];
    }
    if (rounds > 3) {
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {  // times: 4
            x += data[1000 + i];
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {  // times: 2
            x *= data[2000 + i];
        }
    }
    data[threadIdx.x] = x;
}
"""


@needs_nvcc
@pytest.mark.parametrize("architecture", machine_code.ARCHITECTURES)
def test_counts_what_is_issued(compiled, architecture, tmp_path):
    """Loops as often as they run, of two ways the longer one, and not what is rare."""
    source = tmp_path / "counted.cu"
    source.write_text(COUNTED)
    (flow,) = machine_code.flows(source, architecture).values()
    families = Counter()
    for mnemonic, count in flow.counts.items():
        families[mnemonic.split(".")[0]] += count
    assert families["LDG"] == 1 + 8 + 4
    assert 1 + 4 <= flow.waits <= 1 + 8 + 4
    assert families["STG"] == 1
    assert list(flow.rare) == ["not a number"]
    assert not flow.untold
    assert global_bytes(flow.counts) == (1 + 8 + 4 + 1) * 32 * 4


NESTED = """
for (int i = 0; i < 2; ++i) {  // times: 2
    for (int j = 0; j < 4; ++j) {  // times: 4
        f(i, j);
    }
    g(i);
}
"""


def test_rounds_are_told_by_the_smallest_block(tmp_path):
    """Of a loop into which the compiler has moved what stands outside of it, and of one out of whose inner
    loop it has moved what stands there."""
    (tmp_path / "nested.cu").write_text(NESTED)
    file = str(tmp_path / "nested.cu")
    loop, outer = control_flow.Loop(0, frozenset({0})), control_flow.Loop(1, frozenset({0, 1}))
    blocks = [
        SimpleNamespace(instructions=[SimpleNamespace(lines=[(file, line)]) for line in lines])
        for lines in ((2, 3, 4, 4, 4, 6), (3, 2, 4, 4))
    ]
    loop.times, loop.place = control_flow.rounds_of(loop, blocks, [])
    assert (loop.times, loop.place) == (4, (file, 3))
    loop.told = frozenset({loop.place})
    assert control_flow.rounds_of(outer, blocks, [loop]) == (2, (file, 2))


def test_multiply_adds_by_the_names_of_instructions():
    assert multiply_adds({"HMMA.16816.F32.BF16": 2, "HMMA.1688.F32.TF32": 1, "FFMA": 5}) == 2 * 2048 + 1024
    assert kinds({"LDSM.16.M88.4": 3, "LDS.64": 2, "IADD3": 1}) == {
        "HMMA": 0,
        "LDSM": 3,
        "LDS": 2,
        "LDGSTS": 0,
        "rest": 1,
    }


HOST_ONLY = """
#ifndef __CUDA_ARCH__
static_assert(sizeof(int) == 2, "the host side");
#endif
__global__ void __launch_bounds__(32) store(int* x) { *x = 1; }
"""


@needs_nvcc
def test_the_host_side_is_compiled_too(compiled, tmp_path):
    source = tmp_path / "mixed.cu"
    source.write_text(HOST_ONLY)
    with pytest.raises(machine_code.CompileError, match="the host side"):
        compiled(source, machine_code.ARCHITECTURES[0])


@needs_nvcc
def test_compile_errors_are_told(compiled, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { return 1; }")
    with pytest.raises(machine_code.CompileError, match=r"wrong\.cu"):
        compiled(source, "80")


def test_occupancy():
    # threads, registers -> blocks, worked out from the table in the programming guide
    assert machine_code.occupancy("80", 128, 32)[:2] == (16, 1.0)  # 64 warps in blocks of 4
    assert machine_code.occupancy("80", 128, 168)[:2] == (3, 12 / 64)  # 5376 registers a warp: 3 in a quarter
    assert machine_code.occupancy("90a", 256, 128)[:2] == (2, 16 / 64)  # 4096: 4 in a quarter
    assert machine_code.occupancy("90a", 256, 129)[:2] == (1, 8 / 64)  # 4352: 3 in a quarter
    assert machine_code.occupancy("80", 32, 16)[:2] == (32, 0.5)  # at most 32 blocks
    assert machine_code.occupancy("120", 1024, 40)[:2] == (1, 32 / 48)
    assert machine_code.occupancy("80", 1024, 80) == (
        0,
        0.0,
        0,
    )  # cannot run: 2560, 6 in a quarter, 32 wanted
    assert machine_code.occupancy("80", 128, 168)[2] == (164 * 1024 // 3 - 1024) // 128 * 128


def test_names_are_shortened():
    assert (
        machine_code.shorten("void dml::cuda::f<dml::A<float>, 3>(dml::B<int> const&, long)")
        == "f<A<float>,3>"
    )
    assert machine_code.shorten("dml::(anonymous namespace)::copy(unsigned int*)") == "copy"
