// Large batches, backward, second half: the weights of a tile group (pair_weights.cuh) times the points, with
// one owner for each block of the gradient. Tiles in which nothing was kept are skipped.
#pragma once

#include "cuda/pairs/grad_math.cuh"
#include "cuda/pairs/list_slots.cuh"
#include "cuda/pairs/pair_weights.cuh"
#include "cuda/pairs/tile_similarities.cuh"

namespace dml::cuda {

// Columns of the gradient that a thread block owns, at most: every panel reads all weights again.
template <typename Math>
inline constexpr int kWidePanel = Math::kTensorCores ? 128 : 64;
inline constexpr int kNarrowPanel = 64;
inline constexpr int kListSize = 1 + kMaxLine;  // of list_slots, of a line's tiles

template <typename Math, int Cols>
struct GradTraits {
    using GradMath = typename GradMathOf<Math>::Type;
    using Acc = typename Math::Acc;
    using Points = PointsLayout<Math>;
    using Weights = WeightLayout<Math>;
    static constexpr bool kScales = kScalesWeights<Weights>;
    static constexpr int kTile = kTileSide<Acc>;
    static constexpr int kCols = Cols;  // of the gradient, for one block
    using TileShape = Shape<kTile, kCols, 4, 2, true>;
    static constexpr int kThreads = TileShape::kThreads;
    static constexpr int kStages = Weights::kParts == 2 ? 3 : 4;
    static constexpr int kDepth = kSliceBytes / int(sizeof(typename Weights::Element));
    static constexpr int kSlices = kTile / kDepth;  // of one tile
    using WeightRows = RowsOfImage<Weights, kThreads>;
    using WeightBoxes = BoxesOfImage<Weights, kDepth, kTile, kThreads>;
    using PointBoxes = BoxesOfImage<Points, kDepth, kCols, kThreads>;
    static_assert(WeightRows::kBytes == WeightBoxes::kBytes, "the same weights");
    // Of a stage: weights, points, the scales of a tile's lines.
    static constexpr int kPoints = WeightRows::kBytes, kScalesAt = kPoints + PointBoxes::kBytes;
    static constexpr int kStageBytes = kScalesAt + (kScales ? kTile * int(sizeof(float)) : 0);
    static constexpr int kList = kStages * kStageBytes;  // which tiles to visit
    static constexpr int kSharedBytes = kList + kListSize * int(sizeof(int));
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
    int64_t dim;
    Acc* parts;  // [blocks - 1, rows of those sides in the tile group, dim], of all but the first

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

// The tiles of a line of a tile group that count, or a part of them. The line is a row of tiles; transposed, a column.
struct TilesOfLine {
    int first_slot, slots_apart;  // of the line's tiles among the group's
    const int* list;              // which tiles of the line
    int count;

    DML_DEVICE int slot(int tile) const { return first_slot + tile * slots_apart; }
};

// Those in which something was kept. list: [kListSize] of shared memory. By all threads of the block.
template <bool Transposed, typename Acc>
DML_DEVICE TilesOfLine kept_tiles(const TileGroup<Acc>& tile_group, int line, Part part, const uint8_t* kept,
                                  int* list) {
    list_slots(list, Transposed ? tile_group.row_tiles : tile_group.col_tiles, [&](int tile) {
        const int64_t ti = tile_group.row_tile + (Transposed ? tile : line);
        const int64_t tj = tile_group.col_tile + (Transposed ? line : tile);
        return tile_group.has(ti, tj) && (!kept || (kept[tile_group.tile_index(ti, tj)] & kHasGradient));
    });
    const int begin = part.begin(list[0]);
    return {line * (Transposed ? 1 : tile_group.col_tiles), Transposed ? tile_group.col_tiles : 1,
            list + 1 + begin, part.end(list[0]) - begin};
}

// Adds W P to the product, over the tiles W of a line and the points P of their columns; with Transposed W^T P, over
// those of a column of tiles and the points of their rows.
template <typename Traits, bool Transposed, typename Sum>
DML_DEVICE void add_weighted_points(Sum& product, const TilesOfLine& tiles, const Image& weights,
                                    const Image& points, int64_t d0) {
    constexpr int kTile = Traits::kTile, kDepth = Traits::kDepth, kSlices = Traits::kSlices;
    unsigned char* bytes = shared_array<unsigned char>(0, Traits::kStages * Traits::kStageBytes);
    const auto scales_of = [&](int stage) {
        return reinterpret_cast<float*>(bytes + stage * Traits::kStageBytes + Traits::kScalesAt);
    };
    const typename Traits::PointBoxes point_boxes(points, d0);
    const typename Traits::WeightBoxes weight_boxes(weights, 0);
    unsigned slice = 0;
    const auto next = [&](int stage) {
        unsigned char* to = bytes + stage * Traits::kStageBytes;
        const int tile = tiles.list[slice / kSlices], slot = tiles.slot(tile);
        const unsigned k = slice % kSlices;
        if constexpr (Transposed) {
            weight_boxes.start(to, unsigned(slot), k * kDepth);
        } else {
            typename Traits::WeightRows(weights, slot).start(to, k);
        }
        point_boxes.start(to + Traits::kPoints, unsigned(tile), k * kDepth);
        if constexpr (Traits::kScales) {
            const int t = int(threadIdx.x) * 4;
            if (t < kTile) cp_async<16>(scales_of(stage) + t, weights.scales + slot * kTile + t);
        }
        ++slice;
    };
    const auto use = [&](int stage, const auto& fetch) {
        const unsigned char* from = bytes + stage * Traits::kStageBytes;
        using View = std::conditional_t<Transposed, AcrossImage<typename Traits::Weights, kDepth, kTile>,
                                        AlongImage<typename Traits::Weights>>;
        const AcrossImage<typename Traits::Points, kDepth, Traits::kCols> box{from + Traits::kPoints};
        if constexpr (Traits::kScales) {
            product.template add<kDepth>(ScaledRows<View>{{from}, scales_of(stage)}, box, fetch);
        } else {
            product.template add<kDepth>(View{from}, box, fetch);
        }
    };
    pipeline<Traits::kStages>(tiles.count * kSlices, next, next, use);
}

// What a thread block (x, y, z) owns: panel x of the gradient's columns, line y (rows of tiles first, then columns of
// tiles), part z of the line. A diagonal group serves the same points as rows and as columns.
template <typename Acc>
struct OwnedGradient {
    const TileGroup<Acc>& all;
    const Gradients<Acc>& gradients;
    int64_t d0;  // the panel's first column
    int cols;    // of a panel

    DML_DEVICE int side() const { return int(blockIdx.y) < all.row_tiles ? 0 : 1; }
    DML_DEVICE int line() const { return int(blockIdx.y) - (side() == 0 ? 0 : all.row_tiles); }
    DML_DEVICE Part part() const { return {int(blockIdx.z), gradients.shared[side()] ? int(gridDim.z) : 1}; }
    DML_DEVICE bool is_wanted() const { return gradients.side[side()].sum && part().index < part().count; }
    // Whether it sums over a row of tiles, and over a column.
    DML_DEVICE bool has_row() const { return side() == 0; }
    DML_DEVICE bool has_column() const { return side() == 1 || all.diagonal(); }

    // Adds the product, or part of it, to the gradient.
    template <typename Sum>
    DML_DEVICE void add(const Sum& product) const {
        constexpr int kTile = kTileSide<Acc>;
        const Gradient<Acc>& gradient = gradients.side[side()];
        const int64_t row0 = ((side() == 0 ? all.row_tile : all.col_tile) + line()) * kTile;
        const int64_t dim = gradients.dim, rows = gradient.count - row0;
        const bool separate = part().index > 0, first = separate || gradient.first;
        const int64_t tiles = gradients.tiles(all.row_tiles, all.col_tiles);
        const int before = side() == 0 ? 0 : gradients.tiles(0, all.row_tiles, all.col_tiles);
        Acc* sums = (separate ? gradients.parts + ((part().index - 1) * tiles + before + line()) * kTile * dim
                              : gradient.sum + (row0 - gradient.row0) * dim) +
                    d0;
        constexpr int kVector = Sum::kRun * int(sizeof(Acc)) < 16 ? Sum::kRun : 16 / int(sizeof(Acc));
        using Chunk = Vector<Acc, kVector>;
        const bool aligned = reinterpret_cast<uintptr_t>(sums) % sizeof(Chunk) == 0 && dim % kVector == 0;
        if (aligned && rows >= kTile && dim - d0 >= cols) {
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
            product.for_each_run([&](int r, int c, const Acc(&values)[Sum::kRun]) {
#pragma unroll
                for (int e = 0; e < Sum::kRun; ++e) {
                    if (r >= rows || d0 + c + e >= dim) continue;
                    Acc& sum = sums[r * dim + c + e];
                    sum = first ? values[e] : sum + values[e];
                }
            });
        }
    }
};

template <typename Math, int Cols, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(GradTraits<Math, Cols>::kThreads,
                                  kProductBlocks<typename GradMathOf<Math>::Type>)
    add_gradients(const __grid_constant__ TileGroup<Acc> all,
                  const __grid_constant__ Gradients<Acc> gradients, const uint8_t* kept,
                  GroupWeights<WeightLayout<Math>> weights) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Traits = GradTraits<Math, Cols>;
    const OwnedGradient<Acc> owned = {all, gradients, int64_t(blockIdx.x) * Cols, Cols};
    if (!owned.is_wanted()) return;
    const auto tile_group = all.in_use();
    int* list = shared_array<int>(Traits::kList, kListSize);
    Product<typename Traits::GradMath, typename Traits::TileShape> product;
    if (owned.has_row()) {
        const auto tiles = kept_tiles<false>(tile_group, owned.line(), owned.part(), kept, list);
        add_weighted_points<Traits, false>(product, tiles, weights.image(0), tile_group.col_image, owned.d0);
    }
    if (owned.has_column()) {
        const auto tiles = kept_tiles<true>(tile_group, owned.line(), owned.part(), kept, list);
        add_weighted_points<Traits, true>(product, tiles, weights.image(1), tile_group.row_image, owned.d0);
    }
    owned.add(product);
}

}  // namespace dml::cuda
