// Launches kernels and queries device limits. Both throw std::runtime_error, and neither synchronises, so
// both work under stream capture.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/common/known_kernels.h"
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

// The kernel before on the stream, when a launch begins.
enum class Previous {
    kHasEnded,
    kMayRun,  // programmatic dependent launch: the kernel waits itself
};

// Programmatic dependent launches have not run on hardware: DML_CUDA_DEPENDENT_LAUNCH=1 asks for them.
inline bool asks_for_dependent_launches() {
    static const bool asks = [] {
        const char* const value = std::getenv("DML_CUDA_DEPENDENT_LAUNCH");
        return value && std::string(value) == "1";
    }();
    return asks;
}

#if defined(DML_CUDA_ON_HOST)

inline DeviceLimits device_limits() {
    const emulator::Device& device = emulator::device();
    return {device.multiprocessors, device.shared_bytes_per_block, device.compute_capability};
}

template <typename... Params, typename... Args>
void launch_after(Previous previous, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  cudaStream_t /*stream*/, Args&&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    emulator::launch(kernel, {grid, block, shared_bytes, previous == Previous::kMayRun},
                     std::forward<Args>(args)...);
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

// Whether the code that this device runs was compiled for sm_90 or newer, so that the kernel really waits.
inline bool waits_itself(const void* kernel, int device) {
    return known_kernels().code_version(kernel, device, [&] {
        cudaFuncAttributes attributes = {};
        check(cudaFuncGetAttributes(&attributes, kernel), "cannot query the kernel");
        return attributes.ptxVersion;
    }) >= 90;
}

template <typename... Params, typename... Args>
void launch_after(Previous previous, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  cudaStream_t stream, Args&&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const void* const symbol = reinterpret_cast<const void*>(kernel);
    const bool opts_in = shared_bytes > 48 * 1024;  // above this a kernel must opt in, on each device
    const bool may_overlap = previous == Previous::kMayRun && asks_for_dependent_launches();
    int device = 0;
    if (opts_in || may_overlap) check(cudaGetDevice(&device), "no current device");
    if (opts_in) {
        known_kernels().ensure_shared(symbol, device, shared_bytes, [&] {
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
    cudaLaunchAttribute overlaps = {};
    overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlaps.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlaps;
    config.numAttrs = may_overlap && waits_itself(symbol, device) ? 1 : 0;
    // Its status is this launch's; cudaGetLastError may return that of an earlier one.
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "kernel launch failed");
}

#endif

// Does nothing where the grid has no blocks.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
    launch_after(Previous::kHasEnded, kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

// The launches of an op, on its stream. The first is an ordinary one. Kernels of the others may be brought in while the one
// before ends: each begins with wait_for_previous_kernel() in every block, so all before that one have ended, too.
class Launches {
    const cudaStream_t stream_;
    bool any_ = false;

   public:
    explicit Launches(cudaStream_t stream) : stream_(stream) {}
    Launches(const Launches&) = delete;

    template <typename... Params, typename... Args>
    void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) {
        if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
        launch_after(any_ ? Previous::kMayRun : Previous::kHasEnded, kernel, grid, block, shared_bytes,
                     stream_, std::forward<Args>(args)...);
        any_ = true;
    }
};

}  // namespace dml
