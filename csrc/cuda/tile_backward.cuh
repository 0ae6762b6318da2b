// Large batches, backward. For each super-tile one launch turns similarities into weights (pair_weights.cuh),
// and one multiplies them by the points, with one owner for each block of the gradient: what is accumulated
// for row i is G_i / |q_i|. A last launch takes out what the normalisation does. Tiles in which nothing was
// kept are skipped whole.
#pragma once

#include "pair_weights.cuh"

namespace dml::cuda {

inline constexpr int kMaxSuperTile = 64;

template <typename GradMath>
struct GradTraits {
    using T = typename GradMath::Value;
    using Acc = typename GradMath::Acc;
    using Weight = typename WeightOf<GradMath>::Type;
    static constexpr int kTile = TileTraits<GradMath>::kTile;
    static constexpr int kCols = 64;  // of the gradient, for one block
    using TileShape = Shape<kTile, kCols, 4, 2, false>;
    static constexpr int kThreads = TileShape::kThreads;
    static constexpr int kStages = 4;
    static constexpr int kDepth = sizeof(Weight) == 2 ? 32 : 64 / int(sizeof(Weight));
    static constexpr int kPitch = kDepth + kPad<Weight>;  // weights with rows along k
    // Four neighbours along k start in different quarters of the banks, eight for 16-bit elements.
    static constexpr int kAcrossPitch = kTile + (sizeof(Weight) == 8 ? 2 : 8);
    static constexpr int kPointPitch = kCols + (sizeof(T) == 8 ? 2 : 8);
    static constexpr int kWeightElements =
        kTile * kPitch > kDepth* kAcrossPitch ? kTile * kPitch : kDepth * kAcrossPitch;
    static constexpr int kWeightBytes = kWeightElements * int(sizeof(Weight));
    static constexpr int kStageBytes = kWeightBytes + kDepth * kPointPitch * int(sizeof(T));
    static constexpr int kList = kStages * kStageBytes;  // which tiles to visit
    static constexpr int kSharedBytes = kList + (2 * kMaxSuperTile + 1) * int(sizeof(int));
    static_assert(kWeightBytes % 16 == 0 && kStageBytes % 16 == 0, "copies of 16 bytes");
};

// One side's gradient under way: its rows from row0 on, contiguous.
template <typename Acc>
struct Gradient {
    Acc* sum;  // [.., dim]; null where this side is not wanted
    int64_t row0;
    int64_t count;  // of all rows of this side
    bool first;     // nothing has been added yet
};

template <typename Acc>
struct Gradients {
    Gradient<Acc> side[2];  // of the rows and of the columns
};

// Block (x, y): columns x of the gradient, rows of tile y: row tiles first, then column tiles.
template <typename GradMath, typename T = typename GradMath::Value, typename Acc = typename GradMath::Acc>
__global__ void __launch_bounds__(GradTraits<GradMath>::kThreads, kTileBlocks<GradMath>)
    add_gradients(const __grid_constant__ SuperTile<T, Acc> all,
                  const __grid_constant__ Gradients<Acc> gradients, const uint8_t* kept,
                  const typename GradTraits<GradMath>::Weight* weights) {
    using Traits = GradTraits<GradMath>;
    using Weight = typename Traits::Weight;
    constexpr int kTile = Traits::kTile, kDepth = Traits::kDepth, kThreads = Traits::kThreads;
    constexpr int kPitch = Traits::kPitch, kAcrossPitch = Traits::kAcrossPitch,
                  kPointPitch = Traits::kPointPitch;
    unsigned char* bytes = shared_array<unsigned char>(0, Traits::kStages * Traits::kStageBytes);
    int* list = shared_array<int>(Traits::kList, 2 * kMaxSuperTile + 1);
    const int side = int(blockIdx.y) < all.row_tiles ? 0 : 1;
    const int own = int(blockIdx.y) - (side == 0 ? 0 : all.row_tiles);
    const Gradient<Acc>& gradient = gradients.side[side];
    if (!gradient.sum) return;
    const auto super = all.template in_use<kTile>();
    Matrix<T> points = super.rows.points;  // which the weights multiply
    if (side == 0) points = super.cols.points;
    const int64_t d0 = int64_t(blockIdx.x) * Traits::kCols;
    const int64_t row0 = ((side == 0 ? super.row_tile : super.col_tile) + own) * kTile;

    // The tiles that hold weights for these rows, in order: as they are in the block's row of tiles, then
    // transposed in its column. Each is 2 * slot + transposed.
    const auto place = [&](int entry, int& row, int& col) {
        row = entry % 2 ? entry / 2 : own;
        col = entry % 2 ? own : entry / 2;
    };
    if (threadIdx.x == 0) {
        int count = 0;
        const auto list_tile = [&](int entry) {
            int row, col;
            place(entry, row, col);
            const int64_t ti = super.row_tile + row, tj = super.col_tile + col;
            if (super.has(ti, tj) && (!kept || (kept[super.tile_index(ti, tj)] & kHasGradient)))
                list[++count] = entry;
        };
        for (int slot = 0; side == 0 && slot < super.col_tiles; ++slot) list_tile(2 * slot);
        for (int slot = 0; (side == 1 || super.diagonal()) && slot < super.row_tiles; ++slot)
            list_tile(2 * slot + 1);
        list[0] = count;
    }
    block_sync();

    Product<GradMath, typename Traits::TileShape> product;
    const auto weights_of = [&](int stage) {
        return reinterpret_cast<Weight*>(bytes + stage * Traits::kStageBytes);
    };
    const auto points_of = [&](int stage) {
        return reinterpret_cast<T*>(bytes + stage * Traits::kStageBytes + Traits::kWeightBytes);
    };
    constexpr int kSlices = kTile / kDepth;  // of one tile
    const auto load = [&](int64_t next, int stage) {
        const int slice = int(next);
        const int entry = list[1 + slice / kSlices];
        int row, col;
        place(entry, row, col);
        const int k = slice % kSlices * kDepth;
        const Matrix<Weight> w = {weights + (int64_t(row) * super.col_tiles + col) * kTile * kTile, kTile,
                                  kTile, kTile, 16};
        if (entry % 2) {
            copy_box<kDepth, kTile, kAcrossPitch, kThreads>(weights_of(stage), w, k, 0);
        } else {
            copy_box<kTile, kDepth, kPitch, kThreads>(weights_of(stage), w, 0, k);
        }
        const int64_t point0 = (entry % 2 ? super.row_tile + row : super.col_tile + col) * kTile;
        copy_box<kDepth, Traits::kCols, kPointPitch, kThreads>(points_of(stage), points, point0 + k, d0);
    };
    int at = 0;
    const auto use = [&](int stage) {
        const AcrossK<T, kPointPitch> slice{points_of(stage)};
        if (list[1 + at / kSlices] % 2) {
            product.template add<kDepth>(AcrossK<Weight, kAcrossPitch>{weights_of(stage)}, slice);
        } else {
            product.template add<kDepth>(AlongK<Weight, kPitch>{weights_of(stage)}, slice);
        }
        ++at;
    };
    pipeline<Traits::kStages>(int64_t(list[0]) * kSlices, load, use);
    product.each([&](int r, int c, Acc value) {
        const int64_t i = row0 + r, d = d0 + c;
        if (i >= gradient.count || d >= points.cols) return;
        Acc& sum = gradient.sum[(i - gradient.row0) * points.cols + d];
        sum = gradient.first ? value : sum + value;
    });
}

inline constexpr int kFinishThreads = 256;

// One warp a row in [begin, end): from the accumulated sum [end - begin, dim] to the gradient of q_i,
// grad [rows, dim]. They may be the same. weight_sums: of each row's weights, for distances of rows as they
// come. A row that took no part has a gradient of 0.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kFinishThreads)
    finish_gradient(Rows<T, Acc> rows, int64_t begin, int64_t end, Similarity similarity, RowStats<Acc> stats,
                    Upstream<Acc> upstream, const Acc* weight_sums, const Acc* sum, T* grad) {
    const int64_t i = begin + int64_t(blockIdx.x) * (kFinishThreads / kWarpSize) + warp_id();
    const Matrix<T>& points = rows.points;
    if (i >= end) return;
    const T* q = points.data + i * points.stride;
    const Acc* g = sum + (i - begin) * points.cols;
    const bool took_part = i < rows.in_use().points.rows;
    const Acc factor = took_part ? gradient_factor(stats, upstream) : Acc(0);
    const Acc norm = rows.norms[i];
    Acc along = 0, scale = factor;  // how much of q_i there is too much
    if (similarity.normalize) {
        for (int64_t d = lane_id(); d < points.cols; d += kWarpSize) along = std::fma(Acc(q[d]), g[d], along);
        along = warp_sum(along) * norm;  // x_i . G_i
        scale = factor / stats.header[kRange];
    } else if (similarity.euclidean && took_part) {
        along = weight_sums[i];
    }
    const Acc unit = similarity.normalize ? norm : Acc(1);
    for (int64_t d = lane_id(); d < points.cols; d += kWarpSize) {
        const Acc value = g[d] - along * (Acc(q[d]) * unit);
        grad[i * points.cols + d] = factor == Acc(0) ? T(0.0f) : T(scale * value);
    }
}

}  // namespace dml::cuda
