// Partial results that a pass over tiles leaves for the merge that follows it.
#pragma once

#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// A tile group's results for its lines: for each of 2 sides [slots][kQuantities][lines]. A line is a row
// (side 0) or column (side 1) of the tile group, a slot the tile on the other axis.
inline constexpr int kQuantities = 4;

template <typename Acc>
struct Partials {
    Acc* data;

    DML_DEVICE Acc& at(const TileGroup<Acc>& tile_group, int side, int slot, int quantity, int line) const {
        const int lines = (side == 0 ? tile_group.row_tiles : tile_group.col_tiles) * kTileSide<Acc>;
        const int64_t side_size =
            int64_t(tile_group.row_tiles) * tile_group.col_tiles * kTileSide<Acc> * kQuantities;
        return data[side * side_size + (int64_t(slot) * kQuantities + quantity) * lines + line];
    }
};
inline int64_t partials_size(int64_t tiles, int tile, bool both_sides) {
    return (both_sides ? 2 : 1) * tiles * tile * kQuantities;
}

// Whether a merge visits the rows and columns of a tile group for the first time, and its rows for the last.
struct MergeStep {
    bool rows_first, cols_first;
    bool rows_last;

    DML_DEVICE bool first(int side) const { return side == 0 ? rows_first : cols_first; }
};

}  // namespace dml::cuda
