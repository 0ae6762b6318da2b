// A task with its memory and launches, and the kernel arguments that follow from it.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/hopper/similarities.cuh"
#include "cuda/pairs/image_slots.cuh"
#include "cuda/pairs/look.h"
#include "cuda/pairs/merge.h"
#include "cuda/pairs/prepare_rows.cuh"
#include "cuda/pairs/saved_layout.cuh"
#include "cuda/pairs/task_arguments.cuh"

namespace dml::cuda {

extern template struct Merge<float>;
extern template struct Merge<double>;
extern template struct Look<float>;
extern template struct Look<double>;

template <typename Math>
struct Launcher {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using Policy = TilePolicy<Math>;

    const Task& task;
    SavedArrays<Acc> arrays;
    Launches& launches;
    const Problem& p = task.problem;

    Rows<T, Acc> queries() const { return rows(p.queries, arrays.query_norms, nullptr); }
    Rows<T, Acc> refs() const {
        return p.square ? queries() : rows(p.refs, arrays.ref_norms, p.num_valid_refs);
    }
    TileRange all_rows() const { return {0, Policy::tiles_along(p.queries.count)}; }
    TileRange all_cols() const { return {0, Policy::tiles_along(p.refs.count)}; }

    // Calls f(tile_group, step) in a fixed order. images: null where no kernel reads them. similarities: of a tile group;
    // null where all are cached. (In a square matrix the rows below the first groups were first visited as those groups'
    // columns.)
    template <typename F>
    void for_tile_groups(TileGroupShape shape, TileRange rows, TileRange cols, ImageSlots<Math>* images,
                         Acc* similarities, const F& f) const {
        for (int64_t i = rows.begin; i < rows.end; i += shape.rows) {
            const int64_t first = p.square ? std::max(i, cols.begin) : cols.begin;
            for (int64_t j = first; j < cols.end; j += shape.cols) {
                TileGroup<Acc> tile_group = {lines(queries()),
                                             lines(refs()),
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
                                             {},
                                             {},
                                             arrays.cache ? arrays.cache : similarities,
                                             arrays.cache != nullptr};
                if (images) images->bring(tile_group, queries(), refs());
                f(tile_group, MergeStep{j == cols.begin, i == rows.begin, j + shape.cols >= cols.end});
            }
        }
    }
    // The similarities of the tiles that are needed.
    void multiply(const TileGroup<Acc>& tile_group, const TileNeed<Acc>& need) const {
        const Matrix<T> row_points = queries().points, col_points = refs().points;
        if constexpr (kHasWgmma<Math>) {
            if (takes_wgmma(task.tuning.wgmma)) {
                launches(wgmma_similarities<Math>, tile_grid(tile_group), dim3(kWgmmaThreads),
                         kWgmmaSharedBytes<Math>, tile_group, row_points, col_points, need);
                return;
            }
        }
        launches(tile_similarities<Math>, tile_grid(tile_group), dim3(kTileThreads),
                 ProductTraits<Math>::kSharedBytes, tile_group, row_points, col_points, need);
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

    // Norms of rows; open: also bounds that keep everything.
    void prepare(const Rows<T, Acc>& rows, bool open) const {
        constexpr int kRows = kNormThreads / kWarpSize;
        launches(prepare_rows<T, Acc>, dim3(unsigned((rows.points.rows + kRows - 1) / kRows)),
                 dim3(kNormThreads), 0, rows, p.similarity, arrays.row_stats, open);
    }
    void reduce(const Results<Acc>& results, Acc* loss) const {
        Merge<Acc>::reduce(arrays.row_stats, p.queries.count, results,
                           Division{p.reduction, !p.return_sums, formula_facts(p.formula).parts}, loss,
                           launches);
    }

   private:
    static Lines<Acc> lines(const Rows<T, Acc>& rows) {
        return {rows.points.rows, rows.labels, rows.norms, rows.used};
    }
    Rows<T, Acc> rows(const Points& side, Acc* norms, const int64_t* used) const {
        return {{static_cast<const T*>(side.data), side.stride, side.count, p.dim}, side.labels, norms, used};
    }
};

}  // namespace dml::cuda
