// The launches of look.h. Instantiated in instantiations/look_*.cu.
#pragma once

#include "cuda/pairs/accumulate.cuh"
#include "cuda/pairs/find_extremes.cuh"
#include "cuda/pairs/look.h"
#include "cuda/pairs/pair_weights.cuh"
#include "cuda/pairs/terms_by_params.cuh"

namespace dml::cuda {

template <typename Acc>
void Look<Acc>::extremes(const TileGroup<Acc>& tile_group, const Partials<Acc>& partials, Acc* tile_extremes,
                         Launches& launches) {
    launches(find_extremes<Acc>, tile_grid(tile_group), dim3(kTileThreads), PairGrid<Acc>::shared_bytes(2),
             tile_group, partials, tile_extremes);
}

template <typename Acc>
void Look<Acc>::sums(const TileGroup<Acc>& tile_group, const AnyFormula<Acc>& formula, bool second,
                     const TileNeed<Acc>& need, const Partials<Acc>& partials, uint8_t* kept,
                     bool count_zeros, FormulaId which, Launches& launches) {
    launches(accumulate<Acc>, tile_grid(tile_group), dim3(kTileThreads),
             PairGrid<Acc>::shared_bytes(most_summed(which)), tile_group, formula, second, need, partials,
             kept, count_zeros);
}

template <typename Acc>
template <typename Layout>
void Look<Acc>::weights(const TileGroup<Acc>& tile_group, const AnyFormula<Acc>& formula,
                        const TileNeed<Acc>& need, const Upstream<Acc>& upstream,
                        const GroupWeights<Layout>& to, const Partials<Acc>& sums, Launches& launches) {
    launches(pair_weights<Layout, Acc>, tile_grid(tile_group), dim3(kTileThreads),
             PairGrid<Acc>::shared_bytes(kWeightQuantities), tile_group, formula, need, upstream, to, sums);
}

template <typename Acc>
void Look<Acc>::params(const TileGroup<Acc>& tile_group, int64_t blocks, const AnyFormula<Acc>& formula,
                       const TileNeed<Acc>& need, const Upstream<Acc>& upstream,
                       const ByParams<Acc>& by_params, Launches& launches) {
    launches(sum_terms_by_params<Acc>, dim3(unsigned(blocks)), dim3(kTileThreads),
             ParamLayout<Acc>::kSharedBytes, tile_group, formula, need, upstream, by_params);
}

}  // namespace dml::cuda

#define DML_WEIGHTS(Acc, ...)                                                \
    template void dml::cuda::Look<Acc>::weights(                             \
        const dml::cuda::TileGroup<Acc>&, const dml::cuda::AnyFormula<Acc>&, \
        const dml::cuda::TileNeed<Acc>&, const dml::cuda::Upstream<Acc>&,    \
        const dml::cuda::GroupWeights<__VA_ARGS__>&, const dml::cuda::Partials<Acc>&, Launches&)
