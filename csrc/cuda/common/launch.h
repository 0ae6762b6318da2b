// Launches kernels and queries device limits. Both throw std::runtime_error, and neither synchronises, so
// both work under stream capture.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/common/opt_in.h"
#include "cuda/common/primitives.cuh"

#if !defined(DML_CUDA_ON_HOST)
#include <cuda_runtime.h>
#endif

namespace dml {

struct DeviceLimits {
    int multiprocessors;
    int shared_bytes_per_block;  // the most that a thread block may opt in to
    int compute_capability;      // 80 for sm_80
};

#if defined(DML_CUDA_ON_HOST)

inline DeviceLimits device_limits() {
    const emulator::Device& device = emulator::device();
    return {device.multiprocessors, device.shared_bytes_per_block, device.compute_capability};
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t /*stream*/,
            Args&&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    emulator::launch(kernel, grid, block, shared_bytes, std::forward<Args>(args)...);
}

#else

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears it: else PyTorch's next check would blame another op
    throw std::runtime_error(std::string("dml_cuda: ") + what + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0;
    int value = 0;
    check(cudaGetDevice(&device), "no current device");
    check(cudaDeviceGetAttribute(&value, attribute, device), "cannot query the device");
    return value;
}

// Of the current device.
inline DeviceLimits device_limits() {
    return {device_attribute(cudaDevAttrMultiProcessorCount),
            device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
                device_attribute(cudaDevAttrComputeCapabilityMinor)};
}

// Does nothing where the grid has no blocks.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared_bytes > 48 * 1024) {  // above this a kernel must opt in, on each device
        int device = 0;
        check(cudaGetDevice(&device), "no current device");
        opted_in().ensure(reinterpret_cast<const void*>(kernel), device, shared_bytes, [&] {
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared_bytes)),
                  "the kernel needs more shared memory than the device has");
        });
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    // Its status is this launch's; cudaGetLastError may return that of an earlier one.
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "kernel launch failed");
}

#endif

}  // namespace dml
