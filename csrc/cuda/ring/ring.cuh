// One block of columns at a time, by the passes of forward.cuh and backward.cuh: a row meets neither its
// first tile nor its last, because its running numbers come from the blocks before and go on to those after.
#pragma once

#include "cuda/pairs/engine.cuh"
#include "cuda/ring/ring.h"

namespace dml::cuda {

template <typename Acc>
RowStats<Acc> state_of(Acc* numbers, int64_t rows) {
    Acc* a = numbers + kHeader;
    return {numbers, a, a + rows, a + 2 * rows, a + 3 * rows, a + 4 * rows, a + 5 * rows, nullptr};
}

// Writes a header from all norms [count], by one thread block. In forward only that a norm is not finite,
// which stays. In backward the health is 0 instead of NaN: the caller who sums over the blocks makes the
// gradient NaN.
template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads, 1)
    examine_norms(const Acc* norms, int64_t count, bool forward, Acc* header) {
    wait_for_previous_kernel();
    Acc* shared = shared_array<Acc>(0, kWarpSize);
    Acc not_finite = 0, very_long = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        not_finite += Acc(!is_finite(norms[i]));
        very_long += Acc(is_very_long(norms[i]));
    }
    not_finite = block_sum(not_finite, shared);
    very_long = block_sum(very_long, shared);
    if (threadIdx.x != 0) return;
    if (forward) {
        if (not_finite > Acc(0)) header[kHealth] = not_a_number<Acc>();
        return;
    }
    header[kScale] = header[kScale + 1] = Acc(1);
    header[kHealth] = not_finite > Acc(0) ? Acc(0) : Acc(1);
    header[kRange] = very_long > Acc(0) ? long_rows_range<Acc>() : Acc(1);
}

inline constexpr int kRowThreads = 256;
inline dim3 row_blocks(int64_t rows) { return dim3(unsigned((rows + kRowThreads - 1) / kRowThreads)); }

// The rows' weights times grad_parts [2, rows].
template <typename Acc>
__global__ void __launch_bounds__(kRowThreads)
    weigh_rows(RowStats<Acc> from, const Acc* grad_parts, int64_t rows, int last_part, RowStats<Acc> to) {
    wait_for_previous_kernel();
    const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i >= rows) return;
    to.neg_above[i] = from.neg_above[i];
    to.pos_below[i] = from.pos_below[i];
    to.neg[i] = from.neg[i];
    to.pos[i] = from.pos[i];
    to.d_neg[i] = from.d_neg[i] * grad_parts[last_part * rows + i];
    to.d_pos[i] = from.d_pos[i] * grad_parts[i];
}

template <typename Math>
struct BlockEngine {
    static BlockSizes sizes(const Task& task);
    static void add(const Task& task, BlockStage stage, void* state, void* extremes, void* kept,
                    void* workspace, cudaStream_t stream);
    static void backward(const Task& task, const void* weights, const void* grad_parts, const void* kept,
                         void* grad_rows, void* grad_block, void* workspace, cudaStream_t stream);
};

// The task on tiles, without a cache.
inline Task in_tiles(Task task) {
    task.tuning.matrix_bytes = 0;
    task.tuning.cache_bytes = 0;
    return task;
}

// Throws for a stage that the formula lacks.
inline void check_stage(const Problem& p, BlockStage stage) {
    const bool context = formula_facts(p.formula).context;
    const bool known = stage == BlockStage::kHardest ? p.mining.on
                       : context ? stage == BlockStage::kNegatives || stage == BlockStage::kPositives
                                 : stage == BlockStage::kBoth;
    if (!known) throw std::invalid_argument("dml_cuda: not a stage of this formula");
}

// The rows' state and this block's norms and flags.
template <typename Acc>
SavedArrays<Acc> block_arrays(const RowStats<Acc>& row_stats, Acc* norms, int64_t rows, void* kept) {
    return {row_stats, norms, norms + rows, nullptr, static_cast<uint8_t*>(kept)};
}

template <typename Math>
BlockSizes BlockEngine<Math>::sizes(const Task& asked) {
    using Policy = GradientPolicy<Math>;
    const Task task = in_tiles(asked);
    const Problem& p = task.problem;
    constexpr int64_t kNumber = sizeof(typename Math::Acc);
    const int64_t n = p.queries.count, m = p.refs.count, tiles = Policy::count_tiles(p);
    if (n == 0 || m == 0) return {};
    const TileGroupShape forward = Policy::forward_shape(task);
    const int64_t tiled = Policy::image_bytes(p, forward) + Policy::group_similarity_bytes(task, forward);
    const int64_t partials = partials_size(Policy::forward_shape(task).tiles(), Policy::kTile, false);
    int64_t backward = kHeader + kStatsPerRow * n + n + m;
    if (Policy::sums_weights(p)) backward += Policy::weight_partials_size(task) + n + m;
    const int64_t made = learned_bytes<int64_t>(0, task.learned.count, kNumber);
    return {made + tiled + (n + m + partials) * kNumber,
            made + Policy::param_bytes(task) + Policy::image_bytes(p, Policy::shape(task)) +
                Policy::weight_bytes(task) + Policy::part_bytes(task) + backward * kNumber,
            extremes_bytes(tiles, kNumber), Policy::has_kept(p) ? tiles : 0};
}

template <typename Math>
void BlockEngine<Math>::add(const Task& asked, BlockStage stage, void* state, void* extremes, void* kept,
                            void* workspace, cudaStream_t stream) {
    Launches launches(stream);
    using Acc = typename Math::Acc;
    check_stage(asked.problem, stage);
    const int64_t n = asked.problem.queries.count, m = asked.problem.refs.count;
    if (n == 0 || m == 0) return;
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task task = with_made_formula<Acc>(in_tiles(asked), bytes, launches);
    const Problem& p = task.problem;
    const TileGroupShape shape = TilePolicy<Math>::forward_shape(task);
    ImageSlots<Math> images(p, shape, bytes, launches);
    bytes += TilePolicy<Math>::image_bytes(p, shape);
    Acc* const similarities = reinterpret_cast<Acc*>(bytes);
    Acc* norms = reinterpret_cast<Acc*>(bytes + TilePolicy<Math>::group_similarity_bytes(task, shape));
    const RowStats<Acc> row_stats = state_of(static_cast<Acc*>(state), n);
    const Launcher<Math> launcher = {task, block_arrays(row_stats, norms, n, kept), launches};
    const ForwardPass<Math> pass = {launcher,
                                    {norms + n + m},
                                    static_cast<Acc*>(extremes),
                                    Results<Acc>{nullptr, 0, nullptr, p.reduction, nullptr, {}}};

    launcher.prepare(launcher.queries(), false);
    launcher.prepare(launcher.refs(), false);
    const bool first = stage == BlockStage::kHardest || (!p.mining.on && stage != BlockStage::kPositives);
    if (first) {  // every stage meets the same points
        launches(examine_norms<Acc>, dim3(1), dim3(kReduceThreads), kReduceSharedBytes, norms, n + m, true,
                 row_stats.header);
    }
    launcher.for_tile_groups(shape, launcher.all_rows(), launcher.all_cols(), &images, similarities,
                             [&](const auto& tile_group, MergeStep) {
                                 const MergeStep step = {false, false, false};
                                 if (stage == BlockStage::kHardest) {
                                     pass.find_hardest(tile_group, step);
                                 } else {
                                     pass.gather(tile_group, step, stage == BlockStage::kPositives, false);
                                 }
                             });
}

template <typename Math>
void BlockEngine<Math>::backward(const Task& asked, const void* weights, const void* grad_parts,
                                 const void* kept, void* grad_rows, void* grad_block, void* workspace,
                                 cudaStream_t stream) {
    Launches launches(stream);
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using Policy = GradientPolicy<Math>;
    auto* bytes = static_cast<unsigned char*>(workspace);
    Task task = with_made_formula<Acc>(in_tiles(asked), bytes, launches);
    const Problem& p = task.problem;
    task.problem.reduction = Reduction::kSum;  // the upstream gradient is in the rows' weights
    task.problem.return_sums = false;
    const int64_t n = p.queries.count, m = p.refs.count;

    // 1. The workspace.
    GradientWorkspace<Math> space = {};
    auto* param_sums = reinterpret_cast<double*>(bytes);
    bytes += Policy::param_bytes(task);
    ImageSlots<Math> images(p, Policy::shape(task), bytes, launches);
    bytes += Policy::image_bytes(p, Policy::shape(task));
    space.weights = Policy::weights_at(task, bytes);
    space.parts = reinterpret_cast<Acc*>(bytes + Policy::weight_bytes(task));
    Acc* numbers = space.parts + Policy::part_bytes(task) / int64_t(sizeof(Acc));
    Acc* norms = numbers + kHeader + kStatsPerRow * n;
    space.weight_partials = {norms + n + m};
    if (Policy::sums_weights(p)) {
        space.row_weights = space.weight_partials.data + Policy::weight_partials_size(task);
        space.col_weights = space.row_weights + n;
    }
    // Only read; a kernel's argument is not const because forward writes there.
    auto* flags = const_cast<void*>(kept);

    // 2. Norms, and the rows' weights.
    const RowStats<Acc> row_stats = state_of(numbers, n);
    const Launcher<Math> launcher = {task, block_arrays(row_stats, norms, n, flags), launches};
    launcher.prepare(launcher.queries(), false);
    launcher.prepare(launcher.refs(), false);
    launches(examine_norms<Acc>, dim3(1), dim3(kReduceThreads), kReduceSharedBytes, norms, n + m, false,
             row_stats.header);
    const RowStats<Acc> given = state_of(const_cast<Acc*>(static_cast<const Acc*>(weights)), n);
    launches(weigh_rows<Acc>, row_blocks(n), dim3(kRowThreads), 0, given, static_cast<const Acc*>(grad_parts),
             n, formula_facts(p.formula).parts - 1, row_stats);

    // 3. The gradients, summed in place.
    const Acc* one = row_stats.header + kScale;
    Acc *row_sums = static_cast<Acc*>(grad_rows), *block_sums = static_cast<Acc*>(grad_block);
    const BackwardPass<Math> pass{launcher, one, space, images};
    if (task.learned.gradient)
        gradient_by_params(launcher, RowsByParams<Acc>{}, one, param_sums, images, pass.similarities());
    if (!row_sums && !block_sums) return;
    pass.add_pairs({launcher.all_rows(), row_sums}, {launcher.all_cols(), block_sums}, true);
    const auto finish = [&](const Rows<T, Acc>& rows, const Acc* weight_sums, Acc* grad) {
        if (!grad) return;
        constexpr int kRows = kFinishThreads / kWarpSize;
        const int64_t count = rows.points.rows;
        launches(finish_gradient<T, Acc, Acc>, dim3(unsigned((count + kRows - 1) / kRows)),
                 dim3(kFinishThreads), 0, rows, int64_t(0), count, p.similarity, row_stats,
                 launcher.upstream(one), weight_sums, grad, grad);
    };
    finish(launcher.queries(), space.row_weights, row_sums);
    finish(launcher.refs(), space.col_weights, block_sums);
}

}  // namespace dml::cuda
