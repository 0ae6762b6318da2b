#include "wgmma.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <utility>
#include <vector>

#include "float16.h"
#include "warp_math.h"

namespace emulator {
namespace {

constexpr int kWarps = 4;  // of a warpgroup
constexpr int kRows = 16;  // of a warp
constexpr int kColumns = 128;
constexpr int kDepth = 16;
constexpr uint32_t kInFlight = 0xffbfffff;  // a signalling NaN

// ---- descriptors ------------------------------------------------------------------------------

// PTX ISA, "Matrix Descriptor Format".
struct Descriptor {
    uint32_t start, leading, stride;  // bytes
    int base_offset, swizzle;
    bool has_reserved_bits;

    explicit Descriptor(uint64_t bits)
        : start(field(bits, 0)),
          leading(field(bits, 16)),
          stride(field(bits, 32)),
          base_offset(int(bits >> 49 & 7)),
          swizzle(int(bits >> 62)),
          has_reserved_bits((bits & 0x3ff1c000c000c000u) != 0) {}

    static uint32_t field(uint64_t bits, int first) { return uint32_t(bits >> first & 0x3fff) << 4; }

    // Of a row that is swizzled as a whole; 16 where nothing is.
    uint32_t row_bytes() const { return swizzle == 0 ? 16 : 256u >> swizzle; }
};

void check(uint64_t bits, const char* name, Site site) {
    const Descriptor d(bits);
    const std::string which = std::string("the descriptor of ") + name + " at " + text(site);
    if (d.has_reserved_bits) fail(which + " has reserved bits");
    if (d.base_offset != 0) fail(which + " has a base offset, which is not emulated");
    const uint32_t pattern = 8 * d.row_bytes();
    if (d.start % pattern >= d.row_bytes() && d.swizzle != 0)
        fail(which + " begins at byte " + std::to_string(d.start % pattern) +
             " of a pattern of its swizzle, which begins on multiples of " + std::to_string(pattern));
}

}  // namespace

// The canonical layouts of PTX ISA, "Shared Memory Matrix Layout" and "Strides": a chunk is 16 bytes, T = 8 elements.
uint32_t operand_address(uint64_t descriptor, bool is_mn_major, int mn, int k) {
    const Descriptor d(descriptor);
    const uint32_t row = d.row_bytes();
    uint32_t address = d.start;
    if (!is_mn_major) {
        // Rows of k, eight to a pattern. Without a swizzle a row is one chunk, and the next along k lies apart.
        address += mn % 8 * row + mn / 8 * d.stride;
        address += d.swizzle == 0 ? k / 8 * d.leading + k % 8 * 2 : k * 2;
    } else {
        // Rows of M or N, eight of k to a pattern. Without a swizzle the two distances change places.
        const int across = int(row / 2);
        const uint32_t next_mn = d.swizzle == 0 ? d.stride : d.leading;
        const uint32_t next_k = d.swizzle == 0 ? d.leading : d.stride;
        address += mn % across * 2 + mn / across * next_mn + k % 8 * row + k / 8 * next_k;
    }
    const uint32_t bits = d.swizzle == 0 ? 0 : row / 16 - 1;  // 7, 3 or 1
    return address ^ (address >> 3 & bits << 4);
}

namespace {

// ---- what warps have under way ------------------------------------------------------------------

// One variable's accumulators in the lanes of a warp.
struct Accumulators {
    float* registers[kLanes];
    float sums[kRows][kColumns];
    int newest;  // the number of the last wgmma on them

    float& sum(int lane, int i) { return sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]; }
};

bool is_same(const Wgmma& x, const Wgmma& y) {
    return same(x.site, y.site) && x.a == y.a && x.b == y.b && x.accumulates == y.accumulates;
}

void take_to_flight(float* registers) {
    for (int i = 0; i < kAccumulators; ++i) std::memcpy(registers + i, &kInFlight, sizeof kInFlight);
}

struct Warp {
    int rank = 0;               // in its warpgroup
    std::vector<Wgmma> issued;  // as lane 0 brought them
    std::vector<Accumulators*> targets;
    int multiplied = 0, waited = 0;               // how many of them
    std::vector<int> groups;                      // how many were issued at each commit
    std::list<Accumulators> in_flight;            // not moved: targets point there
    std::map<float*, std::vector<float>> fenced;  // by lane 0's accumulators: what all held

    // Those that begin there in lane 0, or null.
    Accumulators* flying(const float* acc) {
        for (Accumulators& a : in_flight) {
            if (a.registers[0] == acc) return &a;
        }
        return nullptr;
    }

    void require_untouched(const Accumulators& a) const {
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < kAccumulators; ++i) {
                if (std::memcmp(&a.registers[lane][i], &kInFlight, sizeof kInFlight) != 0)
                    fail("accumulators were written while the wgmma at " +
                         text(issued[size_t(a.newest)].site) + " was under way, in lane " +
                         std::to_string(lane));
            }
        }
    }

    void fence(float* const acc[kLanes]) {
        if (Accumulators* a = flying(acc[0])) return require_untouched(*a);
        std::vector<float>& held = fenced[acc[0]];
        held.clear();
        for (int lane = 0; lane < kLanes; ++lane)
            held.insert(held.end(), acc[lane], acc[lane] + kAccumulators);
    }

    // The accumulators of a wgmma that are not in flight yet.
    Accumulators& lift(Wgmma* const of[kLanes], Site site) {
        const auto held = fenced.find(of[0]->acc);
        if (held == fenced.end())
            fail("no wgmma_fence of the accumulators before the wgmma at " + text(site));
        Accumulators& a = in_flight.emplace_back();
        for (int lane = 0; lane < kLanes; ++lane) {
            float* const acc = of[lane]->acc;
            if (std::memcmp(acc, &held->second[size_t(lane) * kAccumulators],
                            kAccumulators * sizeof(float)) != 0)
                fail("accumulators were written between wgmma_fence and the wgmma at " + text(site));
            a.registers[lane] = acc;
            for (int i = 0; i < kAccumulators; ++i) a.sum(lane, i) = acc[i];
            take_to_flight(acc);
        }
        fenced.erase(held);
        return a;
    }

    void multiply_next() {
        const Wgmma& w = issued[size_t(multiplied)];
        float a[kRows][kDepth];
        float b[kDepth][kColumns];
        const auto element = [&](uint64_t descriptor, bool is_mn_major, int mn, int k) {
            uint16_t bits;
            const uint32_t address = operand_address(descriptor, is_mn_major, mn, k);
            std::memcpy(&bits, shared_pointer(address, sizeof bits, w.site), sizeof bits);
            return w.is_bfloat16 ? bfloat16_bits_to_float(bits) : half_bits_to_float(bits);
        };
        for (int k = 0; k < kDepth; ++k) {
            for (int i = 0; i < kRows; ++i) a[i][k] = element(w.a, w.a_is_mn_major, kRows * rank + i, k);
            for (int j = 0; j < kColumns; ++j) b[k][j] = element(w.b, w.b_is_mn_major, j, k);
        }
        auto& sums = targets[size_t(multiplied)]->sums;
        if (!w.accumulates) std::memset(sums, 0, sizeof sums);
        multiply_truncated(sums, a, b);
        ++multiplied;
    }

    void land(int covered) {
        while (multiplied < covered) multiply_next();
        for (auto a = in_flight.begin(); a != in_flight.end();) {
            if (a->newest >= covered) {
                ++a;
                continue;
            }
            require_untouched(*a);
            for (int lane = 0; lane < kLanes; ++lane) {
                for (int i = 0; i < kAccumulators; ++i) a->registers[lane][i] = a->sum(lane, i);
            }
            a = in_flight.erase(a);
        }
        waited = covered;
    }

    bool reads(const Wgmma& w, uint32_t first, uint32_t end) const {
        const auto touches = [&](uint64_t descriptor, bool is_mn_major, int mn, int k) {
            const uint32_t address = operand_address(descriptor, is_mn_major, mn, k);
            return address >= first && address < end;
        };
        for (int k = 0; k < kDepth; ++k) {
            for (int i = 0; i < kRows; ++i) {
                if (touches(w.a, w.a_is_mn_major, kRows * rank + i, k)) return true;
            }
            for (int j = 0; j < kColumns; ++j) {
                if (touches(w.b, w.b_is_mn_major, j, k)) return true;
            }
        }
        return false;
    }
};

struct Warpgroup {
    Warp warps[kWarps];
    std::vector<int> waiting;  // threads

    int least_issued() const {
        size_t least = warps[0].issued.size();
        for (const Warp& w : warps) least = std::min(least, w.issued.size());
        return int(least);
    }
};

struct Warpgroups : BlockState {
    std::map<int, Warpgroup> all;

    // Of the thread that runs.
    Warpgroup& group() {
        const int number = current_thread() / (kWarps * kLanes);
        if ((number + 1) * kWarps * kLanes > int(blockDim.x * blockDim.y * blockDim.z))
            fail("wgmma in a warpgroup of less than four warps");
        Warpgroup& g = all[number];
        for (int rank = 0; rank < kWarps; ++rank) g.warps[rank].rank = rank;
        return g;
    }
    Warp& warp() { return group().warps[current_thread() / kLanes % kWarps]; }

    std::string left_over() const override {
        for (const auto& [number, g] : all) {
            for (const Warp& w : g.warps) {
                if (w.waited < int(w.issued.size()))
                    return "nobody waited for the wgmma at " + text(w.issued[size_t(w.waited)].site);
            }
        }
        return {};
    }
};

void issue(void* const operands[]) {
    Wgmma* of[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) of[lane] = static_cast<Wgmma*>(operands[lane]);
    const Wgmma& w = *of[0];
    Warpgroup& group = of_block<Warpgroups>().group();
    Warp& warp = of_block<Warpgroups>().warp();
    for (const Wgmma* other : of) {
        if (!is_same(*other, w))
            fail("the lanes of a warp bring different operands to the wgmma at " + text(w.site));
    }
    check(w.a, "A", w.site);
    check(w.b, "B", w.site);
    const int number = int(warp.issued.size());
    for (const Warp& other : group.warps) {
        if (int(other.issued.size()) > number && !is_same(other.issued[size_t(number)], w))
            fail("divergent warpgroup: wgmma number " + std::to_string(number) + " of warp " +
                 std::to_string(warp.rank) + " is at " + text(w.site) + ", and of warp " +
                 std::to_string(other.rank) + " at " + text(other.issued[size_t(number)].site) +
                 " or of other operands");
    }
    Accumulators* acc = warp.flying(w.acc);
    if (acc) {
        warp.require_untouched(*acc);
    } else {
        acc = &warp.lift(of, w.site);
    }
    acc->newest = number;
    warp.issued.push_back(w);
    warp.targets.push_back(acc);
    do_later([&warp] {
        if (warp.multiplied < int(warp.issued.size())) warp.multiply_next();
    });
    for (const int thread : group.waiting) resume(thread);
    group.waiting.clear();
}

void fence(void* const operands[]) {
    float* acc[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) acc[lane] = static_cast<float*>(operands[lane]);
    of_block<Warpgroups>().warp().fence(acc);
}

void commit(void* const[]) {
    Warp& warp = of_block<Warpgroups>().warp();
    warp.groups.push_back(int(warp.issued.size()));
}

void land(void* const operands[]) { of_block<Warpgroups>().warp().land(*static_cast<int*>(operands[0])); }

}  // namespace

void wgmma_fence(float* acc, Site site) {
    const Unwatched unwatched;
    warp_rendezvous(fence, acc, site);
}

void wgmma(Wgmma request) {
    const Unwatched unwatched;
    if (device().compute_capability != 90)
        fail("wgmma on another device than sm_90, at " + text(request.site));
    warp_rendezvous(issue, &request, request.site);
}

void wgmma_commit(Site site) {
    const Unwatched unwatched;
    warp_rendezvous(commit, nullptr, site);
}

void wgmma_wait(int pending, Site site) {
    const Unwatched unwatched;
    Warpgroup& group = of_block<Warpgroups>().group();
    Warp& warp = of_block<Warpgroups>().warp();
    warp_rendezvous([](void* const[]) {}, nullptr, site);
    const int left = int(warp.groups.size()) - pending;
    int covered = left > 0 ? std::max(warp.groups[size_t(left - 1)], warp.waited) : warp.waited;
    while (group.least_issued() < covered) {
        group.waiting.push_back(current_thread());
        suspend([] { return std::string("wgmma that not all four warps have come to,"); }, site);
    }
    warp_rendezvous(land, &covered, site);
}

std::string wgmma_that_reads(uint32_t address, int bytes) {
    for (const auto& [number, group] : of_block<Warpgroups>().all) {
        for (const Warp& warp : group.warps) {
            for (size_t i = size_t(warp.waited); i < warp.issued.size(); ++i) {
                if (warp.reads(warp.issued[i], address, address + uint32_t(bytes)))
                    return "the wgmma at " + text(warp.issued[i].site);
            }
        }
    }
    return {};
}

}  // namespace emulator
