// How much forward leaves for backward, where in `saved` it lies for tiles, and what decides it. Without CUDA
// code, as a build without CUDA has to know it for torch.compile. Sizes are of type Int (core/sizes.h).
#pragma once

#include <cstdint>

#include "core/sizes.h"
#include "cuda/matrix/sizes.h"

namespace dml::cuda {

inline constexpr int kStatsPerRow = 6;  // numbers of each row

inline constexpr int64_t kCacheBytes = 34ll << 20;      // similarities kept from forward for backward
inline constexpr int64_t kExtremesBudget = 16ll << 20;  // bytes of the tiles' extremes
inline constexpr int64_t kKeptBudget = 16ll << 20;      // tiles known to be kept or not

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

// Of a batch in tiles: [numbers | similarities of all tiles | flags of the rows | kept flags of the tiles], as offsets in bytes.
// The numbers: kHeader, kStatsPerRow of each row, the norms of both sides.
template <typename Int>
struct TileSizes {
    Int similarities, flags, kept, bytes;
    Int caches;  // 1 or 0: whether all similarities are kept

    TileSizes(const Int& n, const Int& m, bool square, int64_t acc_bytes, int64_t cache_bytes) {
        const Int tiles = tile_count_of(n, m, square, acc_bytes);
        const int64_t side = tile_side(acc_bytes);
        const Int all_similarities = tiles * Int(side * side * acc_bytes);
        caches = is_positive(Int(cache_bytes + 1) - all_similarities);
        const Int numbers = Int(kHeader) + Int(kStatsPerRow + 1) * n + (square ? Int(0) : m);
        similarities = round_up(numbers * Int(acc_bytes), 16);
        flags = similarities + all_similarities * caches;
        kept = flags + n;
        bytes = round_up(kept + tiles * knows_kept(tiles), 16);
    }
};

inline constexpr int kFormulaBytes = 8 * 8;              // of a formula's numbers
inline constexpr int kByParamBytes = 2 * kFormulaBytes;  // of the same as dual numbers
inline constexpr int kTicketBytes = 16;

// Behind that, where parameters are on the device: [the formula | its derivatives by each parameter | a ticket
// for backward | for each parameter and part a number of each row]. params: how many, or 0.
template <typename Int>
Int learned_bytes(const Int& n, int64_t params, int64_t acc_bytes) {
    if (params == 0) return Int(0);
    return Int(kFormulaBytes + params * kByParamBytes + kTicketBytes) +
           round_up(n * Int(2 * params * acc_bytes), 16);
}

// Bytes that forward saves: of the matrix path, or of tiles.
template <typename Int>
Int saved_bytes_of(const Int& n, const Int& m, bool square, int64_t acc_bytes, int64_t cache_bytes,
                   int64_t params = 0) {
    const Int matrix = uses_matrix(n, m, acc_bytes);
    return matrix * MatrixSizes<Int>(n, m, square, acc_bytes).bytes +
           (Int(1) - matrix) * TileSizes<Int>(n, m, square, acc_bytes, cache_bytes).bytes +
           learned_bytes(n, params, acc_bytes);
}

// Numbers of a state of a ring (ring/ring.h), and of its weights for backward.
template <typename Int>
Int state_numbers(const Int& rows) {
    return Int(kHeader) + Int(kStatsPerRow) * rows;
}

}  // namespace dml::cuda
