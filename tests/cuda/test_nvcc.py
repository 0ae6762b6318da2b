"""nvcc compiles every kernel for every architecture: no spills, and tensor cores where they are meant."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator.build import HERE

from tools import machine_code

pytestmark = [pytest.mark.slow(150), pytest.mark.long]

needs_nvcc = pytest.mark.skipif(machine_code.find_nvcc() is None, reason="nvcc is not installed")

# Kernels that multiply, on tensor cores but in float64.
PRODUCTS = re.compile(r"(similarities|matrix_gradient|tile_similarities|add_gradients)<")


@pytest.fixture(scope="module", autouse=True)
def nvdisasm():
    assert machine_code.find_nvcc() is None or machine_code.find_nvdisasm(), (
        "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"
    )


# ---- our kernels ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compilations(request):
    """{source, architecture: future of its kernels} of the selected tests, two at a time."""
    items = [item for item in request.session.items if getattr(item, "function", None) is test_kernels]
    chosen = [(item.callspec.params["source"], item.callspec.params["architecture"]) for item in items]
    with ThreadPoolExecutor(2) as pool:
        yield {one: pool.submit(machine_code.analyse, *one) for one in chosen}
        pool.shutdown(cancel_futures=True)


@needs_nvcc
@pytest.mark.parametrize("architecture", machine_code.ARCHITECTURES)
@pytest.mark.parametrize("source", machine_code.sources(), ids=lambda path: path.stem)
def test_kernels(compilations, source, architecture):
    kernels = compilations[source, architecture].result()
    # The same kernels on every architecture.
    for (other, _), done in compilations.items():
        if other == source and done.done():
            assert [k.name for k in done.result()] == [k.name for k in kernels]
    for kernel in kernels:
        where = f"{kernel.name} for sm_{kernel.architecture}"
        assert kernel.spill_bytes == 0, where
        assert kernel.stack_bytes == 0, where
        assert kernel.max_threads > 0, f"{where} has no __launch_bounds__"
        assert kernel.blocks_per_multiprocessor > 0, where
        assert kernel.code_bytes > 0, where
        if kernel.name.startswith("finish_matrix"):  # which may be launched while the one before runs
            assert ("ACQBULK" in kernel.instructions) == (architecture != "80"), where
        expected = set()
        if PRODUCTS.match(kernel.name) and "SimtMath" not in kernel.name:
            expected = {"HMMA"}
        elif kernel.name.startswith("wgmma") and architecture == "90a":
            expected = {"HGMMA"}
        assert set(machine_code.matrix_instructions(kernel)) == expected, where


# Of each source with formulas the kernels that parameters which learn give more to do.
LEARNING = {
    "learned_params": ["make_formula"],
    "matrix_rows": ["finish_matrix_rows"],
    "look_float": ["sum_terms_by_params"],
    "merge": ["merge_sums"],
}


@needs_nvcc
@pytest.mark.parametrize("source", LEARNING)
def test_parameters_that_learn_take_instructions(source):
    """nvcc drops without a word what it takes for a loop over no parameters."""
    fixed, learns = (
        machine_code.instructions_of_one("multi_similarity", source, learns) for learns in (False, True)
    )
    assert fixed.keys() == learns.keys()
    more = {name for name in fixed if learns[name] > fixed[name]}
    assert {name.split("<")[0] for name in more} == set(LEARNING[source])
    assert all(name in more for name in fixed if name.split("<")[0] in LEARNING[source])


# ---- the primitives ------------------------------------------------------------------------------------


@needs_nvcc
def test_primitives_become_the_instructions_meant():
    """The emulator's matrix product is CUDA code too: 4 warps, 64 x 64 tiles, 64 bytes along k."""
    products = {
        "gemm<__half,(Mistake)0>": "HMMA.16816.F32",
        "gemm<__nv_bfloat16,(Mistake)0>": "HMMA.16816.F32.BF16",
        "gemm<Tf32,(Mistake)0>": "HMMA.1688.F32.TF32",
    }
    kernels = [k for k in machine_code.analyse(HERE / "planted_bugs_gemm.cu") if k.name in products]
    assert len(kernels) == len(products) * len(machine_code.ARCHITECTURES)
    for kernel in kernels:
        instructions = kernel.instructions
        assert instructions[products[kernel.name]] == 16, kernel  # 8 tiles of 8 columns, twice along k
        assert sum(n for i, n in instructions.items() if i.startswith("LDSM.16.M88.4")) == 2 + 4
        assert sum(n for i, n in instructions.items() if i.startswith("LDSM.16.M88.2")) == 8
        assert any(i.startswith("LDGSTS") and "128" in i for i in instructions)
        assert any(i.startswith("BAR.SYNC") for i in instructions)


@needs_nvcc
def test_transposing_loads():
    kernels = {k.name: k.instructions for k in machine_code.analyse(HERE / "planted_bugs_warp.cu", "80")}
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
def test_sees_spills(tmp_path):
    source = tmp_path / "hungry.cu"
    source.write_text(HUNGRY)
    (roomy,) = machine_code.analyse(source, "80", (*machine_code.FLAGS, "-DBLOCKS=1"))
    (tight,) = machine_code.analyse(source, "80", (*machine_code.FLAGS, "-DBLOCKS=20"))
    assert roomy.spill_bytes == 0
    assert roomy.registers > 64
    assert tight.spill_bytes > 0
    assert tight.registers <= 34
    assert tight.max_threads == 96
    assert tight.static_shared_bytes == 4
    assert not machine_code.matrix_instructions(tight)


@needs_nvcc
def test_compile_errors_are_reported(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { return 1; }")
    with pytest.raises(machine_code.CompileError, match=r"wrong\.cu"):
        machine_code.analyse(source, "80")


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
