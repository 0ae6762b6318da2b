// The first kernel of the matrix path: similarities of all rows to all columns, and the norms of both.
//
// A pair is stored for its row and, where both sides are the same points, once more for the other: row i uses
// s_ij for its own loss and for the derivative it stores in its place, so the two need not have the same bits.
// Large batches multiply only tiles with i <= j and store them twice; small ones multiply all, in small tiles,
// to fill more multiprocessors.
#pragma once

#include "cuda/matrix/saved_matrix.cuh"
#include "cuda/pairs/product_shape.cuh"

namespace dml::cuda {

template <typename Math, bool kLarge>
struct SimilarityTraits {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using TileShape = std::conditional_t<kLarge, SquareTile<Math>, Shape<32, 64, 2, 2, false>>;
    static constexpr int kRows = TileShape::kRows, kCols = TileShape::kCols, kThreads = TileShape::kThreads;
    static constexpr int kLines = kRows + kCols;
    // Small tiles: 128 floats along k are on their way at once.
    static constexpr int kStages = kLarge ? 3 : 5;
    static constexpr int kDepth = (kLarge ? 64 : 128) / int(sizeof(T));
    static constexpr int kPitch = kDepth + kPad<T>;
    static constexpr int kStageBytes = kLines * kPitch * int(sizeof(T));
    // The similarities take the place of the slices they were computed from.
    static constexpr int kSimPitch = kCols + kPad<Acc>;
    static constexpr int kSimBytes = kRows * kSimPitch * int(sizeof(Acc));
    static constexpr int kTileBytes = kSimBytes > kStages* kStageBytes ? kSimBytes : kStages * kStageBytes;
    static constexpr int kNorms = kTileBytes;
    static constexpr int kSharedBytes = kNorms + kLines * int(sizeof(Acc));
    static_assert(kLines <= kThreads, "a thread for each line");
};

template <typename T, typename Acc>
struct SimilarityTask {
    Rows<T, Acc> rows, cols;
    bool square;
    Similarity similarity;
    SavedMatrix<Acc> saved;
    unsigned* ticket;  // of the kernel that follows
};

// The tile of a block, as the block's product and a thread's share of the norms.
template <typename Math, bool kLarge, typename T, typename Acc>
struct SimilarityTile {
    using Traits = SimilarityTraits<Math, kLarge>;
    static constexpr int kRows = Traits::kRows, kCols = Traits::kCols, kPitch = Traits::kPitch,
                         kDepth = Traits::kDepth, kThreads = Traits::kThreads, kSimPitch = Traits::kSimPitch;
    const SimilarityTask<T, Acc>& task;
    int64_t row0, col0, cols;  // cols: that are in use

    static DML_DEVICE unsigned char* shared() { return shared_array<unsigned char>(0, Traits::kTileBytes); }
    static DML_DEVICE Acc* norms() { return shared_array<Acc>(Traits::kNorms, Traits::kLines); }
    static DML_DEVICE Acc& sim(int r, int c) { return reinterpret_cast<Acc*>(shared())[r * kSimPitch + c]; }

    // Bare dot products to shared memory; returns the sum of squares of this thread's line.
    DML_DEVICE Acc multiply() const {
        using Rows = RowSlices<T, kRows, kDepth, kPitch, kThreads>;
        using Cols = RowSlices<T, kCols, kDepth, kPitch, kThreads>;
        constexpr int kVector = 16 / int(sizeof(T));
        const Matrix<T>& points = task.rows.points;
        Product<Math, typename Traits::TileShape> product;
        Acc squares[2] = {};
        {
            Rows row_slices(points, row0);
            Cols col_slices({task.cols.points.data, task.cols.points.stride, cols, points.cols}, col0);
            const auto slice = [&](int stage) {
                return reinterpret_cast<T*>(shared() + stage * Traits::kStageBytes);
            };
            const auto first = [&](int stage) {
                row_slices.start_first(slice(stage), points);
                col_slices.start_first(slice(stage) + kRows * kPitch, points);
            };
            const auto next = [&](int stage) {
                row_slices.start_next(slice(stage));
                col_slices.start_next(slice(stage) + kRows * kPitch);
            };
            const auto use = [&](int stage, const auto& fetch) {
                const T* from = slice(stage);
                product.template add<kDepth>(AlongK<T, kPitch>{from},
                                             AlongK<T, kPitch>{from + kRows * kPitch}, fetch);
                if (int(threadIdx.x) >= Traits::kLines) return;
#pragma unroll 2
                for (int k = 0; k < kDepth; k += kVector) {
                    const auto x =
                        *reinterpret_cast<const Vector<T, kVector>*>(from + int(threadIdx.x) * kPitch + k);
#pragma unroll
                    for (int e = 0; e < kVector; ++e)
                        squares[e % 2] = std::fma(Acc(x.value[e]), Acc(x.value[e]), squares[e % 2]);
                }
            };
            pipeline<Traits::kStages>(Rows::count(points), first, next, use);
        }
        using Sum = Product<Math, typename Traits::TileShape>;
        product.for_each_run([&](int r, int c, const Acc(&dots)[Sum::kRun]) {
            Vector<Acc, Sum::kRun> run;
#pragma unroll
            for (int e = 0; e < Sum::kRun; ++e) run.value[e] = dots[e];
            reinterpret_cast<Vector<Acc, Sum::kRun>&>(sim(r, c)) = run;
        });
        return squares[0] + squares[1];
    }

    // The norm of this thread's line, for the block and, by one block for each line, for all.
    DML_DEVICE void finish_norm(Acc squares, bool stores_rows, bool stores_cols) const {
        const int line = int(threadIdx.x);
        if (line >= Traits::kLines) return;
        const bool is_row = line < kRows;
        const Rows<T, Acc>& side = is_row ? task.rows : task.cols;
        const int64_t i = is_row ? row0 + line : col0 + line - kRows;
        Acc norm = 0;
        if (i < (is_row ? side.points.rows : cols)) {
            norm = row_norm(squares, side.points, i, task.similarity);
            if (is_row ? stores_rows : stores_cols) side.norms[i] = norm;
        }
        norms()[line] = norm;
    }

    // From dot products to similarities, in shared and in global memory.
    DML_DEVICE void finish_pairs() const {
        const Acc* norm = norms();
        const int c = int(threadIdx.x) % kCols;
        const int64_t j = col0 + c;
#pragma unroll 1
        for (int r = int(threadIdx.x) / kCols; r < kRows; r += kThreads / kCols) {
            const int64_t i = row0 + r;
            const bool inside = i < task.rows.points.rows && j < cols;
            Acc s = 0;
            if (inside && !(task.square && i == j))
                s = quick_similarity(task.similarity, sim(r, c), norm[r], norm[kRows + c]);
            for (uint32_t near = warp_ballot(s != s); near; near &= near - 1) {
                const int lane = __ffs(int(near)) - 1, at = c - lane_id() + lane;
                const Acc found = careful_similarity(task.similarity, task.rows.points, i, norm[r],
                                                     task.cols.points, col0 + at, norm[kRows + at]);
                if (lane == lane_id()) s = found;
            }
            sim(r, c) = s;
            if (inside) task.saved.pairs[i * task.saved.pitch + j] = s;
        }
    }

    // The same pairs for the columns' rows.
    DML_DEVICE void mirror() const {
        block_sync();
        const int r = int(threadIdx.x) % kRows;
#pragma unroll 4
        for (int c = int(threadIdx.x) / kRows; c < kCols; c += kThreads / kRows) {
            const int64_t i = row0 + r, j = col0 + c;
            if (i < task.rows.points.rows && j < cols) task.saved.pairs[j * task.saved.pitch + i] = sim(r, c);
        }
    }
};

// One block a tile, row by row.
template <typename Math, bool kLarge, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(SimilarityTraits<Math, kLarge>::kThreads, kLarge ? kProductBlocks<Math> : 2)
    similarities(const __grid_constant__ SimilarityTask<T, Acc> task) {
    using Traits = SimilarityTraits<Math, kLarge>;
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (blockIdx.x == 0 && threadIdx.x == 0) *task.ticket = 0;
    const int64_t cols = rows_in_use(task.cols.used, task.cols.points.rows);
    if (task.rows.points.rows == 0 && cols == 0) return;  // no memory that copies could read
    const int64_t across = (task.cols.points.rows + Traits::kCols - 1) / Traits::kCols;
    const int64_t tiles = across > 0 ? across : 1;  // rows without columns have norms
    const int64_t ti = blockIdx.x / tiles, tj = blockIdx.x % tiles;
    const bool mirrors = kLarge && task.square;
    if (mirrors && ti > tj) return;
    if (tj > 0 && tj * Traits::kCols >= cols) return;
    const SimilarityTile<Math, kLarge, T, Acc> tile = {task, ti * Traits::kRows, tj * Traits::kCols, cols};
    const Acc squares = tile.multiply();
    tile.finish_norm(squares, mirrors ? ti == tj : tj == 0, !task.square && ti == 0);
    block_sync();
    tile.finish_pairs();
    if (mirrors && ti != tj) tile.mirror();
}

}  // namespace dml::cuda
