// Reduces the rows' results to the loss: one thread block, in a fixed order.
#pragma once

#include "cuda/pairs/row_stats.cuh"

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

// How the sums become the result.
struct Division {
    Reduction reduction;
    bool divide;  // else the result is [parts 0 and 1, counts 0 and 1]
    int parts;
};

// By one block of kThreads, of which each warp adds up a share of one number. shared: [warps]. result: [1], or [4]
// undivided, or [rows] without a reduction, already written. If any point is not finite, every row that has the
// pairs it needs becomes NaN, and so does every gradient; if no row has, all stays 0.
template <int kThreads, int kUnroll, typename Acc>
DML_DEVICE void reduce_slots(const RowStats<Acc>& row_stats, int64_t rows, const Results<Acc>& results,
                             const Division& division, Acc* shared, Acc* result) {
    constexpr int kNumbers = 8, kShares = kThreads / kWarpSize / kNumbers;
    static_assert(kResultNumbers <= kNumbers && kShares > 0, "a warp for each number");
    const int number = warp_id() % kNumbers, share = warp_id() / kNumbers, slots = int(results.slots);
    Acc sum = 0;
    if (number < kResultNumbers) {
#pragma unroll kUnroll
        for (int slot = share * kWarpSize + lane_id(); slot < slots; slot += kShares * kWarpSize)
            sum += results.data[number * slots + slot];
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) shared[warp_id()] = sum;
    block_sync();
    const auto total = [&](int k) {
        Acc x = shared[k];
#pragma unroll
        for (int s = 1; s < kShares; ++s) x += shared[s * kNumbers + k];
        return x;
    };
    const bool finite = total(kNotFinite) == Acc(0);
    const Acc poison = total(kEligibleRows) > Acc(0) ? not_a_number<Acc>() : Acc(0);
    if (results.rows && !finite) {
        for (int64_t i = threadIdx.x; i < rows; i += blockDim.x)
            results.rows[i] = row_stats.flags[i] & kEligible ? not_a_number<Acc>() : Acc(0);
    }
    if (threadIdx.x != 0) return;
    const bool mean = division.divide && division.reduction != Reduction::kSum && !results.rows;
    Acc loss = 0;
#pragma unroll 1
    for (int k = 0; k < 2; ++k) {
        const Acc count = total(kCounts + k), scale = !mean            ? Acc(1)
                                                      : count > Acc(0) ? Acc(1) / count
                                                                       : Acc(0);
        const Acc part = !finite && k < division.parts ? poison : total(kSums + k);
        row_stats.header[kScale + k] = scale;
        loss += part * scale;
        if (division.divide) continue;
        result[k] = part;
        result[2 + k] = count;
    }
    row_stats.header[kHealth] = rows == 0 ? Acc(0) : finite ? Acc(1) : poison;
    row_stats.header[kRange] = total(kVeryLong) > Acc(0) ? long_rows_range<Acc>() : Acc(1);
    if (division.divide && !results.rows) result[0] = loss;
}

template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_results(RowStats<Acc> row_stats, int64_t rows, Results<Acc> results, Division division,
                   Acc* result) {
    wait_for_previous_kernel();
    reduce_slots<kReduceThreads, 4>(row_stats, rows, results, division, shared_array<Acc>(0, kWarpSize),
                                    result);
}

inline constexpr size_t kReduceSharedBytes = kWarpSize * sizeof(double);

}  // namespace dml::cuda
