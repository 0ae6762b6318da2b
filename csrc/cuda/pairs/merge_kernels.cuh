// Merges partial results of tiles into the rows, one thread a row, in the order of the tiles.
#pragma once

#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/row_stats.cuh"

namespace dml::cuda {

inline constexpr int kMergeThreads = 64;
inline constexpr int kMergeBatch = 8;  // slots loaded before the first of them is merged

// The partial results of one line: of side 0 a row of the tile group, of side 1 (only off the diagonal; on it
// both sides are the same points) a column. Calls f(numbers [Count, kMergeBatch]) for a batch of slots at a
// time, in order; numbers are `none` where the tile's kept flag lacks the bit. The lines of a warp lie in one
// tile, so its lanes read the flags of 32 slots together, and no load waits for another.
template <int Tile, int Count, typename T, typename Acc, typename F>
DML_DEVICE void for_slots(const TileGroup<T, Acc>& tile_group, const Partials<Acc>& partials, int side,
                          int line, const uint8_t* kept, uint8_t bit, const Acc (&none)[Count], const F& f) {
    static_assert(Tile % kWarpSize == 0 && kWarpSize % kMergeBatch == 0, "as the threads share");
    const int line_tile = line / Tile;
#pragma unroll 1
    for (int part = side; part < (tile_group.diagonal() ? 2 : side + 1); ++part) {
        const bool as_row = part == 0;
        const int slots = as_row ? tile_group.col_tiles : tile_group.row_tiles;
        const int lines = (as_row ? tile_group.row_tiles : tile_group.col_tiles) * Tile;
        const Acc* numbers = &partials.template at<Tile>(tile_group, part, 0, 0, line);
#pragma unroll 1
        for (int first = 0; first < slots; first += kWarpSize) {
            const int slot = first + lane_id();
            const int64_t ti = tile_group.row_tile + (as_row ? line_tile : slot),
                          tj = tile_group.col_tile + (as_row ? slot : line_tile);
            const uint32_t present = warp_ballot(slot < slots && tile_group.has(ti, tj) &&
                                                 (!kept || (kept[tile_group.tile_index(ti, tj)] & bit) != 0));
            const int count = slots - first < kWarpSize ? slots - first : kWarpSize;
#pragma unroll 1
            for (int batch = 0; batch < count; batch += kMergeBatch) {
                Acc q[Count][kMergeBatch];
#pragma unroll
                for (int b = 0; b < kMergeBatch; ++b) {
#pragma unroll
                    for (int k = 0; k < Count; ++k) {
                        q[k][b] = none[k];
                        if (present >> (batch + b) & 1u) q[k][b] = numbers[(b * kQuantities + k) * lines];
                    }
                }
                numbers += kMergeBatch * kQuantities * int64_t(lines);
                f(q);
            }
        }
    }
}

// Whether the tile group has the line; the answer is the same for a whole thread block.
template <int Tile, typename T, typename Acc>
DML_DEVICE bool has_line(const TileGroup<T, Acc>& tile_group, int side, int line) {
    static_assert(Tile % kMergeThreads == 0, "whole blocks");
    return line < (side == 0 ? tile_group.row_tiles : tile_group.col_tiles) * Tile;
}
// The row of a line, or -1 past the last one. Such a thread merges along with its warp and stores nothing.
template <int Tile, typename T, typename Acc>
DML_DEVICE int64_t merge_row(const TileGroup<T, Acc>& tile_group, int side, int line) {
    const int64_t i = (side == 0 ? tile_group.row_tile : tile_group.col_tile) * Tile + line;
    return i < (side == 0 ? tile_group.rows : tile_group.cols).points.rows ? i : -1;
}

template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_extremes(const __grid_constant__ TileGroup<T, Acc> all, RowStats<Acc> row_stats,
                   Partials<Acc> partials, MergeStep step, Acc epsilon) {
    const auto tile_group = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
    if (!has_line<Tile>(tile_group, side, line)) return;
    const int64_t i = merge_row<Tile>(tile_group, side, line);
    const RunningRow<Acc> row{row_stats, i};
    Extremes<Acc> found;
    if (i >= 0 && !step.first(side)) found = {row.min_pos(), row.max_neg()};
    const Acc none[2] = {infinity<Acc>(), -infinity<Acc>()};
    for_slots<Tile>(tile_group, partials, side, line, nullptr, kHasPartials, none,
                    [&](const Acc(&q)[2][kMergeBatch]) {
#pragma unroll
                        for (int b = 0; b < kMergeBatch; ++b) found.merge({q[0][b], q[1][b]});
                    });
    if (i < 0) return;
    if (step.rows_last && side == 0) {
        const Bounds<Acc> bounds = found.mined(epsilon);
        row_stats.flags[i] = found.has_both() ? kEligible : uint8_t(0);
        row_stats.neg_above[i] = bounds.neg_above;
        row_stats.pos_below[i] = bounds.pos_below;
    } else {
        row.min_pos() = found.min_pos;
        row.max_neg() = found.max_neg;
    }
}

template <int Tile, Stage kStage, typename Formula, typename T, typename Acc>
DML_DEVICE RowResult<Acc> merge_row_sums(const TileGroup<T, Acc>& tile_group, int side, int line, int64_t i,
                                         const Formula& formula, const RowStats<Acc>& row_stats,
                                         const Partials<Acc>& partials, const uint8_t* kept, MergeStep step,
                                         bool mining, const Results<Acc>& results) {
    const RunningRow<Acc> row{row_stats, i};
    const bool first = step.first(side);
    Gathering<Formula, Acc> g;
    if (i >= 0 && !first) g = row.template load<Formula>();
    if (kStage == Stage::kPositives && i >= 0 && first) g.neg = {row_stats.neg[i], Acc(0)};
    Acc none[kQuantities];
    no_quantities<Formula, kStage>(none);
    if (kStage == Stage::kPositives) none[1] = Acc(0);
    for_slots<Tile>(tile_group, partials, side, line, kept, kHasPartials, none,
                    [&](const Acc(&q)[kQuantities][kMergeBatch]) { g.template merge<kStage>(q); });
    if (i < 0) return {};
    if (!(step.rows_last && side == 0)) {
        row.store(g);
        return {};
    }
    if constexpr (kStage == Stage::kNegatives) {
        row_stats.neg[i] = g.neg.value(Formula::kPlusOne);
        return {};
    } else {
        const Bounds<Acc> bounds = {row_stats.pos_below[i], row_stats.neg_above[i]};
        return finish_row(row_stats, i, formula, g, bounds, mining,
                          mining && (row_stats.flags[i] & kEligible) != 0, tile_group.rows.norms[i], results);
    }
}

template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_sums(const __grid_constant__ TileGroup<T, Acc> all,
               const __grid_constant__ AnyFormula<Acc> any_formula, bool second, RowStats<Acc> row_stats,
               Partials<Acc> partials, const uint8_t* kept, MergeStep step, bool mining,
               Results<Acc> results) {
    const auto tile_group = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
    if (!has_line<Tile>(tile_group, side, line)) return;
    const int64_t i = merge_row<Tile>(tile_group, side, line);
    RowResult<Acc> result;
    bool finished = step.rows_last && side == 0;
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        const auto merge = [&](auto stage) {
            result = merge_row_sums<Tile, decltype(stage)::value>(
                tile_group, side, line, i, formula, row_stats, partials, kept, step, mining, results);
        };
        if constexpr (!Formula::kContext) {
            merge(std::integral_constant<Stage, Stage::kBoth>{});
        } else if (!second) {
            finished = false;
            merge(std::integral_constant<Stage, Stage::kNegatives>{});
        } else {
            merge(std::integral_constant<Stage, Stage::kPositives>{});
        }
    });
    if (!finished) return;
    // One slot of results for each warp.
    result.part[0] = warp_sum(result.part[0]);
    result.part[1] = warp_sum(result.part[1]);
    result.count[0] = warp_sum(result.count[0]);
    result.count[1] = warp_sum(result.count[1]);
    result.eligible = warp_sum(result.eligible);
    result.not_finite = warp_sum(result.not_finite);
    result.very_long = warp_sum(result.very_long);
    if (lane_id() == 0 && i >= 0) results.store(i / kWarpSize, result);
}

// Adds the sums of a tile group's weights to those of its rows and columns; null: not wanted.
template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_weights(const __grid_constant__ TileGroup<T, Acc> all, Partials<Acc> partials, const uint8_t* kept,
                  MergeStep step, Acc* row_sums, Acc* col_sums) {
    const auto tile_group = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
    Acc* sums = side == 0 ? row_sums : col_sums;
    if (!sums || !has_line<Tile>(tile_group, side, line)) return;
    const int64_t i = merge_row<Tile>(tile_group, side, line);
    Acc sum = i < 0 || step.first(side) ? Acc(0) : sums[i];
    const Acc none[1] = {Acc(0)};
    for_slots<Tile>(tile_group, partials, side, line, kept, kHasGradient, none,
                    [&](const Acc(&q)[1][kMergeBatch]) {
#pragma unroll
                        for (int b = 0; b < kMergeBatch; ++b) sum += q[0][b];
                    });
    if (i >= 0) sums[i] = sum;
}

inline constexpr int kPartThreads = 256;

// Adds parts [count, pitch] of a gradient to its first `size` sums, in order; one thread a number.
template <typename Acc>
__global__ void __launch_bounds__(kPartThreads)
    merge_gradient(const Acc* parts, int count, int64_t pitch, int64_t size, Acc* sums) {
    const int64_t i = int64_t(blockIdx.x) * kPartThreads + threadIdx.x;
    if (i >= size) return;
    Acc sum = sums[i];
#pragma unroll 8
    for (int k = 0; k < count; ++k) sum += parts[k * pitch + i];
    sums[i] = sum;
}

}  // namespace dml::cuda
