// Backward's launches on tiles: tile groups of weights, each multiplied by the points before the next.
#pragma once

#include "cuda/hopper/gradients.cuh"
#include "cuda/pairs/finish_gradient.cuh"
#include "cuda/pairs/gradient_policy.cuh"
#include "cuda/pairs/launcher.cuh"

namespace dml::cuda {

// Some tiles' rows on one side, and the sum of their gradient.
template <typename Acc>
struct GradientGroup {
    TileRange tiles;
    Acc* sum;  // null: not wanted now
};

// Backward's workspace on tiles.
template <typename Math, typename Acc = typename Math::Acc>
struct GradientWorkspace {
    GroupWeights<WeightLayout<Math>> weights;  // of a tile group
    Acc *parts, *sums;                         // of parts of lines; of 16-bit gradients
    Partials<Acc> weight_partials;             // sums of the weights of a tile group's lines
    Acc *row_weights, *col_weights;  // sums of the weights of all rows, of all columns; null: not needed
};

template <typename Math>
struct BackwardPass {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using Policy = GradientPolicy<Math>;
    using Group = GradientGroup<Acc>;
    static constexpr int kTile = Policy::kTile;

    const Launcher<Math>& launcher;
    const Acc* grad_loss;
    GradientWorkspace<Math> workspace;
    ImageSlots<Math>& images;

    // Weights take the place of similarities that are not cached.
    Acc* similarities() const { return reinterpret_cast<Acc*>(workspace.weights.images[0]); }

    void run(T* grad_queries, T* grad_refs) const {
        const Problem& p = launcher.p;
        const Acc *row_weights = workspace.row_weights, *col_weights = workspace.col_weights;
        const TileRange rows = launcher.all_rows(), cols = launcher.all_cols();
        if (p.square) {
            for_groups(launcher.queries(), rows, row_weights, grad_queries, [&](const Group& group) {
                add_pairs(group, group, true);
                add_pairs(group, {{group.tiles.end, cols.end}, nullptr}, false);
                add_pairs({{0, group.tiles.begin}, nullptr}, group, false);
            });
        } else if (Policy::sums_both_sides(launcher.task)) {
            const Group row_group = group_of(rows, grad_queries, workspace.sums);
            const Group col_group = group_of(cols, grad_refs, workspace.sums + rows.end * kTile * p.dim);
            add_pairs(row_group, col_group, true);
            finish(launcher.queries(), row_group, row_weights, grad_queries);
            finish(launcher.refs(), col_group, col_weights, grad_refs);
        } else {
            for_groups(launcher.queries(), rows, row_weights, grad_queries,
                       [&](const Group& group) { add_pairs(group, {cols, nullptr}, true); });
            for_groups(launcher.refs(), cols, col_weights, grad_refs,
                       [&](const Group& group) { add_pairs({rows, nullptr}, group, true); });
        }
    }

    // Adds to both groups what their pairs give. fresh: nothing has been added to either.
    void add_pairs(const Group& rows, const Group& cols, bool fresh) const {
        launcher.for_tile_groups(Policy::shape(launcher.task), rows.tiles, cols.tiles, &images,
                                 similarities(), [&](const auto& tile_group, MergeStep step) {
                                     step.rows_first = step.rows_first && fresh;
                                     step.cols_first = step.cols_first && fresh;
                                     weigh(tile_group, rows, cols, step);
                                     multiply(tile_group, rows, cols, step);
                                 });
    }

   private:
    // 1. A tile group's similarities become weights.
    void weigh(const TileGroup<Acc>& tile_group, const Group& rows, const Group& cols, MergeStep step) const {
        const SavedArrays<Acc>& arrays = launcher.arrays;
        const TileNeed<Acc> need = {arrays.row_stats, nullptr, arrays.kept};
        if (!arrays.cache) launcher.multiply(tile_group, need);
        Look<Acc>::weights(tile_group, launcher.formula(), need, launcher.upstream(grad_loss),
                           workspace.weights, workspace.weight_partials, launcher.launches);
        if (!Policy::sums_weights(launcher.p)) return;
        Merge<Acc>::weights(tile_group, workspace.weight_partials, arrays.kept, step,
                            rows.sum ? workspace.row_weights : nullptr,
                            cols.sum ? workspace.col_weights : nullptr, launcher.launches);
    }

    // 2. Weights times points, in panels of the gradient's columns.
    void multiply(const TileGroup<Acc>& tile_group, const Group& rows, const Group& cols,
                  MergeStep step) const {
        const Problem& p = launcher.p;
        const bool diagonal = tile_group.diagonal();
        const Gradients<Acc> gradients = {
            {{rows.sum, rows.tiles.begin * kTile, p.queries.count, step.rows_first},
             {cols.sum, cols.tiles.begin * kTile, p.refs.count, step.cols_first}},
            // The side with fewer lines has the longer ones.
            {tile_group.row_tiles <= tile_group.col_tiles,
             tile_group.col_tiles <= tile_group.row_tiles && !diagonal},
            p.dim,
            workspace.parts};
        const int owners = tile_group.row_tiles + (diagonal ? 0 : tile_group.col_tiles);
        const int wanted =
            (rows.sum ? tile_group.row_tiles : 0) + (cols.sum && !diagonal ? tile_group.col_tiles : 0);
        const int64_t parts = parts_of_a_line(tile_group);
        const auto launch = [&](auto kernel, int panel, int threads, int shared_bytes) {
            const int64_t panels = (p.dim + panel - 1) / panel;
            launcher.launches(kernel, dim3(unsigned(panels), unsigned(owners), unsigned(parts)),
                              dim3(threads), shared_bytes, tile_group, gradients, launcher.arrays.kept,
                              workspace.weights);
            merge_parts(tile_group, gradients, int(parts) - 1);
        };
        if constexpr (kHasWgmma<Math>) {
            if (takes_wgmma(launcher.task.tuning.wgmma)) {
                launch(wgmma_gradients<Math>, kProductTile, kWgmmaThreads, kWgmmaGradientBytes<Math>);
                return;
            }
        }
        const auto launch_panels = [&](auto panel) {
            using Traits = GradTraits<Math, decltype(panel)::value>;
            launch(add_gradients<Math, Traits::kCols>, Traits::kCols, Traits::kThreads, Traits::kSharedBytes);
        };
        constexpr int kWide = kWidePanel<Math>;
        if (p.dim > kNarrowPanel &&
            (p.dim + kWide - 1) / kWide * wanted >= launcher.task.tuning.wide_blocks) {
            launch_panels(std::integral_constant<int, kWide>());
        } else {
            launch_panels(std::integral_constant<int, kNarrowPanel>());
        }
    }

    int64_t parts_of_a_line(const TileGroup<Acc>& tile_group) const {
        const Task& task = launcher.task;
        const TileGroupShape shape = {tile_group.row_tiles, tile_group.col_tiles};
        const bool diagonal = tile_group.diagonal();
        const int64_t one = std::max<int64_t>(Policy::part_bytes(launcher.p, shape, diagonal), 1);
        const int64_t room = 1 + Policy::part_bytes(task) / one;
        return std::min(Policy::parts_of_a_line(task, shape, diagonal), room);
    }

    // 3. The other parts of shared lines are added to the first.
    void merge_parts(const TileGroup<Acc>& tile_group, const Gradients<Acc>& gradients, int count) const {
        const int64_t dim = launcher.p.dim;
        const int64_t pitch = gradients.tiles(tile_group.row_tiles, tile_group.col_tiles) * kTile * dim;
        const Acc* parts = gradients.parts;
        for (const int side : {0, 1}) {
            const Gradient<Acc>& gradient = gradients.side[side];
            const int64_t rows = gradients.tiles(side, tile_group.row_tiles, tile_group.col_tiles) * kTile;
            const int64_t first = (side == 0 ? tile_group.row_tile : tile_group.col_tile) * kTile;
            if (gradient.sum && rows > 0 && count > 0) {
                Merge<Acc>::gradient(parts, count, pitch, std::min(rows, gradient.count - first) * dim,
                                     gradient.sum + (first - gradient.row0) * dim, launcher.launches);
            }
            parts += rows * dim;
        }
    }

    // 4. From a group's sums to the gradient of its rows.
    void finish(const Rows<T, Acc>& rows, const Group& group, const Acc* weight_sums, T* grad) const {
        if (!grad) return;
        constexpr int kRows = kFinishThreads / kWarpSize;
        const int64_t begin = group.tiles.begin * kTile;
        const int64_t end = std::min(group.tiles.end * kTile, rows.points.rows);
        launcher.launches(finish_gradient<T, Acc>, dim3(unsigned((end - begin + kRows - 1) / kRows)),
                          dim3(kFinishThreads), 0, rows, begin, end, launcher.p.similarity,
                          launcher.arrays.row_stats, launcher.upstream(grad_loss), weight_sums, group.sum,
                          grad);
    }

    // The group of rows of `tiles`: its sum is in `sums`, or in place in the side's gradient.
    Group group_of(TileRange tiles, T* grad, Acc* sums) const {
        if (!grad) return {tiles, nullptr};
        if constexpr (Policy::kSeparateSums) {
            return {tiles, sums};
        } else {
            return {tiles, grad + tiles.begin * kTile * launcher.p.dim};
        }
    }

    // Calls f(group) for each group of one side's tiles, and finishes its gradient.
    template <typename F>
    void for_groups(const Rows<T, Acc>& side, TileRange tiles, const Acc* weight_sums, T* grad,
                    const F& f) const {
        if (!grad) return;
        const int64_t size = Policy::group_tiles(launcher.task, tiles.end);
        for (int64_t first = 0; first < tiles.end; first += size) {
            const Group group = group_of({first, std::min(first + size, tiles.end)}, grad, workspace.sums);
            f(group);
            finish(side, group, weight_sums, grad);
        }
    }
};

// bytes: the workspace, behind the images.
template <typename Math>
void backward_tiles(const Launcher<Math>& launcher, const typename Math::Acc* grad_loss,
                    typename Math::Value* grad_queries, typename Math::Value* grad_refs,
                    ImageSlots<Math>& images, unsigned char* bytes) {
    using Acc = typename Math::Acc;
    using Policy = GradientPolicy<Math>;
    const Task& task = launcher.task;
    const Problem& p = launcher.p;
    GradientWorkspace<Math> workspace = {};
    workspace.weights = Policy::weights_at(task, bytes);
    bytes += Policy::weight_bytes(task);
    workspace.parts = reinterpret_cast<Acc*>(bytes);
    bytes += Policy::part_bytes(task);
    workspace.sums = reinterpret_cast<Acc*>(bytes);
    bytes += Policy::sum_bytes(task);
    workspace.weight_partials = {reinterpret_cast<Acc*>(bytes)};
    if (Policy::sums_weights(p)) {
        workspace.row_weights = workspace.weight_partials.data + Policy::weight_partials_size(task);
        workspace.col_weights = workspace.row_weights + (p.square ? 0 : p.queries.count);
    }
    BackwardPass<Math>{launcher, grad_loss, workspace, images}.run(grad_queries, grad_refs);
}

// The gradient by the parameters: of the terms, and of `by_rows`. sums: [params, slots] of workspace; similarities: of a
// tile group. A batch without pairs takes the matrix path.
template <typename Math, typename Acc = typename Math::Acc>
void gradient_by_params(const Launcher<Math>& launcher, const RowsByParams<Acc>& by_rows,
                        const Acc* grad_loss, double* sums, ImageSlots<Math>& images, Acc* similarities) {
    const Task& task = launcher.task;
    const LearnedParams& learned = task.learned;
    const SavedArrays<Acc>& arrays = launcher.arrays;
    const TileRange rows = launcher.all_rows(), cols = launcher.all_cols();
    const TileNeed<Acc> need = {arrays.row_stats, nullptr, arrays.kept};
    ByParams<Acc> by_params = {by_rows, learned.count, sums, learned.ticket(), learned.gradient, true, false};
    launcher.for_tile_groups(GradientPolicy<Math>::shape(task), rows, cols, arrays.cache ? nullptr : &images,
                             similarities, [&](const auto& group, MergeStep) {
                                 if (!arrays.cache) launcher.multiply(group, need);
                                 by_params.last = group.row_tile + group.row_tiles == rows.end &&
                                                  group.col_tile + group.col_tiles == cols.end;
                                 Look<Acc>::params(group, TilePolicy<Math>::param_slots(task),
                                                   launcher.formula(), need, launcher.upstream(grad_loss),
                                                   by_params, launcher.launches);
                                 by_params.first = false;
                             });
}

}  // namespace dml::cuda
