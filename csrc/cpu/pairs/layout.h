// What forward leaves for backward: the layout of `saved`, and the numbers of its rows. Sizes are of type Int
// (core/sizes.h), as torch.compile asks for them before it knows them.
#pragma once

#include <cstdint>

#include "core/sizes.h"

namespace dml::cpu {

// Memory that may hold similarity tiles from forward to backward, whatever N and M: less where the gradient
// of the columns, which may be many, comes on top.
constexpr int64_t kSquareCacheBytes = int64_t(64) << 20, kCacheBytes = int64_t(32) << 20;

// Small batches are cut finer, so that there is work for several threads, and fewer pairs beside the diagonal
// are computed twice. The side depends on the sizes alone, as every sum depends on it.
constexpr int64_t kSmallTile = 64, kLargeTile = 128, kMostPointsInSmallTiles = 1024;

// m: the most columns there may be.
template <typename Int>
Int tile_side(const Int& n, const Int& m) {
    const Int is_large = is_positive(size_max(n, m) - Int(kMostPointsInSmallTiles));
    return Int(kSmallTile) + Int(kLargeTile - kSmallTile) * is_large;
}

template <typename Int>
Int tile_count_of(const Int& n, const Int& m, bool square) {
    const Int side = tile_side(n, m);
    return tile_count((n + side - Int(1)) / side, (m + side - Int(1)) / side, square);
}

// The bytes of `saved`: [row stats | plan | kept | tiles], each from a multiple of 64 on.
//   row stats  T: six numbers a row, two scales, poisoned     plan   int32 (plan.h)
//   kept       per tile, whether any of its pairs may have a gradient
//   tiles      the similarities of the first `cached` tiles
constexpr int64_t kStatsPerRow = 6;

template <typename Int>
struct Layout {
    Int plan, kept, tiles, cached, bytes;

    // m: the most columns there may be. itemsize: of the type that is computed in.
    Layout(const Int& n, const Int& m, bool square, int64_t itemsize, bool save_tiles) {
        const Int side = tile_side(n, m), count = tile_count_of(n, m, square);
        const Int tile_bytes = side * side * Int(itemsize);
        const Int most = Int(square ? kSquareCacheBytes : kCacheBytes) / tile_bytes;
        cached = save_tiles ? size_min(count, most) : Int(0);
        plan = round_up((Int(kStatsPerRow) * n + Int(3)) * Int(itemsize), 64);
        const Int plan_numel = square ? Int(3) * n : Int(3) * n + m;
        kept = round_up(plan + plan_numel * Int(sizeof(int32_t)), 64);
        tiles = round_up(kept + count, 64);
        bytes = tiles + cached * tile_bytes;
    }
};

template <typename T>
struct RowStats {
    T *neg_above, *pos_below, *neg_value, *pos_value, *d_neg, *d_pos;  // [N] each
    T* scale;                                                          // [2] 1 / count of each part
    T* poisoned;

    RowStats(T* data, int64_t n)
        : neg_above(data),
          pos_below(data + n),
          neg_value(data + 2 * n),
          pos_value(data + 3 * n),
          d_neg(data + 4 * n),
          d_pos(data + 5 * n),
          scale(data + 6 * n),
          poisoned(data + 6 * n + 2) {}
};

// ---- blocks of columns, one after the other (ring.cpp)
// ----------------------------------------------------------

// A state, [kRingState, N]: the numbers of RowAccumulators and of RowStats, and whether the points so far
// were finite (0 or NaN). The weights that backward needs, [kStatsPerRow, N]: those of RowStats.
constexpr int64_t kAccumulatorNumbers = 7, kRingState = kAccumulatorNumbers + kStatsPerRow + 1;

}  // namespace dml::cpu
