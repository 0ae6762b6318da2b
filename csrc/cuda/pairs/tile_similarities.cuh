// Large batches: the similarities of a tile group, multiplied from the images of its points. Every other kernel on tiles
// looks at these alone.
#pragma once

#include "cuda/pairs/product_shape.cuh"
#include "cuda/pairs/tile_need.cuh"
#include "cuda/pairs/write_image.cuh"

namespace dml::cuda {

template <typename Math>
struct ProductTraits {
    using Acc = typename Math::Acc;
    using Layout = PointsLayout<Math>;
    static constexpr int kTile = kTileSide<Acc>;
    static_assert(SquareTile<Math>::kThreads == kTileThreads, "as other kernels on tiles");
    using Slices = RowsOfImage<Layout, kTileThreads>;
    static constexpr int kStages = Layout::kParts == 2 ? 2 : 3;
    static constexpr int kDepth = kSliceBytes / int(sizeof(typename Layout::Element));  // k-slice
    static constexpr int kStageBytes = 2 * Slices::kBytes;
    // Rows of similarities are 16 bytes longer than the tile, so that eight rows start in different banks.
    static constexpr int kSimPitch = kTile + kPad<Acc>;
    static constexpr int kSimBytes = kTile * kSimPitch * int(sizeof(Acc));
    // Shared memory. The similarities take the place of the slices they were computed from.
    static constexpr int kTileBytes = kSimBytes > kStages* kStageBytes ? kSimBytes : kStages * kStageBytes;
    static constexpr int kNorms = (kTileBytes + 15) / 16 * 16;
    static constexpr int kFactors = kNorms + 2 * kTile * int(sizeof(Acc));
    static constexpr int kLabels = kFactors + (PartsOf<Math>::kScaled ? 2 * kTile * int(sizeof(Acc)) : 0);
    static constexpr int kFlags = kLabels + 2 * kTile * int(sizeof(int64_t));
    static constexpr int kSharedBytes = kFlags + kWarpSize * int(sizeof(int));
};

// The bare dot products of the images' rows of a tile and of another. Takes the first kStages * kStageBytes of shared
// memory.
template <typename Math>
DML_DEVICE void multiply_tile(Product<Math, SquareTile<Math>>& product, unsigned char* shared,
                              const Image& rows, int row_tile, const Image& cols, int col_tile, int64_t dim) {
    using Traits = ProductTraits<Math>;
    using Slices = typename Traits::Slices;
    const Slices row_slices(rows, row_tile), col_slices(cols, col_tile);
    unsigned slice = 0;
    const auto next = [&](int stage) {
        unsigned char* to = shared + stage * Traits::kStageBytes;
        row_slices.start(to, slice);
        col_slices.start(to + Slices::kBytes, slice);
        ++slice;
    };
    const auto use = [&](int stage, const auto& fetch) {
        using View = AlongImage<typename Traits::Layout>;
        const unsigned char* from = shared + stage * Traits::kStageBytes;
        product.template add<Traits::kDepth>(View{from}, View{from + Slices::kBytes}, fetch);
    };
    const int slices = int((dim + Traits::kDepth - 1) / Traits::kDepth);
    pipeline<Traits::kStages, false>(slices, next, next, use);
}

// Inverse norms from which on the product of two is in range.
template <typename Acc>
inline constexpr Acc kPlainNorm = Acc(sizeof(Acc) == 8 ? 1e-145 : 1e-15);

// Writes a tile's similarities to sim. factors: of lines, their norms times the scales of their images.
template <typename Math, typename Sum, typename T, typename Acc>
DML_DEVICE void put_similarities(const Sum& product, const TileGroup<Acc>& tile_group,
                                 const Matrix<T>& row_points, int64_t row0, const Matrix<T>& col_points,
                                 int64_t col0, const Acc* norms, const Acc* factors, int* flags, Acc* sim) {
    using Traits = ProductTraits<Math>;
    constexpr bool kScaled = PartsOf<Math>::kScaled;
    constexpr int kTile = Traits::kTile, kSimPitch = Traits::kSimPitch, kThreads = kTileThreads;
    using Run = Vector<Acc, Sum::kRun>;
    if (!tile_group.similarity.euclidean) {
        Acc check = 0;  // not finite once a similarity is not
        product.for_each_run([&](int r, int c, const Acc(&dots)[Sum::kRun]) {
            Run s;
#pragma unroll
            for (int e = 0; e < Sum::kRun; ++e) s.value[e] = dots[e] * (factors[r] * factors[kTile + c + e]);
            if constexpr (Sum::kRun == 1) {
                check = std::fma(s.value[0], s.value[0], check);
            } else {
#pragma unroll
                for (int e = 0; e < Sum::kRun; e += 2) check = std::fma(s.value[e], s.value[e + 1], check);
            }
            *reinterpret_cast<Run*>(sim + r * kSimPitch + c) = s;
        });
        // Whether the norm of this thread's line is in the range where products need no check, as scaled rows are. It
        // is read where it is used: the product leaves no register to keep the answer in.
        const bool plain = kScaled || int(threadIdx.x) >= 2 * kTile || norms[threadIdx.x] >= kPlainNorm<Acc>;
        if (!block_any(!plain || check - check != Acc(0), flags)) return;
        block_sync();
    }
    {  // distances; cosines at the edges, of zero rows and out of range
        product.for_each_run([&](int r, int c, const Acc(&dots)[Sum::kRun]) {
            Run s;
#pragma unroll
            for (int e = 0; e < Sum::kRun; ++e) s.value[e] = dots[e];
            *reinterpret_cast<Run*>(sim + r * kSimPitch + c) = s;
        });
        block_sync();
        constexpr int kRowStep = kThreads / kTile;
        const int c = int(threadIdx.x) % kTile;
        const Acc norm = norms[kTile + c];
        const auto unscaled = [&](Acc dot, int r) {
            if constexpr (kScaled) {
                dot *= tile_group.row_image.scales[row0 - tile_group.row_tile * kTile + r];
                dot *= tile_group.col_image.scales[col0 - tile_group.col_tile * kTile + c];
            }
            return dot;
        };
#pragma unroll 1
        for (int r = int(threadIdx.x) / kTile; r < kTile; r += kRowStep) {
            Acc& s = sim[r * kSimPitch + c];
            const bool pair = row0 + r < tile_group.rows.count && col0 + c < tile_group.cols.count &&
                              !(tile_group.square && row0 + r >= col0 + c);
            Acc x = pair ? quick_similarity(tile_group.similarity, unscaled(s, r), norms[r], norm) : Acc(0);
            for (uint32_t near = warp_ballot(x != x); near; near &= near - 1) {
                const int lane = __ffs(int(near)) - 1, at = c - lane_id() + lane;
                const Acc y = careful_similarity(tile_group.similarity, row_points, row0 + r, norms[r],
                                                 col_points, col0 + at, norms[kTile + at]);
                if (lane == lane_id()) x = y;
            }
            s = x;
        }
        block_sync();
    }
}

// A block a tile; those that are not needed are passed over.
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kTileThreads, kProductBlocks<Math>)
    tile_similarities(const __grid_constant__ TileGroup<Acc> all, Matrix<T> row_points, Matrix<T> col_points,
                      const __grid_constant__ TileNeed<Acc> need) {
    using Traits = ProductTraits<Math>;
    constexpr int kTile = Traits::kTile, kSimPitch = Traits::kSimPitch;
    const auto tile_group = all.in_use();
    const int row_tile = int(blockIdx.y), col_tile = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row_tile, tj = tile_group.col_tile + col_tile;
    int64_t* labels = shared_array<int64_t>(Traits::kLabels, 2 * kTile);
    int* flags = shared_array<int>(Traits::kFlags, kWarpSize);
    if (!tile_group.has(ti, tj) || !need.of(tile_group, ti, tj, labels, flags)) return;
    unsigned char* bytes = shared_array<unsigned char>(0, Traits::kTileBytes);
    Acc* norms = shared_array<Acc>(Traits::kNorms, 2 * kTile);
    Acc* factors = norms;
    if constexpr (PartsOf<Math>::kScaled) factors = shared_array<Acc>(Traits::kFactors, 2 * kTile);
    Acc* sim = reinterpret_cast<Acc*>(bytes);

    static_assert(2 * kTile <= kTileThreads, "a thread for each line");
    if (int(threadIdx.x) < 2 * kTile) {
        const int t = int(threadIdx.x);
        const bool is_row = t < kTile;
        const int64_t i = line_of_thread(tile_group, ti, tj);
        norms[t] = i >= 0 ? (is_row ? tile_group.rows : tile_group.cols).norms[i] : Acc(0);
        if constexpr (PartsOf<Math>::kScaled)
            factors[t] = norms[t] * (is_row ? tile_group.row_image.scales[row_tile * kTile + t]
                                            : tile_group.col_image.scales[col_tile * kTile + t - kTile]);
    }
    {
        Product<Math, SquareTile<Math>> product;
        multiply_tile<Math>(product, bytes, tile_group.row_image, row_tile, tile_group.col_image, col_tile,
                            row_points.cols);
        put_similarities<Math>(product, tile_group, row_points, ti * kTile, col_points, tj * kTile, norms,
                               factors, flags, sim);
    }
    block_sync();
    using Chunks = ChunkShare<Acc, kTile, kTile, kTileThreads>;
    using Chunk = Vector<Acc, Chunks::kElements>;
    const Acc* from = sim + Chunks::row() * kSimPitch + Chunks::col();
    Acc* to = tile_group.similarities_of(ti, tj) + Chunks::row() * kTile + Chunks::col();
#pragma unroll
    for (int c = 0; c < Chunks::kCount; ++c) {
        *reinterpret_cast<Chunk*>(to + c * Chunks::kRowStep * kTile) =
            *reinterpret_cast<const Chunk*>(from + c * Chunks::kRowStep * kSimPitch);
    }
}

}  // namespace dml::cuda
