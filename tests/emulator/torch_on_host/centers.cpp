// csrc/torch/cuda_centers.cpp for CPU tensors, with the kernels of the emulator: its ops as
// dml_cuda_centers_on_host.
#include <torch/library.h>

// The file's own registration, for CUDA tensors, becomes a function that is never called.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "machine.h"
#include "no_custom_formulas.h"
#include "torch/cuda_centers.cpp"
#include "torch/schemas.h"

TORCH_LIBRARY(dml_cuda_centers_on_host, m) {
    using namespace dml;
    m.def(schemas::center_softmax().c_str(), &center_softmax<cuda::CenterKernelsOnCuda>);
    m.def(schemas::center_softmax_backward().c_str(), &center_softmax_backward<cuda::CenterKernelsOnCuda>);
    // The launches between start_record and end_record, which are not run: a line each.
    static std::string record;
    m.def("start_record() -> ()", [] { emulator::record_launches(&record); });
    m.def("end_record() -> str", [] {
        emulator::record_launches(nullptr);
        return std::exchange(record, {});
    });
}
