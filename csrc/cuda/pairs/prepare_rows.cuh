// Every row's norm.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/pairs/row_stats.cuh"

namespace dml::cuda {

inline constexpr int kNormThreads = 256;

// One warp a row. open: also sets the row's bounds so that every pair is kept.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kNormThreads)
    prepare_rows(Rows<T, Acc> rows, Similarity similarity, RowStats<Acc> row_stats, bool open) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t i = int64_t(blockIdx.x) * (kNormThreads / kWarpSize) + warp_id();
    const Matrix<T>& points = rows.points;
    if (i >= points.rows) return;
    constexpr int kVector = 16 / int(sizeof(T));
    const T* row = points.data + i * points.stride;
    Acc squares = 0;
    const auto add = [&](T value) { squares = std::fma(Acc(value), Acc(value), squares); };
    const int64_t whole = begin_on_chunks(points) ? points.cols / kVector * kVector : 0;
#pragma unroll 4
    for (int64_t d = lane_id() * kVector; d < whole; d += kWarpSize * kVector) {
        const auto values = *reinterpret_cast<const Vector<T, kVector>*>(row + d);
#pragma unroll
        for (int e = 0; e < kVector; ++e) add(values.value[e]);
    }
    for (int64_t d = whole + lane_id(); d < points.cols; d += kWarpSize) add(row[d]);
    squares = warp_sum(squares);
    if (lane_id() != 0) return;
    rows.norms[i] = row_norm(squares, points, i, similarity);
    if (!open) return;
    row_stats.neg_above[i] = Bounds<Acc>::all().neg_above;
    row_stats.pos_below[i] = Bounds<Acc>::all().pos_below;
}

}  // namespace dml::cuda
