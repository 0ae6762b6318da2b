// csrc/torch/cuda_pairs.cpp for CPU tensors, with the kernels of the emulator: pair_loss as
// dml_cuda_pair_loss_on_host.
#include <torch/library.h>

// The file's own registration, for CUDA tensors, becomes a function that is never called.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "no_custom_formulas.h"
#include "torch/cuda_pairs.cpp"
#include "torch/schemas.h"

TORCH_LIBRARY(dml_cuda_pair_loss_on_host, m) {
    using namespace dml;
    m.def(schemas::pair_loss().c_str(), &FlatOp<&cuda::pair_loss>::call);
    m.def(schemas::pair_loss_backward().c_str(), &FlatOp<&cuda::pair_loss_backward>::call);
    m.def(schemas::count_pairs().c_str(), &FlatOp<&cuda::count_pairs_of_rows>::call);
}
