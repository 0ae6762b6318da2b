// mbarrier.cuh for the emulator. Included by that, never directly.
#pragma once

#include "mbarrier.h"

namespace dml {

DML_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals, Site site = Site::here()) {
    emulator::mbarrier_init(barrier, arrivals, site);
}
DML_DEVICE void fence_mbarrier_init() { emulator::fence_async(); }
DML_DEVICE void fence_async_proxy() { emulator::fence_async(); }

DML_DEVICE void mbarrier_arrive(Mbarrier* barrier, Site site = Site::here()) {
    emulator::mbarrier_arrive(barrier, 0, site);
}
DML_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, Site site = Site::here()) {
    emulator::mbarrier_arrive(barrier, bytes, site);
}
DML_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity, Site site = Site::here()) {
    emulator::mbarrier_wait(barrier, parity, site);
}
DML_DEVICE void bulk_copy(void* shared, const void* global, int bytes, Mbarrier* barrier,
                          Site site = Site::here()) {
    emulator::bulk_copy(shared, global, bytes, barrier, site);
}
DML_DEVICE void named_barrier_sync(int id, int threads, Site site = Site::here()) {
    emulator::named_barrier(id, threads, site);
}

}  // namespace dml
