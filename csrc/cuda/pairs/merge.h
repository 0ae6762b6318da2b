// The kernels that look at no point: what tiles and rows leave is merged by them, however it was multiplied.
// They are compiled once for float and double (instantiations/merge.cu), not once for each kind of
// arithmetic.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/pairs/reduce.cuh"
#include "cuda/pairs/tile_forward.cuh"

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
    static Lines without_points(const TileGroup<T, Acc>& s) {
        return {without_points(s.rows),
                without_points(s.cols),
                s.square,
                s.self_index,
                s.mine_self_pair,
                s.similarity,
                s.row_tile,
                s.col_tile,
                s.row_tiles,
                s.col_tiles,
                s.all_row_tiles,
                s.all_col_tiles,
                s.used_col_tiles,
                s.cache,
                s.cache_filled};
    }

    // of_cols: columns have partial results that are not the rows'.
    static void extremes(const Lines& tile_group, bool of_cols, const RowStats<Acc>& stats,
                         const Partials<Acc>& partials, Turn turn, Acc epsilon, cudaStream_t stream);
    static void sums(const Lines& tile_group, bool of_cols, const AnyFormula<Acc>& formula, bool second,
                     const RowStats<Acc>& stats, const Partials<Acc>& partials, const uint8_t* kept,
                     Turn turn, bool mining, const Results<Acc>& results, cudaStream_t stream);
    static void weights(const Lines& tile_group, const Partials<Acc>& partials, const uint8_t* kept,
                        Turn turn, Acc* row_sums, Acc* col_sums, cudaStream_t stream);
    // Adds parts [count, pitch] of a gradient to its first `size` sums.
    static void gradient(const Acc* parts, int count, int64_t pitch, int64_t size, Acc* sums,
                         cudaStream_t stream);
    static void reduce(const RowStats<Acc>& stats, int64_t rows, const Results<Acc>& results,
                       const Acc* ref_norms, int64_t refs, const int64_t* num_valid_refs,
                       const Division& division, Acc* loss, cudaStream_t stream);
};

}  // namespace dml::cuda
