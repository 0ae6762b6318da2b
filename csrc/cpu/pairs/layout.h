// What forward saves for backward: the layout of `saved`, and the stats of its rows.
#pragma once

#include <cstdint>

#include "cpu/pairs/plan.h"
#include "cpu/pairs/tiles.h"

namespace dml::cpu {

// The most memory for similarity tiles from forward to backward. Rectangular problems have less, as the
// gradient of the columns comes on top.
constexpr int64_t kSquareCacheBytes = int64_t(64) << 20, kCacheBytes = int64_t(32) << 20;

// The bytes of `saved`: [stats | plan | kept | tiles], each at a multiple of 64.
//   stats  T      RowStats
//   plan   int32  Plan
//   kept   uint8  for each tile, whether any of its pairs may have a gradient
//   tiles  T      the similarities of the first `cached` tiles
struct Layout {
    int64_t plan, kept, tiles, cached, bytes;

    Layout(int64_t n, const Tiles& all, int64_t itemsize, bool save_tiles) {
        const auto after = [](int64_t at, int64_t size) { return (at + size + 63) / 64 * 64; };
        const int64_t most = all.square ? kSquareCacheBytes : kCacheBytes;
        cached = save_tiles ? std::min(all.count(), most / (all.area() * itemsize)) : 0;
        plan = after(0, (6 * n + 3) * itemsize);
        kept = after(plan, Plan::numel(n, all.m, all.square) * int64_t(sizeof(int32_t)));
        tiles = after(kept, all.count());
        bytes = tiles + cached * all.area() * itemsize;
    }
};

// The row stats: bounds of the kept pairs, values of the accumulators, and derivatives of the row's loss.
template <typename T>
struct RowStats {
    T *neg_above, *pos_below, *neg_value, *pos_value, *d_neg, *d_pos;  // [N]
    T* scale;                                                          // [2] 1 / count of each part
    T* poisoned;                                                       // [1] whether the loss is NaN

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

}  // namespace dml::cpu
