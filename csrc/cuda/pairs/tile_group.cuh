// Large batches: tiles of the pair matrix, groups of tiles, and the similarities of a tile.
//
// A tile group is one launch, so workspaces stay bounded whatever N and M. Where both sides are the same
// points only pairs i < j are visited: each serves row i and, transposed, row j.
#pragma once

#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/write_image.cuh"

namespace dml::cuda {

// Arithmetic whose tiles need the registers of two thread blocks.
template <typename Math>
inline constexpr bool kNeedsManyRegisters = false;
template <typename T>
inline constexpr bool kNeedsManyRegisters<SimtMath<T>> = true;
template <typename T>
inline constexpr bool kNeedsManyRegisters<Tf32Math<T, true>> = true;
template <>
inline constexpr bool kNeedsManyRegisters<ScaledMath<2>> = true;
template <typename T>
inline constexpr bool kNeedsManyRegisters<WeightMath<T, 2>> = true;

// Thread blocks of a tile kernel per multiprocessor: of two, one multiplies while the other visits its pairs.
// From sm_120 on shared memory holds one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <typename Math>
inline constexpr int kTileBlocks = 1;
#else
template <typename Math>
inline constexpr int kTileBlocks = kNeedsManyRegisters<Math> ? 1 : 2;
#endif

// The same for kernels that visit pairs, whose formulas take registers as well.
template <typename Math>
inline constexpr int kPairBlocks = kTileBlocks<Math>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <>
inline constexpr int kPairBlocks<ScaledMath<1>> = 1;
#endif

template <typename Math>
using SquareTile = Shape<kTileSide<Math>, kTileSide<Math>, 2, 4, false>;

template <typename Math>
struct TileTraits {
    using Acc = typename Math::Acc;
    using Layout = PointsLayout<Math>;
    using TileShape = SquareTile<Math>;
    static constexpr int kTile = kTileSide<Math>;
    static constexpr int kThreads = TileShape::kThreads;
    using Slices = RowsOfImage<Layout, kThreads>;
    static constexpr int kStages = Layout::kParts == 2 ? 2 : 3;
    static constexpr int kDepth = kSliceBytes / int(sizeof(typename Layout::Element));  // k-slice
    static constexpr int kStageBytes = 2 * Slices::kBytes;
    // Rows of similarities are 16 bytes longer than the tile, so that eight rows start in different banks.
    static constexpr int kSimPitch = kTile + kPad<Acc>;
    static constexpr int kSimBytes = kTile * kSimPitch * int(sizeof(Acc));
    // Shared memory. The similarities take the place of the slices they were computed from.
    static constexpr int kTileBytes = kSimBytes > kStages* kStageBytes ? kSimBytes : kStages * kStageBytes;
    static constexpr int kLabels = (kTileBytes + 15) / 16 * 16;
    static constexpr int kNorms = kLabels + 2 * kTile * int(sizeof(int64_t));
    static constexpr int kFactors = kNorms + 2 * kTile * int(sizeof(Acc));
    static constexpr int kFlags = kFactors + (PartsOf<Math>::kScaled ? 2 * kTile * int(sizeof(Acc)) : 0);
    static constexpr int kEnd =
        kFlags + kWarpSize * int(sizeof(int));  // where the kernels' other arrays begin
};

// The tiles [row_tile, row_tile + row_tiles) x [col_tile, col_tile + col_tiles).
template <typename T, typename Acc>
struct TileGroup {
    Rows<T, Acc> rows, cols;
    bool square;  // rows and columns are the same points
    const int64_t* self_index;
    bool mine_self_pair;  // whether mining sees the pair of a row and itself
    Similarity similarity;
    int64_t row_tile, col_tile;
    int row_tiles, col_tiles;
    int64_t all_row_tiles, all_col_tiles, used_col_tiles;
    Acc* cache;                  // [tiles, kTile, kTile] or null
    bool cache_filled;           // an earlier launch has stored the similarities
    Image row_image, col_image;  // of the group's rows and columns

    DML_INLINE int64_t tile_index(int64_t ti, int64_t tj) const {
        return square ? ti * (2 * all_row_tiles - ti + 1) / 2 + (tj - ti) : ti * all_col_tiles + tj;
    }
    template <int Tile>
    DML_DEVICE TileGroup in_use() const {
        TileGroup result = *this;
        result.cols = cols.in_use();
        result.used_col_tiles = (result.cols.points.rows + Tile - 1) / Tile;
        return result;
    }
    DML_INLINE bool has(int64_t ti, int64_t tj) const { return square ? ti <= tj : tj < used_col_tiles; }
    DML_INLINE bool diagonal() const { return square && row_tile == col_tile; }
};

inline constexpr int kMaxTileGroup = 64;            // tiles along an edge of a square group
inline constexpr int kMaxLine = 2 * kMaxTileGroup;  // along the longer edge of another

// The tile of a block: its similarities and the labels of both sides, in shared memory.
template <typename Math>
struct LoadedTile {
    using Traits = TileTraits<Math>;
    using Acc = typename Math::Acc;
    int64_t row0, col0;
    Acc* sim;             // [kTile, kSimPitch]
    int64_t* row_labels;  // [kTile]
    int64_t* col_labels;  // [kTile]
};

// The bare dot products of the images' rows of a tile and of another. Takes the first kStages * kStageBytes of shared
// memory.
template <typename Math>
DML_DEVICE void multiply_tile(Product<Math, SquareTile<Math>>& product, unsigned char* shared,
                              const Image& rows, int row_tile, const Image& cols, int col_tile, int64_t dim) {
    using Traits = TileTraits<Math>;
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
DML_DEVICE void store_similarities(const Sum& product, const TileGroup<T, Acc>& tile_group, int64_t row0,
                                   int64_t col0, const Acc* norms, const Acc* factors, int* flags, Acc* sim) {
    using Traits = TileTraits<Math>;
    constexpr bool kScaled = PartsOf<Math>::kScaled;
    constexpr int kTile = Traits::kTile, kSimPitch = Traits::kSimPitch, kThreads = Traits::kThreads;
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
        const bool unusual = warp_any(!plain || check - check != Acc(0));
        if (lane_id() == 0) flags[warp_id()] = unusual ? 1 : 0;
        block_sync();
        int any = 0;
        for (int w = 0; w < kThreads / kWarpSize; ++w) any |= flags[w];
        if (any == 0) return;
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
            const bool pair = row0 + r < tile_group.rows.points.rows &&
                              col0 + c < tile_group.cols.points.rows &&
                              !(tile_group.square && row0 + r >= col0 + c);
            Acc x = pair ? quick_similarity(tile_group.similarity, unscaled(s, r), norms[r], norm) : Acc(0);
            for (uint32_t near = warp_ballot(x != x); near; near &= near - 1) {
                const int lane = __ffs(int(near)) - 1, at = c - lane_id() + lane;
                const Acc y =
                    careful_similarity(tile_group.similarity, tile_group.rows.points, row0 + r, norms[r],
                                       tile_group.cols.points, col0 + at, norms[kTile + at]);
                if (lane == lane_id()) x = y;
            }
            s = x;
        }
        block_sync();
    }
}

// The similarities, labels and norms of a tile: from the cache, or multiplied (and cached where there is a
// cache).
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
DML_DEVICE LoadedTile<Math> load_tile(const TileGroup<T, Acc>& tile_group, int64_t ti, int64_t tj) {
    using Traits = TileTraits<Math>;
    constexpr int kTile = Traits::kTile, kThreads = Traits::kThreads, kSimPitch = Traits::kSimPitch;
    unsigned char* bytes = shared_array<unsigned char>(0, Traits::kTileBytes);
    int64_t* labels = shared_array<int64_t>(Traits::kLabels, 2 * kTile);
    Acc* norms = shared_array<Acc>(Traits::kNorms, 2 * kTile);
    Acc* factors = norms;
    if constexpr (PartsOf<Math>::kScaled) factors = shared_array<Acc>(Traits::kFactors, 2 * kTile);
    int* flags = shared_array<int>(Traits::kFlags, kWarpSize);
    Acc* sim = reinterpret_cast<Acc*>(bytes);
    const int row_tile = int(ti - tile_group.row_tile), col_tile = int(tj - tile_group.col_tile);
    const Matrix<T>&rows = tile_group.rows.points, &cols = tile_group.cols.points;
    const int64_t row0 = ti * kTile, col0 = tj * kTile;

    static_assert(2 * kTile <= kThreads, "a thread for each line");
    if (int(threadIdx.x) < 2 * kTile) {
        const int t = int(threadIdx.x);
        const bool is_row = t < kTile;
        const int64_t i = is_row ? row0 + t : col0 + t - kTile;
        const bool inside = i < (is_row ? rows.rows : cols.rows);
        labels[t] = inside ? (is_row ? tile_group.rows.labels : tile_group.cols.labels)[i] : 0;
        norms[t] = inside ? (is_row ? tile_group.rows.norms : tile_group.cols.norms)[i] : Acc(0);
        if constexpr (PartsOf<Math>::kScaled) {
            if (!tile_group.cache_filled)
                factors[t] = norms[t] * (is_row ? tile_group.row_image.scales[row_tile * kTile + t]
                                                : tile_group.col_image.scales[col_tile * kTile + t - kTile]);
        }
    }
    const LoadedTile<Math> tile = {row0, col0, sim, labels, labels + kTile};
    // Computed where it is used: the product leaves no registers to keep it in.
    const auto cached = [&] { return tile_group.cache + tile_group.tile_index(ti, tj) * kTile * kTile; };
    if (!tile_group.cache_filled) {
        Product<Math, SquareTile<Math>> product;
        multiply_tile<Math>(product, bytes, tile_group.row_image, row_tile, tile_group.col_image, col_tile,
                            rows.cols);
        store_similarities<Math>(product, tile_group, row0, col0, norms, factors, flags, sim);
        if (tile_group.cache) {
            using Chunks = ChunkShare<Acc, kTile, kTile, kThreads>;
            using Chunk = Vector<Acc, Chunks::kElements>;
            const Acc* from = sim + Chunks::row() * kSimPitch + Chunks::col();
            Acc* to = cached() + Chunks::row() * kTile + Chunks::col();
#pragma unroll
            for (int c = 0; c < Chunks::kCount; ++c) {
                *reinterpret_cast<Chunk*>(to + c * Chunks::kRowStep * kTile) =
                    *reinterpret_cast<const Chunk*>(from + c * Chunks::kRowStep * kSimPitch);
            }
        }
        return tile;
    }
    WholeBoxes<Acc, kTile, kTile, kTile, kSimPitch, kThreads>(cached()).start(sim, 0);
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();
    return tile;
}

}  // namespace dml::cuda
