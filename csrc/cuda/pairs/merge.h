// Launches of the kernels that read no points: merges and the reduction. They are compiled once for float and
// double (instantiations/merge.cu), not for each arithmetic.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/reduce.cuh"

namespace dml::cuda {

template <typename Acc>
struct Merge {
    using Lines = TileGroup<Acc, Acc>;  // without points
    static constexpr int kTile = tile_side(sizeof(Acc));

    template <typename T>
    static Rows<Acc, Acc> without_points(const Rows<T, Acc>& rows) {
        const Matrix<T>& m = rows.points;
        return {{nullptr, m.stride, m.rows, m.cols}, rows.labels, rows.norms, rows.used};
    }
    template <typename T>
    static Lines without_points(const TileGroup<T, Acc>& group) {
        return {without_points(group.rows),
                without_points(group.cols),
                group.square,
                group.self_index,
                group.mine_self_pair,
                group.similarity,
                group.row_tile,
                group.col_tile,
                group.row_tiles,
                group.col_tiles,
                group.all_row_tiles,
                group.all_col_tiles,
                group.used_col_tiles,
                group.cache,
                group.cache_filled,
                {},
                {}};
    }

    // of_cols: columns have partial results of their own.
    static void extremes(const Lines& tile_group, bool of_cols, const RowStats<Acc>& row_stats,
                         const Partials<Acc>& partials, MergeStep step, Acc epsilon, cudaStream_t stream);
    static void sums(const Lines& tile_group, bool of_cols, const AnyFormula<Acc>& formula, bool second,
                     const RowStats<Acc>& row_stats, const Partials<Acc>& partials, const uint8_t* kept,
                     MergeStep step, bool mining, const Results<Acc>& results, cudaStream_t stream);
    static void weights(const Lines& tile_group, const Partials<Acc>& partials, const uint8_t* kept,
                        MergeStep step, Acc* row_sums, Acc* col_sums, cudaStream_t stream);
    // Adds parts [count, pitch] of a gradient to its first `size` sums.
    static void gradient(const Acc* parts, int count, int64_t pitch, int64_t size, Acc* sums,
                         cudaStream_t stream);
    static void reduce(const RowStats<Acc>& row_stats, int64_t rows, const Results<Acc>& results,
                       const Division& division, Acc* loss, cudaStream_t stream);
};

}  // namespace dml::cuda
