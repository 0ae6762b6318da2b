// csrc/torch/cuda_triplets.cpp for CPU tensors, with the kernels of the emulator: its ops as
// dml_cuda_on_host.
#include <torch/library.h>

// The file's own registration, for CUDA tensors, becomes a function that is never called.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "no_custom_formulas.h"
#include "torch/cuda_triplets.cpp"
#include "torch/schemas.h"

TORCH_LIBRARY(dml_cuda_on_host, m) {
    m.def(dml::schemas::triplet_loss().c_str(), &dml::FlatOp<&dml::cuda::triplet_loss>::call);
    m.def(dml::schemas::ranking_loss().c_str(), &dml::FlatOp<&dml::cuda::ranking_loss>::call);
    m.def(dml::schemas::select().c_str(), &dml::FlatOp<&dml::cuda::select>::call);
}
