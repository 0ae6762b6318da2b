// Barriers in shared memory that count arrivals and bytes, bulk copies that report to them, and barriers among
// some warps of a block; sm_90 and up.
//
// An mbarrier is in a phase, 0, 1, .. of which waiters know the parity (PTX ISA, "mbarrier"). A phase is over
// when all arrivals it was initialised for have come and all bytes that arrivals announced have landed; the next
// one begins at once with as many arrivals to come. An arrival releases what its thread did, a wait acquires it.
#pragma once

#include <cstdint>

#include "cuda/common/primitives.cuh"

namespace dml {

struct alignas(8) Mbarrier {
    uint64_t state;
};

}  // namespace dml

#if defined(DML_CUDA_ON_HOST)
#include "../../../tests/emulator/mbarrier_on_host.h"
#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "mbarrier.cuh needs sm_90 or newer"
#endif

namespace dml {

// By one thread. Others may use the barrier after fence_mbarrier_init and a barrier of the block.
DML_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}

// By the thread that initialised: makes mbarriers known to bulk copies, which work through the async proxy.
DML_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// What this thread has written to shared memory comes before what bulk copies and wgmma, after a barrier that
// follows, do to it.
DML_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DML_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes that bulk copies will report to this phase.
DML_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Waits until the current phase, or else the one before it, is a phase of this parity that is over. So on a fresh
// barrier 0 waits for the first phase, and 1 goes on at once.
DML_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
    uint32_t is_over;
    do {  // try_wait sleeps, but not for ever
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(is_over)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!is_over);
}

// By one thread: starts a copy of bytes, a multiple of 16, between addresses that are too. As they land they are
// reported to the barrier, whose waiters then see them; so do wgmma that these issue.
DML_DEVICE void bulk_copy(void* shared, const void* global, int bytes, Mbarrier* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// A barrier among this many threads, whole warps, of the block. id 1 to 15; 0 is block_sync's.
DML_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace dml

#endif  // DML_CUDA_ON_HOST
