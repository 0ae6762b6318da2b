// Large batches: the similarities of a tile group, multiplied from the images of its points. Every other kernel on tiles
// looks at these alone.
#pragma once

#include "cuda/pairs/product_shape.cuh"
#include "cuda/pairs/tile_need.cuh"
#include "cuda/pairs/write_image.cuh"

namespace dml::cuda {

// Shared memory of a kernel, an array at a time.
struct SharedArrays {
    template <typename T>
    static DML_DEVICE T* at(int byte_offset, int count) {
        return shared_array<T>(byte_offset, count);
    }
};

// What a block has of its tile's lines: rows, then columns.
template <typename Math>
struct TileLines {
    using Acc = typename Math::Acc;
    static constexpr int kCount = 2 * kTileSide<Acc>;
    static constexpr bool kScaled = PartsOf<Math>::kScaled;
    static constexpr int kFactors = kCount * int(sizeof(Acc));
    static constexpr int kLabels = (kScaled ? 2 : 1) * kFactors;
    static constexpr int kFlags = kLabels + kCount * int(sizeof(int64_t));
    static constexpr int kBytes = kFlags + kWarpSize * int(sizeof(int));
    static_assert(kCount <= kTileThreads, "a thread for each line");

    Acc *norms, *factors;  // factors: norms times the scales of their images
    int64_t* labels;       // room for them
    int* flags;            // a number for each warp

    template <typename Arrays>
    DML_DEVICE TileLines(int first_byte, Arrays)
        : norms(Arrays::template at<Acc>(first_byte, kCount)),
          factors(kScaled ? Arrays::template at<Acc>(first_byte + kFactors, kCount) : norms),
          labels(Arrays::template at<int64_t>(first_byte + kLabels, kCount)),
          flags(Arrays::template at<int>(first_byte + kFlags, kWarpSize)) {}

    // By a thread for each line.
    DML_DEVICE void load(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj) {
        constexpr int kTile = kTileSide<Acc>;
        const int line = int(threadIdx.x);
        if (line >= kCount) return;
        const int64_t i = line_of_thread(tile_group, ti, tj);
        norms[line] = i >= 0 ? (line < kTile ? tile_group.rows : tile_group.cols).norms[i] : Acc(0);
        if constexpr (kScaled) {
            factors[line] = norms[line] * (line < kTile ? tile_group.row_scale(ti * kTile + line)
                                                        : tile_group.col_scale(tj * kTile + line - kTile));
        }
    }
};

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
    static constexpr int kLines = (kTileBytes + 15) / 16 * 16;
    static constexpr int kSharedBytes = kLines + TileLines<Math>::kBytes;
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
    pipeline<Traits::kStages>(slices, next, next, use);
}

// Inverse norms from which on the product of two is in range.
template <typename Acc>
inline constexpr Acc kPlainNorm = Acc(sizeof(Acc) == 8 ? 1e-145 : 1e-15);

// Writes a tile's similarities to sim [kTile, kSimPitch], by the first kTileThreads threads of a block, which hold its
// product; then from there to global memory.
template <typename Math, typename Sum, typename T, typename Acc, typename Sync>
DML_DEVICE void put_similarities(const Sum& product, const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj,
                                 const Matrix<T>& row_points, const Matrix<T>& col_points,
                                 const TileLines<Math>& lines, Acc* sim, const Sync& sync) {
    using Traits = ProductTraits<Math>;
    constexpr bool kScaled = PartsOf<Math>::kScaled;
    constexpr int kTile = Traits::kTile, kSimPitch = Traits::kSimPitch;
    const Acc *norms = lines.norms, *factors = lines.factors;
    const int64_t row0 = ti * kTile, col0 = tj * kTile;
    using Run = Vector<Acc, Sum::kRun>;
    bool unusual = true;  // distances; cosines at the edges, of zero rows and out of range
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
        unusual = block_any(!plain || check - check != Acc(0), lines.flags, sync);
    }
    if (unusual) {
        sync();
        product.for_each_run([&](int r, int c, const Acc(&dots)[Sum::kRun]) {
            Run s;
#pragma unroll
            for (int e = 0; e < Sum::kRun; ++e) s.value[e] = dots[e];
            *reinterpret_cast<Run*>(sim + r * kSimPitch + c) = s;
        });
        sync();
        constexpr int kRowStep = kTileThreads / kTile;
        const int c = int(threadIdx.x) % kTile;
        const Acc norm = norms[kTile + c];
#pragma unroll 1
        for (int r = int(threadIdx.x) / kTile; r < kTile; r += kRowStep) {
            Acc& s = sim[r * kSimPitch + c];
            const bool pair = row0 + r < tile_group.rows.count && col0 + c < tile_group.cols.count &&
                              !(tile_group.square && row0 + r >= col0 + c);
            Acc dot = s;
            if constexpr (kScaled)
                dot = dot * tile_group.row_scale(row0 + r) * tile_group.col_scale(col0 + c);
            Acc x = pair ? quick_similarity(tile_group.similarity, dot, norms[r], norm) : Acc(0);
            for (uint32_t near = warp_ballot(x != x); near; near &= near - 1) {
                const int lane = __ffs(int(near)) - 1, at = c - lane_id() + lane;
                const Acc y = careful_similarity(tile_group.similarity, row_points, row0 + r, norms[r],
                                                 col_points, col0 + at, norms[kTile + at]);
                if (lane == lane_id()) x = y;
            }
            s = x;
        }
        sync();
    }
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

// A block a tile; those that are not needed are passed over.
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kTileThreads, kProductBlocks<Math>)
    tile_similarities(const __grid_constant__ TileGroup<Acc> all, Matrix<T> row_points, Matrix<T> col_points,
                      const __grid_constant__ TileNeed<Acc> need) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Traits = ProductTraits<Math>;
    const auto tile_group = all.in_use();
    const int row_tile = int(blockIdx.y), col_tile = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row_tile, tj = tile_group.col_tile + col_tile;
    TileLines<Math> lines(Traits::kLines, SharedArrays{});
    if (!tile_group.has(ti, tj) || !need.of(tile_group, ti, tj, lines.labels, lines.flags)) return;
    unsigned char* bytes = shared_array<unsigned char>(0, Traits::kTileBytes);
    lines.load(tile_group, ti, tj);
    Product<Math, SquareTile<Math>> product;
    multiply_tile<Math>(product, bytes, tile_group.row_image, row_tile, tile_group.col_image, col_tile,
                        row_points.cols);
    put_similarities(product, tile_group, ti, tj, row_points, col_points, lines,
                     reinterpret_cast<Acc*>(bytes), BlockSync{});
}

}  // namespace dml::cuda
