// Stands in for torch's header where the torch side of the CUDA kernels runs on CPU tensors.
#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

struct CUDAGuard {
    explicit CUDAGuard(c10::Device) {}
    ~CUDAGuard() {}
};

}  // namespace c10::cuda
