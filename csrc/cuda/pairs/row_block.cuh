// Small batches. A thread block owns a row block: 16 rows and all columns, whose similarities stay in its
// shared memory. Mining, accumulators and row losses never leave the thread block, and no step needs another
// kernel's result: forward is one kernel and the reduction, backward one kernel.
//
// A pair is computed twice, in the row blocks of both its rows, and again in backward. All of these have the
// same bits (Shape::kSymmetric), so all agree on which pairs were kept.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/row_stats.cuh"

namespace dml::cuda {

inline constexpr int kRowBlockRows = 16;
inline constexpr int kRowBlockCols = 64;  // columns of one product
inline constexpr int kRowBlockStages = 3;
using RowBlockShape = Shape<kRowBlockRows, kRowBlockCols, 1, 8, true, false>;
using RowBlockGradShape = Shape<kRowBlockRows, kRowBlockCols, 1, 8, false, true>;
inline constexpr int kRowBlockThreads = RowBlockShape::kThreads;
inline constexpr int kRowBlockWarps = kRowBlockThreads / kWarpSize;

// Shared memory, in bytes: stages of slices, norms, the rows' projections, similarities [16, pitch].
template <typename T, typename Acc>
struct RowBlockLayout {
    static constexpr int kDepth = 128 / int(sizeof(T));  // k-slice
    static constexpr int kPitch = kDepth + kPad<T>;
    // [k, columns] slices: four rows of floats start in different quarters of the banks.
    static constexpr int kAcrossPitch = kRowBlockCols + (sizeof(T) == 8 ? 2 : 8);
    static constexpr int kStageBytes = (kRowBlockRows + kRowBlockCols) * kPitch * int(sizeof(T));
    static_assert(kDepth * kAcrossPitch * int(sizeof(T)) <= kStageBytes,
                  "both kinds of slices share the stages");
    static constexpr int kNorms = kRowBlockStages * kStageBytes;
    static constexpr int kAlong = kNorms + (kRowBlockRows + kRowBlockCols) * int(sizeof(Acc));
    static constexpr int kSims = kAlong + kRowBlockRows * int(sizeof(Acc));

    static int64_t pitch(int64_t cols) {
        return (cols > 0 ? (cols + kRowBlockCols - 1) / kRowBlockCols : 1) * kRowBlockCols + kPad<Acc>;
    }
    static size_t bytes(int64_t cols) { return kSims + size_t(kRowBlockRows) * pitch(cols) * sizeof(Acc); }
};

template <typename T, typename Acc>
struct RowBlockPairs {
    Rows<T, Acc> rows, cols;
    bool skip_self;  // both are the same points: (i, i) is no pair
    bool rows_are_queries;
    const int64_t* self_index;  // of the queries
    bool mine_self_pair;        // whether mining sees the pair of a row and itself
    Similarity similarity;
    int pitch;  // of the similarities in shared memory

    DML_DEVICE RowBlockPairs in_use() const {
        RowBlockPairs result = *this;
        result.rows = rows.in_use();
        result.cols = cols.in_use();
        return result;
    }
};

// Fills sims [16, pitch] with the similarities of rows row0.. to all columns. With ComputeNorms the norms are
// computed from the slices as they pass and stored, else they are loaded.
template <typename Math, bool ComputeNorms, typename T, typename Acc>
DML_DEVICE void row_block_similarities(const RowBlockPairs<T, Acc>& pairs, int64_t row0, Acc* sims) {
    using Layout = RowBlockLayout<T, Acc>;
    constexpr int kDepth = Layout::kDepth, kPitch = Layout::kPitch;
    unsigned char* stages = shared_array<unsigned char>(0, Layout::kNorms);
    Acc* norms = shared_array<Acc>(Layout::kNorms, kRowBlockRows + kRowBlockCols);  // rows, then columns
    const auto& row_points = pairs.rows.points;
    const auto& col_points = pairs.cols.points;
    const auto row_slice = [&](int stage) {
        return reinterpret_cast<T*>(stages + stage * Layout::kStageBytes);
    };
    const auto col_slice = [&](int stage) { return row_slice(stage) + kRowBlockRows * kPitch; };

    // Once at least, for the norms.
    for (int64_t col0 = 0; col0 == 0 || col0 < col_points.rows; col0 += kRowBlockCols) {
        Product<Math, RowBlockShape> product;
        Acc squares = 0;  // of half a row, in each of the first 160 threads
        const int norm_row = int(threadIdx.x) / 2, norm_half = int(threadIdx.x) % 2;
        RowSlices<T, kRowBlockRows, kDepth, kPitch, kRowBlockThreads> row_slices(row_points, row0);
        RowSlices<T, kRowBlockCols, kDepth, kPitch, kRowBlockThreads> col_slices(col_points, col0);
        const auto first = [&](int stage) {
            row_slices.start_first(row_slice(stage), row_points);
            col_slices.start_first(col_slice(stage), row_points);
        };
        const auto next = [&](int stage) {
            row_slices.start_next(row_slice(stage));
            col_slices.start_next(col_slice(stage));
        };
        const auto use = [&](int stage, const auto& fetch) {
            product.template add<kDepth>(AlongK<T, kPitch>{row_slice(stage)},
                                         AlongK<T, kPitch>{col_slice(stage)}, fetch);
            if (ComputeNorms && norm_row < kRowBlockRows + kRowBlockCols) {
                const T* x = row_slice(stage) + norm_row * kPitch + norm_half * (kDepth / 2);
#pragma unroll 8
                for (int k = 0; k < kDepth / 2; ++k) squares = std::fma(Acc(x[k]), Acc(x[k]), squares);
            }
        };
        pipeline<kRowBlockStages, false>(row_slices.count(row_points), first, next, use);

        if (ComputeNorms) squares += shfl_xor(squares, 1);
        if (norm_row < kRowBlockRows + kRowBlockCols && norm_half == 0) {
            const auto load_norm = [&](const Rows<T, Acc>& side, int64_t row, bool store) {
                if (row >= side.points.rows) return Acc(0);
                if (!ComputeNorms) return side.norms[row];
                const Acc norm = row_norm(squares, side.points, row, pairs.similarity);
                if (store) side.norms[row] = norm;
                return norm;
            };
            norms[norm_row] = norm_row < kRowBlockRows
                                  ? load_norm(pairs.rows, row0 + norm_row, col0 == 0)
                                  : load_norm(pairs.cols, col0 + norm_row - kRowBlockRows,
                                              !pairs.skip_self && blockIdx.x == 0);
        }
        block_sync();
        product.for_each([&](int r, int c, Acc dot) {
            const int64_t i = row0 + r, j = col0 + c;
            const bool pair = i < row_points.rows && j < col_points.rows && !(pairs.skip_self && i == j);
            Acc s = 0;
            if (pair) s = quick_similarity(pairs.similarity, dot, norms[r], norms[kRowBlockRows + c]);
            for (uint32_t near = warp_ballot(s != s); near; near &= near - 1) {
                const int lane = __ffs(int(near)) - 1, at_r = shfl(r, lane), at_c = shfl(c, lane);
                const Acc found = careful_similarity(pairs.similarity, row_points, row0 + at_r, norms[at_r],
                                                     col_points, col0 + at_c, norms[kRowBlockRows + at_c]);
                if (lane == lane_id()) s = found;
            }
            sims[r * pairs.pitch + j] = s;
        });
    }
    block_sync();
}

// Replaces the pair of row i and itself among s [columns] by NaN, which no bound keeps, if it is a positive.
// Each lane touches the columns that it visits anyway: j % 32 = lane.
template <typename T, typename Acc>
DML_DEVICE void mark_self(const RowBlockPairs<T, Acc>& pairs, int64_t i, Acc* s) {
    if (!pairs.self_index) return;
    const int64_t cols = pairs.cols.points.rows;
    const auto mark = [&](int64_t j) {
        if (pairs.cols.labels[j] == pairs.rows.labels[i]) s[j] = not_a_number<Acc>();
    };
    if (pairs.rows_are_queries) {
        const int64_t self = pairs.self_index[i];
        if (self >= 0 && self < cols && self % kWarpSize == lane_id()) mark(self);
    } else {
        for (int64_t j = lane_id(); j < cols; j += kWarpSize) {
            if (pairs.self_index[j] == i) mark(j);
        }
    }
}
// The same for (i, i) where rows and columns are the same points, which is no pair.
template <typename T, typename Acc>
DML_DEVICE void mark_diagonal(const RowBlockPairs<T, Acc>& pairs, int64_t i, Acc* s) {
    if (pairs.skip_self && i % kWarpSize == lane_id()) s[i] = not_a_number<Acc>();
}

// A set of a lane's pairs of a row: bit k is the pair with column 32 k + lane.
struct LaneSet {
    uint32_t bits = 0;

    DML_DEVICE bool has(int k) const { return bits >> k & 1u; }
    DML_DEVICE void add(int k, bool wanted) { bits |= uint32_t(wanted) << k; }
    // f(column), in ascending order.
    template <typename F>
    DML_DEVICE void for_each(const F& f) const {
#pragma unroll 1
        for (uint32_t rest = bits; rest != 0; rest &= rest - 1) {
            f(kWarpSize * (__ffs(int(rest)) - 1) + lane_id());
        }
    }
};
static_assert(kRowBlockMaxCols <= 32 * kWarpSize, "a bit for each column of a lane");

// f(k, column) for each pair of a lane.
template <typename F>
DML_DEVICE void for_each_of_lane(int64_t cols, const F& f) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = 0; first * kWarpSize < int(cols); first += kAtOnce) {
#pragma unroll
        for (int k = first; k < first + kAtOnce; ++k) {
            const int j = k * kWarpSize + lane_id();
            if (j < int(cols)) f(k, j);
        }
    }
}

}  // namespace dml::cuda
