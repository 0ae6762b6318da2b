// What the planted_bugs programs share, on the host and on a GPU.
#pragma once

#include <cstddef>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/common/launch.h"

namespace dml {

#if defined(DML_CUDA_ON_HOST)

template <typename T>
using Array = std::vector<T>;

inline void wait_for_kernels() {}

// The programs that use what sm_90 added say so first.
inline void use_hopper() { emulator::device() = {4, 227 * 1024, 90}; }

#else

// Memory that both the host and the GPU reach.
template <typename T>
struct Managed {
    using value_type = T;

    T* allocate(size_t count) {
        void* memory = nullptr;
        check(cudaMallocManaged(&memory, count * sizeof(T)), "no memory");
        return static_cast<T*>(memory);
    }
    void deallocate(T* memory, size_t) { cudaFree(memory); }
    bool operator==(const Managed&) const { return true; }
    bool operator!=(const Managed&) const { return false; }
};

template <typename T>
using Array = std::vector<T, Managed<T> >;

inline void wait_for_kernels() { check(cudaDeviceSynchronize(), "a kernel failed"); }

inline void use_hopper() {}

#endif

template <typename T>
Array<T> read(size_t count) {
    Array<T> values(count);
    if (std::fread(values.data(), sizeof(T), count, stdin) != count)
        throw std::runtime_error("too few bytes");
    return values;
}

template <typename T>
void write(const Array<T>& values) {
    wait_for_kernels();
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// Runs the program; an exception becomes a message and exit code 3.
template <typename Main>
int report(Main main) {
    try {
        main();
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 3;
    }
}

}  // namespace dml
