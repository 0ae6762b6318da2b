// Distances from products of points.
#pragma once

#include "cuda/triplets/block.cuh"
#include "cuda/triplets/triplets.h"

namespace dml::cuda {

// A warp computes 32 columns of a row. For near points the square comes from the difference itself, summed by
// all lanes.
template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    distances_from_products(TripletRowBlock<T> row_block, const T* x, const T* x_squares, const T* y,
                            const T* y_squares, int64_t dim) {
    const int64_t wide = (row_block.columns + kWarpSize - 1) / kWarpSize;
    for (int64_t item = int64_t(blockIdx.x) * kTripletWarps + warp_id(); item < row_block.rows * wide;
         item += int64_t(gridDim.x) * kTripletWarps) {
        const int64_t r = item / wide, first = item % wide * kWarpSize, j = first + lane_id();
        const bool exists = j < row_block.columns;
        const T both = x_squares[r] + (exists ? y_squares[j] : T(0));
        T square = exists ? both - T(2) * row_block.s[r * row_block.pitch + j] : both;
        for (uint32_t near = warp_ballot(exists && square < kNearSquare<T> * both); near; near &= near - 1) {
            const int lane = __ffs(int(near)) - 1;
            const T *a = x + r * dim, *b = y + (first + lane) * dim;
            T sum = 0;
            for (int64_t d = lane_id(); d < dim; d += kWarpSize) sum += (a[d] - b[d]) * (a[d] - b[d]);
            sum = warp_sum(sum);
            if (lane == lane_id()) square = sum;
        }
        if (exists) row_block.s[r * row_block.pitch + j] = -std::sqrt(square > T(0) ? square : T(0));
    }
}

}  // namespace dml::cuda
