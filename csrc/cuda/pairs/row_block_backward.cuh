// Small batches, backward: similarities are computed again, become weights in place and multiply the points.
#pragma once

#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/row_block.cuh"
#include "cuda/pairs/row_weights.cuh"

namespace dml::cuda {

// Whose losses reach the rows' gradient: the rows' own where they are queries, the columns' where those are.
struct LossSides {
    bool rows, cols;
};

// 1. Which of row i's pairs are kept, by either line; s [columns] of the others becomes 0.
struct KeptPairs {
    LaneSet positives, kept;
};
template <typename T, typename Acc>
DML_DEVICE KeptPairs keep_pairs(const RowBlockPairs<T, Acc>& pairs, int64_t i, Acc* s,
                                const RowStats<Acc>& row_stats, LossSides sides, const Bounds<Acc>& bounds) {
    const int64_t label = pairs.rows.labels[i];
    mark_diagonal(pairs, i, s);
    mark_self(pairs, i, s);
    KeptPairs found;
    for_each_of_lane(pairs.cols.points.rows, [&](int k, int j) {
        const bool positive = pairs.cols.labels[j] == label;
        Acc below = bounds.pos_below, above = bounds.neg_above;
        if (sides.cols) {
            below = std::fmax(below, row_stats.pos_below[j]);
            above = std::fmin(above, row_stats.neg_above[j]);
        }
        const bool keep = positive ? s[j] < below : s[j] > above;
        found.positives.add(k, positive);
        found.kept.add(k, keep);
        if (!keep) s[j] = Acc(0);
    });
    return found;
}

// 3. Weights sims [16, pitch] times the columns, 64 dimensions at a time; along [16] times the rows is
// subtracted.
template <typename GradMath, typename T, typename Acc>
DML_DEVICE void multiply_row_block(const RowBlockPairs<T, Acc>& pairs, int64_t all_rows, int64_t row0,
                                   const Acc* sims, const Acc* along, Acc factor, T* grad) {
    using Layout = RowBlockLayout<T, Acc>;
    constexpr int kDepth = Layout::kDepth, kPitch = Layout::kAcrossPitch;
    unsigned char* stages = shared_array<unsigned char>(0, Layout::kNorms);
    const Matrix<T>&rows = pairs.rows.points, &cols = pairs.cols.points;
    for (int64_t d0 = 0; d0 < rows.cols; d0 += kRowBlockCols) {
        Product<GradMath, RowBlockGradShape> product;
        const ColumnBoxes<T, kDepth, kRowBlockCols, kPitch, kRowBlockThreads> boxes(cols, 0, d0);
        const auto slice = [&](int stage) {
            return reinterpret_cast<T*>(stages + stage * Layout::kStageBytes);
        };
        int fetched = 0;
        const auto next = [&](int stage) {
            boxes.start(slice(stage), fetched);
            fetched += kDepth;
        };
        int at = 0;
        const auto use = [&](int stage, const auto& fetch) {
            product.template add<kDepth>(ResidentAlongK<Acc>{sims + at, pairs.pitch},
                                         AcrossK<T, kPitch>{slice(stage)}, fetch);
            at += kDepth;
        };
        pipeline<kRowBlockStages, false>(int((cols.rows + kDepth - 1) / kDepth), next, next, use);
        product.for_each([&](int r, int c, Acc g) {
            const int64_t i = row0 + r, d = d0 + c;
            if (i >= all_rows || d >= rows.cols) return;
            if (i >= rows.rows) {  // not in use
                grad[i * rows.cols + d] = T(0.0f);
                return;
            }
            const Acc unit = unit_factor(pairs.rows.norms[i], pairs.similarity);
            const Acc x = Acc(rows.data[i * rows.stride + d]) * unit;
            grad[i * rows.cols + d] = factor == Acc(0) ? T(0.0f) : T(factor * ((g - along[r] * x) * unit));
        });
    }
}

// grad: [rows, dim].
template <typename Math, typename GradMath, typename T = typename Math::Value,
          typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kRowBlockThreads, 1)
    row_block_backward(const __grid_constant__ RowBlockPairs<T, Acc> all,
                       const __grid_constant__ AnyFormula<Acc> any_formula, RowStats<Acc> row_stats,
                       LossSides sides, Upstream<Acc> upstream, T* grad) {
    using Layout = RowBlockLayout<T, Acc>;
    const RowBlockPairs<T, Acc> pairs = all.in_use();
    Acc* along = shared_array<Acc>(Layout::kAlong, kRowBlockRows);
    Acc* sims = shared_array<Acc>(Layout::kSims, kRowBlockRows * pairs.pitch);
    const int64_t row0 = int64_t(blockIdx.x) * kRowBlockRows, left = pairs.rows.points.rows - row0;
    const int64_t rows = left < kRowBlockRows ? left : kRowBlockRows;
    row_block_similarities<Math, false>(pairs, row0, sims);
    const Similarity kind = pairs.similarity;
#pragma unroll 1
    for (int r = warp_id(); r < rows; r += kRowBlockWarps) {
        const int64_t i = row0 + r;
        Acc* s = sims + r * pairs.pitch;
        RowWeight<Acc> row_weight;
        if (sides.rows) row_weight = RowWeight<Acc>::load(row_stats, i, upstream);
        const KeptPairs pairs_of_row = keep_pairs(pairs, i, s, row_stats, sides, row_weight.bounds);
        // 2. In place, similarities become dL/ds times the factor that makes column j a unit row, so that
        // they multiply the columns as they are.
        Acc multiple = 0;  // of row i, to subtract from its sum
        any_formula.visit([&](const auto& formula) {
            pairs_of_row.kept.for_each([&](int j) {
                const Acc sim = s[j];
                const bool positive = pairs_of_row.positives.has(j / kWarpSize);
                RowWeight<Acc> line_weight = row_weight;
                Acc w = 0;
#pragma unroll 1
                for (int side = 0; side < (sides.cols ? 2 : 1); ++side) {
                    if (side == 1) line_weight = RowWeight<Acc>::load(row_stats, j, upstream);
                    w += line_weight.of(formula, positive, sim);
                }
                s[j] = w;
                if (w == Acc(0)) return;
                const Acc norm = pairs.cols.norms[j];
                if (kind.euclidean) w = by_distance(w, sim);
                // x_i . y_j, from a distance 1 - d^2 / 2
                const Acc cosine = !kind.euclidean ? sim : Acc(1) - sim * sim / Acc(2);
                multiple += kind.normalize ? (norm == Acc(0) ? Acc(0) : w * cosine) : w;
                s[j] = w * unit_factor(norm, kind);
            });
        });
        multiple = warp_sum(multiple);
        if (lane_id() == 0) along[r] = kind.normalize || kind.euclidean ? multiple : Acc(0);
    }
    // The pipeline's first barrier comes before any thread reads the weights, unless there is no slice.
    block_sync();
    multiply_row_block<GradMath>(pairs, all.rows.points.rows, row0, sims, along,
                                 gradient_factor(row_stats, upstream), grad);
}

}  // namespace dml::cuda
