// From the rows' losses to the result: one block, in a fixed order.
#pragma once

#include "pair_loss.h"
#include "rows.cuh"

namespace dml::cuda {

inline constexpr int kReduceThreads = 1024;

template <typename T>
DML_DEVICE T block_sum(T x, T* shared) {  // shared: [warps]; every thread gets the sum
    const int warps = int(blockDim.x) / kWarpSize;
    x = warp_sum(x);
    if (lane_id() == 0) shared[warp_id()] = x;
    block_sync();
    x = warp_sum(lane_id() < warps ? shared[lane_id()] : T(0));
    block_sync();
    return x;
}

// How many of the rows are not finite.
template <typename Acc>
DML_DEVICE int count_not_finite(const Acc* inverse_norms, int64_t rows) {
    int bad = 0;
    for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) bad += is_finite(inverse_norms[i]) ? 0 : 1;
    return bad;
}

// result: [1], or [rows] where nothing is reduced. Where any point is not finite, each row that has the
// pairs it needs becomes NaN, and with the scale every gradient does; where no row has, all stays 0.
template <typename Loss, typename Acc>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_losses(Loss loss, RowStats<Acc> stats, int64_t rows, const Acc* inverse_norms,
                  const Acc* ref_inverse_norms, int64_t refs, const int64_t* ref_count, Reduction reduction,
                  Acc* result) {
    Acc* sums = shared_array<Acc>(0, kWarpSize);
    int* counts = shared_array<int>(kWarpSize * int(sizeof(Acc)), kWarpSize);

    const int bad = count_not_finite(inverse_norms, rows) +
                    count_not_finite(ref_inverse_norms, rows_in_use(ref_count, refs));
    const bool finite = block_sum(bad, counts) == 0;

    Acc sum = 0;
    int count = 0;
#pragma unroll 1  // several rows' divisions at once, in double, take too many registers
    for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
        const int flags = stats.flags[i];
        const bool poisoned = !finite && (flags & kEligible);
        const Acc x = poisoned ? not_a_number<Acc>() : finite ? row_loss(stats, i, loss) : Acc(0);
        if (reduction == Reduction::kNone) result[i] = x;
        sum += x;
        const bool nonzero = !(x == Acc(0));  // NaN counts
        const bool valid = poisoned || (flags & kValid);
        count += reduction == Reduction::kMeanNonzero ? nonzero
                 : reduction == Reduction::kMeanValid ? valid
                                                      : 1;
    }
    sum = block_sum(sum, sums);
    count = block_sum(count, counts);
    if (threadIdx.x != 0) return;
    const bool mean = reduction != Reduction::kSum && reduction != Reduction::kNone;
    const Acc scale = !mean ? Acc(1) : count > 0 ? Acc(1) / Acc(count) : Acc(0);
    const bool poisoned = sum != sum;
    stats.scale[0] = finite ? scale : poisoned ? not_a_number<Acc>() : Acc(0);
    if (reduction != Reduction::kNone) result[0] = sum * scale;
}

inline constexpr size_t kReduceSharedBytes = kWarpSize * (sizeof(double) + sizeof(int));

}  // namespace dml::cuda
