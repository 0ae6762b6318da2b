// Independent tasks on the threads that there are.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace dml::cpu {

// Work, in elementary steps of half a nanosecond, that is worth waking another thread for.
inline constexpr int64_t kTaskWork = int64_t(1) << 13;

// What tools/cpu_threads.py reads: how much processor time each task took, run one after another, as
// `threads` threads would have been handed them. Null, and without cost, otherwise.
struct TaskLog {
    struct Region {
        int64_t threads;            // that would have shared the tasks
        std::vector<double> tasks;  // seconds
    };
    int64_t threads;
    std::vector<Region> regions;

    static TaskLog*& current() {
        static TaskLog* log = nullptr;
        return log;
    }
};

inline int64_t thread_count() {
    const TaskLog* log = TaskLog::current();
    return log ? log->threads : at::get_num_threads();
}

// Calls run(k) for k in [0, count), in any order on any thread. `work`: steps of all tasks together; the
// number of threads follows from it. Whoever is free takes the next task, so uneven tasks share well; what
// a task computes must depend on k alone.
template <typename Run>
void for_tasks(int64_t count, int64_t work, const Run& run) {
    const int64_t useful = std::min(count, work / kTaskWork);
    const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(useful, thread_count());
    if (TaskLog* log = TaskLog::current()) {
        using Clock = std::chrono::steady_clock;  // asking for processor time would cost more than a task
        log->regions.push_back({std::max<int64_t>(threads, 1), std::vector<double>(count)});
        double* seconds = log->regions.back().tasks.data();
        auto start = Clock::now();
        for (int64_t k = 0; k < count; ++k) {
            run(k);
            const auto end = Clock::now();  // what is still on its way to memory is the next task's
            seconds[k] = std::chrono::duration<double>(end - start).count();
            start = end;
        }
        return;
    }
    if (threads <= 1) {
        for (int64_t k = 0; k < count; ++k) run(k);
        return;
    }
    // Relaxed: the region's beginning and end order what tasks hand on, and nothing else may.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
        for (int64_t k = take(); k < count; k = take()) run(k);
    });
}

// Calls run(from, to) for pieces of [0, size) that do not depend on the number of threads.
template <typename Run>
void for_pieces(int64_t size, int64_t piece, int64_t work, const Run& run) {
    for_tasks((size + piece - 1) / piece, work,
              [&](int64_t k) { run(k * piece, std::min(size, (k + 1) * piece)); });
}

}  // namespace dml::cpu
