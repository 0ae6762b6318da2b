// What forward saves for backward: the layout of `saved`, and the stats of its rows. Sizes are of type Int
// (core/sizes.h), as torch.compile asks for them before it knows them.
#pragma once

#include <cstdint>

#include "core/sizes.h"
#include "losses/formula.h"

namespace dml::cpu {

// The most memory for similarity tiles from forward to backward, unless the caller says how much. Rectangular problems have
// less, as the gradient of the columns comes on top.
constexpr int64_t kSquareCacheBytes = int64_t(64) << 20, kCacheBytes = int64_t(32) << 20;

// Tiles are smaller for small batches: more tiles to distribute, and fewer pairs near the diagonal computed
// twice. The side depends on the sizes alone, as it determines the order of every sum.
constexpr int64_t kSmallTile = 64, kLargeTile = 128, kMostRowsOfSmallTiles = 1024;

// The shape of a batch. m: rows of ref_emb, valid or not.
template <typename Int>
struct Shape {
    Int n, m;
    bool square, both_directions;

    // Rows that have a loss, and columns where they have one.
    Int lines() const { return both_directions ? n + m : n; }
};

// m: rows of ref_emb, valid or not.
template <typename Int>
Int tile_side(const Int& n, const Int& m) {
    const Int is_large = is_positive(size_max(n, m) - Int(kMostRowsOfSmallTiles));
    return Int(kSmallTile) + Int(kLargeTile - kSmallTile) * is_large;
}

template <typename Int>
Int tile_count_of(const Int& n, const Int& m, bool square) {
    const Int side = tile_side(n, m);
    return tile_count((n + side - Int(1)) / side, (m + side - Int(1)) / side, square);
}

constexpr int64_t kStatsPerRow = 8;

// The bytes of `saved`: [stats | plan | kept | tiles], each at a multiple of 64.
//   stats  T      RowStats of the lines
//   plan   int32  Plan
//   kept   uint8  for each tile, whether any of its pairs may have a gradient
//   tiles  T      the similarities of the first `cached` tiles
template <typename Int>
struct Layout {
    Int plan, kept, tiles, cached, bytes;

    // itemsize: of the compute type. cache_bytes: of tiles; below 0: as above.
    Layout(const Shape<Int>& shape, int64_t itemsize, int64_t cache_bytes) {
        const Int &n = shape.n, &m = shape.m;
        const bool square = shape.square;
        const Int side = tile_side(n, m), count = tile_count_of(n, m, square);
        const Int tile_bytes = side * side * Int(itemsize);
        if (cache_bytes < 0) cache_bytes = square ? kSquareCacheBytes : kCacheBytes;
        cached = size_min(count, Int(cache_bytes) / tile_bytes);
        plan = round_up((Int(kStatsPerRow) * shape.lines() + Int(3)) * Int(itemsize), 64);
        const Int plan_numel = Int(3) * n + (square ? Int(0) : shape.both_directions ? Int(3) * m : m);
        kept = round_up(plan + plan_numel * Int(sizeof(int32_t)), 64);
        tiles = round_up(kept + count, 64);
        bytes = tiles + cached * tile_bytes;
    }
};

// The row stats: bounds of the kept pairs, values and counts of the accumulators, and derivatives of the row's
// loss.
template <typename T>
struct RowStats {
    T *neg_above, *pos_below, *neg_value, *pos_value, *d_neg, *d_pos, *neg_count, *pos_count;  // [lines]
    T* scale;     // [2] 1 / count of each part
    T* poisoned;  // [1] whether the loss is NaN

    RowStats(T* data, int64_t n)
        : neg_above(data),
          pos_below(data + n),
          neg_value(data + 2 * n),
          pos_value(data + 3 * n),
          d_neg(data + 4 * n),
          d_pos(data + 5 * n),
          neg_count(data + 6 * n),
          pos_count(data + 7 * n),
          scale(data + 8 * n),
          poisoned(data + 8 * n + 2) {}

    T* numbers() const { return neg_above; }  // [kStatsPerRow, lines]
    Gathered<T> gathered(int64_t i) const { return {neg_value[i], pos_value[i], neg_count[i], pos_count[i]}; }
};

// Numbers of a row in the state of a ring (ring.cpp): those of RowAccumulators and RowStats, and one more.
constexpr int64_t kAccumulatorNumbers = 7, kStateNumbers = kAccumulatorNumbers + kStatsPerRow + 1;

}  // namespace dml::cpu
