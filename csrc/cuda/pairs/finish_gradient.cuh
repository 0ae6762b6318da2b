// The last step of a gradient: from the sum of weights times points, which is G_i / |q_i|, through the normalisation.
#pragma once

#include "cuda/pairs/row_weights.cuh"

namespace dml::cuda {

inline constexpr int kFinishThreads = 256;

// By a warp: the gradient of row i from its sum g(dimension), projected through the normalisation, times
// `scale`. weight_sum: of its weights, for distances of rows that are not normalised. grad [dim]: 0 where
// `factor` is.
template <typename T, typename Acc, typename Out, typename Sum>
DML_DEVICE void project_row(const Matrix<T>& points, int64_t i, Similarity similarity, Acc norm,
                            Acc weight_sum, Acc factor, Acc scale, const Sum& g, Out* grad) {
    const T* q = points.data + i * points.stride;
    Acc along = 0;  // the multiple of q_i to subtract
    if (similarity.normalize) {
        for (int64_t d = lane_id(); d < points.cols; d += kWarpSize) along = std::fma(Acc(q[d]), g(d), along);
        along = warp_sum(along) * norm;  // x_i . G_i
    } else if (similarity.euclidean) {
        along = weight_sum;
    }
    const Acc unit = similarity.normalize ? norm : Acc(1);
    for (int64_t d = lane_id(); d < points.cols; d += kWarpSize) {
        const Acc value = g(d) - along * (Acc(q[d]) * unit);
        grad[d] = factor == Acc(0) ? Out(0.0f) : Out(scale * value);
    }
}

// One warp a row in [begin, end): from sum [end - begin, dim] to the gradient grad [rows, dim], which may be
// the same memory. weight_sums: [rows] of each row's weights, for distances of rows that are not normalised.
// A row that is not in use has a gradient of 0.
template <typename T, typename Acc, typename Out = T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_gradient(Rows<T, Acc> rows, int64_t begin, int64_t end, Similarity similarity,
                    RowStats<Acc> row_stats, Upstream<Acc> upstream, const Acc* weight_sums, const Acc* sum,
                    Out* grad) {
    wait_for_previous_kernel();
    const int64_t i = begin + int64_t(blockIdx.x) * (kFinishThreads / kWarpSize) + warp_id();
    const Matrix<T>& points = rows.points;
    if (i >= end) return;
    const Acc* g = sum + (i - begin) * points.cols;
    const bool in_use = i < rows.in_use().points.rows;
    const Acc factor = in_use ? gradient_factor(row_stats, upstream) : Acc(0);
    const Acc scale = similarity.normalize ? factor / row_stats.header[kRange] : factor;
    project_row(
        points, i, similarity, rows.norms[i], weight_sums && in_use ? weight_sums[i] : Acc(0), factor, scale,
        [&](int64_t d) { return g[d]; }, grad + i * points.cols);
}

}  // namespace dml::cuda
