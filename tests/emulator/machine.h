// The emulated machine: runs a grid block by block, the threads of a block as fibers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda_language.h"

namespace emulator {

// How the threads of a block take turns. Each finds mistakes that the other misses.
enum class Schedule {
    kRoundRobin,  // all threads but those of some sleeping warps, in an order drawn each round
    kWarpFirst,   // one warp runs as far as it can before another does, lanes in shuffled order
};

// For the launches that follow. Until called, the environment decides: DML_EMULATOR_SCHEDULE
// (round_robin or warp_first) and DML_EMULATOR_SEED (a number).
void set_schedule(Schedule schedule, uint64_t seed);

// The device that kernels are told they run on; tests may change it.
struct Device {
    int multiprocessors = 4;
    int shared_bytes_per_block = 163 * 1024;
    int compute_capability = 80;
};
Device& device();

// What is thrown out of launch() when a kernel breaks a rule.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Ends the launch with a Failure that says in which block and thread it happened.
[[noreturn]] void fail(const std::string& what);

// Where in the kernel's source a barrier or collective stands. As a default argument, here() is
// the place of the call: two places that meet at one barrier are divergence.
struct Site {
    const char* file;
    int line;

    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// __syncthreads.
void block_barrier(Site site);

// Waits until all 32 lanes of the warp are here; the last one runs the operation on what they
// brought (operands[lane]), for all of them. Orders no memory, except when asked to (__syncwarp).
constexpr int kLanes = 32;
using Operation = void (*)(void* const operands[kLanes]);
void warp_rendezvous(Operation operation, void* operand, Site site, bool orders_memory = false);

// An array of the block's dynamic shared memory, in a heap block of its own, filled with NaN.
void* shared_array(int byte_offset, size_t bytes);

// cp.async: bytes on their way to shared memory, per thread and in groups.
struct Copy {
    void* destination;
    int bytes;
    alignas(16) unsigned char data[16];
};
void start_copy(const Copy& copy);
void commit_copies();
// The next copy of the groups that are no longer among the newest `pending`; false if none.
bool next_landed_copy(int pending, Copy& copy);

// Launches that are only written down, not run: one line each, "<symbol> <grid> <block> <shared bytes>".
void record_launches(std::string* record);  // null: run them again
bool recorded(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) {
    if (recorded(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes)) return;
    const std::tuple<Params...> values(std::forward<Args>(args)...);
    run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
}

}  // namespace emulator
