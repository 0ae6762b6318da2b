// Launches of the kernels that read no points: merges and the reduction. They are compiled once for float and
// double (instantiations/merge.cu), not for each arithmetic.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/reduce.cuh"

namespace dml::cuda {

template <typename Acc>
struct Merge {
    // of_cols: columns have partial results of their own.
    static void extremes(const TileGroup<Acc>& tile_group, bool of_cols, const RowStats<Acc>& row_stats,
                         const Partials<Acc>& partials, MergeStep step, Acc epsilon, Launches& launches);
    static void sums(const TileGroup<Acc>& tile_group, bool of_cols, const AnyFormula<Acc>& formula,
                     bool second, const RowStats<Acc>& row_stats, const Partials<Acc>& partials,
                     const uint8_t* kept, MergeStep step, bool mining, const Results<Acc>& results,
                     Launches& launches);
    static void weights(const TileGroup<Acc>& tile_group, const Partials<Acc>& partials, const uint8_t* kept,
                        MergeStep step, Acc* row_sums, Acc* col_sums, Launches& launches);
    // Adds parts [count, pitch] of a gradient to its first `size` sums.
    static void gradient(const Acc* parts, int count, int64_t pitch, int64_t size, Acc* sums,
                         Launches& launches);
    static void reduce(const RowStats<Acc>& row_stats, int64_t rows, const Results<Acc>& results,
                       const Division& division, Acc* loss, Launches& launches);
};

}  // namespace dml::cuda
