// Large batches: every row's hardest pairs.
#pragma once

#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/row_stats.cuh"
#include "cuda/pairs/tile_pairs.cuh"

namespace dml::cuda {

// Merges the lines' extremes over the thread block, to out [2].
template <typename Acc>
DML_DEVICE void store_tile_extremes(const Extremes<Acc>& found, Acc* out) {
    Acc* warp_extremes = PairGrid<Acc>::line_numbers();
    const Acc least = warp_min(found.min_pos), greatest = warp_max(found.max_neg);
    if (lane_id() == 0) {
        warp_extremes[warp_id()] = least;
        warp_extremes[kWarpSize + warp_id()] = greatest;
    }
    block_sync();
    if (threadIdx.x != 0) return;
    Extremes<Acc> extremes;
    for (int w = 0; w < kTileThreads / kWarpSize; ++w)
        extremes.merge({warp_extremes[w], warp_extremes[kWarpSize + w]});
    out[0] = extremes.min_pos;
    out[1] = extremes.max_neg;
}

// tile_extremes: [tiles, 2] the least positive and greatest negative similarity of each tile, or null.
template <typename Acc>
__global__ void __launch_bounds__(kTileThreads, kPairBlocks<Acc>)
    find_extremes(const __grid_constant__ TileGroup<Acc> all, Partials<Acc> partials, Acc* tile_extremes) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Grid = PairGrid<Acc>;
    constexpr int kTile = Grid::kTile;
    const auto tile_group = all.in_use();
    const int row = int(blockIdx.y), col = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row, tj = tile_group.col_tile + col;
    if (!tile_group.has(ti, tj)) return;
    load_pairs(tile_group, ti, tj, true);
    const WarpExchange<Grid> exchange = {Grid::scratch(2)};

    const ColumnIds<Grid> col_ids;
    Acc min_pos[Grid::kCols], max_neg[Grid::kCols];  // of the columns
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) {
        min_pos[j] = infinity<Acc>();
        max_neg[j] = -infinity<Acc>();
    }
    bool any_positive = false;  // of the warp
#pragma unroll 1
    for (int i = 0; i < Grid::kRows; ++i) {
        const int id = Grid::ids()[Grid::row(i)];
        const auto sims = Grid::sims(i);  // NaN where there is no pair, which std::fmin and fmax ignore
        Extremes<Acc> row_extremes;
        if (col_ids.any_positive(id)) {
            any_positive = true;
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                const bool positive = col_ids.positive(j, id);
                const Acc pos = positive ? sims.s[j] : infinity<Acc>();
                const Acc neg = positive ? -infinity<Acc>() : sims.s[j];
                row_extremes.merge({pos, neg});
                min_pos[j] = std::fmin(min_pos[j], pos);
                max_neg[j] = std::fmax(max_neg[j], neg);
            }
            row_extremes.min_pos = merge_lanes<Grid>(row_extremes.min_pos, Minimum{});
        } else {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                row_extremes.max_neg = std::fmax(row_extremes.max_neg, sims.s[j]);
                max_neg[j] = std::fmax(max_neg[j], sims.s[j]);
            }
        }
        exchange.put_row(0, i, row_extremes.min_pos);
        exchange.put_row(1, i, merge_lanes<Grid>(row_extremes.max_neg, Maximum{}));
    }
    if (!any_positive) {
        exchange.put_every_col(0, infinity<Acc>());
    } else {
        exchange.put_cols(0, min_pos, Minimum{});
    }
    exchange.put_cols(1, max_neg, Maximum{});
    block_sync();

    const int line = int(threadIdx.x);
    Extremes<Acc> found;
    if (line < (tile_group.square ? Grid::kLines : kTile)) {
        found = {exchange.get(0, line, Minimum{}), exchange.get(1, line, Maximum{})};
        const int side = line < kTile ? 0 : 1;
        const int slot = side == 0 ? col : row,
                  at = side == 0 ? row * kTile + line : (col - 1) * kTile + line;
        partials.at(tile_group, side, slot, 0, at) = found.min_pos;
        partials.at(tile_group, side, slot, 1, at) = found.max_neg;
    }
    if (tile_extremes) store_tile_extremes(found, tile_extremes + 2 * tile_group.tile_index(ti, tj));
}

}  // namespace dml::cuda
