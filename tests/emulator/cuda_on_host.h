// Runs the CUDA kernels on a CPU, from their own source, to prove them right without a GPU.
//
// The kernels call only the functions of primitives.cuh and launch.h. Built by a host compiler with
// -DDML_CUDA_ON_HOST, those come from here instead (below), and mean the same:
//
// - A thread is a fiber. A block's fibers take turns on one core, and change only where a thread
//   waits: at a barrier or a warp function. Blocks run one after another in shuffled order.
// - A warp function waits for its 32 lanes; the last to arrive computes for all of them, fragments
//   laid out as PTX says, tensor-core sums truncated as the hardware does.
// - cp.async fills its destination with NaN when it starts and with the data at the wait. Both a
//   reader that is too early and one that still wanted the old contents see NaN.
// - Shared memory is NaN at block start. Every shared_array is a heap block of its own, so
//   AddressSanitizer names the line that runs over its end, as it does for global memory.
// - mbarriers, bulk copies, named barriers and wgmma of sm_90a come from mbarrier.h and wgmma.h.
// - A barrier that not all live threads reach, or that they reach at different lines, ends the
//   launch with an exception that says who waits where.
//
// A missing barrier shows only if some thread overtakes another. Hence two schedules (machine.h):
// round-robin, where warps drift a little apart, and warp-first, where one warp runs ahead as far as
// it can. A test runs both with several seeds. Built with -fsanitize=thread instead, only barriers
// (not turns) order what threads do, and a race is reported even if nobody overtook, within a warp
// too. Races between blocks, and between kernels of which one need not wait for the other, are for
// between_blocks.cpp.
//
// Not modelled: time, memory banks, caches, the number of registers; and only ThreadSanitizer knows
// that shuffles and mma order no memory between the lanes of a warp, as warp_sync does.
//
// Included by primitives.cuh, never directly.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_language.h"
#include "float16.h"
#include "machine.h"
#include "warp_math.h"

#define DML_DEVICE inline

namespace dml {

using emulator::Site;

DML_DEVICE int lane_id() { return int(threadIdx.x) % kWarpSize; }
DML_DEVICE int warp_id() { return int(threadIdx.x) / kWarpSize; }

// ---- barriers and fences ----------------------------------------------------------------------

DML_DEVICE void block_sync(Site site = Site::here()) { emulator::block_barrier(site); }

DML_DEVICE void warp_sync(Site site = Site::here()) {
    emulator::warp_rendezvous([](void* const*) {}, nullptr, site, true);
}

// ---- between kernels --------------------------------------------------------------------------

DML_DEVICE void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
DML_DEVICE void let_next_kernel_start() {}

// ---- shared memory and asynchronous copies ----------------------------------------------------

template <typename T>
DML_DEVICE T* shared_array(int byte_offset, int count) {
    return static_cast<T*>(emulator::shared_array(byte_offset, sizeof(T) * size_t(count)));
}

DML_DEVICE void require_aligned(const void* address, int bytes, const char* what, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes) == 0) return;
    emulator::fail(std::string(what) + " at " + site.file + ":" + std::to_string(site.line) +
                   " is not aligned to " + std::to_string(bytes) + " bytes");
}

template <int Bytes>
DML_DEVICE void cp_async(void* shared, const void* global, int valid_bytes = Bytes,
                         Site site = Site::here()) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
    require_aligned(shared, Bytes, "the destination of cp_async", site);
    require_aligned(global, Bytes, "the source of cp_async", site);
    if (valid_bytes < 0 || valid_bytes > Bytes) emulator::fail("cp_async: bad valid_bytes");
    emulator::Copy copy{shared, Bytes, {}};
    std::memcpy(copy.data, global, size_t(valid_bytes));
    std::memset(shared, 0xff, Bytes);
    emulator::start_copy(copy);
}

DML_DEVICE void cp_async_commit() { emulator::commit_copies(); }

template <int Pending>
DML_DEVICE void cp_async_wait() {
    emulator::Copy copy;
    while (emulator::next_landed_copy(Pending, copy)) {
        std::memcpy(copy.destination, copy.data, size_t(copy.bytes));
    }
}

// ---- matrix fragments -------------------------------------------------------------------------

template <int Matrices>
DML_DEVICE void ldmatrix(uint32_t (&r)[Matrices], const void* row, bool transposed, Site site) {
    emulator::LoadMatrix request{Matrices, transposed, {}, r};
    if (lane_id() < 8 * Matrices) {  // the other lanes' addresses do not count
        require_aligned(row, 16, "the row of ldmatrix", site);
        std::memcpy(request.row, row, 16);
    }
    emulator::warp_rendezvous(emulator::load_matrix, &request, site);
}

DML_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
    ldmatrix<4>(r, row, false, site);
}
DML_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
    ldmatrix<2>(r, row, false, site);
}
DML_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
    ldmatrix<4>(r, row, true, site);
}
DML_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
    ldmatrix<2>(r, row, true, site);
}

template <typename T>
struct MmaOnHost;
template <>
struct MmaOnHost<__half> {
    static constexpr auto multiply = emulator::multiply_half;
};
template <>
struct MmaOnHost<__nv_bfloat16> {
    static constexpr auto multiply = emulator::multiply_bfloat16;
};
template <>
struct MmaOnHost<Tf32> {
    static constexpr auto multiply = emulator::multiply_tf32;
};

template <typename T>
DML_DEVICE void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    Site site = Site::here()) {
    emulator::Multiply request{acc, a, b};
    emulator::warp_rendezvous(MmaOnHost<T>::multiply, &request, site);
}

template <typename T>
DML_DEVICE void mma_from_zero(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Site site = Site::here()) {
    for (float& x : acc) x = 0.0f;
    mma<T>(acc, a, b, site);
}

// ---- conversions ------------------------------------------------------------------------------

template <typename T>
DML_DEVICE uint32_t pack2(float low, float high) {
    return uint32_t(T(low).bits) | uint32_t(T(high).bits) << 16;
}

DML_DEVICE void unpack2(uint32_t pair, float& low, float& high) {
    low = emulator::half_bits_to_float(uint16_t(pair));
    high = emulator::half_bits_to_float(uint16_t(pair >> 16));
}

DML_DEVICE float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

// ---- integers that several threads add to -----------------------------------------------------

DML_DEVICE void atomic_add(int32_t* sum, int32_t value) { __atomic_fetch_add(sum, value, __ATOMIC_RELAXED); }

// Release and acquire, as on the device.
DML_DEVICE unsigned take_ticket(unsigned* tickets) {
    return __atomic_fetch_add(tickets, 1u, __ATOMIC_ACQ_REL);
}

// ---- between the lanes of a warp --------------------------------------------------------------

template <typename T>
DML_DEVICE T shfl(T value, int source_lane, Site site = Site::here()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    emulator::Shuffle request{0, source_lane};
    std::memcpy(&request.value, &value, sizeof value);
    emulator::warp_rendezvous(emulator::shuffle, &request, site);
    std::memcpy(&value, &request.value, sizeof value);
    return value;
}

template <typename T>
DML_DEVICE T shfl_xor(T value, int lane_mask, Site site = Site::here()) {
    return shfl(value, lane_id() ^ lane_mask, site);
}

DML_DEVICE uint32_t warp_ballot(bool predicate, Site site = Site::here()) {
    emulator::Vote request{predicate, 0};
    emulator::warp_rendezvous(emulator::vote, &request, site);
    return request.result;
}

DML_DEVICE bool warp_any(bool predicate, Site site = Site::here()) {
    return warp_ballot(predicate, site) != 0;
}

}  // namespace dml
