// Large batches: which tiles a pass needs. The others hold no pair that it would count.
#pragma once

#include "cuda/pairs/row_stats.cuh"
#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// Bits of a tile's kept flag.
inline constexpr uint8_t kHasGradient = 1;  // a derivative in it can be not 0
inline constexpr uint8_t kHasPartials = 2;  // the present pass has left partial results

template <typename Acc>
struct TileNeed {
    RowStats<Acc> row_stats;
    const Acc* extremes = nullptr;  // [tiles, 2] of the tiles, for tiles that mining emptied; or null
    const uint8_t* kept = nullptr;  // [tiles] flags, for tiles without a derivative; or null
    bool only_positives = false;    // of a pass that adds up no negatives

    // For the whole block. labels [2 kTile] and flags: shared memory.
    DML_DEVICE bool of(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj, int64_t* labels,
                       int* flags) const {
        if (!has_gradient(tile_group, ti, tj)) return false;
        if (extremes && !block_any(may_keep(tile_group, ti, tj), flags)) return false;
        return !only_positives || block_any(has_positives(tile_group, ti, tj, labels), flags);
    }

    DML_DEVICE bool has_gradient(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj) const {
        return !kept || (kept[tile_group.tile_index(ti, tj)] & kHasGradient) != 0;
    }

   private:
    // Whether the thread's line may keep a pair, from the tile's extremes and the line's bounds.
    DML_DEVICE bool may_keep(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj) const {
        const int64_t index = tile_group.tile_index(ti, tj), i = line_of_thread(tile_group, ti, tj);
        const bool counts = i >= 0 && (tile_group.square || int(threadIdx.x) < kTileSide<Acc>);
        return counts && (extremes[2 * index] < row_stats.pos_below[i] ||
                          (!only_positives && extremes[2 * index + 1] > row_stats.neg_above[i]));
    }
    // Whether the thread's row has a positive.
    DML_DEVICE bool has_positives(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj,
                                  int64_t* labels) const {
        constexpr int kTile = kTileSide<Acc>;
        const int64_t i = line_of_thread(tile_group, ti, tj);
        const int line = int(threadIdx.x);
        if (i >= 0) labels[line] = (line < kTile ? tile_group.rows : tile_group.cols).labels[i];
        block_sync();
        bool any = false;
        if (i >= 0 && line < kTile) {
            const int64_t cols = tile_group.cols.count - tj * kTile;
            for (int c = 0; c < (cols < kTile ? int(cols) : kTile); ++c)
                any = any || labels[kTile + c] == labels[line];
        }
        return any;
    }
};

}  // namespace dml::cuda
