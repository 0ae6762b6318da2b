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

// An array of the block's dynamic shared memory, in a heap block of its own, filled with NaN. The block's shared
// memory begins on a multiple of the largest alignment that its arrays are declared with.
void* shared_array(int byte_offset, size_t bytes, int alignment = 128);

// Where in the device's shared memory an address in such an array is; and back, of bytes in one array.
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address, size_t bytes, Site site);

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

// ---- for what works beside the threads (mbarrier.cpp, wgmma.cpp) ----

// What such a part keeps for the block that runs.
struct BlockState {
    virtual ~BlockState() = default;
    // What should not be there any more once all threads have returned, or nothing.
    virtual std::string left_over() const { return {}; }
};
BlockState& block_state(BlockState* (*make)());  // made for the block when first asked for

template <typename T>
T& of_block() {
    return static_cast<T&>(block_state([]() -> BlockState* { return new T; }));
}

int current_thread();  // its number in the block

// Others may run first.
void give_way();

// Stops the thread that runs until resume() names it. A report of a deadlock says what it waits for.
void suspend(std::function<std::string()> what, Site site);
void resume(int thread);

// The work is done once, by the device: soon or after many turns, as the seed draws, at the latest when no thread
// can run. Not at all after the block's threads have returned.
void do_later(std::function<void()> work);

// While the emulator works on behalf of a thread, its own memory accesses are nobody's race. (It is not instrumented,
// but ThreadSanitizer sees what it does by way of malloc and memcpy.)
class Unwatched {
   public:
    Unwatched();
    ~Unwatched();
    Unwatched(const Unwatched&) = delete;
    Unwatched& operator=(const Unwatched&) = delete;
};

// For ThreadSanitizer: what came before a release of the address comes before what follows an acquire.
void release(const void* address);
void acquire(const void* address);

std::string text(Site site);
bool same(Site a, Site b);

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
