// A task with its memory and stream, and the kernel arguments that follow from it.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/pairs/find_extremes.cuh"
#include "cuda/pairs/merge.h"
#include "cuda/pairs/saved_layout.cuh"
#include "cuda/pairs/task_arguments.cuh"

namespace dml::cuda {

extern template struct Merge<float>;
extern template struct Merge<double>;

template <typename Math>
struct Launcher {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using Policy = TilePolicy<Math>;
    static_assert(Policy::kTile == Merge<Acc>::kTile, "merges know the tiles");

    const Task& task;  // with aligned rows
    SavedArrays<Acc> arrays;
    cudaStream_t stream;
    const Problem& p = task.problem;

    Rows<T, Acc> queries() const { return rows(p.queries, arrays.query_norms, nullptr); }
    Rows<T, Acc> refs() const {
        return p.square ? queries() : rows(p.refs, arrays.ref_norms, p.num_valid_refs);
    }
    static dim3 tile_grid(const TileGroup<T, Acc>& tile_group) {
        return dim3(unsigned(tile_group.col_tiles), unsigned(tile_group.row_tiles));
    }
    TileRange all_rows() const { return {0, Policy::tiles_along(p.queries.count)}; }
    TileRange all_cols() const { return {0, Policy::tiles_along(p.refs.count)}; }

    // Calls f(tile_group, step) in a fixed order. (In a square matrix the rows below the first groups were
    // first visited as those groups' columns.)
    template <typename F>
    void for_tile_groups(TileGroupShape shape, TileRange rows, TileRange cols, const F& f) const {
        for (int64_t i = rows.begin; i < rows.end; i += shape.rows) {
            const int64_t first = p.square ? std::max(i, cols.begin) : cols.begin;
            for (int64_t j = first; j < cols.end; j += shape.cols) {
                const TileGroup<T, Acc> tile_group = {queries(),
                                                      refs(),
                                                      p.square,
                                                      p.self_index,
                                                      p.mine_self_pair,
                                                      p.similarity,
                                                      i,
                                                      j,
                                                      static_cast<int>(std::min(shape.rows, rows.end - i)),
                                                      static_cast<int>(std::min(shape.cols, cols.end - j)),
                                                      all_rows().end,
                                                      all_cols().end,
                                                      all_cols().end,
                                                      arrays.cache,
                                                      false};
                f(tile_group, MergeStep{j == cols.begin, i == rows.begin, j + shape.cols >= cols.end});
            }
        }
    }

    // Whether a term of 0 counts.
    bool count_zeros() const {
        return !(formula_facts(p.formula).counts_pairs && p.reduction == Reduction::kMeanNonzero);
    }
    Upstream<Acc> upstream(const Acc* grad_loss) const { return upstream_of(task, grad_loss); }
    AnyFormula<Acc> formula() const { return AnyFormula<Acc>(p, task.learned.made); }
    Results<Acc> results(void* workspace, Acc* loss) const {
        return {static_cast<Acc*>(workspace),
                Policy::result_slots(task),
                p.reduction == Reduction::kNone ? loss : nullptr,
                p.reduction,
                static_cast<const Acc*>(task.row_weights),
                rows_by_params<Acc>(task)};
    }

    // Norms of the points; open: also bounds that keep everything.
    void prepare(bool open, Previous previous) const {
        prepare(queries(), open, previous);
        if (!p.square) prepare(refs(), false, Previous::kMayRun);
    }
    void reduce(const Results<Acc>& results, Acc* loss) const {
        Merge<Acc>::reduce(arrays.row_stats, p.queries.count, results,
                           Division{p.reduction, !p.return_sums, formula_facts(p.formula).parts}, loss,
                           stream);
    }

   private:
    void prepare(const Rows<T, Acc>& rows, bool open, Previous previous) const {
        constexpr int kRows = kNormThreads / kWarpSize;
        launch_after(previous, prepare_rows<T, Acc>, dim3(unsigned((rows.points.rows + kRows - 1) / kRows)),
                     dim3(kNormThreads), 0, stream, rows, p.similarity, arrays.row_stats, open);
    }
    Rows<T, Acc> rows(const Points& side, Acc* norms, const int64_t* used) const {
        return {{static_cast<const T*>(side.data), side.stride, side.count, p.dim}, side.labels, norms, used};
    }
};

}  // namespace dml::cuda
