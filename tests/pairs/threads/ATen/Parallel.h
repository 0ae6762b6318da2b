// Replaces PyTorch's header of this name: at::parallel_for on std::threads, whose starts and joins
// ThreadSanitizer sees, unlike those of OpenMP.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace at {

// Hidden, so that PyTorch's library keeps its functions.
#define DML_HIDDEN __attribute__((visibility("hidden")))

DML_HIDDEN inline int& thread_limit() {
    static int limit = 1;
    return limit;
}
DML_HIDDEN inline bool& is_inside() {
    static thread_local bool inside = false;
    return inside;
}
DML_HIDDEN inline int get_num_threads() { return thread_limit(); }
DML_HIDDEN inline bool in_parallel_region() { return is_inside(); }

template <typename F>
DML_HIDDEN void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
    std::vector<std::thread> threads;
    for (int64_t k = begin; k < end; ++k) {
        threads.emplace_back([&f, k] {
            is_inside() = true;
            f(k, k + 1);
        });
    }
    for (std::thread& thread : threads) thread.join();
}

#undef DML_HIDDEN

}  // namespace at
