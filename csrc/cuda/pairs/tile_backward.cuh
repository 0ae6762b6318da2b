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

template <typename Math, int Cols>
struct GradTraits {
    using GradMath = typename GradMathOf<Math>::Type;
    using Acc = typename Math::Acc;
    using Weight = typename WeightOf<GradMath>::Type;
    using Layout = PointsLayout<Math>;
    static constexpr bool kScales = kScalesWeights<Weight>, kScaledPoints = PartsOf<Math>::kScaled;
    static constexpr int kTile = kTileSide<Acc>;
    static constexpr int kCols = Cols;  // of the gradient, for one block
    // Weights that are scaled on their way to the tensor cores are scaled by as few warps as possible.
    static constexpr bool kTall = kScales || kCols == 64;
    using TileShape = Shape<kTile, kCols, kTall ? 4 : 2, kTall ? 2 : 4, true>;
    static constexpr int kThreads = TileShape::kThreads;
    static constexpr int kStages = 4;
    // Whole rounds through the stages take more registers.
    static constexpr bool kWholeRounds =
        !kNeedsManyRegisters<GradMath> && (kCols == kNarrowPanel || sizeof(Weight) == 2);
    static constexpr int kDepth = 64 / int(sizeof(Weight));
    // Rows along k: lanes read two floats each of eight rows, or eight 16-byte rows, from different banks.
    static constexpr int kPitch = kDepth + (kScales ? 8 : kPad<Weight>);
    // Rows of k: four rows of k, two apart, start in different quarters of the banks; for 16-bit elements eight.
    static constexpr int kAcrossPitch = kTile + (kScales ? 4 : sizeof(Weight) == 8 ? 2 : 8);
    using Boxes = BoxesOfImage<Layout, kDepth, kCols, kThreads>;
    static constexpr int kWeightElements =
        kTile * kPitch > kDepth* kAcrossPitch ? kTile * kPitch : kDepth * kAcrossPitch;
    static constexpr int kPoints = kWeightElements * int(sizeof(Weight));  // of a stage
    static constexpr int kUps = kPoints + Boxes::kBytes;
    static constexpr int kScaleBytes = (kTile + kDepth) * int(sizeof(float));
    static constexpr int kStageBytes = kUps + (kScales ? kScaleBytes : 0);
    static constexpr int kList = kStages * kStageBytes;  // which tiles to visit
    static constexpr int kSharedBytes = kList + (kMaxLine + 1) * int(sizeof(int));
    static_assert(kPoints % 16 == 0 && kStageBytes % 16 == 0, "copies of 16 bytes");
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

// Adds W P to the product, over the kept tiles W of the group's row of tiles `line` and the points P of their
// columns; with Transposed W^T P, over its column of tiles `line` and the points of their rows. Only a part
// of these tiles.
template <typename Traits, bool Transposed, typename Sum, typename Acc>
DML_DEVICE void add_weighted_points(Sum& product, const TileGroup<Acc>& tile_group, int line, Part part,
                                    const uint8_t* kept,
                                    const GroupWeights<typename Traits::Weight, Acc>& weights, int64_t d0) {
    using Weight = typename Traits::Weight;
    constexpr int kTile = Traits::kTile, kDepth = Traits::kDepth, kThreads = Traits::kThreads;
    constexpr int kPitch = Traits::kPitch, kAcrossPitch = Traits::kAcrossPitch;
    constexpr int kSlices = kTile / kDepth;  // of one tile
    static_assert(kSlices % Traits::kStages == 0, "whole rounds");
    unsigned char* bytes = shared_array<unsigned char>(0, Traits::kStages * Traits::kStageBytes);
    int* list = shared_array<int>(Traits::kList, kMaxLine + 1);
    list_slots(list, Transposed ? tile_group.row_tiles : tile_group.col_tiles, [&](int slot) {
        const int64_t ti = tile_group.row_tile + (Transposed ? slot : line);
        const int64_t tj = tile_group.col_tile + (Transposed ? line : slot);
        return tile_group.has(ti, tj) && (!kept || (kept[tile_group.tile_index(ti, tj)] & kHasGradient));
    });

    const Image& image = Transposed ? tile_group.row_image : tile_group.col_image;
    const typename Traits::Boxes points(image, d0);
    using AlongSlot = WholeBoxes<Weight, kTile, kDepth, kTile, kPitch, kThreads>;
    using AcrossSlot = WholeBoxes<Weight, kDepth, kTile, kTile, kAcrossPitch, kThreads>;
    const int first_slot = line * (Transposed ? 1 : tile_group.col_tiles);
    const std::conditional_t<Transposed, AcrossSlot, AlongSlot> boxes(weights.weights +
                                                                      int64_t(first_slot) * weights.kPlace);
    const unsigned slots_apart = unsigned(Transposed ? tile_group.col_tiles : 1);
    const auto weights_of = [&](int stage) {
        return reinterpret_cast<Weight*>(bytes + stage * Traits::kStageBytes);
    };
    const auto points_of = [&](int stage) { return bytes + stage * Traits::kStageBytes + Traits::kPoints; };
    const auto ups_of = [&](int stage) {
        return reinterpret_cast<float*>(bytes + stage * Traits::kStageBytes + Traits::kUps);
    };
    const int* slots = list + 1 + part.begin(list[0]);
    const int count = part.end(list[0]) - part.begin(list[0]);
    unsigned slice = 0;
    const auto next = [&](int stage) {
        const unsigned slot = unsigned(slots[slice / kSlices]), k = slice % kSlices * kDepth;
        boxes.start(weights_of(stage),
                    slot * slots_apart * unsigned(weights.kPlace) + k * (Transposed ? kTile : 1));
        points.start(points_of(stage), slot, k);
        if constexpr (Traits::kScales) {
            const unsigned t = threadIdx.x * 4u;
            if (t < unsigned(kTile)) {
                const unsigned lines =
                    (unsigned(first_slot) + slot * slots_apart) * 2u + (Transposed ? 1u : 0u);
                cp_async<16>(ups_of(stage) + t, weights.ups + lines * unsigned(kTile) + t);
            } else if (Traits::kScaledPoints && t < unsigned(kTile + kDepth)) {
                cp_async<16>(ups_of(stage) + t, image.scales + slot * unsigned(kTile) + k + (t - kTile));
            }
        }
        ++slice;
    };
    const auto use = [&](int stage, const auto& fetch) {
        const AcrossImage<typename Traits::Layout, kDepth, Traits::kCols> slice{points_of(stage)};
        if constexpr (Traits::kScales) {
            const float *ups = ups_of(stage), *scales = Traits::kScaledPoints ? ups + kTile : nullptr;
            const auto* data = reinterpret_cast<const float*>(weights_of(stage));
            using Weights = ScaledWeights<Transposed ? Traits::kAcrossPitch : Traits::kPitch, !Transposed>;
            product.template add<kDepth>(Weights{data, ups, scales}, slice, fetch);
        } else if constexpr (Transposed) {
            product.template add<kDepth>(AcrossK<Weight, kAcrossPitch>{weights_of(stage)}, slice, fetch);
        } else {
            product.template add<kDepth>(AlongK<Weight, kPitch>{weights_of(stage)}, slice, fetch);
        }
    };
    pipeline<Traits::kStages, Traits::kWholeRounds>(count * kSlices, next, next, use);
}

// Thread block (x, y, z): panel x of the gradient's columns, line y (rows of tiles first, then columns of
// tiles), part z of the line. A diagonal group serves the same points as rows and as columns.
template <typename Math, int Cols, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(GradTraits<Math, Cols>::kThreads,
                                  kProductBlocks<typename GradMathOf<Math>::Type>)
    add_gradients(const __grid_constant__ TileGroup<Acc> all,
                  const __grid_constant__ Gradients<Acc> gradients, const uint8_t* kept,
                  GroupWeights<typename GradTraits<Math, Cols>::Weight, Acc> weights) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Traits = GradTraits<Math, Cols>;
    constexpr int kTile = Traits::kTile;
    const int side = int(blockIdx.y) < all.row_tiles ? 0 : 1;
    const int line = int(blockIdx.y) - (side == 0 ? 0 : all.row_tiles);
    const Gradient<Acc>& gradient = gradients.side[side];
    const Part part = {int(blockIdx.z), gradients.shared[side] ? int(gridDim.z) : 1};
    if (!gradient.sum || part.index >= part.count) return;
    const auto tile_group = all.in_use();
    const int64_t d0 = int64_t(blockIdx.x) * Traits::kCols;

    using Sum = Product<typename Traits::GradMath, typename Traits::TileShape>;
    Sum product;
    if (side == 0) add_weighted_points<Traits, false>(product, tile_group, line, part, kept, weights, d0);
    if (side == 1 || tile_group.diagonal())
        add_weighted_points<Traits, true>(product, tile_group, line, part, kept, weights, d0);

    const int64_t row0 = ((side == 0 ? tile_group.row_tile : tile_group.col_tile) + line) * kTile;
    const int64_t dim = gradients.dim, rows = gradient.count - row0;
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

}  // namespace dml::cuda
