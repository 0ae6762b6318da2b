// Large batches, backward. For each super-tile one launch turns similarities into weights, in a bounded
// workspace, and one multiplies them by the points, with one owner for each block of the gradient. A last
// launch takes out what the normalisation does. Tiles in which nothing was kept are skipped whole.
//
// The workspace holds W'_ij = dL/ds_ij / (|q_i| |r_j|), both factors at once, because a tile serves its rows
// (W' R) and its columns (W'^T Q). What is accumulated for row i is then G_i / |q_i|.
#pragma once

#include "super_tile.cuh"

namespace dml::cuda {

// The type of the weights in the workspace: what the product would round them to anyway.
template <typename GradMath>
struct WeightOf {
    using Type = typename GradMath::Acc;
};
template <typename T>
struct WeightOf<HalfMath<T>> {
    using Type = T;
};

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

// weights: [row_tiles, col_tiles, kTile, kTile] of the super-tile. upstream: [1], or [rows] with per_row.
template <typename Math, typename Loss, typename Weight, typename T = typename Math::Value,
          typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kTileBlocks<Math>)
    pair_weights(const __grid_constant__ SuperTile<T, Acc> all, Loss loss, RowStats<Acc> stats,
                 const Acc* upstream, bool per_row, const uint8_t* kept, Weight* weights) {
    using Traits = TileTraits<Math>;
    constexpr int kTile = Traits::kTile;
    const auto super = all.template in_use<kTile>();
    const int64_t ti = super.row_tile + blockIdx.y, tj = super.col_tile + blockIdx.x;
    if (!super.has(ti, tj) || (kept && !kept[super.tile_index(ti, tj)])) return;
    const LoadedTile<Math> tile = load_tile<Math>(super, ti, tj);
    leave_out_self<Math>(super, tile);
    const Acc* norms = shared_array<Acc>(Traits::kNorms, 2 * kTile);
    Weight* out = weights + (int64_t(blockIdx.y) * super.col_tiles + blockIdx.x) * kTile * kTile;

    // The rows' statistics go through shared memory; those of its one column a thread holds in registers.
    Acc* scratch = shared_array<Acc>(Traits::kScratch, 4 * Traits::kThreads);
    RowWeight<Acc>* of_rows = reinterpret_cast<RowWeight<Acc>*>(scratch);
    static_assert(kTile * sizeof(RowWeight<Acc>) <= 4 * Traits::kThreads * sizeof(Acc), "they fit");
    const auto load_weight = [&](int64_t i) {
        RowWeight<Acc> weight = RowWeight<Acc>::load(stats, i);
        if (per_row) weight.scale(upstream[i]);
        return weight;
    };
    if (int(threadIdx.x) < kTile && tile.row0 + int(threadIdx.x) < super.rows.points.rows) {
        of_rows[threadIdx.x] = load_weight(tile.row0 + int(threadIdx.x));
    }
    block_sync();
    const int c = int(threadIdx.x) % kTile;
    const int64_t j = tile.col0 + c;
    const bool both = super.square && j < super.cols.points.rows;
    const RowWeight<Acc> of_col = both ? load_weight(j) : RowWeight<Acc>{};
    for (int r = int(threadIdx.x) / kTile; r < kTile; r += Traits::kThreads / kTile) {
        Acc w = 0;
        if (super.is_pair(tile.row0 + r, j)) {
            const Acc s = tile.sim[r * Traits::kSimPitch + c];
            const bool positive = tile.row_labels[r] == tile.col_labels[c];
            w = of_rows[r].of(loss, positive, s);
            if (both) w += of_col.of(loss, positive, s);
            if (w != Acc(0))
                w *= (positive ? loss.slope_pos(s) : loss.slope_neg(s)) * (norms[r] * norms[kTile + c]);
        }
        out[r * kTile + c] = Weight(w);
    }
}

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
            if (super.has(ti, tj) && (!kept || kept[super.tile_index(ti, tj)])) list[++count] = entry;
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

// One warp a row in [begin, end): from the accumulated G_i / |q_i|, sum [end - begin, dim], to the gradient
// of q_i, grad [rows, dim]. They may be the same. A row that took no part has a gradient of 0.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kFinishThreads)
    finish_gradient(Rows<T, Acc> rows, int64_t begin, int64_t end, bool normalize, const Acc* scale,
                    const Acc* upstream, const Acc* sum, T* grad) {
    const int64_t i = begin + int64_t(blockIdx.x) * (kFinishThreads / kWarpSize) + warp_id();
    const Matrix<T>& points = rows.points;
    if (i >= end) return;
    const T* q = points.data + i * points.stride;
    const Acc* g = sum + (i - begin) * points.cols;
    const Acc inverse = rows.inverse_norms[i];
    Acc radial = 0;  // x_i . G_i
    if (normalize) {
        for (int64_t d = lane_id(); d < points.cols; d += kWarpSize)
            radial = std::fma(Acc(q[d]), g[d], radial);
        radial = warp_sum(radial);
    }
    const bool took_part = i < rows.in_use().points.rows;
    const Acc factor = took_part ? scale[0] * (upstream ? upstream[0] : Acc(1)) : Acc(0);
    for (int64_t d = lane_id(); d < points.cols; d += kWarpSize) {
        const Acc value = g[d] - (radial * inverse) * (Acc(q[d]) * inverse);
        // A scale of 0 also hides a point that is not finite where nothing asks for its gradient.
        grad[i * points.cols + d] = factor == Acc(0) ? T(0.0f) : T(factor * value);
    }
}

}  // namespace dml::cuda
