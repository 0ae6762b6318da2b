// Launches of the kernels that look at the pairs of a tile group, whose similarities are there. They are compiled once
// for float and double (instantiations/look_*.cu), not for each arithmetic.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/pair_weights.h"
#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/row_weights.cuh"
#include "cuda/pairs/tile_need.cuh"

namespace dml::cuda {

// Where the gradient by parameters is summed.
template <typename Acc>
struct ByParams {
    RowsByParams<Acc> rows;
    int params;
    double* sums;      // [params, blocks]
    unsigned* ticket;  // 0 before and after
    double* gradient;  // [params + 1], the last number 0
    bool first, last;  // tile group
};

template <typename Acc>
dim3 tile_grid(const TileGroup<Acc>& tile_group) {
    return dim3(unsigned(tile_group.col_tiles), unsigned(tile_group.row_tiles));
}

template <typename Acc>
struct Look {
    // tile_extremes: see find_extremes.cuh.
    static void extremes(const TileGroup<Acc>& tile_group, const Partials<Acc>& partials, Acc* tile_extremes,
                         Launches& launches);
    // second: the positives of a formula with context.
    static void sums(const TileGroup<Acc>& tile_group, const AnyFormula<Acc>& formula, bool second,
                     const TileNeed<Acc>& need, const Partials<Acc>& partials, uint8_t* kept,
                     bool count_zeros, FormulaId which, Launches& launches);
    template <typename Layout>
    static void weights(const TileGroup<Acc>& tile_group, const AnyFormula<Acc>& formula,
                        const TileNeed<Acc>& need, const Upstream<Acc>& upstream,
                        const GroupWeights<Layout>& to, const Partials<Acc>& sums, Launches& launches);
    static void params(const TileGroup<Acc>& tile_group, int64_t blocks, const AnyFormula<Acc>& formula,
                       const TileNeed<Acc>& need, const Upstream<Acc>& upstream,
                       const ByParams<Acc>& by_params, Launches& launches);
};

}  // namespace dml::cuda
