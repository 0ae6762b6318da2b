// Small batches. A block owns a strip of 16 rows and all columns, and the strip of S stays in its shared
// memory: mining, what the formula gathers and the row losses never leave the block, and no pass needs
// another kernel's result. Forward is this kernel and the reduction, backward this kernel alone.
//
// A pair is computed twice, in the strips of both its rows, and again in backward. All of these have the
// same bits (Shape::kSymmetric), so everybody agrees on which pairs were kept.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/statistics.cuh"

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
    static constexpr int kAlong = kNorms + (kStripRows + kStripCols) * int(sizeof(Acc));
    static constexpr int kStrip = kAlong + kStripRows * int(sizeof(Acc));

    static int64_t pitch(int64_t cols) {
        return (cols > 0 ? (cols + kStripCols - 1) / kStripCols : 1) * kStripCols + kPad<Acc>;
    }
    static size_t bytes(int64_t cols) { return kStrip + size_t(kStripRows) * pitch(cols) * sizeof(Acc); }
};

template <typename T, typename Acc>
struct StripPairs {
    Rows<T, Acc> own;    // the strips' rows
    Rows<T, Acc> other;  // the columns
    bool skip_self;      // both are the same points: (i, i) is no pair
    bool own_are_queries;
    const int64_t* self_index;  // of the queries
    bool mine_self_pair;        // whether mining sees the pair of a row and itself
    Similarity similarity;
    int pitch;  // of the strip in shared memory

    DML_DEVICE StripPairs in_use() const {
        StripPairs some = *this;
        some.own = own.in_use();
        some.other = other.in_use();
        return some;
    }
};

// Fills the strip [16, pitch] with the similarities of rows row0.. to all columns. With ComputeNorms it
// takes the squares from the slices as they pass and stores the norms, else it loads them.
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

    // Once at least, for the norms.
    for (int64_t col0 = 0; col0 == 0 || col0 < other.rows; col0 += kStripCols) {  // times: 8
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
            product.template add<kDepth>(AlongK<T, kPitch>{rows_of(stage)}, AlongK<T, kPitch>{cols_of(stage)},
                                         fetch);
            if (ComputeNorms && norm_row < kStripRows + kStripCols) {
                const T* x = rows_of(stage) + norm_row * kPitch + norm_half * (kDepth / 2);
#pragma unroll 8
                for (int k = 0; k < kDepth / 2; ++k) squares = std::fma(Acc(x[k]), Acc(x[k]), squares);
            }
        };
        pipeline<kStripStages, false>(row_slices.count(own), first, next, use);

        if (ComputeNorms) squares += shfl_xor(squares, 1);
        if (norm_row < kStripRows + kStripCols && norm_half == 0) {
            const auto norm_of = [&](const Rows<T, Acc>& side, int64_t row, bool store) {
                if (row >= side.points.rows) return Acc(0);
                if (!ComputeNorms) return side.norms[row];
                const Acc norm = row_norm(squares, side.points, row, pairs.similarity);
                if (store) side.norms[row] = norm;
                return norm;
            };
            norms[norm_row] = norm_row < kStripRows ? norm_of(pairs.own, row0 + norm_row, col0 == 0)
                                                    : norm_of(pairs.other, col0 + norm_row - kStripRows,
                                                              !pairs.skip_self && blockIdx.x == 0);
        }
        block_sync();
        product.each([&](int r, int c, Acc dot) {
            const int64_t i = row0 + r, j = col0 + c;
            const bool pair = i < own.rows && j < other.rows && !(pairs.skip_self && i == j);
            Acc s = 0;
            if (pair) s = quick_similarity(pairs.similarity, dot, norms[r], norms[kStripRows + c]);
            for (uint32_t near = warp_ballot(s != s); near; near &= near - 1) {  // rare: rows near each other
                const int lane = __ffs(int(near)) - 1, at_r = shfl(r, lane), at_c = shfl(c, lane);
                const Acc found = careful_similarity(pairs.similarity, own, row0 + at_r, norms[at_r], other,
                                                     col0 + at_c, norms[kStripRows + at_c]);
                if (lane == lane_id()) s = found;
            }
            strip[r * pairs.pitch + j] = s;
        });
    }
    block_sync();
}

// Marks the pair of row i and itself among s, where that is a positive of a queue: no bound keeps NaN. Each
// lane of the warp touches only the columns that it visits anyway: j % 32 = lane.
template <typename T, typename Acc>
DML_DEVICE void mark_self(const StripPairs<T, Acc>& pairs, int64_t i, Acc* s) {
    if (!pairs.self_index) return;
    const int64_t cols = pairs.other.points.rows;
    const auto mark = [&](int64_t j) {
        if (pairs.other.labels[j] == pairs.own.labels[i]) s[j] = not_a_number<Acc>();
    };
    if (pairs.own_are_queries) {
        const int64_t self = pairs.self_index[i];
        if (self >= 0 && self < cols && self % kWarpSize == lane_id()) mark(self);
    } else {
        for (int64_t j = lane_id(); j < cols; j += kWarpSize) {
            if (pairs.self_index[j] == i) mark(j);
        }
    }
}
// Marks what is no pair at all.
template <typename T, typename Acc>
DML_DEVICE void mark_diagonal(const StripPairs<T, Acc>& pairs, int64_t i, Acc* s) {
    if (pairs.skip_self && i % kWarpSize == lane_id()) s[i] = not_a_number<Acc>();
}

// Some of a lane's pairs of a row: bit k is that with column 32 k + lane.
struct LaneSet {
    uint32_t bits = 0;

    DML_DEVICE bool has(int k) const { return bits >> k & 1u; }
    DML_DEVICE void add(int k, bool wanted) { bits |= uint32_t(wanted) << k; }
    // f(column), in ascending order.
    template <typename F>
    DML_DEVICE void each(const F& f) const {
#pragma unroll 1
        for (uint32_t rest = bits; rest != 0; rest &= rest - 1) {  // times: 6, where mining keeps a tenth
            f(kWarpSize * (__ffs(int(rest)) - 1) + lane_id());
        }
    }
};
static_assert(kStripMaxCols <= 32 * kWarpSize, "a bit for each column of a lane");

// f(k, column) for each pair of a lane.
template <typename F>
DML_DEVICE void each_of_lane(int64_t cols, const F& f) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = 0; first * kWarpSize < int(cols); first += kAtOnce) {  // times: 4
#pragma unroll
        for (int k = first; k < first + kAtOnce; ++k) {
            const int j = k * kWarpSize + lane_id();
            if (j < int(cols)) f(k, j);
        }
    }
}

// One accumulator over pairs, by a warp.
template <Accumulator kAccumulator, typename Acc, typename Term>
DML_DEVICE Running<kAccumulator, Acc> gather_row(const LaneSet& kept, const Term& term, Acc zero_counts) {
    Running<kAccumulator, Acc> accumulator;
    if constexpr (kAccumulator == Accumulator::kLogSumExp) {
        kept.each([&](int j) {
            const Acc z = term(j);
            accumulator.a = z > accumulator.a ? z : accumulator.a;
        });
        accumulator.a = warp_max(accumulator.a);
        kept.each([&](int j) { accumulator.b += std::exp(term(j) - accumulator.a); });
    } else {
        kept.each([&](int j) {
            const Acc t = term(j);
            accumulator.a += t != Acc(0) ? Acc(1) : zero_counts;
            accumulator.b += t;
        });
        accumulator.a = warp_sum(accumulator.a);
    }
    accumulator.b = warp_sum(accumulator.b);
    return accumulator;
}

// What a warp knows of a row before the formula looks at it: its bounds, and which pairs they keep.
template <typename Acc>
struct StripRow {
    Bounds<Acc> bounds;
    bool had_both;
    LaneSet positives, kept;
};

// s: the similarities of row i.
template <typename T, typename Acc>
DML_DEVICE StripRow<Acc> mine_row(const StripPairs<T, Acc>& pairs, int64_t i, Acc* s, Mining mining) {
    const int64_t cols = pairs.other.points.rows;
    const int64_t label = pairs.own.labels[i];
    StripRow<Acc> row;
    mark_diagonal(pairs, i, s);
    if (!pairs.mine_self_pair) mark_self(pairs, i, s);
    Extremes<Acc> hardest;
    each_of_lane(cols, [&](int k, int j) {
        const bool positive = pairs.other.labels[j] == label;
        row.positives.add(k, positive);
        hardest.add(positive, s[j]);
    });
    hardest = {warp_min(hardest.min_pos), warp_max(hardest.max_neg)};
    row.bounds = mining.on ? hardest.mined(Acc(mining.epsilon)) : Bounds<Acc>::all();
    row.had_both = hardest.has_both();
    if (pairs.mine_self_pair) mark_self(pairs, i, s);
    each_of_lane(cols, [&](int k, int j) {
        row.kept.add(k, row.positives.has(k) ? s[j] < row.bounds.pos_below : s[j] > row.bounds.neg_above);
    });
    return row;
}

// A warp finishes row i.
template <typename Formula, typename T, typename Acc>
DML_DEVICE void strip_row(const StripPairs<T, Acc>& pairs, int64_t i, const Acc* s,
                          const StripRow<Acc>& mined, const Formula& formula, bool mining, bool count_zeros,
                          const RowStats<Acc>& stats, const Results<Acc>& results) {
    const LaneSet positives = {mined.kept.bits & mined.positives.bits};
    const LaneSet negatives = {Formula::kPosInNeg ? mined.kept.bits
                                                  : mined.kept.bits & ~mined.positives.bits};
    const Acc zero_counts = count_zeros ? Acc(1) : kZeroCounts<Acc>;
    Gathering<Formula, Acc> row;
    row.neg =
        gather_row<Formula::kNeg, Acc>(negatives, [&](int j) { return formula.neg_term(s[j]); }, zero_counts);
    Acc context = 0;
    if constexpr (Formula::kContext) {
        context = row.neg.value(Formula::kPlusOne);
        Acc derivative = 0;
        positives.each([&](int j) { derivative += formula.pos_context(s[j], context); });
        row.neg.a = context;
        row.neg.b = warp_sum(derivative);
    }
    row.pos = gather_row<Formula::kPos, Acc>(
        positives, [&](int j) { return formula.pos_term(s[j], context); }, zero_counts);
    if (lane_id() != 0) return;
    results.store(i, finish_row(stats, i, formula, row, mined.bounds, mining, mined.had_both,
                                pairs.own.norms[i], results));
}

template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kStripThreads, 1)
    strip_forward(const __grid_constant__ StripPairs<T, Acc> all,
                  const __grid_constant__ AnyFormula<Acc> any_formula, Mining mining, bool count_zeros,
                  RowStats<Acc> stats, Results<Acc> results) {
    using Layout = StripLayout<T, Acc>;
    const StripPairs<T, Acc> pairs = all.in_use();
    Acc* strip = shared_array<Acc>(Layout::kStrip, kStripRows * pairs.pitch);
    const int64_t row0 = int64_t(blockIdx.x) * kStripRows;
    strip_similarities<Math, true>(pairs, row0, strip);
#pragma unroll 1
    for (int r = warp_id(); r < kStripRows; r += kStripWarps) {  // times: 2
        if (row0 + r >= pairs.own.points.rows) break;
        Acc* s = strip + r * pairs.pitch;
        const StripRow<Acc> mined = mine_row(pairs, row0 + r, s, mining);
        any_formula.visit([&](const auto& formula) {
            strip_row(pairs, row0 + r, s, mined, formula, mining.on, count_zeros, stats, results);
        });
    }
}

// Which rows' losses reach the strips' rows: their own (they are queries), the columns' (those are), both.
struct Sides {
    bool own, other;
};

// grad: [own rows, dim].
template <typename Math, typename GradMath, typename T = typename Math::Value,
          typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kStripThreads, 1)
    strip_backward(const __grid_constant__ StripPairs<T, Acc> all,
                   const __grid_constant__ AnyFormula<Acc> any_formula, RowStats<Acc> stats, Sides sides,
                   Upstream<Acc> upstream, T* grad) {
    using Layout = StripLayout<T, Acc>;
    const StripPairs<T, Acc> pairs = all.in_use();
    constexpr int kDepth = Layout::kDepth, kPitch = Layout::kAcrossPitch;
    unsigned char* stages = shared_array<unsigned char>(0, Layout::kNorms);
    Acc* along = shared_array<Acc>(Layout::kAlong, kStripRows);
    Acc* strip = shared_array<Acc>(Layout::kStrip, kStripRows * pairs.pitch);
    const Matrix<T>& own = pairs.own.points;
    const Matrix<T>& other = pairs.other.points;
    const Similarity kind = pairs.similarity;
    const int64_t row0 = int64_t(blockIdx.x) * kStripRows;
    const int64_t rows = own.rows - row0 < kStripRows ? own.rows - row0 : kStripRows;
    strip_similarities<Math, false>(pairs, row0, strip);

    // In place, the similarities become weights: the gradient with respect to each, times the inverse norm
    // of the column, so that what they multiply are the columns as they are.
#pragma unroll 1
    for (int r = warp_id(); r < rows; r += kStripWarps) {  // times: 2
        const int64_t i = row0 + r;
        const int64_t label = pairs.own.labels[i];
        Acc* s = strip + r * pairs.pitch;
        RowWeight<Acc> mine;
        if (sides.own) mine = RowWeight<Acc>::load(stats, i, upstream);
        mark_diagonal(pairs, i, s);
        mark_self(pairs, i, s);
        LaneSet positives, kept;  // by either row
        each_of_lane(other.rows, [&](int k, int j) {
            const bool positive = pairs.other.labels[j] == label;
            Acc below = mine.bounds.pos_below, above = mine.bounds.neg_above;
            if (sides.other) {
                below = std::fmax(below, stats.pos_below[j]);
                above = std::fmin(above, stats.neg_above[j]);
            }
            const bool keep = positive ? s[j] < below : s[j] > above;
            positives.add(k, positive);
            kept.add(k, keep);
            if (!keep) s[j] = Acc(0);
        });
        Acc toward_self = 0;  // how much of its own row the gradient holds too much
        any_formula.visit([&](const auto& formula) {
            kept.each([&](int j) {
                const Acc sim = s[j];
                const bool positive = positives.has(j / kWarpSize);
                RowWeight<Acc> of_line = mine;
                Acc w = 0;
#pragma unroll 1
                for (int side = 0; side < (sides.other ? 2 : 1); ++side) {  // times: 2
                    if (side == 1) of_line = RowWeight<Acc>::load(stats, j, upstream);
                    w += of_line.of(formula, positive, sim);
                }
                s[j] = w;
                if (w == Acc(0)) return;
                const Acc norm = pairs.other.norms[j];
                if (kind.euclidean) {  // rare: distances
                    w = by_distance(w, sim);
                }
                // x_i . y_j, from a distance 1 - d^2 / 2
                const Acc cosine = !kind.euclidean ? sim : Acc(1) - sim * sim / Acc(2);
                toward_self += kind.normalize ? (norm == Acc(0) ? Acc(0) : w * cosine) : w;
                s[j] = w * unit_factor(norm, kind);
            });
        });
        toward_self = warp_sum(toward_self);
        if (lane_id() == 0) along[r] = kind.normalize || kind.euclidean ? toward_self : Acc(0);
    }
    // The pipeline's first barrier comes before anybody reads the strip, unless there is no slice.
    block_sync();

    const Acc factor = gradient_factor(stats, upstream);
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
            const Acc unit = unit_factor(pairs.own.norms[i], kind);
            const Acc x = Acc(own.data[i * own.stride + d]) * unit;
            grad[i * own.cols + d] = factor == Acc(0) ? T(0.0f) : T(factor * ((g - along[r] * x) * unit));
        });
    }
}

}  // namespace dml::cuda
