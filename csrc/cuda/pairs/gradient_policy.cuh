// How backward's work is cut in a bounded workspace: tile groups of weights, groups of 16-bit gradients,
// lines shared among thread blocks. From sizes and the type alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/pairs/tile_backward.cuh"
#include "cuda/pairs/tile_policy.cuh"

namespace dml::cuda {

template <typename Math>
struct GradientPolicy : TilePolicy<Math> {
    using typename TilePolicy<Math>::T;
    using TilePolicy<Math>::image_bytes;
    using typename TilePolicy<Math>::Acc;
    using GradMath = typename GradMathOf<Math>::Type;
    using Weights = GroupWeights<WeightLayout<Math>>;
    using TilePolicy<Math>::kTile;
    using TilePolicy<Math>::tiles_along;
    using TilePolicy<Math>::group_shape;
    static constexpr bool kSeparateSums = !std::is_same_v<T, Acc>;  // gradients are narrower than their sums
    using TilePolicy<Math>::kBudget;
    using TilePolicy<Math>::cached_bytes;
    // Bytes of weights at once, which leave sums of 16-bit gradients their room.
    static constexpr int64_t kWeightBudget = (kSeparateSums ? 16ll : 32ll) << 20;
    static constexpr int64_t kPartBudget = 4ll << 20;  // bytes of gradients of parts of lines

    // Weights take the place of a tile group's similarities.
    static TileGroupShape shape(const Task& task) {
        return TilePolicy<Math>::shape_within(task, kBudget - kPartBudget - cached_bytes(task), kWeightBudget,
                                              Weights::kBytes);
    }
    static int64_t weight_bytes(const Task& task) { return shape(task).tiles() * Weights::kBytes; }
    static Weights weights_at(const Task& task, unsigned char* bytes) { return {bytes, shape(task).tiles()}; }
    // What cache, images and weights leave of the budget.
    static int64_t room(const Task& task) {
        return kBudget - weight_bytes(task) - image_bytes(task.problem, shape(task)) - cached_bytes(task);
    }

    // ---- groups of rows ----------------------------------------------------------------------------------
    // Where 16-bit gradients are summed in float32 those sums are bounded too: the rows are cut into groups,
    // and a group's gradient is finished before the next begins. A pair of two groups is then visited twice,
    // once for each. Elsewhere there is one group, and its sums are the gradient itself.

    static int64_t sum_bytes(const Problem& p, int64_t tiles) {
        return tiles * kTile * p.dim * int64_t(sizeof(Acc));
    }
    static int64_t most_summed_tiles(const Task& task) {
        const Problem& p = task.problem;
        const int64_t bytes = std::min(task.tuning.sum_bytes, room(task) - part_bytes(task));
        return std::max<int64_t>(bytes / std::max<int64_t>(sum_bytes(p, 1), 1), 1);
    }
    static int64_t group_tiles(const Task& task, int64_t tiles) {
        if (!kSeparateSums) return tiles;
        const int64_t most = most_summed_tiles(task), groups = (tiles + most - 1) / most;
        return (tiles + groups - 1) / groups;  // of equal size
    }
    static bool sums_both_sides(const Task& task) {
        const Problem& p = task.problem;
        const int64_t tiles = tiles_along(p.queries.count) + tiles_along(p.refs.count);
        return !p.square && (!kSeparateSums || tiles <= most_summed_tiles(task));
    }
    static int64_t sum_bytes(const Task& task) {
        const Problem& p = task.problem;
        const int64_t rows = tiles_along(p.queries.count), cols = tiles_along(p.refs.count);
        if (!kSeparateSums) return 0;
        if (sums_both_sides(task)) return sum_bytes(p, rows + cols);
        return sum_bytes(p, std::max(group_tiles(task, rows), group_tiles(task, cols)));
    }

    // ---- parts of lines ----------------------------------------------------------------------------------
    // Where a tile group has few lines for so many multiprocessors, several thread blocks share a line: as
    // many as give each block what it would have if `wide_blocks` had equal work, but split_slots tiles at
    // least. Their sums are merged in order. Where the lines of one side are longer than the others, as where
    // a few rows meet many references, the long ones are shared, among more blocks.

    static int64_t parts_of_a_line(const Task& task, TileGroupShape group, bool diagonal) {
        const int64_t line = std::max(group.rows, group.cols);
        const int64_t panels = (task.problem.dim + kNarrowPanel - 1) / kNarrowPanel;
        const int64_t slots = group.tiles() * (diagonal ? 1 : 2) * panels;  // of all lines
        const int64_t at_once = kNeedsManyRegisters<GradMath> ? 1 : 2;      // blocks of a multiprocessor
        const int64_t wanted =
            task.problem.square ? task.tuning.wide_blocks : task.tuning.line_blocks * at_once / 2;
        const int64_t blocks = std::max<int64_t>(wanted, 1), share = (slots + blocks - 1) / blocks;
        return std::max<int64_t>(line / std::max(task.tuning.split_slots, share), 1);
    }
    // Of one part's sums.
    static int64_t part_bytes(const Problem& p, TileGroupShape group, bool diagonal) {
        const bool both = group.rows == group.cols && !diagonal;
        return (both ? 2 : 1) * std::min(group.rows, group.cols) * kTile * p.dim * int64_t(sizeof(Acc));
    }
    static int64_t part_bytes(const Task& task) {
        const Problem& p = task.problem;
        const TileGroupShape group = shape(task);
        int64_t bytes = 0;
        for (const bool diagonal : {false, true}) {
            const bool occurs = diagonal ? p.square : !p.square || group.rows < tiles_along(p.queries.count);
            const int64_t parts = parts_of_a_line(task, group, diagonal);
            if (occurs) bytes = std::max(bytes, (parts - 1) * part_bytes(p, group, diagonal));
        }
        return std::min({bytes, kPartBudget, room(task) / 4}) / 16 * 16;
    }

    // ---- workspace ---------------------------------------------------------------------------------------

    // Distances of rows that are not normalised need the sum of each line's weights as well.
    static bool sums_weights(const Problem& p) { return p.similarity.euclidean && !p.similarity.normalize; }
    // Numbers: partial sums of a tile group's lines, then the sums of all rows and of all columns.
    static int64_t weight_partials_size(const Task& task) {
        return partials_size(shape(task).tiles(), kTile, true);
    }

    // Images, weights of a tile group and their powers of two, gradients of parts of its lines, sums of 16-bit
    // gradients, sums of weights.
    static int64_t workspace_bytes(const Task& task) {
        const Problem& p = task.problem;
        int64_t numbers = 0;
        if (sums_weights(p))
            numbers = weight_partials_size(task) + p.queries.count + (p.square ? 0 : p.refs.count);
        return image_bytes(p, shape(task)) + weight_bytes(task) + part_bytes(task) + sum_bytes(task) +
               numbers * int64_t(sizeof(Acc));
    }
};

}  // namespace dml::cuda
