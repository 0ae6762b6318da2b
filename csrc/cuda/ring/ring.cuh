// One block of columns at a time: the streams of tile_forward.cuh and the products of tile_backward.cuh, of
// which a row meets neither the first tile nor the last, because its running numbers come from the blocks
// before and go on to those after. Nothing of a product is compiled anew.
#pragma once

#include "cuda/pairs/engine.cuh"
#include "cuda/ring/ring.h"

namespace dml::cuda {

template <typename Acc>
RowStats<Acc> state_of(Acc* numbers, int64_t rows) {
    Acc* a = numbers + kHeader;
    return {numbers, a, a + rows, a + 2 * rows, a + 3 * rows, a + 4 * rows, a + 5 * rows, nullptr};
}

// What all points' norms say, into a header. In forward only that something is not finite, which stays said;
// backward, where no gradient is 1, or 0 where something is not finite: whoever sums over the blocks makes
// it NaN. One block.
template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads, 1)
    examine_norms(const Acc* norms, int64_t count, bool forward, Acc* header) {
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

// The rows' weights times what comes from above: grad_parts [2, rows].
template <typename Acc>
__global__ void __launch_bounds__(kRowThreads)
    weigh_rows(RowStats<Acc> from, const Acc* grad_parts, int64_t rows, int last_part, RowStats<Acc> to) {
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

// A task whose tiles are neither strips nor kept from forward for backward.
inline Task in_tiles(Task task) {
    task.tuning.strip_limit = 0;
    task.tuning.cache_bytes = 0;
    return task;
}

// Throws for a stage that the formula has not.
inline void check_stage(const Problem& p, BlockStage stage) {
    const bool context = formula_facts(p.formula).context;
    const bool known = stage == BlockStage::kHardest ? p.mining.on
                       : context ? stage == BlockStage::kNegatives || stage == BlockStage::kPositives
                                 : stage == BlockStage::kBoth;
    if (!known) throw std::invalid_argument("dml_cuda: not a stage of this formula");
}

template <typename Math>
BlockSizes BlockEngine<Math>::sizes(const Task& asked) {
    using On = Work<Math>;
    const Task task = in_tiles(asked);
    const Problem& p = task.problem;
    constexpr int64_t kNumber = sizeof(typename Math::Acc);
    const int64_t n = p.queries.count, m = p.refs.count, tiles = On::tile_count_of(p);
    if (n == 0 || m == 0) return {};
    const int64_t packed = packed_bytes<typename Math::Value>(p);
    const int64_t partials = partials_size(On::forward_shape(task).tiles(), On::kTile, false);
    int64_t backward = kHeader + kStatsPerRow * n + n + m;
    if (On::sums_weights(p))
        backward += partials_size(On::backward_shape(task).tiles(), On::kTile, true) + n + m;
    return {packed + (n + m + partials) * kNumber,
            packed + On::weight_bytes(task) + On::part_bytes(task) + backward * kNumber,
            extremes_bytes(tiles, kNumber), On::knows_kept(p) ? tiles : 0};
}

template <typename Math>
void BlockEngine<Math>::add(const Task& asked, BlockStage stage, void* state, void* extremes, void* kept,
                            void* workspace, cudaStream_t stream) {
    using On = Work<Math>;
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    check_stage(asked.problem, stage);
    const int64_t n = asked.problem.queries.count, m = asked.problem.refs.count;
    if (n == 0 || m == 0) return;
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task task = with_aligned_rows<T>(in_tiles(asked), bytes, stream);
    const Problem& p = task.problem;
    Acc* norms = reinterpret_cast<Acc*>(bytes);
    const Partials<Acc> partials = {norms + n + m};
    const RowStats<Acc> stats = state_of(static_cast<Acc*>(state), n);
    const Places<Acc> places = {stats, norms, norms + n, static_cast<uint8_t*>(kept)};
    const On work{task, false, nullptr, stream, p, &places};

    work.prepare(work.queries(), false);
    work.prepare(work.refs(), false);
    const bool first = stage == BlockStage::kHardest || (!p.mining.on && stage != BlockStage::kPositives);
    if (first) {  // every stage meets the same points
        launch(examine_norms<Acc>, dim3(1), dim3(kReduceThreads), kReduceSharedBytes, stream, norms, n + m,
               true, stats.header);
    }
    auto* of_tiles = static_cast<Acc*>(extremes);
    const auto all = [&](const auto& visit) {
        work.for_tile_groups(
            On::forward_shape(task), work.all_rows(), work.all_cols(),
            [&](const auto& tile_group, Turn) { visit(tile_group, Turn{false, false, false}); });
    };
    if (stage == BlockStage::kHardest) {
        all([&](const auto& tile_group, Turn turn) {
            launch(find_extremes<Math>, work.tiles_of(tile_group), dim3(On::Traits::kThreads),
                   On::Grid::shared_bytes(2), stream, tile_group, partials, of_tiles);
            Merge<Acc>::extremes(Merge<Acc>::without_points(tile_group), false, stats, partials, turn,
                                 Acc(p.mining.epsilon), stream);
        });
        return;
    }
    const AnyFormula<Acc> formula(p);
    const bool second = stage == BlockStage::kPositives;
    const size_t shared_bytes = On::Grid::shared_bytes(most_summed(p.formula));
    const Results<Acc> none = {nullptr, 0, nullptr, p.reduction};
    all([&](const auto& tile_group, Turn turn) {
        launch(accumulate<Math>, work.tiles_of(tile_group), dim3(On::Traits::kThreads), shared_bytes, stream,
               tile_group, formula, second, stats, partials, of_tiles, work.kept(), work.count_zeros());
        Merge<Acc>::sums(Merge<Acc>::without_points(tile_group), false, formula, second, stats, partials,
                         work.kept(), turn, p.mining.on, none, stream);
    });
}

template <typename Math>
void BlockEngine<Math>::backward(const Task& asked, const void* weights, const void* grad_parts,
                                 const void* kept, void* grad_rows, void* grad_block, void* workspace,
                                 cudaStream_t stream) {
    using On = Work<Math>;
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    auto* bytes = static_cast<unsigned char*>(workspace);
    Task task = with_aligned_rows<T>(in_tiles(asked), bytes, stream);
    const Problem& p = task.problem;
    task.problem.reduction = Reduction::kSum;  // what comes from above is in the rows' weights
    task.problem.return_sums = false;
    const int64_t n = p.queries.count, m = p.refs.count;

    auto* of_tiles = reinterpret_cast<typename On::Weight*>(bytes);
    auto* parts = reinterpret_cast<Acc*>(bytes + On::weight_bytes(task));
    Acc* numbers = parts + On::part_bytes(task) / int64_t(sizeof(Acc));
    Acc* norms = numbers + kHeader + kStatsPerRow * n;
    const Partials<Acc> partials = {norms + n + m};
    Acc* row_weights = nullptr;
    if (On::sums_weights(p))
        row_weights = partials.data + partials_size(On::backward_shape(task).tiles(), On::kTile, true);
    Acc* col_weights = row_weights ? row_weights + n : nullptr;

    const RowStats<Acc> stats = state_of(numbers, n);
    // Only read; a kernel's argument is not const because forward writes there.
    auto* known = const_cast<uint8_t*>(static_cast<const uint8_t*>(kept));
    const Places<Acc> places = {stats, norms, norms + n, known};
    const On work{task, false, nullptr, stream, p, &places};
    work.prepare(work.queries(), false);
    work.prepare(work.refs(), false);
    launch(examine_norms<Acc>, dim3(1), dim3(kReduceThreads), kReduceSharedBytes, stream, norms, n + m, false,
           stats.header);
    const RowStats<Acc> from = state_of(const_cast<Acc*>(static_cast<const Acc*>(weights)), n);
    launch(weigh_rows<Acc>, row_blocks(n), dim3(kRowThreads), 0, stream, from,
           static_cast<const Acc*>(grad_parts), n, formula_facts(p.formula).parts - 1, stats);

    const Acc* one = stats.header + kScale;
    Acc *of_rows = static_cast<Acc*>(grad_rows), *of_block = static_cast<Acc*>(grad_block);
    const typename On::Backward pass{work, one, of_tiles, parts, nullptr, partials, row_weights, col_weights};
    pass.add_pairs({work.all_rows(), of_rows}, {work.all_cols(), of_block}, true);
    const auto finish = [&](const Rows<T, Acc>& rows, const Acc* weight_sums, Acc* grad) {
        if (!grad) return;
        constexpr int kRows = kFinishThreads / kWarpSize;
        const int64_t count = rows.points.rows;
        launch(finish_gradient<T, Acc, Acc>, dim3(unsigned((count + kRows - 1) / kRows)),
               dim3(kFinishThreads), 0, stream, rows, int64_t(0), count, p.similarity, stats,
               work.upstream(one), weight_sums, grad, grad);
    };
    finish(work.queries(), row_weights, of_rows);
    finish(work.refs(), col_weights, of_block);
}

}  // namespace dml::cuda
