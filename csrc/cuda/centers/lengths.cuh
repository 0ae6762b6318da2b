// Lengths of points that lie as rows or as columns, and the way back through the division by them. A lane has a
// point, and the warps of a thread block share its dimensions: side by side points that are columns are read whole.
#pragma once

#include "cuda/centers/centers.h"
#include "cuda/triplets/block.cuh"

namespace dml::cuda {

inline constexpr size_t kLengthBytes = kTripletThreads * sizeof(double);

// The sum of term(d) over the dimensions, the same in all threads of a lane's point.
template <typename T, typename Term>
DML_DEVICE T sum_of_dimensions(int64_t dim, bool exists, const Term& term) {
    T* const shared = reinterpret_cast<T*>(shared_array<double>(0, kTripletThreads));
    T sum = T(0);
    for (int64_t d = warp_id(); exists && d < dim; d += kTripletWarps) sum += term(d);
    shared[threadIdx.x] = sum;
    block_sync();
    sum = T(0);
#pragma unroll
    for (int w = 0; w < kTripletWarps; ++w) sum += shared[w * kWarpSize + lane_id()];
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    store_inverse_lengths(StridedPoints<const T> points, T tiny, T* inverse) {
    const int64_t j = int64_t(blockIdx.x) * kWarpSize + lane_id();
    const bool exists = j < points.count;
    const T* const point = points.data + j * points.row;
    const T square = sum_of_dimensions<T>(points.dim, exists, [&](int64_t d) {
        const T x = point[d * points.col];
        return x * x;
    });
    const T length = std::sqrt(square);
    if (exists && warp_id() == 0) inverse[j] = length <= tiny ? T(0) : T(1) / length;
}

template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    take_out_lengths(StridedPoints<T> gradient, StridedPoints<const T> points, const T* inverse) {
    const int64_t j = int64_t(blockIdx.x) * kWarpSize + lane_id();
    const bool exists = j < points.count;
    const T* const point = points.data + j * points.row;
    T* const out = gradient.data + j * gradient.row;
    const T product = sum_of_dimensions<T>(
        points.dim, exists, [&](int64_t d) { return out[d * gradient.col] * point[d * points.col]; });
    if (!exists) return;
    const T along = product * inverse[j] * inverse[j];
    for (int64_t d = warp_id(); d < points.dim; d += kTripletWarps)
        out[d * gradient.col] -= along * point[d * points.col];
}

}  // namespace dml::cuda
