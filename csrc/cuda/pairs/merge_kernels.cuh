// Merges partial results of tiles into the rows. A block has a line a lane; its warps share the tiles of the
// lines, each in their order, and the first warp merges what the others found, in the warps' order.
#pragma once

#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/reduce.cuh"
#include "cuda/pairs/tile_need.cuh"

namespace dml::cuda {

inline constexpr int kMergeWarps = 8, kMergeThreads = kMergeWarps * kWarpSize;
inline constexpr int kMergeBatch = 4;  // slots that a warp loads before it merges the first of them
// Shared memory: what warps found, then scratch of block_sum.
template <typename Acc>
inline constexpr int kMergeScratch = kMergeWarps * kQuantities * kWarpSize * int(sizeof(Acc));
template <typename Acc>
inline constexpr int kMergeBytes = kMergeScratch<Acc> + kWarpSize * int(sizeof(Acc));

// The warp's share of the partial results of one line: of side 0 a row of the tile group, of side 1 (only off the
// diagonal; on it both sides are the same points) a column. Calls f(numbers [Count, kMergeBatch]) for a batch
// of slots at a time, in order; numbers are `none` where the tile's kept flag lacks the bit. The lines of a block
// lie in one tile, so lanes read the flags of a batch together, and no load waits for another.
template <int Count, typename Acc, typename F>
DML_DEVICE void for_slots(const TileGroup<Acc>& tile_group, const Partials<Acc>& partials, int side, int line,
                          const uint8_t* kept, uint8_t bit, const Acc (&none)[Count], const F& f) {
    static_assert(kTileSide<Acc> % kWarpSize == 0 && kMergeBatch <= kWarpSize, "as the lanes share");
    const int line_tile = line / kTileSide<Acc>;
#pragma unroll 1
    for (int part = side; part < (tile_group.diagonal() ? 2 : side + 1); ++part) {
        const bool as_row = part == 0;
        const int slots = as_row ? tile_group.col_tiles : tile_group.row_tiles;
        const int lines = (as_row ? tile_group.row_tiles : tile_group.col_tiles) * kTileSide<Acc>;
#pragma unroll 1
        for (int first = warp_id() * kMergeBatch; first < slots; first += kMergeWarps * kMergeBatch) {
            const int slot = first + lane_id();
            const int64_t ti = tile_group.row_tile + (as_row ? line_tile : slot),
                          tj = tile_group.col_tile + (as_row ? slot : line_tile);
            const uint32_t present =
                warp_ballot(lane_id() < kMergeBatch && slot < slots && tile_group.has(ti, tj) &&
                            (!kept || (kept[tile_group.tile_index(ti, tj)] & bit) != 0));
            const Acc* numbers = &partials.at(tile_group, part, first, 0, line);
            Acc q[Count][kMergeBatch];
#pragma unroll
            for (int b = 0; b < kMergeBatch; ++b) {
#pragma unroll
                for (int k = 0; k < Count; ++k) {
                    q[k][b] = none[k];
                    if (present >> b & 1u) q[k][b] = numbers[(b * kQuantities + k) * lines];
                }
            }
            f(q);
        }
    }
}

// What all warps found for the lane's line, in the first warp alone: there the answer is true.
template <int Count, typename Acc>
DML_DEVICE bool gather_warps(const Acc (&found)[Count], Acc (&all)[Count][kMergeWarps]) {
    static_assert(Count <= kQuantities, "room for so many");
    Acc* shared = shared_array<Acc>(0, kMergeWarps * kQuantities * kWarpSize);
#pragma unroll
    for (int k = 0; k < Count; ++k) shared[(warp_id() * Count + k) * kWarpSize + lane_id()] = found[k];
    block_sync();
    if (warp_id() != 0) return false;
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) {
#pragma unroll
        for (int k = 0; k < Count; ++k) all[k][w] = shared[(w * Count + k) * kWarpSize + lane_id()];
    }
    return true;
}

// Whether the tile group has the line; the answer is the same for a whole thread block.
template <typename Acc>
DML_DEVICE bool has_line(const TileGroup<Acc>& tile_group, int side, int line) {
    static_assert(kTileSide<Acc> % kWarpSize == 0, "whole blocks");
    return line < (side == 0 ? tile_group.row_tiles : tile_group.col_tiles) * kTileSide<Acc>;
}
// The row of a line, or -1 past the last one. Such a thread merges along with its warp and stores nothing.
template <typename Acc>
DML_DEVICE int64_t merge_row(const TileGroup<Acc>& tile_group, int side, int line) {
    const int64_t i = (side == 0 ? tile_group.row_tile : tile_group.col_tile) * kTileSide<Acc> + line;
    return i < (side == 0 ? tile_group.rows : tile_group.cols).count ? i : -1;
}

template <typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_extremes(const __grid_constant__ TileGroup<Acc> all, RowStats<Acc> row_stats,
                   Partials<Acc> partials, MergeStep step, Acc epsilon) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const auto tile_group = all.in_use();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kWarpSize + lane_id();
    if (!has_line(tile_group, side, line)) return;
    Extremes<Acc> found;
    const Acc none[2] = {infinity<Acc>(), -infinity<Acc>()};
    for_slots(tile_group, partials, side, line, nullptr, kHasPartials, none,
              [&](const Acc(&q)[2][kMergeBatch]) {
#pragma unroll
                  for (int b = 0; b < kMergeBatch; ++b) found.merge({q[0][b], q[1][b]});
              });
    Acc all_found[2][kMergeWarps];
    if (!gather_warps({found.min_pos, found.max_neg}, all_found)) return;
    const int64_t i = merge_row(tile_group, side, line);
    if (i < 0) return;
    const RunningRow<Acc> row{row_stats, i};
    found = step.first(side) ? Extremes<Acc>() : Extremes<Acc>{row.min_pos(), row.max_neg()};
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) found.merge({all_found[0][w], all_found[1][w]});
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

template <Stage kStage, typename Formula, typename Acc>
DML_DEVICE RowResult<Acc> merge_row_sums(const TileGroup<Acc>& tile_group, int side, int line, int64_t i,
                                         const Formula& formula, const RowStats<Acc>& row_stats,
                                         const Partials<Acc>& partials, const uint8_t* kept, MergeStep step,
                                         bool mining, const Results<Acc>& results) {
    Gathering<Formula, Acc> part;
    Acc none[kQuantities];
    no_quantities<Formula, kStage>(none);
    if (kStage == Stage::kPositives) part.neg.b = none[1] = Acc(0);
    for_slots(tile_group, partials, side, line, kept, kHasPartials, none,
              [&](const Acc(&q)[kQuantities][kMergeBatch]) { part.template merge<kStage>(q); });
    Acc found[kQuantities][kMergeWarps];
    if (!gather_warps({part.neg.a, part.neg.b, part.pos.a, part.pos.b}, found) || i < 0) return {};
    const RunningRow<Acc> row{row_stats, i};
    Gathering<Formula, Acc> g;
    if (!step.first(side)) g = row.template load<Formula>();
    if (kStage == Stage::kPositives && step.first(side)) g.neg = {row_stats.neg[i], Acc(0)};
    g.template merge<kStage>(found);
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

template <typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_sums(const __grid_constant__ TileGroup<Acc> all,
               const __grid_constant__ AnyFormula<Acc> any_formula, bool second, RowStats<Acc> row_stats,
               Partials<Acc> partials, const uint8_t* kept, MergeStep step, bool mining,
               Results<Acc> results) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const auto tile_group = all.in_use();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kWarpSize + lane_id();
    if (!has_line(tile_group, side, line)) return;
    const int64_t i = merge_row(tile_group, side, line);
    RowResult<Acc> result;
    bool finished = step.rows_last && side == 0;
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        const auto merge = [&](auto stage) {
            result = merge_row_sums<decltype(stage)::value>(tile_group, side, line, i, formula, row_stats,
                                                            partials, kept, step, mining, results);
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
    if (!tile_group.square && tile_group.row_tile == 0) {
        // References matter by their norms only. Blocks past the last row store nothing.
        const int64_t rows = min(tile_group.rows.count, int64_t(tile_group.row_tiles) * kTileSide<Acc>);
        const int64_t step_size = (rows + kWarpSize - 1) / kWarpSize * kMergeThreads;
        for (int64_t j = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x; j < tile_group.cols.count;
             j += step_size) {
            result.not_finite += Acc(!is_finite(tile_group.cols.norms[j]));
            result.very_long += Acc(is_very_long(tile_group.cols.norms[j]));
        }
    }
    Acc* shared = shared_array<Acc>(kMergeScratch<Acc>, kWarpSize);
    result.not_finite = block_sum(result.not_finite, shared);
    result.very_long = block_sum(result.very_long, shared);
    if (warp_id() != 0) return;
    // One slot of results for each block.
    result.part[0] = warp_sum(result.part[0]);
    result.part[1] = warp_sum(result.part[1]);
    result.count[0] = warp_sum(result.count[0]);
    result.count[1] = warp_sum(result.count[1]);
    result.eligible = warp_sum(result.eligible);
    if (lane_id() == 0 && i >= 0) results.store(i / kWarpSize, result);
}

// Adds the sums of a tile group's weights to those of its rows and columns; null: not wanted.
template <typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_weights(const __grid_constant__ TileGroup<Acc> all, Partials<Acc> partials, const uint8_t* kept,
                  MergeStep step, Acc* row_sums, Acc* col_sums) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const auto tile_group = all.in_use();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kWarpSize + lane_id();
    Acc* sums = side == 0 ? row_sums : col_sums;
    if (!sums || !has_line(tile_group, side, line)) return;
    Acc sum = 0;
    const Acc none[1] = {Acc(0)};
    for_slots(tile_group, partials, side, line, kept, kHasGradient, none, [&](const Acc(&q)[1][kMergeBatch]) {
#pragma unroll
        for (int b = 0; b < kMergeBatch; ++b) sum += q[0][b];
    });
    Acc found[1][kMergeWarps];
    if (!gather_warps({sum}, found)) return;
    const int64_t i = merge_row(tile_group, side, line);
    if (i < 0) return;
    sum = step.first(side) ? Acc(0) : sums[i];
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) sum += found[0][w];
    sums[i] = sum;
}

inline constexpr int kPartThreads = 256;

// Adds parts [count, pitch] of a gradient to its first `size` sums, in order; one thread a number.
template <typename Acc>
__global__ void __launch_bounds__(kPartThreads)
    merge_gradient(const Acc* parts, int count, int64_t pitch, int64_t size, Acc* sums) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t i = int64_t(blockIdx.x) * kPartThreads + threadIdx.x;
    if (i >= size) return;
    Acc sum = sums[i];
#pragma unroll 8
    for (int k = 0; k < count; ++k) sum += parts[k * pitch + i];
    sums[i] = sum;
}

}  // namespace dml::cuda
