// Small batches. A block owns a strip of 16 rows and all columns, and the strip of S stays in its shared
// memory: mining, both log-sum-exps and the row losses never leave the block, and no pass needs another
// kernel's result. Forward is this kernel and the reduction, backward this kernel alone.
//
// A pair is computed twice, in the strips of both its rows, and again in backward. All of these have the
// same bits (Shape::kSymmetric), so everybody agrees on which pairs were kept.
#pragma once

#include "math.cuh"
#include "pair_loss.h"
#include "rows.cuh"

namespace dml::cuda {

inline constexpr int kStripRows = 16;
inline constexpr int kStripCols = 64;  // columns of one product
inline constexpr int kStripStages = 3;
using StripShape = Shape<kStripRows, kStripCols, 1, 8, true, false>;
using StripGradShape = Shape<kStripRows, kStripCols, 1, 8, false, true>;
inline constexpr int kStripThreads = StripShape::kThreads;
inline constexpr int kStripWarps = kStripThreads / kWarpSize;

template <typename T, typename Acc>
struct StripLayout {                                     // of shared memory, in bytes
    static constexpr int kDepth = 128 / int(sizeof(T));  // k-slice
    static constexpr int kPitch = kDepth + kPad<T>;
    // [k, columns] slices: four rows of floats start in different quarters of the banks.
    static constexpr int kAcrossPitch = kStripCols + (sizeof(T) == 8 ? 2 : 8);
    static constexpr int kStageBytes = (kStripRows + kStripCols) * kPitch * int(sizeof(T));
    static_assert(kDepth * kAcrossPitch * int(sizeof(T)) <= kStageBytes,
                  "both kinds of slices share the stages");
    static constexpr int kNorms = kStripStages * kStageBytes;
    static constexpr int kRadial = kNorms + (kStripRows + kStripCols) * int(sizeof(Acc));
    static constexpr int kStrip = kRadial + kStripRows * int(sizeof(Acc));

    static int64_t pitch(int64_t cols) {
        return (cols > 0 ? (cols + kStripCols - 1) / kStripCols : 1) * kStripCols + kPad<Acc>;
    }
    static size_t bytes(int64_t cols) { return kStrip + size_t(kStripRows) * pitch(cols) * sizeof(Acc); }
};

// The longest rows that leave a block within the 99 KiB that every GPU of sm_80 and up grants.
template <typename Acc>
inline constexpr int64_t kStripMaxCols = 4096 / int64_t(sizeof(Acc));

template <typename T, typename Acc>
struct StripPairs {
    Rows<T, Acc> own;    // the strips' rows
    Rows<T, Acc> other;  // the columns
    bool skip_self;      // both are the same points: (i, i) is no pair
    bool own_are_queries;
    const int64_t* self_ref;  // of the queries
    bool normalize;
    int pitch;  // of the strip in shared memory

    DML_DEVICE bool is_pair(int64_t i, int64_t j) const { return !skip_self || i != j; }
    DML_DEVICE StripPairs in_use() const {
        StripPairs some = *this;
        some.own = own.in_use();
        some.other = other.in_use();
        return some;
    }
};

// Fills the strip [16, pitch] with the similarities of rows row0.. to all columns. With ComputeNorms it
// takes the squares from the slices as they pass and stores the inverse norms, else it loads them.
template <typename Math, bool ComputeNorms, typename T, typename Acc>
DML_DEVICE void strip_similarities(const StripPairs<T, Acc>& pairs, int64_t row0, Acc* strip) {
    using Layout = StripLayout<T, Acc>;
    constexpr int kDepth = Layout::kDepth, kPitch = Layout::kPitch;
    unsigned char* stages = shared_array<unsigned char>(0, Layout::kNorms);
    Acc* norms = shared_array<Acc>(Layout::kNorms, kStripRows + kStripCols);  // own rows, then columns
    const auto& own = pairs.own.points;
    const auto& other = pairs.other.points;
    const auto rows_of = [&](int stage) {
        return reinterpret_cast<T*>(stages + stage * Layout::kStageBytes);
    };
    const auto cols_of = [&](int stage) { return rows_of(stage) + kStripRows * kPitch; };

    for (int64_t col0 = 0; col0 == 0 || col0 < other.rows;
         col0 += kStripCols) {  // once at least, for the norms
        Product<Math, StripShape> product;
        Acc squares = 0;  // of half a row for each of the first 160 threads
        const int norm_row = int(threadIdx.x) / 2, norm_half = int(threadIdx.x) % 2;
        RowSlices<T, kStripRows, kDepth, kPitch, kStripThreads> row_slices(own, row0);
        RowSlices<T, kStripCols, kDepth, kPitch, kStripThreads> col_slices(other, col0);
        const auto first = [&](int stage) {
            row_slices.start_first(rows_of(stage), own);
            col_slices.start_first(cols_of(stage), own);
        };
        const auto next = [&](int stage) {
            row_slices.start_next(rows_of(stage));
            col_slices.start_next(cols_of(stage));
        };
        const auto use = [&](int stage, const auto& fetch) {
            product.template add<kDepth>(AlongK<T, kPitch>{rows_of(stage)},
                                         AlongK<T, kPitch>{cols_of(stage)}, fetch);
            if (ComputeNorms && norm_row < kStripRows + kStripCols) {
                const T* x = rows_of(stage) + norm_row * kPitch + norm_half * (kDepth / 2);
#pragma unroll 8
                for (int k = 0; k < kDepth / 2; ++k) squares = std::fma(Acc(x[k]), Acc(x[k]), squares);
            }
        };
        pipeline<kStripStages, false>(row_slices.count(own), first, next, use);

        if (ComputeNorms) squares += shfl_xor(squares, 1);
        if (norm_row < kStripRows + kStripCols && norm_half == 0) {
            const auto inverse_of = [&](const Rows<T, Acc>& side, int64_t row, bool store) {
                if (row >= side.points.rows) return Acc(0);
                if (!ComputeNorms) return side.inverse_norms[row];
                const Acc inverse = inverse_norm(squares, side.points, row, pairs.normalize);
                if (store) side.inverse_norms[row] = inverse;
                return inverse;
            };
            norms[norm_row] = norm_row < kStripRows ? inverse_of(pairs.own, row0 + norm_row, col0 == 0)
                                                    : inverse_of(pairs.other, col0 + norm_row - kStripRows,
                                                                 !pairs.skip_self && blockIdx.x == 0);
        }
        block_sync();
        product.each([&](int r, int c, Acc dot) {
            const int64_t i = row0 + r, j = col0 + c;
            const Acc inv_i = norms[r], inv_j = norms[kStripRows + c];
            Acc s = 0;
            if (i < own.rows && j < other.rows) {
                s = quick_similarity(dot, inv_i, inv_j);
                if (s != s) s = careful_similarity(own, i, inv_i, other, j, inv_j);
            }
            strip[r * pairs.pitch + j] = s;
        });
    }
    block_sync();
}

// Raises the similarity of row i to itself among s over every bound, where that is a positive pair: it is not
// kept then. Each lane of the warp touches only the columns that it visits anyway: j % 32 = lane.
template <typename T, typename Acc>
DML_DEVICE void leave_out_self(const StripPairs<T, Acc>& pairs, int64_t i, Acc* s) {
    if (!pairs.self_ref) return;
    const int64_t cols = pairs.other.points.rows;
    const auto leave_out = [&](int64_t j) {
        if (pairs.other.labels[j] == pairs.own.labels[i]) s[j] = infinity<Acc>();
    };
    if (pairs.own_are_queries) {
        const int64_t self = pairs.self_ref[i];
        if (self >= 0 && self < cols && self % kWarpSize == lane_id()) leave_out(self);
    } else {
        for (int64_t j = lane_id(); j < cols; j += kWarpSize) {
            if (pairs.self_ref[j] == i) leave_out(j);
        }
    }
}

// A warp finds the bounds and both log-sum-exps of row i, whose similarities are s.
template <typename Loss, typename T, typename Acc>
DML_DEVICE void strip_row(const StripPairs<T, Acc>& pairs, int64_t i, Acc* s, const Loss& loss, bool mining,
                          Acc epsilon, const RowStats<Acc>& stats) {
    const int64_t cols = pairs.other.points.rows;
    const int64_t label = pairs.own.labels[i];
    const auto each_pair = [&](const auto& f) {
        for (int64_t j = lane_id(); j < cols; j += kWarpSize) {
            if (pairs.is_pair(i, j)) f(pairs.other.labels[j] == label, s[j]);
        }
    };

    Extremes<Acc> hardest;
    if (mining) {
        each_pair([&](bool positive, Acc sim) { hardest.add(positive, sim); });
        hardest = {warp_min(hardest.min_pos), warp_max(hardest.max_neg)};
    }
    const Bounds<Acc> bounds = mining ? hardest.mined(epsilon) : Bounds<Acc>::all();
    leave_out_self(pairs, i, s);

    LogSumExp<Acc> pos, neg;
    each_pair([&](bool positive, Acc sim) {
        if (positive ? sim < bounds.pos_below : sim > bounds.neg_above) {
            const Acc logit = positive ? loss.logit_pos(sim) : loss.logit_neg(sim);
            if (positive) {
                pos.max = logit > pos.max ? logit : pos.max;
            } else {
                neg.max = logit > neg.max ? logit : neg.max;
            }
        }
    });
    pos.max = warp_max(pos.max);
    neg.max = warp_max(neg.max);
    each_pair([&](bool positive, Acc sim) {
        if (positive ? sim < bounds.pos_below : sim > bounds.neg_above) {
            if (positive) {
                pos.sum += std::exp(loss.logit_pos(sim) - pos.max);
            } else {
                neg.sum += std::exp(loss.logit_neg(sim) - neg.max);
            }
        }
    });
    pos.sum = warp_sum(pos.sum);
    neg.sum = warp_sum(neg.sum);
    if (lane_id() == 0) finish_row(stats, i, loss, bounds, pos, neg, mining, hardest.has_both());
}

template <typename Math, typename Loss, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kStripThreads, 1)
    strip_forward(const __grid_constant__ StripPairs<T, Acc> all, Loss loss, bool mining, Acc epsilon,
                  RowStats<Acc> stats) {
    using Layout = StripLayout<T, Acc>;
    const StripPairs<T, Acc> pairs = all.in_use();
    Acc* strip = shared_array<Acc>(Layout::kStrip, kStripRows * pairs.pitch);
    const int64_t row0 = int64_t(blockIdx.x) * kStripRows;
    strip_similarities<Math, true>(pairs, row0, strip);
    for (int r = warp_id(); r < kStripRows; r += kStripWarps) {
        if (row0 + r >= pairs.own.points.rows) break;
        strip_row(pairs, row0 + r, strip + r * pairs.pitch, loss, mining, epsilon, stats);
    }
}

// Which rows' losses reach the strips' rows: their own (they are queries), the columns' (those are), both.
struct Sides {
    bool own, other;
};

// grad: [own rows, dim]. upstream: [1], or [queries] with per_row.
template <typename Math, typename GradMath, typename Loss, typename T = typename Math::Value,
          typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kStripThreads, 1)
    strip_backward(const __grid_constant__ StripPairs<T, Acc> all, Loss loss, RowStats<Acc> stats,
                   Sides sides, const Acc* upstream, bool per_row, T* grad) {
    using Layout = StripLayout<T, Acc>;
    const StripPairs<T, Acc> pairs = all.in_use();
    constexpr int kDepth = Layout::kDepth, kPitch = Layout::kAcrossPitch;
    unsigned char* stages = shared_array<unsigned char>(0, Layout::kNorms);
    Acc* radial = shared_array<Acc>(Layout::kRadial, kStripRows);
    Acc* strip = shared_array<Acc>(Layout::kStrip, kStripRows * pairs.pitch);
    const Matrix<T>& own = pairs.own.points;
    const Matrix<T>& other = pairs.other.points;
    const int64_t row0 = int64_t(blockIdx.x) * kStripRows;
    const int64_t rows = own.rows - row0 < kStripRows ? own.rows - row0 : kStripRows;
    strip_similarities<Math, false>(pairs, row0, strip);

    // In place, the similarities become weights: the gradient with respect to each, times the inverse norm
    // of the column, so that what they multiply are the columns as they are.
    for (int r = warp_id(); r < rows; r += kStripWarps) {
        const int64_t i = row0 + r;
        const int64_t label = pairs.own.labels[i];
        const auto load_weight = [&](int64_t query) {
            RowWeight<Acc> weight = RowWeight<Acc>::load(stats, query);
            if (per_row) weight.scale(upstream[query]);
            return weight;
        };
        const RowWeight<Acc> mine = sides.own ? load_weight(i) : RowWeight<Acc>{};
        leave_out_self(pairs, i, strip + r * pairs.pitch);
        Acc toward_self = 0;  // x_i . G_i, which the normalisation takes out of the gradient
        for (int64_t j = lane_id(); j < other.rows; j += kWarpSize) {
            const Acc s = strip[r * pairs.pitch + j];
            const bool positive = pairs.other.labels[j] == label;
            Acc w = 0;
            if (pairs.is_pair(i, j)) {
                if (sides.own) w += mine.of(loss, positive, s);
                if (sides.other) w += load_weight(j).of(loss, positive, s);
                w = w == Acc(0) ? w : w * (positive ? loss.slope_pos(s) : loss.slope_neg(s));
            }
            toward_self += w == Acc(0) ? Acc(0) : w * s;
            strip[r * pairs.pitch + j] = w == Acc(0) ? w : w * pairs.other.inverse_norms[j];
        }
        toward_self = warp_sum(toward_self);
        if (lane_id() == 0) radial[r] = pairs.normalize ? toward_self : Acc(0);
    }
    // The pipeline's first barrier comes before anybody reads the strip, unless there is no slice.
    block_sync();

    const Acc scale = stats.scale[0] * (per_row ? Acc(1) : upstream[0]);
    for (int64_t d0 = 0; d0 < own.cols; d0 += kStripCols) {
        Product<GradMath, StripGradShape> product;
        const ColumnBoxes<T, kDepth, kStripCols, kPitch, kStripThreads> boxes(other, 0, d0);
        const auto slice_of = [&](int stage) {
            return reinterpret_cast<T*>(stages + stage * Layout::kStageBytes);
        };
        int below = 0;
        const auto next = [&](int stage) {
            boxes.start(slice_of(stage), below);
            below += kDepth;
        };
        int at = 0;
        const auto use = [&](int stage, const auto& fetch) {
            product.template add<kDepth>(ResidentAlongK<Acc>{strip + at, pairs.pitch},
                                         AcrossK<T, kPitch>{slice_of(stage)}, fetch);
            at += kDepth;
        };
        pipeline<kStripStages, false>(int((other.rows + kDepth - 1) / kDepth), next, next, use);
        product.each([&](int r, int c, Acc g) {
            const int64_t i = row0 + r, d = d0 + c;
            if (i >= all.own.points.rows || d >= own.cols) return;
            if (i >= own.rows) {  // took no part
                grad[i * own.cols + d] = T(0.0f);
                return;
            }
            const Acc inverse = pairs.own.inverse_norms[i];
            const Acc x = Acc(own.data[i * own.stride + d]) * inverse;
            // A scale of 0 also hides a point that is not finite where nothing asks for its gradient.
            grad[i * own.cols + d] = scale == Acc(0) ? T(0.0f) : T(scale * ((g - radial[r] * x) * inverse));
        });
    }
}

}  // namespace dml::cuda
