"""nvcc compiles what uses wgmma for sm_90a, without spills or waits of its own; for nothing else at all."""

import pytest
from emulator.build import HERE

from tools import machine_code

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

needs_nvcc = pytest.mark.skipif(machine_code.find_nvcc() is None, reason="nvcc is not installed")

PROGRAMS = ["hopper_products", "hopper_primitives", "tile_similarities"]


def analyse(program, flags=machine_code.FLAGS):
    source = HERE / f"{program}.cu"
    report = (machine_code.compile_source(source, ("90a",), flags) / "ptxas.txt").read_text()
    return machine_code.analyse(source, "90a", flags), report


@needs_nvcc
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels(program):
    kernels, report = analyse(program)
    assert kernels
    assert not machine_code.wgmma_remarks(report)
    for kernel in kernels:
        assert kernel.spill_bytes == 0, kernel.name
        assert kernel.stack_bytes == 0, kernel.name
        assert kernel.max_threads > 0, f"{kernel.name} has no __launch_bounds__"
        multiplies = kernel.name.startswith(("multiply", "wgmma_similarities"))
        assert (machine_code.matrix_instructions(kernel).get("HGMMA", 0) > 0) == multiplies, kernel.name
        if multiplies:
            assert any(name.startswith("UBLKCP") for name in kernel.instructions), kernel.name


@needs_nvcc
def test_two_blocks_on_a_multiprocessor():
    """Of the tile product of 16-bit elements; one where slices are joined, as are two parts, in 192 KB."""
    for kernel in analyse("hopper_products")[0]:
        *_, parts, scaled = kernel.name.removesuffix(">").split(",")
        stages = 3 * 32 * 1024 * int(parts) + 48
        assert kernel.blocks_per_multiprocessor == (1 if parts == "2" or scaled == "true" else 2), kernel.name
        assert kernel.shared_bytes_left >= stages, kernel.name


@needs_nvcc
def test_other_front_ends_refuse_wgmma():
    """Rather than compile to nothing what a kernel for sm_90a is made of."""
    for architecture in set(machine_code.ARCHITECTURES) - {"90a"}:
        with pytest.raises(machine_code.CompileError, match="arch=compute_90a"):
            machine_code.analyse(HERE / "hopper_products.cu", architecture)


@needs_nvcc
def test_sees_serialised_wgmma(tmp_path):
    """Accumulators that are used under way, of which ptxas must say so."""
    source = tmp_path / "serialised.cu"
    source.write_text("""
        #include "cuda/common/wgmma.cuh"
        using namespace dml;
        __global__ void __launch_bounds__(128) serialised(float* out) {
            char* tile = pattern_aligned_array<char>(0, 1 << 15);
            float acc[kWgmmaRegisters] = {};
            wgmma_fence(acc);
            for (int k = 0; k < 4; ++k) {
                const uint64_t a = operand<Major::kK>(tile, 0);
                wgmma<__half, Major::kK, Major::kK>(acc, a, a);
                acc[k] += 1.0f;
            }
            wgmma_commit();
            wgmma_wait<0>(acc);
            for (int i = 0; i < kWgmmaRegisters; ++i) out[i * 128 + threadIdx.x] = acc[i];
        }""")
    report = (machine_code.compile_source(source, ("90a",)) / "ptxas.txt").read_text()
    assert machine_code.wgmma_remarks(report)
