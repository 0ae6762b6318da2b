// Large batches, backward, where parameters learn: the gradient by them, in one launch. What a parameter does to
// the terms of the tiles' pairs is the first half of the gradient (pair_weights.cuh) with the derivatives by the
// parameter in place of those by the similarity, and summed over all pairs; what it does to a row's loss for
// constant terms is known from forward. Blocks share a tile group's tiles, a launch each, and with the last group the
// rows; the block that finishes last, as a ticket tells, adds what they found.
#pragma once

#include "cuda/pairs/learned_params.cuh"
#include "cuda/pairs/pair_weights.cuh"

namespace dml::cuda {

// Shared memory: that of tiles and lines, then the block's sum for each parameter, scratch of block_sum, and
// whether the block is the last.
template <typename Acc>
struct ParamLayout {
    static constexpr int kTotals = PairGrid<Acc>::shared_bytes(kWeightQuantities);
    static constexpr int kScratch = kTotals + kMaxParams * int(sizeof(double));
    static constexpr int kLast = kScratch + kWarpSize * int(sizeof(double));
    static constexpr int kSharedBytes = kLast + 16;
};

// What the parameters do to the terms of the block's tiles, upstream included, added to totals.
template <typename Acc>
DML_DEVICE void add_terms_by_params(const TileGroup<Acc>& tile_group, const AnyFormula<Acc>& any_formula,
                                    const TileNeed<Acc>& need, const Upstream<Acc>& upstream,
                                    double* totals) {
    using Grid = PairGrid<Acc>;
    const int64_t tiles = int64_t(tile_group.row_tiles) * tile_group.col_tiles;
#pragma unroll 1
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        const int64_t ti = tile_group.row_tile + t / tile_group.col_tiles,
                      tj = tile_group.col_tile + t % tile_group.col_tiles;
        if (!tile_group.has(ti, tj) || !need.has_gradient(tile_group, ti, tj)) continue;
        block_sync();  // the tile before is done with
        const LoadedTile<Acc> tile = load_pairs(tile_group, ti, tj, false);
        any_formula.visit([&](const auto& formula) {
            using Formula = std::decay_t<decltype(formula)>;
            using Derived = DerivedByParam<Acc, Formula>;
#pragma unroll 1
            for (int k = 0; k < Formula::kParamCount; ++k) {
                const Derived derived = derived_by<Formula, Acc>(any_formula.learned, formula, k);
                TileWeights<Derived, Acc> terms = {tile_group, tile, derived, need.row_stats, upstream};
                terms.load_lines(ti, tj);
                Acc sum = 0;
                terms.template for_rows<true>(
                    [&](int i, const typename Grid::Sims& sims, const typename Grid::Sims& w) {
#pragma unroll
                        for (int j = 0; j < Grid::kCols; ++j) sum += w.s[j];
                        Grid::put_sims(i, sims);  // careful terms have taken their place
                    });
                sum = block_sum(sum, Grid::scratch(kWeightQuantities));
                if (threadIdx.x == 0) totals[k] += double(sum);
            }
        });
    }
    block_sync();
}

template <typename Acc>
__global__ void __launch_bounds__(kTileThreads, kPairBlocks<Acc>)
    sum_terms_by_params(const __grid_constant__ TileGroup<Acc> all,
                        const __grid_constant__ AnyFormula<Acc> any_formula,
                        const __grid_constant__ TileNeed<Acc> need, Upstream<Acc> upstream,
                        const __grid_constant__ ByParams<Acc> by_params) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Layout = ParamLayout<Acc>;
    const RowStats<Acc>& row_stats = need.row_stats;
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    double* totals = shared_array<double>(Layout::kTotals, kMaxParams);
    double* scratch = shared_array<double>(Layout::kScratch, kWarpSize);
    int* last = shared_array<int>(Layout::kLast, 4);
    if (thread < kMaxParams) totals[thread] = 0;
    add_terms_by_params(all.in_use(), any_formula, need, upstream, totals);
    // Tiles are all but the whole work: a share of the rows is small beside a tile.
#pragma unroll 1
    for (int k = 0; k < by_params.params; ++k) {
        const int64_t first = int64_t(blockIdx.x) * threads + thread, step = int64_t(gridDim.x) * threads;
        const double sum =
            by_params.last
                ? block_sum(sum_rows_by_param(by_params.rows, k, first, step, row_stats, upstream), scratch)
                : 0.0;
        double& slot = by_params.sums[int64_t(k) * gridDim.x + blockIdx.x];
        if (thread == 0) slot = (by_params.first ? 0.0 : slot) + totals[k] + sum;
    }
    if (!by_params.last) return;
    if (thread == 0) *last = take_ticket(by_params.ticket) + 1 == gridDim.x;
    block_sync();
    if (!*last) return;
#pragma unroll 1
    for (int k = 0; k < by_params.params; ++k) {
        double sum = 0;
        for (int64_t slot = thread; slot < gridDim.x; slot += threads)
            sum += by_params.sums[int64_t(k) * gridDim.x + slot];
        sum = block_sum(sum, scratch);
        if (thread == 0) by_params.gradient[k] = gradient_of_sum(sum, row_stats, upstream);
    }
    if (thread != 0) return;
    by_params.gradient[by_params.params] = 0;
    *by_params.ticket = 0;  // for the next backward of this forward, which the stream orders after this one
}

}  // namespace dml::cuda
