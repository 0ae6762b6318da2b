// Large batches, backward, second half: the weights of a tile group (pair_weights.cuh) times the points, with
// one owner for each block of the gradient. The sum for row i is G_i / |q_i|; a last launch projects through
// the normalisation. Tiles in which nothing was kept are skipped.
#pragma once

#include "cuda/pairs/pair_weights.cuh"

namespace dml::cuda {

// Columns of the gradient that a thread block owns, at most: every panel reads all weights again.
template <typename GradMath>
inline constexpr int kWidePanel = GradMath::kTensorCores ? 128 : 64;
inline constexpr int kNarrowPanel = 64;

template <typename GradMath, int Cols>
struct GradTraits {
    using T = typename GradMath::Value;
    using Acc = typename GradMath::Acc;
    using Weight = typename WeightOf<GradMath>::Type;
    static constexpr int kTile = TileTraits<GradMath>::kTile;
    static constexpr int kCols = Cols;  // of the gradient, for one block
    using TileShape = Shape<kTile, kCols, kCols == 64 ? 4 : 2, kCols == 64 ? 2 : 4, true>;
    static constexpr int kThreads = TileShape::kThreads;
    static constexpr int kStages = 4;
    // Whole rounds through the stages take more registers.
    static constexpr bool kWholeRounds =
        !kNeedsManyRegisters<GradMath> && (kCols == kNarrowPanel || sizeof(T) == 2);
    static constexpr int kDepth = 64 / int(sizeof(T) > sizeof(Weight) ? sizeof(T) : sizeof(Weight));
    static constexpr int kPitch = kDepth + kPad<Weight>;  // weights with rows along k
    // Four neighbours along k start in different quarters of the banks, eight for 16-bit elements.
    static constexpr int kAcrossPitch = kTile + (sizeof(Weight) == 8 ? 2 : 8);
    // Points likewise, which lanes read as vectors: of four rows, or of every second of eight.
    static constexpr bool kHalfVectors = sizeof(T) == 2 && sizeof(Weight) == 4;
    static constexpr int kPointPitch = kCols + (sizeof(T) == 8 ? 2 : kHalfVectors ? 16 : 8);
    static constexpr int kWeightElements =
        kTile * kPitch > kDepth* kAcrossPitch ? kTile * kPitch : kDepth * kAcrossPitch;
    static constexpr int kWeightBytes = kWeightElements * int(sizeof(Weight));
    static constexpr int kStageBytes = kWeightBytes + kDepth * kPointPitch * int(sizeof(T));
    static constexpr int kList = kStages * kStageBytes;  // which tiles to visit
    static constexpr int kSharedBytes = kList + (kMaxLine + 1) * int(sizeof(int));
    static_assert(kWeightBytes % 16 == 0 && kStageBytes % 16 == 0, "copies of 16 bytes");
};

// One side's running gradient: its rows from row0 on, contiguous.
template <typename Acc>
struct Gradient {
    Acc* sum;  // [.., dim]; null: not wanted
    int64_t row0;
    int64_t count;  // of all rows of this side
    bool first;     // nothing has been added yet
};

template <typename Acc>
struct Gradients {
    Gradient<Acc> side[2];  // of the rows and of the columns
    bool shared[2];         // whether several thread blocks share a line of that side
    Acc* parts;             // [blocks - 1, rows of those sides in the tile group, dim], of all but the first

    // Tiles of shared lines: of one side, of both.
    DML_INLINE int tiles(int of, int row_tiles, int col_tiles) const {
        return !shared[of] ? 0 : of == 0 ? row_tiles : col_tiles;
    }
    DML_INLINE int tiles(int row_tiles, int col_tiles) const {
        return tiles(0, row_tiles, col_tiles) + tiles(1, row_tiles, col_tiles);
    }
};

// One of the thread blocks that share a line.
struct Part {
    int index, count;
    DML_DEVICE int begin(int slots) const { return slots * index / count; }
    DML_DEVICE int end(int slots) const { return slots * (index + 1) / count; }
};

// Lists in order the slots for which wanted(slot) holds; list[0] is their number. One warp works for the
// block.
template <typename F>
DML_DEVICE void list_slots(int* list, int slots, const F& wanted) {
    if (warp_id() == 0) {
        int count = 0;
#pragma unroll 1
        for (int first = 0; first < slots; first += kWarpSize) {
            const int slot = first + lane_id();
            const bool listed = slot < slots && wanted(slot);
            const uint32_t all = warp_ballot(listed), before = all & ((1u << lane_id()) - 1u);
            if (listed) list[1 + count + __popc(before)] = slot;
            count += __popc(all);
        }
        if (lane_id() == 0) list[0] = count;
    }
    block_sync();
}

// Adds W P to the product, over the kept tiles W of the group's row of tiles `line` and the points P of their
// columns; with Transposed W^T P, over its column of tiles `line` and the points of their rows. Only a part
// of these tiles.
template <typename Traits, bool Transposed, typename Sum, typename T, typename Acc>
DML_DEVICE void add_weighted_points(Sum& product, const TileGroup<T, Acc>& tile_group, int line, Part part,
                                    const uint8_t* kept, const typename Traits::Weight* weights, int64_t d0) {
    using Weight = typename Traits::Weight;
    constexpr int kTile = Traits::kTile, kDepth = Traits::kDepth, kThreads = Traits::kThreads;
    constexpr int kPitch = Traits::kPitch, kAcrossPitch = Traits::kAcrossPitch,
                  kPointPitch = Traits::kPointPitch;
    constexpr int kSlices = kTile / kDepth;  // of one tile
    static_assert(kSlices % Traits::kStages == 0, "whole rounds");
    unsigned char* bytes = shared_array<unsigned char>(0, Traits::kStages * Traits::kStageBytes);
    int* list = shared_array<int>(Traits::kList, kMaxLine + 1);
    list_slots(list, Transposed ? tile_group.row_tiles : tile_group.col_tiles, [&](int slot) {
        const int64_t ti = tile_group.row_tile + (Transposed ? slot : line);
        const int64_t tj = tile_group.col_tile + (Transposed ? line : slot);
        return tile_group.has(ti, tj) && (!kept || (kept[tile_group.tile_index(ti, tj)] & kHasGradient));
    });

    const ColumnBoxes<T, kDepth, Traits::kCols, kPointPitch, kThreads> points(
        Transposed ? tile_group.rows.points : tile_group.cols.points,
        (Transposed ? tile_group.row_tile : tile_group.col_tile) * kTile, d0);
    using AlongSlot = WholeBoxes<Weight, kTile, kDepth, kTile, kPitch, kThreads>;
    using AcrossSlot = WholeBoxes<Weight, kDepth, kTile, kTile, kAcrossPitch, kThreads>;
    const std::conditional_t<Transposed, AcrossSlot, AlongSlot> boxes(
        weights + int64_t(line) * (Transposed ? 1 : tile_group.col_tiles) * kTile * kTile);
    const unsigned slot_size = unsigned(Transposed ? tile_group.col_tiles : 1) * kTile * kTile;
    const auto weights_of = [&](int stage) {
        return reinterpret_cast<Weight*>(bytes + stage * Traits::kStageBytes);
    };
    const auto points_of = [&](int stage) {
        return reinterpret_cast<T*>(bytes + stage * Traits::kStageBytes + Traits::kWeightBytes);
    };
    const int* slots = list + 1 + part.begin(list[0]);
    const int count = part.end(list[0]) - part.begin(list[0]);
    unsigned slice = 0;
    const auto next = [&](int stage) {
        const unsigned slot = unsigned(slots[slice / kSlices]), k = slice % kSlices * kDepth;
        boxes.start(weights_of(stage), slot * slot_size + k * (Transposed ? kTile : 1));
        points.start(points_of(stage), int(slot * kTile + k));
        ++slice;
    };
    const auto use = [&](int stage, const auto& fetch) {
        const AcrossK<T, kPointPitch> slice{points_of(stage)};
        if constexpr (Transposed) {
            product.template add<kDepth>(AcrossK<Weight, kAcrossPitch>{weights_of(stage)}, slice, fetch);
        } else {
            product.template add<kDepth>(AlongK<Weight, kPitch>{weights_of(stage)}, slice, fetch);
        }
    };
    pipeline<Traits::kStages, Traits::kWholeRounds>(count * kSlices, next, next, use);
}

// Thread block (x, y, z): panel x of the gradient's columns, line y (rows of tiles first, then columns of
// tiles), part z of the line. A diagonal group serves the same points as rows and as columns.
template <typename GradMath, int Cols, typename T = typename GradMath::Value,
          typename Acc = typename GradMath::Acc>
__global__ void __launch_bounds__(GradTraits<GradMath, Cols>::kThreads, kTileBlocks<GradMath>)
    add_gradients(const __grid_constant__ TileGroup<T, Acc> all,
                  const __grid_constant__ Gradients<Acc> gradients, const uint8_t* kept,
                  const typename GradTraits<GradMath, Cols>::Weight* weights) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Traits = GradTraits<GradMath, Cols>;
    constexpr int kTile = Traits::kTile;
    const int side = int(blockIdx.y) < all.row_tiles ? 0 : 1;
    const int line = int(blockIdx.y) - (side == 0 ? 0 : all.row_tiles);
    const Gradient<Acc>& gradient = gradients.side[side];
    const Part part = {int(blockIdx.z), gradients.shared[side] ? int(gridDim.z) : 1};
    if (!gradient.sum || part.index >= part.count) return;
    const auto tile_group = all.template in_use<kTile>();
    const int64_t d0 = int64_t(blockIdx.x) * Traits::kCols;

    using Sum = Product<GradMath, typename Traits::TileShape>;
    Sum product;
    if (side == 0) add_weighted_points<Traits, false>(product, tile_group, line, part, kept, weights, d0);
    if (side == 1 || tile_group.diagonal())
        add_weighted_points<Traits, true>(product, tile_group, line, part, kept, weights, d0);

    const int64_t row0 = ((side == 0 ? tile_group.row_tile : tile_group.col_tile) + line) * kTile;
    const int64_t dim = tile_group.rows.points.cols, rows = gradient.count - row0;
    const bool separate = part.index > 0, first = separate || gradient.first;
    const int64_t tiles = gradients.tiles(all.row_tiles, all.col_tiles);
    const int before = side == 0 ? 0 : gradients.tiles(0, all.row_tiles, all.col_tiles);
    Acc* sums = (separate ? gradients.parts + ((part.index - 1) * tiles + before + line) * kTile * dim
                          : gradient.sum + (row0 - gradient.row0) * dim) +
                d0;
    constexpr int kVector = Sum::kRun * int(sizeof(Acc)) < 16 ? Sum::kRun : 16 / int(sizeof(Acc));
    using Chunk = Vector<Acc, kVector>;
    const bool aligned = reinterpret_cast<uintptr_t>(sums) % sizeof(Chunk) == 0 && dim % kVector == 0;
    if (aligned && rows >= kTile && dim - d0 >= Traits::kCols) {
        product.for_each_run([&](int r, int c, const Acc(&values)[Sum::kRun]) {
            Chunk* sum = reinterpret_cast<Chunk*>(sums + r * dim + c);
#pragma unroll
            for (int v = 0; v < Sum::kRun / kVector; ++v) {
                Chunk x = {};
                if (!first) x = sum[v];
#pragma unroll
                for (int e = 0; e < kVector; ++e) x.value[e] += values[v * kVector + e];
                sum[v] = x;
            }
        });
    } else {
        product.for_each([&](int r, int c, Acc value) {
            if (r >= rows || d0 + c >= dim) return;
            Acc& sum = sums[r * dim + c];
            sum = first ? value : sum + value;
        });
    }
}

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
    let_next_kernel_start();
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
