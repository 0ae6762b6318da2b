#include "machine.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "fiber.h"

extern "C" {
[[gnu::weak]] void __asan_poison_memory_region(void const volatile*, size_t);
[[gnu::weak]] void __asan_unpoison_memory_region(void const volatile*, size_t);
[[gnu::weak]] void __tsan_acquire(void*);
[[gnu::weak]] void __tsan_release(void*);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace emulator {

void release(const void* address) {
    if (__tsan_release) __tsan_release(const_cast<void*>(address));
}

void acquire(const void* address) {
    if (__tsan_acquire) __tsan_acquire(const_cast<void*>(address));
}

Unwatched::Unwatched() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

Unwatched::~Unwatched() {
    if (!AnnotateIgnoreReadsEnd) return;
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

bool same(Site a, Site b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every integer type

class Random {  // splitmix64
   public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint32_t below(uint32_t bound) { return uint32_t((uint64_t(next()) * bound) >> 32); }

    template <typename T>
    void shuffle(std::vector<T>& items) {
        for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(uint32_t(i))]);
    }

   private:
    uint32_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return uint32_t((z ^ (z >> 31)) >> 32);
    }
    uint64_t state_;
};

enum class State { kReady, kAtBarrier, kAtRendezvous, kSuspended, kDone };

struct PendingCopy {
    Copy copy;
    int group;
};

struct Thread {
    Fiber fiber;
    uint3 index;
    Site site;                          // where it waits
    std::function<std::string()> what;  // and for what, if suspended
    std::vector<PendingCopy> copies;
    size_t landed;  // how many of them have been handed back
    int groups;     // committed so far
};

struct Warp {
    int lanes;
    int ready;
    int arrived;
    Operation operation;  // what those who have arrived wait for, and where
    Site site;
    unsigned meetings;  // that ordered memory, so far
    char parity[2];     // as Machine::barrier_parity_
    void* operands[kLanes];
};

// What the device will do beside the threads, when so many turns have been taken.
struct LaterWork {
    uint64_t due;
    std::function<void()> work;
};

struct SharedArray {
    size_t bytes;
    char* start;
    std::unique_ptr<char, decltype(&std::free)> allocation{nullptr, &std::free};
};

class Machine {
   public:
    Schedule schedule = Schedule::kRoundRobin;
    Random random{0};
    Device device;
    std::string* record = nullptr;

    Machine() {
        const char* name = std::getenv("DML_EMULATOR_SCHEDULE");
        const char* seed = std::getenv("DML_EMULATOR_SEED");
        if (name && std::strcmp(name, "warp_first") == 0) {
            schedule = Schedule::kWarpFirst;
        } else if (name && std::strcmp(name, "round_robin") != 0) {
            throw Failure("DML_EMULATOR_SCHEDULE is round_robin or warp_first, not " + std::string(name));
        }
        if (seed) random = Random(std::strtoull(seed, nullptr, 10));
    }

    void run_grid(const Launch& launch, const std::function<void()>& kernel);
    void wait_for_previous_kernel();
    bool position(Position& at) const;
    void block_barrier(Site site);
    void warp_rendezvous(Operation operation, void* operand, Site site, bool orders_memory);
    void* shared_array(int byte_offset, size_t bytes, int alignment);
    uint32_t shared_address(const void* pointer);
    void* shared_pointer(uint32_t address, size_t bytes, Site site);
    void suspend(std::function<std::string()> what, Site site);
    void resume(int thread);
    void do_later(std::function<void()> work);
    BlockState& block_state(BlockState* (*make)());
    int current_thread() const { return current_; }
    void yield();
    [[noreturn]] void fail(const std::string& what);

    Thread& self() { return *threads_[current_]; }

   private:
    static void thread_main();
    void check_launch(const Launch& launch) const;
    void run_block();
    int next_ready();
    void add_to_round(int warp);
    void do_due_work(bool is_idle);
    void make_ready(int thread);
    void wait(State state, Site site);
    void release_barrier();
    std::string describe_waiting() const;

    int live_ = 0;   // threads that have not returned
    int ready_ = 0;  // of these, able to run
    int at_barrier_ = 0;
    unsigned barriers_ = 0;  // passed so far
    bool waited_ = false;    // for the kernel before
    int current_ = -1;
    std::vector<std::unique_ptr<Thread>> threads_;  // kept from block to block, for their stacks
    std::vector<State> states_;                     // of threads_; apart, as every turn looks at many
    std::vector<Warp> warps_;
    std::vector<int> round_;  // the threads to visit, from next_ on
    size_t next_ = 0;
    int round_warp_ = -1;

    std::map<BlockState* (*)(), std::unique_ptr<BlockState>> block_states_;
    std::vector<LaterWork> later_;
    uint64_t turns_ = 0;

    std::map<int, SharedArray> shared_;
    size_t shared_bytes_ = 0;
    int shared_alignment_ = 0;
    const std::function<void()>* kernel_ = nullptr;
    Fiber main_;
    bool running_ = false;
    std::string failure_;

    // Addresses that release() and acquire() speak of. Two for the barriers in turn: whoever is late
    // in leaving one must not learn of what the others did before the next.
    char start_ = 0, end_ = 0, barrier_parity_[2] = {};
};

Machine& machine() {
    static Machine* const machine = new Machine;
    return *machine;
}

std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// ---- launching --------------------------------------------------------------------------------

void Machine::check_launch(const Launch& launch) const {
    const auto& [grid, block, shared_bytes, is_dependent] = launch;
    if (running_) throw Failure("a kernel cannot launch a kernel");
    if (uint64_t(block.x) * block.y * block.z > 1024 || block.x * block.y * block.z == 0) {
        throw Failure("a block has 1 to 1024 threads");
    }
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        throw Failure("the grid is too large: at most 2^31 - 1, 65535, 65535");
    }
    if (shared_bytes > size_t(device.shared_bytes_per_block)) {
        throw Failure("the kernel needs more shared memory than the device has: " +
                      std::to_string(shared_bytes) + " bytes");
    }
}

void Machine::run_grid(const Launch& launch, const std::function<void()>& kernel) {
    check_launch(launch);
    const dim3 grid = launch.grid;
    gridDim = grid;
    blockDim = launch.block;
    shared_bytes_ = launch.shared_bytes;
    kernel_ = &kernel;
    if (kernel_begins) kernel_begins(launch.is_dependent);

    std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
    for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
    random.shuffle(order);
    release(&start_);  // what the host did comes before the kernel, but no block before another
    for (uint64_t i : order) {
        blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        run_block();
        for (const auto& [make, state] : block_states_) {
            if (!failure_.empty()) break;
            failure_ = state->left_over();
            if (!failure_.empty()) failure_ += " [block " + text(blockIdx) + ", at its end]";
        }
        block_states_.clear();
        later_.clear();
        shared_.clear();
        shared_alignment_ = 0;
        if (!failure_.empty()) throw Failure(std::exchange(failure_, {}));
        if (launch.is_dependent && !waited_)
            throw Failure("block " + text(blockIdx) + " did not wait for the kernel before it");
    }
    acquire(&end_);
}

void Machine::wait_for_previous_kernel() {
    waited_ = true;
    if (previous_kernel_ended) previous_kernel_ended();
}

bool Machine::position(Position& at) const {
    if (!running_) return false;
    at = {int64_t(blockIdx.x) + int64_t(gridDim.x) * (blockIdx.y + int64_t(gridDim.y) * blockIdx.z), current_,
          barriers_};
    return true;
}

void Machine::run_block() {
    const int count = int(blockDim.x * blockDim.y * blockDim.z);
    while (int(threads_.size()) < count) threads_.push_back(std::make_unique<Thread>());
    states_.resize(threads_.size());
    // ThreadSanitizer knows fibers only. Dealt out anew, the same thread of two blocks is rarely one.
    random.shuffle(threads_);
    warps_.assign((count + kLanes - 1) / kLanes, Warp{});
    for (int i = 0; i < count; ++i) {
        Thread& thread = *threads_[i];
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        states_[i] = State::kReady;
        thread.copies.clear();
        thread.landed = 0;
        thread.groups = 0;
        thread.fiber.prepare(&Machine::thread_main);
        Warp& warp = warps_[i / kLanes];
        ++warp.lanes;
        ++warp.ready;
    }
    round_.reserve(1024);
    live_ = ready_ = count;
    at_barrier_ = 0;
    waited_ = false;
    round_.clear();
    next_ = 0;
    round_warp_ = -1;

    running_ = true;
    current_ = next_ready();
    main_.switch_to(self().fiber);
    running_ = false;
}

void Machine::thread_main() {
    Machine& m = machine();
    threadIdx = m.self().index;
    acquire(&m.start_);
    (*m.kernel_)();
    release(&m.end_);
    m.states_[m.current_] = State::kDone;
    --m.ready_;
    --m.warps_[m.current_ / kLanes].ready;
    --m.live_;
    if (m.live_ > 0 && m.at_barrier_ == m.live_) m.release_barrier();
    m.yield();
}

// ---- taking turns -----------------------------------------------------------------------------

// Which thread goes on, or -1 when none can.
int Machine::next_ready() {
    for (;;) {
        for (; next_ < round_.size(); ++next_) {
            if (states_[round_[next_]] == State::kReady) return round_[next_++];
        }
        if (ready_ == 0) return -1;

        // A new round: the same warp while it can run, else another one; or every warp, except
        // those that chance lets sleep, so that warps drift apart.
        const int warps = int(warps_.size());
        round_.clear();
        next_ = 0;
        if (schedule == Schedule::kWarpFirst) {
            while (round_warp_ < 0 || warps_[round_warp_].ready == 0) round_warp_ = int(random.below(warps));
            add_to_round(round_warp_);
        } else {
            for (int w = 0; w < warps; ++w) {
                if (warps_[w].ready > 0 && random.below(4) > 0) add_to_round(w);
            }
        }
        random.shuffle(round_);
    }
}

void Machine::add_to_round(int warp) {
    for (int lane = 0; lane < warps_[warp].lanes; ++lane) round_.push_back(warp * kLanes + lane);
}

// Does what is due, or, where the threads wait for it, what is due first.
void Machine::do_due_work(bool is_idle) {
    const Unwatched unwatched;
    ++turns_;
    for (;;) {
        const auto first =
            std::min_element(later_.begin(), later_.end(),
                             [](const LaterWork& a, const LaterWork& b) { return a.due < b.due; });
        if (first == later_.end() || (first->due > turns_ && !is_idle)) return;
        const std::function<void()> work = std::move(first->work);
        later_.erase(first);
        work();
        is_idle = false;
    }
}

void Machine::do_later(std::function<void()> work) {
    constexpr uint32_t kLongest = 12;  // 2048 turns: of 288 threads about seven each
    later_.push_back({turns_ + (uint64_t(1) << random.below(kLongest)), std::move(work)});
}

// Lets another thread run; returns when this one is chosen again, which for a finished one is never.
void Machine::yield() {
    Thread& from = self();
    if (!later_.empty()) do_due_work(false);
    int next = next_ready();
    while (next < 0 && live_ > 0 && !later_.empty()) {
        do_due_work(true);
        next = next_ready();
    }
    if (next < 0) {
        if (live_ > 0) fail("deadlock: " + describe_waiting());
        from.fiber.switch_to(main_, true);
    }
    if (next == current_) return;
    const bool done = states_[current_] == State::kDone;
    current_ = next;
    from.fiber.switch_to(self().fiber, done);
    threadIdx = from.index;
}

void Machine::wait(State state, Site site) {
    states_[current_] = state;
    self().site = site;
    --ready_;
    --warps_[current_ / kLanes].ready;
    yield();
}

void Machine::make_ready(int thread) {
    states_[thread] = State::kReady;
    ++ready_;
    ++warps_[thread / kLanes].ready;
}

void Machine::suspend(std::function<std::string()> what, Site site) {
    self().what = std::move(what);
    wait(State::kSuspended, site);
}

void Machine::resume(int thread) {
    if (states_[thread] == State::kSuspended) make_ready(thread);
}

BlockState& Machine::block_state(BlockState* (*make)()) {
    std::unique_ptr<BlockState>& state = block_states_[make];
    if (!state) state.reset(make());
    return *state;
}

// ---- meeting ----------------------------------------------------------------------------------

void Machine::block_barrier(Site site) {
    const char* meeting = &barrier_parity_[barriers_ % 2];
    release(meeting);
    ++at_barrier_;
    if (at_barrier_ == live_) {
        Thread& last = self();
        states_[current_] = State::kAtBarrier;
        last.site = site;
        --ready_;
        --warps_[current_ / kLanes].ready;
        release_barrier();
        yield();  // the last to arrive has no right to go first
    } else {
        wait(State::kAtBarrier, site);
    }
    acquire(meeting);
}

void Machine::release_barrier() {
    const int count = int(blockDim.x * blockDim.y * blockDim.z);
    int first = -1;
    for (int i = 0; i < count; ++i) {
        if (states_[i] != State::kAtBarrier) continue;
        if (first < 0) first = i;
        if (!same(threads_[i]->site, threads_[first]->site)) {
            fail("divergent barrier: " + describe_waiting());
        }
    }
    for (int i = 0; i < count; ++i) {
        if (states_[i] == State::kAtBarrier) make_ready(i);
    }
    at_barrier_ = 0;
    ++barriers_;
}

void Machine::warp_rendezvous(Operation operation, void* operand, Site site, bool orders_memory) {
    const int first = current_ / kLanes * kLanes;
    const int lane = current_ - first;
    Warp& warp = warps_[current_ / kLanes];
    if (warp.lanes != kLanes)
        fail("a warp function at " + text(site) + " in a warp of " + std::to_string(warp.lanes) +
             " lanes: all 32 must exist");
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.site = site;
    } else if (warp.operation != operation || !same(warp.site, site)) {
        fail("divergent warp: lane " + std::to_string(lane) + " is at " + text(site) + " while " +
             describe_waiting());
    }
    warp.operands[lane] = operand;
    const char* meeting = &warp.parity[warp.meetings % 2];
    if (orders_memory) release(meeting);
    if (++warp.arrived < kLanes) {
        wait(State::kAtRendezvous, site);
    } else {
        warp.arrived = 0;
        if (orders_memory) ++warp.meetings;
        operation(warp.operands);
        std::fill_n(states_.begin() + first, kLanes, State::kReady);
        ready_ += kLanes - 1;
        warp.ready += kLanes - 1;
    }
    if (orders_memory) acquire(meeting);
}

std::string Machine::describe_waiting() const {
    struct Group {
        std::string what;
        int threads;
        int first;
    };
    std::vector<Group> groups;
    int done = 0;
    const int count = int(blockDim.x * blockDim.y * blockDim.z);
    for (int i = 0; i < count; ++i) {
        const Thread& thread = *threads_[i];
        if (states_[i] == State::kDone) ++done;
        if (states_[i] == State::kDone || states_[i] == State::kReady) continue;
        const std::string what = (states_[i] == State::kSuspended   ? thread.what() + " at "
                                  : states_[i] == State::kAtBarrier ? "the block barrier at "
                                                                    : "the warp function at ") +
                                 text(thread.site);
        auto group =
            std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.what == what; });
        if (group == groups.end()) group = groups.insert(groups.end(), {what, 0, i});
        ++group->threads;
    }
    std::string all;
    for (const Group& group : groups) {
        all += std::to_string(group.threads) + " threads wait at " + group.what + " (first: thread " +
               std::to_string(group.first) + "); ";
    }
    return all + std::to_string(done) + " have returned";
}

void Machine::fail(const std::string& what) {
    if (!running_) throw Failure(what);
    failure_ = what + " [block " + text(blockIdx) + ", thread " + text(self().index) + "]";
    self().fiber.switch_to(main_, true);
    __builtin_unreachable();
}

// ---- shared memory ----------------------------------------------------------------------------

void* Machine::shared_array(int byte_offset, size_t bytes, int alignment) {
    shared_alignment_ = std::max(shared_alignment_, alignment);
    const auto found = shared_.find(byte_offset);
    if (found != shared_.end()) {
        SharedArray& array = found->second;
        if (array.bytes != bytes) {
            fail("the shared array at byte " + std::to_string(byte_offset) + " has " +
                 std::to_string(array.bytes) + " bytes in one place and " + std::to_string(bytes) +
                 " in another");
        }
        return array.start;
    }
    if (byte_offset < 0 || byte_offset + bytes > shared_bytes_) {
        fail("the shared array at byte " + std::to_string(byte_offset) + " of " + std::to_string(bytes) +
             " bytes does not fit in the " + std::to_string(shared_bytes_) +
             " bytes that the launch asked for");
    }
    for (const auto& [offset, array] : shared_) {
        if (byte_offset < offset + int64_t(array.bytes) && offset < byte_offset + int64_t(bytes)) {
            fail("the shared arrays at bytes " + std::to_string(offset) + " and " +
                 std::to_string(byte_offset) + " overlap");
        }
    }

    // Aligned exactly as the offset is: an address that the device would refuse, or a conflict of
    // banks, must look the same here.
    constexpr size_t kAlignment = 128;
    const size_t skew = byte_offset % kAlignment;
    SharedArray& array = shared_[byte_offset];
    array.bytes = bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, skew + bytes)) throw std::bad_alloc();
    array.allocation.reset(static_cast<char*>(memory));
    array.start = array.allocation.get() + skew;
    std::memset(array.start, kPoison, bytes);
    if (skew && __asan_poison_memory_region) {
        __asan_poison_memory_region(array.allocation.get(), skew);
    }
    return array.start;
}

// The device keeps the first KB of shared memory, and owes the block's no more than the alignment it asked for.
constexpr uint32_t kReservedShared = 1024;

uint32_t Machine::shared_address(const void* pointer) {
    const char* const byte = static_cast<const char*>(pointer);
    for (const auto& [offset, array] : shared_) {
        if (byte >= array.start && byte < array.start + array.bytes)
            return kReservedShared + uint32_t(shared_alignment_ % 1024) + uint32_t(offset) +
                   uint32_t(byte - array.start);
    }
    fail("an address that is not in shared memory");
}

void* Machine::shared_pointer(uint32_t address, size_t bytes, Site site) {
    const int64_t byte = int64_t(address) - kReservedShared - shared_alignment_ % 1024;
    auto array = shared_.upper_bound(int(byte));
    if (array != shared_.begin()) {
        --array;
        const int64_t first = byte - array->first;
        if (first >= 0 && first + int64_t(bytes) <= int64_t(array->second.bytes))
            return array->second.start + first;
    }
    fail("byte " + std::to_string(byte) + " of shared memory, where the block has no array, is used at " +
         text(site));
}

}  // namespace

// ---- what machine.h promises ------------------------------------------------------------------

void set_schedule(Schedule schedule, uint64_t seed) {
    machine().schedule = schedule;
    machine().random = Random(seed);
}

Device& device() { return machine().device; }

void fail(const std::string& what) { machine().fail(what); }

void block_barrier(Site site) {
    const Unwatched unwatched;
    machine().block_barrier(site);
}

void warp_rendezvous(Operation operation, void* operand, Site site, bool orders_memory) {
    const Unwatched unwatched;
    machine().warp_rendezvous(operation, operand, site, orders_memory);
}

void* shared_array(int byte_offset, size_t bytes, int alignment) {
    const Unwatched unwatched;
    return machine().shared_array(byte_offset, bytes, alignment);
}

uint32_t shared_address(const void* pointer) { return machine().shared_address(pointer); }

void* shared_pointer(uint32_t address, size_t bytes, Site site) {
    return machine().shared_pointer(address, bytes, site);
}

BlockState& block_state(BlockState* (*make)()) { return machine().block_state(make); }

int current_thread() { return machine().current_thread(); }

void give_way() { machine().yield(); }

void suspend(std::function<std::string()> what, Site site) { machine().suspend(std::move(what), site); }

void resume(int thread) { machine().resume(thread); }

void do_later(std::function<void()> work) { machine().do_later(std::move(work)); }

void start_copy(const Copy& copy) {
    const Unwatched unwatched;
    Thread& thread = machine().self();
    thread.copies.push_back({copy, thread.groups});
}

void commit_copies() { ++machine().self().groups; }

bool next_landed_copy(int pending, Copy& copy) {
    const Unwatched unwatched;
    Thread& thread = machine().self();
    if (thread.landed == thread.copies.size()) {
        thread.copies.clear();
        thread.landed = 0;
        return false;
    }
    const PendingCopy& oldest = thread.copies[thread.landed];
    if (oldest.group >= thread.groups - pending) return false;
    copy = oldest.copy;
    ++thread.landed;
    return true;
}

void record_launches(std::string* record) { machine().record = record; }

bool recorded(const void* kernel, const Launch& launch) {
    std::string* record = machine().record;
    if (!record) return false;
    Dl_info symbol = {};
    dladdr(kernel, &symbol);
    *record += symbol.dli_sname ? symbol.dli_sname : "?";
    for (const dim3& d : {launch.grid, launch.block})
        *record += " " + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
    *record +=
        " " + std::to_string(launch.shared_bytes) + " " + std::to_string(int(launch.is_dependent)) + "\n";
    return true;
}

void run_grid(const Launch& launch, const std::function<void()>& kernel) {
    const Unwatched unwatched;
    machine().run_grid(launch, kernel);
}

void wait_for_previous_kernel() { machine().wait_for_previous_kernel(); }

bool position(Position& at) { return machine().position(at); }

}  // namespace emulator
