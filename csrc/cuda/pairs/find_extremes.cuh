// Large batches, before the formula: the rows' norms, and every row's hardest pairs.
#pragma once

#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/row_stats.cuh"
#include "cuda/pairs/tile_pairs.cuh"

namespace dml::cuda {

// ---- every row's norm ---------------------------------------------------------------------------------

inline constexpr int kNormThreads = 256;

// One warp a row. open: also sets the row's bounds so that every pair is kept.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kNormThreads)
    prepare_rows(Rows<T, Acc> rows, Similarity similarity, RowStats<Acc> row_stats, bool open) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t i = int64_t(blockIdx.x) * (kNormThreads / kWarpSize) + warp_id();
    const Matrix<T>& points = rows.points;
    if (i >= points.rows) return;
    constexpr int kVector = 16 / int(sizeof(T));  // rows are aligned
    const T* row = points.data + i * points.stride;
    Acc squares = 0;
    const auto add = [&](T value) { squares = std::fma(Acc(value), Acc(value), squares); };
    const int64_t whole = points.cols / kVector * kVector;
#pragma unroll 4
    for (int64_t d = lane_id() * kVector; d < whole; d += kWarpSize * kVector) {
        const auto values = *reinterpret_cast<const Vector<T, kVector>*>(row + d);
#pragma unroll
        for (int e = 0; e < kVector; ++e) add(values.value[e]);
    }
    if (whole + lane_id() < points.cols) add(row[whole + lane_id()]);
    squares = warp_sum(squares);
    if (lane_id() != 0) return;
    rows.norms[i] = row_norm(squares, points, i, similarity);
    if (!open) return;
    row_stats.neg_above[i] = Bounds<Acc>::all().neg_above;
    row_stats.pos_below[i] = Bounds<Acc>::all().pos_below;
}

// ---- the hardest pairs ------------------------------------------------------------------------------------

// Merges the lines' extremes over the thread block, to out [2].
template <typename Math, typename Acc>
DML_DEVICE void store_tile_extremes(const Extremes<Acc>& found, Acc* out) {
    Acc* warp_extremes = PairGrid<Math>::line_numbers();
    const Acc least = warp_min(found.min_pos), greatest = warp_max(found.max_neg);
    if (lane_id() == 0) {
        warp_extremes[warp_id()] = least;
        warp_extremes[kWarpSize + warp_id()] = greatest;
    }
    block_sync();
    if (threadIdx.x != 0) return;
    Extremes<Acc> extremes;
    for (int w = 0; w < TileTraits<Math>::kThreads / kWarpSize; ++w)
        extremes.merge({warp_extremes[w], warp_extremes[kWarpSize + w]});
    out[0] = extremes.min_pos;
    out[1] = extremes.max_neg;
}

// tile_extremes: [tiles, 2] the least positive and greatest negative similarity of each tile, or null.
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kPairBlocks<Math>)
    find_extremes(const __grid_constant__ TileGroup<T, Acc> all, Partials<Acc> partials, Acc* tile_extremes) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Grid = PairGrid<Math>;
    constexpr int kTile = Grid::kTile;
    const auto tile_group = all.template in_use<kTile>();
    const int row = int(blockIdx.y), col = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row, tj = tile_group.col_tile + col;
    if (!tile_group.has(ti, tj)) return;
    load_pairs<Math>(tile_group, ti, tj, true);
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
        partials.template at<kTile>(tile_group, side, slot, 0, at) = found.min_pos;
        partials.template at<kTile>(tile_group, side, slot, 1, at) = found.max_neg;
    }
    if (tile_extremes) store_tile_extremes<Math>(found, tile_extremes + 2 * tile_group.tile_index(ti, tj));
}

}  // namespace dml::cuda
