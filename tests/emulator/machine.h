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

// A dependent launch may begin before the one before it has ended, until it waits for that; every block must.
void wait_for_previous_kernel();

// Where the thread that runs stands: its block's number, its own, and how many barriers were passed.
struct Position {
    int64_t block;
    int thread;
    unsigned barriers;
};
bool position(Position& at);  // false outside of kernels

// What between_blocks.cpp watches in a build that has it.
[[gnu::weak]] void watch_memory(const void* start, size_t bytes);
[[gnu::weak]] void unwatch_memory(const void* start);
[[gnu::weak]] void kernel_begins(bool is_dependent);
[[gnu::weak]] void previous_kernel_ended();

// The grid of a launch, and how it follows the one before it.
struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    bool is_dependent = false;
};

// Launches that are only written down, not run: one line each, "<symbol> <grid> <block> <shared bytes>
// <whether dependent>".
void record_launches(std::string* record);  // null: run them again
bool recorded(const void* kernel, const Launch& launch);

void run_grid(const Launch& launch, const std::function<void()>& kernel);

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const Launch& launch, Args&&... args) {
    if (recorded(reinterpret_cast<const void*>(kernel), launch)) return;
    const std::tuple<Params...> values(std::forward<Args>(args)...);
    run_grid(launch, [&] { std::apply(kernel, values); });
}

}  // namespace emulator
