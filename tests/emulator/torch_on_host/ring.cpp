// csrc/torch/cuda_ring.cpp for CPU tensors, with the kernels of the emulator: its ops as
// dml_cuda_blocks_on_host.
#include <torch/library.h>

// The file's own registration, for CUDA tensors, becomes a function that is never called.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "no_custom_formulas.h"
#include "torch/cuda_ring.cpp"
#include "torch/schemas.h"

TORCH_LIBRARY(dml_cuda_blocks_on_host, m) {
    using namespace dml;
    m.def(schemas::pair_block_turn().c_str(), &FlatOp<&cuda::turn>::call);
    m.def(schemas::pair_block().c_str(), &FlatOp<&cuda::add>::call);
    m.def(schemas::pair_block_rows().c_str(), &FlatOp<&cuda::finish>::call);
    m.def(schemas::pair_block_backward().c_str(), &FlatOp<&cuda::backward_of_block>::call);
}
