// Watches what the blocks of a launch, and launches that may overlap, do to each other's memory. Kernels are
// compiled with -fsanitize=thread, but linked with this instead of ThreadSanitizer, which knows fibers and so
// believes that what one fiber did for two blocks happened in this order.
//
// Here an access happens before another of the same launch only if a release and an acquire of one atomic, with
// the barriers of their blocks, say so; and before one of a later launch unless that was launched as dependent
// and its block has not waited yet. Within a block nothing is compared: that is ThreadSanitizer's.
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "machine.h"

namespace emulator {
namespace {

struct Access {
    uint64_t launch = 0;  // 0: none
    Position at;
};

// The last accesses to a byte.
struct Byte {
    Access write, read;
};

// A moment of a thread. What it covers: that thread's accesses, and its block's before the barrier behind it.
using Moment = Position;
bool covers(const Moment& moment, const Position& at) {
    return at.thread == moment.thread ? at.barriers <= moment.barriers : at.barriers < moment.barriers;
}

using Known = std::map<int64_t, Moment>;  // by block
struct Learnt {
    Moment when;
    Known known;
};

struct Watch {
    std::map<uintptr_t, std::vector<Byte>> memory;
    std::map<uintptr_t, Known> released;  // at each atomic of this launch
    // Of the block that runs.
    int64_t block = -1;
    std::vector<Learnt> learnt;
    std::vector<Moment> waits;
    uint64_t launch = 0, chain = 0;  // chain: the last launch that waited for all before it
    bool is_dependent = false;
};
Watch& watch() {
    static Watch* const watch = new Watch;
    return *watch;
}

void enter(const Position& at) {
    Watch& w = watch();
    if (w.block == at.block) return;
    w.block = at.block;
    w.learnt.clear();
    w.waits.clear();
}

bool is_before(const Access& a, const Position& now) {
    const Watch& w = watch();
    if (a.launch == 0 || (a.launch == w.launch && a.at.block == now.block)) return true;
    if (a.launch < w.launch) {
        return !w.is_dependent || a.launch < w.chain ||
               std::any_of(w.waits.begin(), w.waits.end(), [&](const Moment& m) { return covers(now, m); });
    }
    return std::any_of(w.learnt.begin(), w.learnt.end(), [&](const Learnt& l) {
        const auto of = l.known.find(a.at.block);
        return covers(now, l.when) && of != l.known.end() && covers(of->second, a.at);
    });
}

std::string name(const Access& a) {
    return "thread " + std::to_string(a.at.thread) + " of block " + std::to_string(a.at.block) +
           (a.launch == watch().launch ? "" : " of an earlier launch");
}

enum class Kind { kRead, kWrite, kAtomic };

void touch(const void* address, size_t bytes, Kind kind) {
    Position at;
    if (!position(at)) return;
    Watch& w = watch();
    const auto start = reinterpret_cast<uintptr_t>(address);
    auto found = w.memory.upper_bound(start);
    if (found == w.memory.begin()) return;
    --found;
    const uintptr_t first = start - found->first;
    if (first >= found->second.size()) return;
    enter(at);
    for (uintptr_t k = first; k < std::min<uintptr_t>(first + bytes, found->second.size()); ++k) {
        Byte& byte = found->second[k];
        const Access& other = is_before(byte.write, at) ? byte.read : byte.write;
        if (!is_before(byte.write, at) || (kind != Kind::kRead && !is_before(byte.read, at))) {
            fail("race between blocks: an access at byte " + std::to_string(k) + " of " +
                 std::to_string(found->second.size()) + " may come before that of " + name(other));
        }
        if (kind == Kind::kWrite) byte.write = {w.launch, at};
        if (kind == Kind::kRead) byte.read = {w.launch, at};
    }
}

uint32_t fetch_add(volatile uint32_t* sum, uint32_t value, int order) {
    touch(const_cast<uint32_t*>(sum), sizeof *sum, Kind::kAtomic);
    const uint32_t before = *sum;
    *sum = before + value;
    Position at;
    if (!position(at)) return before;
    Watch& w = watch();
    Known& released = w.released[reinterpret_cast<uintptr_t>(sum)];
    const bool acquires = order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
    const bool releases = order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
    if (acquires) w.learnt.push_back({at, released});
    if (!releases) return before;
    for (const Learnt& l : w.learnt) {
        if (covers(at, l.when)) released.insert(l.known.begin(), l.known.end());
    }
    released[at.block] = at;
    return before;
}

}  // namespace

void watch_memory(const void* start, size_t bytes) {
    watch().memory[reinterpret_cast<uintptr_t>(start)].assign(bytes, Byte{});
}
void unwatch_memory(const void* start) { watch().memory.erase(reinterpret_cast<uintptr_t>(start)); }

void kernel_begins(bool is_dependent) {
    Watch& w = watch();
    ++w.launch;
    w.is_dependent = is_dependent;
    if (!is_dependent) w.chain = w.launch;
    w.released.clear();
    w.block = -1;
}

void previous_kernel_ended() {
    Position at;
    position(at);
    enter(at);
    watch().waits.push_back(at);
}

}  // namespace emulator

// ---- what the compiler calls ---------------------------------------------------------------------------------

extern "C" {
using emulator::Kind;
using emulator::touch;

#define DML_ACCESSES(n)                                                                \
    void __tsan_read##n(void* address) { touch(address, n, Kind::kRead); }             \
    void __tsan_write##n(void* address) { touch(address, n, Kind::kWrite); }           \
    void __tsan_unaligned_read##n(void* address) { touch(address, n, Kind::kRead); }   \
    void __tsan_unaligned_write##n(void* address) { touch(address, n, Kind::kWrite); } \
    void __tsan_volatile_read##n(void* address) { touch(address, n, Kind::kRead); }    \
    void __tsan_volatile_write##n(void* address) { touch(address, n, Kind::kWrite); }
DML_ACCESSES(1)
DML_ACCESSES(2)
DML_ACCESSES(4)
DML_ACCESSES(8)
DML_ACCESSES(16)
void __tsan_read_range(void* address, size_t bytes) { touch(address, bytes, Kind::kRead); }
void __tsan_write_range(void* address, size_t bytes) { touch(address, bytes, Kind::kWrite); }

void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
    touch(from, bytes, Kind::kRead);
    touch(to, bytes, Kind::kWrite);
    return __real_memcpy(to, from, bytes);
}

uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* sum, uint32_t value, int order) {
    return emulator::fetch_add(sum, value, order);
}
// Initialised statics of the host.
uint8_t __tsan_atomic8_load(const volatile uint8_t* value, int) { return *value; }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
