// Launches and instantiates the merges.
#include "cuda/pairs/merge.h"
#include "cuda/pairs/merge_kernels.cuh"

namespace dml::cuda {

namespace {

// A lane for each row, and for each column where columns have partial results of their own.
template <typename Acc>
dim3 merge_grid(const TileGroup<Acc>& tile_group, bool of_cols) {
    const bool cols_too = of_cols && !tile_group.diagonal();
    const int tiles = cols_too ? std::max(tile_group.row_tiles, tile_group.col_tiles) : tile_group.row_tiles;
    return dim3(unsigned(tiles * kTileSide<Acc> / kWarpSize), cols_too ? 2 : 1);
}

}  // namespace

template <typename Acc>
void Merge<Acc>::extremes(const TileGroup<Acc>& tile_group, bool of_cols, const RowStats<Acc>& row_stats,
                          const Partials<Acc>& partials, MergeStep step, Acc epsilon, Launches& launches) {
    launches(merge_extremes<Acc>, merge_grid(tile_group, of_cols), dim3(kMergeThreads), kMergeBytes<Acc>,
             tile_group, row_stats, partials, step, epsilon);
}

template <typename Acc>
void Merge<Acc>::sums(const TileGroup<Acc>& tile_group, bool of_cols, const AnyFormula<Acc>& formula,
                      bool second, const RowStats<Acc>& row_stats, const Partials<Acc>& partials,
                      const uint8_t* kept, MergeStep step, bool mining, const Results<Acc>& results,
                      Launches& launches) {
    launches(merge_sums<Acc>, merge_grid(tile_group, of_cols), dim3(kMergeThreads), kMergeBytes<Acc>,
             tile_group, formula, second, row_stats, partials, kept, step, mining, results);
}

template <typename Acc>
void Merge<Acc>::weights(const TileGroup<Acc>& tile_group, const Partials<Acc>& partials, const uint8_t* kept,
                         MergeStep step, Acc* row_sums, Acc* col_sums, Launches& launches) {
    launches(merge_weights<Acc>, merge_grid(tile_group, true), dim3(kMergeThreads), kMergeBytes<Acc>,
             tile_group, partials, kept, step, row_sums, col_sums);
}

template <typename Acc>
void Merge<Acc>::gradient(const Acc* parts, int count, int64_t pitch, int64_t size, Acc* sums,
                          Launches& launches) {
    launches(merge_gradient<Acc>, dim3(unsigned((size + kPartThreads - 1) / kPartThreads)),
             dim3(kPartThreads), 0, parts, count, pitch, size, sums);
}

template <typename Acc>
void Merge<Acc>::reduce(const RowStats<Acc>& row_stats, int64_t rows, const Results<Acc>& results,
                        const Division& division, Acc* loss, Launches& launches) {
    launches(reduce_results<Acc>, dim3(1), dim3(kReduceThreads), kReduceSharedBytes, row_stats, rows, results,
             division, loss);
}

template struct Merge<float>;
template struct Merge<double>;

}  // namespace dml::cuda
