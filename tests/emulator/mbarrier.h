// What mbarriers count, the bulk copies that report to them, and named barriers, of the block that runs.
//
// The rules are PTX's: "mbarrier", "cp.async.bulk", "Async proxy", "bar". A bulk copy fills its destination with NaN
// when it starts; the source is read, and the bytes land, at a moment that the seed draws, copies in any order. What
// the device leaves undefined ends the launch: an mbarrier that is used before it was initialised, or by a copy without
// the fence, that has too many arrivals, that was written over, or whose bytes do not add up when the block ends.
//
// Not modelled: that writes of threads to shared memory need fence_async_proxy before copies and wgmma use it.
#pragma once

#include <cstddef>

#include "machine.h"

namespace emulator {

void mbarrier_init(void* barrier, int arrivals, Site site);
void fence_async();  // what this thread initialised may be used by copies
void mbarrier_arrive(void* barrier, int expected_bytes, Site site);
void mbarrier_wait(void* barrier, int parity, Site site);
void bulk_copy(void* shared, const void* global, int bytes, void* barrier, Site site);
void named_barrier(int id, int threads, Site site);

}  // namespace emulator
