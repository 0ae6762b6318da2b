// Large batches, forward: two streams over the tiles, each followed by a fold into the rows' statistics.
// The first (only with mining) finds every row's hardest pairs, the second both log-sum-exps over what was
// kept. Tiles leave partial results for their rows and columns; folds merge them in the order of the tiles,
// one thread a row, so that the result never depends on which block came first.
#pragma once

#include "super_tile.cuh"

namespace dml::cuda {

// Until it is finished a row keeps its running state in the arrays of its final statistics.
template <typename Acc>
struct RunningRow {
    const RowStats<Acc>& stats;
    int64_t i;

    DML_DEVICE Acc& min_pos() const { return stats.neg_above[i]; }
    DML_DEVICE Acc& max_neg() const { return stats.pos_below[i]; }
    DML_DEVICE Acc& pos_max() const { return stats.lse_pos[i]; }
    DML_DEVICE Acc& pos_sum() const { return stats.weight_pos[i]; }
    DML_DEVICE Acc& neg_max() const { return stats.lse_neg[i]; }
    DML_DEVICE Acc& neg_sum() const { return stats.weight_neg[i]; }
};

// A tile's results for its lines: [2 sides][slots][quantities][lines]. A line is a row (side 0) or column
// (side 1) of the super-tile, a slot the tile on the other axis.
template <typename Acc>
struct Partials {
    Acc* data;
    int slots, lines;

    DML_DEVICE Acc& at(int side, int slot, int quantity, int line) const {
        return data[((int64_t(side) * slots + slot) * 4 + quantity) * lines + line];
    }
};
inline int64_t partials_size(int slots, int tile) { return int64_t(2) * slots * 4 * slots * tile; }

// ---- every row's norm ---------------------------------------------------------------------------------

inline constexpr int kNormThreads = 256;

// One warp a row. Where stats are given, also starts the row's running state.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kNormThreads)
    prepare_rows(Rows<T, Acc> rows, bool normalize, RowStats<Acc> stats, bool start, bool mining) {
    const int64_t i = int64_t(blockIdx.x) * (kNormThreads / kWarpSize) + warp_id();
    const Matrix<T>& points = rows.points;
    if (i >= points.rows) return;
    Acc squares = 0;
    for (int64_t d = lane_id(); d < points.cols; d += kWarpSize) {
        const Acc x = Acc(points.data[i * points.stride + d]);
        squares = std::fma(x, x, squares);
    }
    squares = warp_sum(squares);
    if (lane_id() != 0) return;
    rows.inverse_norms[i] = inverse_norm(squares, points, i, normalize);
    if (!start) return;
    const RunningRow<Acc> row{stats, i};
    const Bounds<Acc> all = Bounds<Acc>::all();
    row.min_pos() = mining ? infinity<Acc>() : all.neg_above;
    row.max_neg() = mining ? -infinity<Acc>() : all.pos_below;
    row.pos_max() = row.neg_max() = -infinity<Acc>();
    row.pos_sum() = row.neg_sum() = Acc(0);
}

// ---- merging the threads of one line --------------------------------------------------------------------

// Threads line, line + kTile, .. hold parts of one line. merge(other thread) is called on the first of them
// for each of the others, in order, after every thread has put its numbers into shared memory.
template <typename Math, int Quantities, typename Acc, typename Merge>
DML_DEVICE void merge_line(const Acc (&own)[Quantities], const Merge& merge) {
    using Traits = TileTraits<Math>;
    Acc* scratch = shared_array<Acc>(Traits::kScratch, 4 * Traits::kThreads);
    for (int q = 0; q < Quantities; ++q) scratch[q * Traits::kThreads + int(threadIdx.x)] = own[q];
    block_sync();
    if (int(threadIdx.x) < Traits::kTile) {
        for (int t = int(threadIdx.x) + Traits::kTile; t < Traits::kThreads; t += Traits::kTile) {
            Acc other[Quantities];
            for (int q = 0; q < Quantities; ++q) other[q] = scratch[q * Traits::kThreads + t];
            merge(other);
        }
    }
    block_sync();  // before the scratch is used again
}

// ---- the hardest pairs ------------------------------------------------------------------------------------

template <bool RowSide, typename Math, typename T, typename Acc>
DML_DEVICE Extremes<Acc> line_extremes(const SuperTile<T, Acc>& super, const LoadedTile<Math>& tile,
                                       const Partials<Acc>& partials, int slot, int line0) {
    Extremes<Acc> found;
    for_line<RowSide>(super, tile, [&](bool positive, Acc s) { found.add(positive, s); });
    const Acc own[2] = {found.min_pos, found.max_neg};
    merge_line<Math>(own, [&](const Acc(&other)[2]) { found.merge({other[0], other[1]}); });
    if (int(threadIdx.x) < TileTraits<Math>::kTile) {
        const int side = RowSide ? 0 : 1, line = line0 + int(threadIdx.x);
        partials.at(side, slot, 0, line) = found.min_pos;
        partials.at(side, slot, 1, line) = found.max_neg;
    }
    return found;
}

// tile_extremes: [tiles, 2] the least positive and greatest negative similarity of each tile, or null.
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kTileBlocks<Math>)
    find_extremes(const __grid_constant__ SuperTile<T, Acc> all, Partials<Acc> partials, Acc* tile_extremes) {
    using Traits = TileTraits<Math>;
    const auto super = all.template in_use<Traits::kTile>();
    const int row = int(blockIdx.y), col = int(blockIdx.x);
    const int64_t ti = super.row_tile + row, tj = super.col_tile + col;
    if (!super.has(ti, tj)) return;
    const LoadedTile<Math> tile = load_tile<Math>(super, ti, tj);
    const Extremes<Acc> found = line_extremes<true>(super, tile, partials, col, row * Traits::kTile);
    if (super.square) line_extremes<false>(super, tile, partials, row, col * Traits::kTile);
    if (!tile_extremes) return;
    // Over the rows alone: the columns see the same pairs. Threads past the rows hold parts of those.
    Acc* scratch = shared_array<Acc>(Traits::kScratch, 4 * Traits::kThreads);
    const Acc min_pos = warp_min(found.min_pos), max_neg = warp_max(found.max_neg);
    if (lane_id() == 0) {
        scratch[warp_id()] = min_pos;
        scratch[kWarpSize + warp_id()] = max_neg;
    }
    block_sync();
    if (threadIdx.x != 0) return;
    Extremes<Acc> of_tile;
    for (int w = 0; w < Traits::kThreads / kWarpSize; ++w)
        of_tile.merge({scratch[w], scratch[kWarpSize + w]});
    const int64_t index = super.tile_index(ti, tj);
    tile_extremes[2 * index] = of_tile.min_pos;
    tile_extremes[2 * index + 1] = of_tile.max_neg;
}

// ---- the log-sum-exps ---------------------------------------------------------------------------------

// Whether anything of a tile can have been kept, from the extremes of the tile and the loosest bounds of its
// rows and columns. Every thread gets the answer.
template <typename Math, typename T, typename Acc>
DML_DEVICE bool may_keep(const SuperTile<T, Acc>& super, int64_t ti, int64_t tj, const RowStats<Acc>& stats,
                         const Acc* tile_extremes) {
    using Traits = TileTraits<Math>;
    Acc* scratch = shared_array<Acc>(Traits::kScratch, 4 * Traits::kThreads);
    Bounds<Acc> loosest = Bounds<Acc>::none();
    for (int t = int(threadIdx.x); t < (super.square ? 2 : 1) * Traits::kTile; t += Traits::kThreads) {
        const int64_t i = t < Traits::kTile ? ti * Traits::kTile + t : (tj - 1) * Traits::kTile + t;
        if (i >= super.rows.points.rows) continue;
        const Acc below = stats.pos_below[i], above = stats.neg_above[i];
        loosest.pos_below = below > loosest.pos_below ? below : loosest.pos_below;
        loosest.neg_above = above < loosest.neg_above ? above : loosest.neg_above;
    }
    const Acc below = warp_max(loosest.pos_below), above = warp_min(loosest.neg_above);
    if (lane_id() == 0) {
        scratch[warp_id()] = below;
        scratch[kWarpSize + warp_id()] = above;
    }
    block_sync();
    const int64_t index = super.tile_index(ti, tj);
    bool may = false;
    for (int w = 0; w < Traits::kThreads / kWarpSize; ++w) {
        may = may || tile_extremes[2 * index] < scratch[w] ||
              tile_extremes[2 * index + 1] > scratch[kWarpSize + w];
    }
    block_sync();
    return may;
}

template <bool RowSide, typename Math, typename Loss, typename T, typename Acc>
DML_DEVICE bool line_sums(const SuperTile<T, Acc>& super, const LoadedTile<Math>& tile, const Loss& loss,
                          const RowStats<Acc>& stats, const Partials<Acc>& partials, int slot, int line0) {
    constexpr int kTile = TileTraits<Math>::kTile;
    const int in_tile = int(threadIdx.x) % kTile;
    const int64_t i = (RowSide ? tile.row0 : tile.col0) + in_tile;
    Bounds<Acc> bounds = Bounds<Acc>::none();
    if (i < (RowSide ? super.rows : super.cols).points.rows)
        bounds = {stats.pos_below[i], stats.neg_above[i]};

    LogSumExp<Acc> pos, neg;
    for_line<RowSide>(super, tile, [&](bool positive, Acc s) {
        if (positive) {
            const Acc logit = s < bounds.pos_below ? loss.logit_pos(s) : -infinity<Acc>();
            pos.max = logit > pos.max ? logit : pos.max;
        } else {
            const Acc logit = s > bounds.neg_above ? loss.logit_neg(s) : -infinity<Acc>();
            neg.max = logit > neg.max ? logit : neg.max;
        }
    });
    if (!pos.empty() || !neg.empty()) {
        for_line<RowSide>(super, tile, [&](bool positive, Acc s) {
            if (positive) {
                if (s < bounds.pos_below) pos.sum += std::exp(loss.logit_pos(s) - pos.max);
            } else {
                if (s > bounds.neg_above) neg.sum += std::exp(loss.logit_neg(s) - neg.max);
            }
        });
    }
    const Acc own[4] = {pos.max, pos.sum, neg.max, neg.sum};
    merge_line<Math>(own, [&](const Acc(&other)[4]) {
        pos.merge(other[0], other[1]);
        neg.merge(other[2], other[3]);
    });
    if (int(threadIdx.x) < kTile) {
        const int side = RowSide ? 0 : 1, line = line0 + int(threadIdx.x);
        partials.at(side, slot, 0, line) = pos.max;
        partials.at(side, slot, 1, line) = pos.sum;
        partials.at(side, slot, 2, line) = neg.max;
        partials.at(side, slot, 3, line) = neg.sum;
    }
    return !pos.empty() || !neg.empty();
}

// kept: [tiles] whether the tile holds any pair that some row kept, or null. A tile that was not kept
// leaves no partials.
template <typename Math, typename Loss, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kTileBlocks<Math>)
    accumulate(const __grid_constant__ SuperTile<T, Acc> all, Loss loss, RowStats<Acc> stats,
               Partials<Acc> partials, const Acc* tile_extremes, uint8_t* kept) {
    using Traits = TileTraits<Math>;
    const auto super = all.template in_use<Traits::kTile>();
    const int row = int(blockIdx.y), col = int(blockIdx.x);
    const int64_t ti = super.row_tile + row, tj = super.col_tile + col;
    if (!super.has(ti, tj)) return;
    const int64_t index = super.tile_index(ti, tj);
    if (tile_extremes && !may_keep<Math>(super, ti, tj, stats, tile_extremes)) {
        if (threadIdx.x == 0) kept[index] = 0;
        return;
    }
    const LoadedTile<Math> tile = load_tile<Math>(super, ti, tj);
    leave_out_self<Math>(super, tile);
    bool any = line_sums<true>(super, tile, loss, stats, partials, col, row * Traits::kTile);
    if (super.square)
        any = line_sums<false>(super, tile, loss, stats, partials, row, col * Traits::kTile) || any;
    if (!kept) return;
    int* flags = shared_array<int>(Traits::kFlags, kWarpSize);
    any = warp_any(any);
    if (lane_id() == 0) flags[warp_id()] = any ? 1 : 0;
    block_sync();
    if (threadIdx.x != 0) return;
    int some = 0;
    for (int w = 0; w < Traits::kThreads / kWarpSize; ++w) some |= flags[w];
    kept[index] = uint8_t(some);
}

// ---- folds --------------------------------------------------------------------------------------------

inline constexpr int kFoldThreads = 128;

// Which partial results the rows of a super-tile get: thread `line` of side 0 is a row of it, of side 1 (only
// off the diagonal, where both sides are the same points) a column. Calls f(side, slot) for each tile that
// holds some, in order.
template <int Tile, typename T, typename Acc, typename F>
DML_DEVICE void for_slots(const SuperTile<T, Acc>& super, int side, int line, const uint8_t* kept,
                          const F& f) {
    const int own = line / Tile;
    const auto visit = [&](int a_side, int slot) {
        const int64_t ti = super.row_tile + (a_side == 0 ? own : slot),
                      tj = super.col_tile + (a_side == 0 ? slot : own);
        if (super.has(ti, tj) && (!kept || kept[super.tile_index(ti, tj)])) f(a_side, slot);
    };
    if (side == 0) {
        for (int slot = 0; slot < super.col_tiles; ++slot) visit(0, slot);
    }
    if (side == 1 || super.diagonal()) {
        for (int slot = 0; slot < super.row_tiles; ++slot) visit(1, slot);
    }
}

// The row of a fold's thread, or -1.
template <int Tile, typename T, typename Acc>
DML_DEVICE int64_t fold_row(const SuperTile<T, Acc>& super, int side, int line) {
    if (line >= (side == 0 ? super.row_tiles : super.col_tiles) * Tile) return -1;
    const int64_t i = (side == 0 ? super.row_tile : super.col_tile) * Tile + line;
    return i < (side == 0 ? super.rows : super.cols).points.rows ? i : -1;
}

// last: the rows of the super-tile have met all columns, and their bounds can be known.
template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kFoldThreads, 1)
    fold_extremes(const __grid_constant__ SuperTile<T, Acc> all, RowStats<Acc> stats, Partials<Acc> partials,
                  bool last, Acc epsilon) {
    const auto super = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kFoldThreads + int(threadIdx.x);
    const int64_t i = fold_row<Tile>(super, side, line);
    if (i < 0) return;
    const RunningRow<Acc> row{stats, i};
    Extremes<Acc> found = {row.min_pos(), row.max_neg()};
    for_slots<Tile>(super, side, line, nullptr, [&](int a_side, int slot) {
        found.merge({partials.at(a_side, slot, 0, line), partials.at(a_side, slot, 1, line)});
    });
    if (last && side == 0) {
        const Bounds<Acc> bounds = found.mined(epsilon);
        stats.flags[i] = found.has_both() ? kEligible : 0;
        stats.neg_above[i] = bounds.neg_above;
        stats.pos_below[i] = bounds.pos_below;
    } else {
        row.min_pos() = found.min_pos;
        row.max_neg() = found.max_neg;
    }
}

template <typename Loss, int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kFoldThreads, 1)
    fold_sums(const __grid_constant__ SuperTile<T, Acc> all, Loss loss, RowStats<Acc> stats,
              Partials<Acc> partials, const uint8_t* kept, bool last, bool mining) {
    const auto super = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kFoldThreads + int(threadIdx.x);
    const int64_t i = fold_row<Tile>(super, side, line);
    if (i < 0) return;
    const RunningRow<Acc> row{stats, i};
    LogSumExp<Acc> pos = {row.pos_max(), row.pos_sum()}, neg = {row.neg_max(), row.neg_sum()};
    for_slots<Tile>(super, side, line, kept, [&](int a_side, int slot) {
        pos.merge(partials.at(a_side, slot, 0, line), partials.at(a_side, slot, 1, line));
        neg.merge(partials.at(a_side, slot, 2, line), partials.at(a_side, slot, 3, line));
    });
    if (last && side == 0) {
        const Bounds<Acc> bounds = {stats.pos_below[i], stats.neg_above[i]};
        finish_row(stats, i, loss, bounds, pos, neg, mining, mining && (stats.flags[i] & kEligible) != 0);
    } else {
        row.pos_max() = pos.max;
        row.pos_sum() = pos.sum;
        row.neg_max() = neg.max;
        row.neg_sum() = neg.sum;
    }
}

}  // namespace dml::cuda
