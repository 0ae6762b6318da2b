#include "mbarrier.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "wgmma.h"

namespace emulator {
namespace {

constexpr uint64_t kIntact = 0x6d62617272696572;  // what an mbarrier's bytes hold

struct Barrier {
    Site made;
    Position maker;
    int arrivals;  // of each phase
    int pending;   // still to come in this one
    bool is_known_to_copies = false;
    int64_t bytes =
        0;  // the transaction count: announced but not landed, or below 0 landed but not announced
    unsigned phase = 0;
    std::vector<int> waiting;
};

struct NamedBarrier {
    int threads;
    std::vector<int> arrived;
    unsigned meetings = 0;
    char parity[2];  // for ThreadSanitizer, as the machine's own barrier
};

struct Barriers : BlockState {
    std::map<void*, Barrier> all;
    std::map<int, NamedBarrier> named;
    int copies = 0;  // under way
    Site last_copy;

    static std::string name(const void* barrier, const Barrier& b) {
        return "the mbarrier at shared address " + std::to_string(shared_address(barrier)) + " (made at " +
               text(b.made) + ")";
    }

    Barrier& at(void* barrier, Site site) {
        const auto found = all.find(barrier);
        if (found == all.end()) fail("an mbarrier that was not initialised is used at " + text(site));
        const Position& maker = found->second.maker;
        Position now;
        position(now);
        if (now.thread != maker.thread && now.barriers == maker.barriers)
            fail("no barrier of the block between the initialisation of " + name(barrier, found->second) +
                 " and its use at " + text(site));
        uint64_t bytes;
        std::memcpy(&bytes, barrier, sizeof bytes);
        if (bytes != kIntact) fail(name(barrier, found->second) + " was written over");
        return found->second;
    }

    static void end_phase_if_complete(Barrier& b) {
        if (b.pending > 0 || b.bytes != 0) return;
        ++b.phase;
        b.pending = b.arrivals;
        for (const int thread : b.waiting) resume(thread);
        b.waiting.clear();
    }

    std::string left_over() const override {
        if (copies > 0)
            return std::to_string(copies) +
                   " bulk copies had not landed when the block ended, the last one of " + text(last_copy);
        for (const auto& [barrier, b] : all) {
            if (b.bytes != 0)
                return "the mbarrier made at " + text(b.made) + " is left with a transaction count of " +
                       std::to_string(b.bytes);
        }
        return {};
    }
};

}  // namespace

void mbarrier_init(void* barrier, int arrivals, Site site) {
    const Unwatched unwatched;
    if (device().compute_capability < 90) fail("an mbarrier on a device older than sm_90, at " + text(site));
    if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0)
        fail("the mbarrier made at " + text(site) + " is misaligned");
    if (arrivals < 1 || arrivals >= 1 << 20) fail("an mbarrier counts 1 to 2^20 - 1 arrivals");
    std::memcpy(barrier, &kIntact, sizeof kIntact);
    Barrier b;
    b.made = site;
    position(b.maker);
    b.arrivals = b.pending = arrivals;
    if (!of_block<Barriers>().all.emplace(barrier, b).second)
        fail("an mbarrier is initialised again at " + text(site));
}

void fence_async() {
    const Unwatched unwatched;
    for (auto& [barrier, b] : of_block<Barriers>().all) {
        if (b.maker.thread == current_thread()) b.is_known_to_copies = true;
    }
}

void mbarrier_arrive(void* barrier, int expected_bytes, Site site) {
    const Unwatched unwatched;
    Barrier& b = of_block<Barriers>().at(barrier, site);
    give_way();
    if (b.pending == 0)
        fail("more arrivals at " + text(site) + " than " + Barriers::name(barrier, b) + " counts");
    release(barrier);
    --b.pending;
    b.bytes += expected_bytes;
    Barriers::end_phase_if_complete(b);
}

void mbarrier_wait(void* barrier, int parity, Site site) {
    const Unwatched unwatched;
    Barrier& b = of_block<Barriers>().at(barrier, site);
    give_way();
    while (int(b.phase % 2) == parity) {
        b.waiting.push_back(current_thread());
        suspend(
            [barrier, &b] {
                return Barriers::name(barrier, b) + " in phase " + std::to_string(b.phase) +
                       ", which lacks " + std::to_string(b.pending) + " of " + std::to_string(b.arrivals) +
                       " arrivals and " + std::to_string(b.bytes) + " bytes,";
            },
            site);
    }
    acquire(barrier);
}

void bulk_copy(void* shared, const void* global, int bytes, void* barrier, Site site) {
    const Unwatched unwatched;
    const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (bytes <= 0 || bytes % 16 != 0 || !is_aligned(shared) || !is_aligned(global))
        fail("the addresses and the size of the bulk copy at " + text(site) + " are not multiples of 16");
    Barriers& barriers = of_block<Barriers>();
    if (!barriers.at(barrier, site).is_known_to_copies)
        fail("the bulk copy at " + text(site) + " uses " +
             Barriers::name(barrier, barriers.at(barrier, site)) +
             " without a fence after its initialisation");
    const uint32_t first = shared_address(shared);
    shared_pointer(first, size_t(bytes), site);  // fails where no array holds all of them
    if (const std::string reader = wgmma_that_reads(first, bytes); !reader.empty())
        fail("the bulk copy at " + text(site) + " overwrites what " + reader + " may still read");
    std::memset(shared, 0xff, size_t(bytes));
    ++barriers.copies;
    barriers.last_copy = site;
    do_later([=, &barriers] {
        std::memcpy(shared, global, size_t(bytes));
        --barriers.copies;
        Barrier& b = barriers.at(barrier, site);
        b.bytes -= bytes;
        Barriers::end_phase_if_complete(b);
    });
}

void named_barrier(int id, int threads, Site site) {
    const Unwatched unwatched;
    if (id < 1 || id > 15 || threads <= 0 || threads % kLanes != 0)
        fail("the barrier at " + text(site) + ": its number is 1 to 15, its threads are whole warps");
    NamedBarrier& b = of_block<Barriers>().named[id];
    if (b.arrived.empty()) b.threads = threads;
    if (b.threads != threads)
        fail("barrier " + std::to_string(id) + " is for another number of threads at " + text(site));
    const char* const meeting = &b.parity[b.meetings % 2];
    release(meeting);
    b.arrived.push_back(current_thread());
    if (int(b.arrived.size()) < threads) {
        suspend(
            [id, threads] {
                return "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads";
            },
            site);
    } else {
        for (const int thread : b.arrived) resume(thread);
        b.arrived.clear();
        ++b.meetings;
        give_way();
    }
    acquire(meeting);
}

}  // namespace emulator
