// How torch is set to multiply float32 matrices on CUDA.
#pragma once

#include <ATen/Context.h>
#include <torch/version.h>

#include <string_view>

namespace dml {

// As the ops name it: ieee (in full), or tf32 (torch's "high" and "medium" alike). torch's older getter
// raises where the older and the newer way to set it were mixed.
inline std::string_view cuda_precision() {
    const auto& context = at::globalContext();
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 10)
    const bool full = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) !=
                      at::Float32Precision::TF32;
#else
    bool full = true;
    try {
        full = context.float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
    } catch (const c10::Error&) {
    }
#endif
    return full ? "ieee" : "tf32";
}

}  // namespace dml
