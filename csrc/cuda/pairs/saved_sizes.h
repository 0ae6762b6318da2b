// How much forward leaves for backward, where in `saved` it lies, and what decides it. Without CUDA code, as
// a build without CUDA has to know it for torch.compile. Sizes are of type Int (core/sizes.h).
#pragma once

#include <cstdint>

#include "core/sizes.h"

namespace dml::cuda {

inline constexpr int kHeader = 4;       // numbers of all rows
inline constexpr int kStatsPerRow = 6;  // numbers of each row

// Up to so many rows and columns, and so much work, a batch is computed in row blocks without tiles. The
// rows: then a thread block stays within the 99 KiB that every GPU from sm_80 on grants. The work: above it
// tiles are as fast (measured on an H100), as row blocks have one product for all columns of 16 rows.
inline constexpr int64_t kRowBlockMaxCols = 512;
inline constexpr int64_t kRowBlockWork = 512 * (128 + 256);
inline constexpr int64_t kCacheBytes = 34ll << 20;      // similarities kept from forward for backward
inline constexpr int64_t kExtremesBudget = 16ll << 20;  // bytes of the tiles' extremes
inline constexpr int64_t kKeptBudget = 16ll << 20;      // tiles known to be kept or not

// acc_bytes, here and below: of a number of the type that sums are computed in.
constexpr int64_t tile_side(int64_t acc_bytes) { return acc_bytes == 8 ? 64 : 128; }

template <typename Int>
Int tile_count_of(const Int& n, const Int& m, bool square, int64_t acc_bytes) {
    const int64_t side = tile_side(acc_bytes);
    return tile_count(ceil_div(n, side), ceil_div(m, side), square);
}

// 1 or 0: whether it is known which of so many tiles hold a gradient.
template <typename Int>
Int knows_kept(const Int& tiles) {
    return is_positive(Int(kKeptBudget + 1) - tiles);
}

// Bytes of the least positive and the greatest negative similarity of each tile; 0 where they are not known.
// Their use is to find the tiles that were not kept.
template <typename Int>
Int extremes_bytes(const Int& tiles, int64_t acc_bytes) {
    const Int bytes = tiles * Int(2 * acc_bytes);
    return bytes * is_positive(Int(kExtremesBudget + 1) - bytes) * knows_kept(tiles);
}

// 1 or 0: whether a batch is computed in tiles, not in row blocks.
template <typename Int>
Int uses_tiles(const Int& n, const Int& m, const Int& dim, int64_t row_block_limit = kRowBlockMaxCols) {
    const Int rows = size_max(n, m);
    const Int beyond = size_max(rows - Int(std::min(row_block_limit, kRowBlockMaxCols)),
                                rows * (dim + Int(256)) - Int(kRowBlockWork));
    return is_positive(beyond) * is_positive(size_min(n, m));
}

// [numbers | similarities of all tiles | flags of the rows | kept flags of the tiles], as offsets in bytes.
// The numbers: kHeader, kStatsPerRow of each row, the norms of both sides.
template <typename Int>
struct SavedSizes {
    Int similarities, flags, kept, bytes;
    Int caches;  // 1 or 0: whether similarities may be kept for backward

    SavedSizes(const Int& n, const Int& m, const Int& dim, bool square, int64_t acc_bytes, bool save,
               int64_t row_block_limit = kRowBlockMaxCols, int64_t cache_bytes = kCacheBytes) {
        const Int tiles = tile_count_of(n, m, square, acc_bytes);
        const Int in_tiles = uses_tiles(n, m, dim, row_block_limit);
        const int64_t side = tile_side(acc_bytes);
        const Int all_similarities = tiles * Int(side * side * acc_bytes);
        caches = in_tiles * is_positive(Int(cache_bytes + 1) - all_similarities);
        const Int numbers = Int(kHeader) + Int(kStatsPerRow + 1) * n + (square ? Int(0) : m);
        similarities = round_up(numbers * Int(acc_bytes), 16);
        flags = similarities + (save ? all_similarities * caches : Int(0));
        kept = flags + n;
        bytes = round_up(kept + tiles * in_tiles * knows_kept(tiles), 16);
    }
};

// Numbers of a state of a ring (ring/ring.h), and of its weights for backward.
template <typename Int>
Int state_numbers(const Int& rows) {
    return Int(kHeader) + Int(kStatsPerRow) * rows;
}

}  // namespace dml::cuda
