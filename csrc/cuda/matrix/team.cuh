// The threads that work on one row of the matrix: a warp, or a block for long rows.
#pragma once

#include "cuda/matrix/sizes.h"
#include "cuda/pairs/tile_pairs.cuh"

namespace dml::cuda {

inline constexpr int kTeamThreads = 256;
inline constexpr int kTeamWarps = kTeamThreads / kWarpSize;
inline constexpr int kMostMerged = 4;  // numbers at once

template <bool kBlock, typename Acc>
struct Team {
    static constexpr int kWarps = kBlock ? kTeamWarps : 1, kThreads = kWarps * kWarpSize;
    Acc* scratch;  // [kMostMerged, kTeamWarps], shared

    static DML_DEVICE int warp() { return kBlock ? warp_id() : 0; }
    static DML_DEVICE int thread() { return kBlock ? int(threadIdx.x) : lane_id(); }

    // Merges each number over the team; every thread gets the same bits. The numbers' shuffles alternate, so
    // that none waits for another's.
    template <int Count, typename Merge>
    DML_DEVICE void merge(Acc (&x)[Count], const Merge& merge) const {
        static_assert(Count <= kMostMerged, "room for so many");
#pragma unroll 1
        for (int m = kWarpSize / 2; m > 0; m /= 2) {
#pragma unroll
            for (int k = 0; k < Count; ++k) x[k] = merge(x[k], shfl_xor(x[k], m));
        }
        if constexpr (kBlock) {
            block_sync();  // previous readers are done
            if (lane_id() == 0) {
#pragma unroll
                for (int k = 0; k < Count; ++k) scratch[k * kTeamWarps + warp_id()] = x[k];
            }
            block_sync();
#pragma unroll
            for (int k = 0; k < Count; ++k) {
                x[k] = scratch[k * kTeamWarps];
                for (int w = 1; w < kTeamWarps; ++w) x[k] = merge(x[k], scratch[k * kTeamWarps + w]);
            }
        }
    }
};

}  // namespace dml::cuda
