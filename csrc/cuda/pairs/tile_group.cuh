// Large batches: tiles of the pair matrix, and groups of tiles.
//
// A tile group is one launch of a kernel, so workspaces stay bounded whatever N and M. Where both sides are the same
// points only pairs i < j are visited: each serves row i and, transposed, row j.
#pragma once

#include "cuda/common/images.cuh"
#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/rows.cuh"

namespace dml::cuda {

inline constexpr int kTileThreads = 256;

// 128 rows and columns; of doubles 64.
template <typename Acc>
inline constexpr int kTileSide = int(tile_side(sizeof(Acc)));

// One side of the pair matrix: rows or columns, without their points.
template <typename Acc>
struct Lines {
    int64_t count;
    const int64_t* labels;  // [count]
    const Acc* norms;       // [count] of row_norm
    const int64_t* used;    // how many are in use, in device memory; null: all

    DML_DEVICE Lines in_use() const { return {rows_in_use(used, count), labels, norms, used}; }
};

// The tiles [row_tile, row_tile + row_tiles) x [col_tile, col_tile + col_tiles).
template <typename Acc>
struct TileGroup {
    Lines<Acc> rows, cols;
    bool square;  // rows and columns are the same points
    const int64_t* self_index;
    bool mine_self_pair;  // whether mining sees the pair of a row and itself
    Similarity similarity;
    int64_t row_tile, col_tile;
    int row_tiles, col_tiles;
    int64_t all_row_tiles, all_col_tiles, used_col_tiles;
    Image row_image, col_image;  // of the group's rows and columns
    Acc* similarities;           // [tiles, kTile, kTile]
    bool of_all_tiles;           // or of the group's alone

    DML_INLINE int64_t tile_index(int64_t ti, int64_t tj) const {
        return square ? ti * (2 * all_row_tiles - ti + 1) / 2 + (tj - ti) : ti * all_col_tiles + tj;
    }
    // Of a tile among the group's.
    DML_INLINE int64_t slot(int64_t ti, int64_t tj) const {
        return (ti - row_tile) * col_tiles + (tj - col_tile);
    }
    DML_DEVICE Acc* similarities_of(int64_t ti, int64_t tj) const {
        const int64_t index = of_all_tiles ? tile_index(ti, tj) : slot(ti, tj);
        return similarities + index * (kTileSide<Acc> * kTileSide<Acc>);
    }
    // The scales of the images of a row and a column.
    DML_DEVICE float row_scale(int64_t i) const { return row_image.scales[i - row_tile * kTileSide<Acc>]; }
    DML_DEVICE float col_scale(int64_t j) const { return col_image.scales[j - col_tile * kTileSide<Acc>]; }
    DML_DEVICE TileGroup in_use() const {
        TileGroup result = *this;
        result.cols = cols.in_use();
        result.used_col_tiles = (result.cols.count + kTileSide<Acc> - 1) / kTileSide<Acc>;
        return result;
    }
    DML_INLINE bool has(int64_t ti, int64_t tj) const { return square ? ti <= tj : tj < used_col_tiles; }
    DML_INLINE bool diagonal() const { return square && row_tile == col_tile; }
};

inline constexpr int kMaxTileGroup = 64;            // tiles along an edge of a square group
inline constexpr int kMaxLine = 2 * kMaxTileGroup;  // along the longer edge of another

// The row or column of this thread's line, or -1.
template <typename Acc>
DML_DEVICE int64_t line_of_thread(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj) {
    constexpr int kTile = kTileSide<Acc>;
    const int line = int(threadIdx.x);
    if (line >= 2 * kTile) return -1;
    const bool is_row = line < kTile;
    const int64_t i = is_row ? ti * kTile + line : tj * kTile + line - kTile;
    return i < (is_row ? tile_group.rows : tile_group.cols).count ? i : -1;
}

// A barrier for all threads of a block.
struct BlockSync {
    DML_DEVICE void operator()() const { block_sync(); }
};

// Whether `value` holds for any of the first kTileThreads of a block; they all get the answer. flags: a number for each
// warp, in shared memory. Two barriers.
template <typename Sync = BlockSync>
DML_DEVICE bool block_any(bool value, int* flags, const Sync& sync = {}) {
    value = warp_any(value);
    sync();  // previous readers of the flags are done
    if (lane_id() == 0) flags[warp_id()] = value ? 1 : 0;
    sync();
    int any = 0;
    for (int w = 0; w < kTileThreads / kWarpSize; ++w) any |= flags[w];
    return any != 0;
}

}  // namespace dml::cuda
