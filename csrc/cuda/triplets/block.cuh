// Reductions and prefix sums over a thread block of the triplet kernels, in a fixed order.
#pragma once

#include "cuda/pairs/rows.cuh"

namespace dml::cuda {

inline constexpr int kTripletThreads = 256, kTripletWarps = kTripletThreads / kWarpSize;

inline constexpr int kMergeBytes = kTripletWarps * int(sizeof(double));
inline constexpr size_t kTripletSharedBytes = kMergeBytes + (kTripletThreads + 1) * sizeof(double);

// op over all threads' x; every thread gets the result.
template <typename T, typename Op>
DML_DEVICE T block_merge(T x, const Op& op) {
    static_assert(sizeof(T) <= sizeof(double));
    T* shared = reinterpret_cast<T*>(shared_array<double>(0, kTripletWarps));
#pragma unroll
    for (int m = kWarpSize / 2; m > 0; m /= 2) x = op(x, shfl_xor(x, m));
    if (lane_id() == 0) shared[warp_id()] = x;
    block_sync();
    x = shared[0];
#pragma unroll
    for (int w = 1; w < kTripletWarps; ++w) x = op(x, shared[w]);
    block_sync();
    return x;
}
template <typename T>
DML_DEVICE T merge_sum(T x) {
    return block_merge(x, [](T a, T b) { return a + b; });
}
template <typename T>
DML_DEVICE T merge_max(T x) {
    return block_merge(x, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
DML_DEVICE T merge_min(T x) {
    return block_merge(x, [](T a, T b) { return a < b ? a : b; });
}

// The sum of x over the threads before this one, and over all.
template <typename T>
DML_DEVICE T block_scan(T x, T& total) {
    static_assert(sizeof(T) <= sizeof(double));
    T* shared = reinterpret_cast<T*>(shared_array<double>(0, kTripletWarps));
    const int lane = lane_id();
    T inclusive = x;
#pragma unroll
    for (int m = 1; m < kWarpSize; m *= 2) {
        const T lower = shfl(inclusive, lane >= m ? lane - m : lane);
        if (lane >= m) inclusive += lower;
    }
    const T before = shfl(inclusive, lane > 0 ? lane - 1 : 0);
    if (lane == kWarpSize - 1) shared[warp_id()] = inclusive;
    block_sync();
    T sum = 0, base = 0;
#pragma unroll
    for (int w = 0; w < kTripletWarps; ++w) {
        if (w == warp_id()) base = sum;
        sum += shared[w];
    }
    block_sync();
    total = sum;
    return lane > 0 ? base + before : base;
}

}  // namespace dml::cuda
