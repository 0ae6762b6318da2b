// Large batches, backward, where parameters learn: what they do to the terms of the tiles' pairs. It is the
// first half of the gradient (pair_weights.cuh) with the derivatives by a parameter in place of those by the
// similarity, and summed over all pairs.
#pragma once

#include "cuda/pairs/pair_weights.cuh"
#include "cuda/pairs/reduce.cuh"

namespace dml::cuda {

// Shared memory: that of tiles and lines, then the block's sum for each parameter.
template <typename Math>
constexpr int param_shared_bytes() {
    return PairGrid<Math>::shared_bytes(1) + kMaxParams * int(sizeof(double));
}

// all: a group of all tiles, which the blocks share. sums: [params, blocks].
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kPairBlocks<Math>)
    sum_terms_by_params(const __grid_constant__ TileGroup<T, Acc> all,
                        const __grid_constant__ AnyFormula<Acc> any_formula, int params,
                        RowStats<Acc> row_stats, Upstream<Acc> upstream, const uint8_t* kept, double* sums) {
    using Grid = PairGrid<Math>;
    const auto tile_group = all.template in_use<Grid::kTile>();
    double* totals = shared_array<double>(Grid::shared_bytes(1), kMaxParams);
    if (int(threadIdx.x) < kMaxParams) totals[threadIdx.x] = 0;
    const int64_t tiles = int64_t(tile_group.row_tiles) * tile_group.col_tiles;
#pragma unroll 1
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        const int64_t ti = t / tile_group.col_tiles, tj = t % tile_group.col_tiles;
        if (!tile_group.has(ti, tj) || (kept && !(kept[tile_group.tile_index(ti, tj)] & kHasGradient)))
            continue;
        block_sync();  // the tile before is done with
        const LoadedTile<Math> tile = load_pairs<Math>(tile_group, ti, tj, false);
        any_formula.visit([&](const auto& formula) {
            using Formula = std::decay_t<decltype(formula)>;
            using Derived = DerivedByParam<Acc, Formula>;
#pragma unroll 1
            for (int k = 0; k < count_names(Formula::kParams); ++k) {
                const Derived derived = derived_by<Formula, Acc>(any_formula.learned, formula, k);
                TileWeights<Math, Derived, T> terms = {tile_group, tile, derived, row_stats, upstream};
                terms.load_lines(ti, tj);
                Acc sum = 0;
                terms.template for_rows<true>(
                    [&](int i, const typename Grid::Sims& sims, const typename Grid::Sims& w) {
#pragma unroll
                        for (int j = 0; j < Grid::kCols; ++j) sum += w.s[j];
                        Grid::put_sims(i, sims);  // careful terms have taken their place
                    });
                sum = block_sum(sum, Grid::scratch(1));
                if (threadIdx.x == 0) totals[k] += double(sum);
            }
        });
    }
    block_sync();
    const int k = int(threadIdx.x);
    if (k < params) sums[int64_t(k) * gridDim.x + blockIdx.x] = totals[k];
}

}  // namespace dml::cuda
