// Independent tasks on all threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace dml::cpu {

// The work that is worth waking another thread for, in elementary steps of about half a nanosecond.
inline constexpr int64_t kTaskWork = int64_t(1) << 13;

inline int64_t thread_count() { return at::get_num_threads(); }

// Calls run(k) for k in [0, count), in any order on any thread. work: the steps of all tasks together, from
// which the number of threads follows. A free thread starts the next task, which balances uneven tasks; the
// result of a task must depend on k alone.
template <typename Run>
void for_tasks(int64_t count, int64_t work, const Run& run) {
    const int64_t useful = std::min(count, work / kTaskWork);
    const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(useful, thread_count());
    if (threads <= 1) {
        for (int64_t k = 0; k < count; ++k) run(k);
        return;
    }
    // Relaxed is enough: the start and the end of the parallel region order memory, and tasks share nothing.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        const auto next_task = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
        for (int64_t k = next_task(); k < count; k = next_task()) run(k);
    });
}

// Calls run(from, to) for the pieces of [0, size), which do not depend on the number of threads.
template <typename Run>
void for_pieces(int64_t size, int64_t piece, int64_t work, const Run& run) {
    for_tasks((size + piece - 1) / piece, work,
              [&](int64_t k) { run(k * piece, std::min(size, (k + 1) * piece)); });
}

}  // namespace dml::cpu
