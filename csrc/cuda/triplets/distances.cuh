// Distances from products of points.
#pragma once

#include "cuda/triplets/block.cuh"
#include "cuda/triplets/triplets.h"

namespace dml::cuda {

// A warp takes 32 columns of a row. Where the points are close the difference is summed up again, by all
// lanes.
template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    distances_from_products(TripletStrip<T> strip, const T* x, const T* x_squares, const T* y,
                            const T* y_squares, int64_t dim) {
    const int64_t wide = (strip.columns + kWarpSize - 1) / kWarpSize;
    for (int64_t item = int64_t(blockIdx.x) * kTripletWarps + warp_id(); item < strip.rows * wide;
         item += int64_t(gridDim.x) * kTripletWarps) {
        const int64_t r = item / wide, first = item % wide * kWarpSize, j = first + lane_id();
        const bool exists = j < strip.columns;
        const T both = x_squares[r] + (exists ? y_squares[j] : T(0));
        T square = exists ? both - T(2) * strip.s[r * strip.pitch + j] : both;
        for (uint32_t near = warp_ballot(exists && square < kNearSquare<T> * both); near; near &= near - 1) {
            const int lane = __ffs(int(near)) - 1;
            const T *a = x + r * dim, *b = y + (first + lane) * dim;
            T sum = 0;
            for (int64_t d = lane_id(); d < dim; d += kWarpSize) sum += (a[d] - b[d]) * (a[d] - b[d]);
            sum = warp_sum(sum);
            if (lane == lane_id()) square = sum;
        }
        if (exists) strip.s[r * strip.pitch + j] = -std::sqrt(square > T(0) ? square : T(0));
    }
}

}  // namespace dml::cuda
