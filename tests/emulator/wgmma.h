// wgmma of the block that runs.
//
// Each warp multiplies its 16 rows on its own, at a moment that the seed draws between its wgmma and its wait, in order;
// operands are read then, where their descriptors say. A wait ends only when all four warps of the warpgroup have come to
// the wgmma that it covers, with the same operands from the same place. From a wgmma to the wait that covers it the
// accumulators are signalling NaN, which arithmetic makes quiet: so a use is seen in the result, and a write here.
//
// What the device leaves undefined ends the launch: accumulators that threads touched since their fence, or while they
// were in flight; a descriptor that begins inside a pattern of its swizzle; wgmma that nobody waited for when the block
// ends.
#pragma once

#include <cstdint>

#include "machine.h"

namespace emulator {

constexpr int kAccumulators = 64;  // of a thread

// What a lane brings to m64n128k16.
struct Wgmma {
    float* acc;
    uint64_t a, b;  // descriptors
    bool a_is_mn_major, b_is_mn_major, is_bfloat16, accumulates;
    Site site;
};

void wgmma_fence(float* acc, Site site);
void wgmma(Wgmma request);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);

// "the wgmma at .." that no wait covers yet and that reads some of these bytes of shared memory, or nothing.
std::string wgmma_that_reads(uint32_t address, int bytes);

// The address in shared memory of element (mn, k) of an operand of 2-byte elements.
uint32_t operand_address(uint64_t descriptor, bool is_mn_major, int mn, int k);

}  // namespace emulator
