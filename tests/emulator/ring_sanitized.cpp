// Runs the engine block by block, forward and backward, for the sanitizers to watch: each buffer is a heap
// block of exactly the size that the engine asked for. Whether the results are right is tested elsewhere.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/ring/ring.cuh"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

template <typename Math>
void run(Scalar scalar, int64_t n, std::vector<int64_t> counts, int64_t dim, int64_t stride,
         FormulaId formula, bool mining, Similarity similarity) {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    const Cloud<T> rows(n, dim, stride);
    std::vector<Cloud<T>> blocks;
    for (const int64_t count : counts) blocks.emplace_back(count, dim, dim);
    const Buffer self_index(n * int64_t(sizeof(int64_t)));  // in the first block, as far as it goes
    for (int64_t i = 0; i < n; ++i) self_index.as<int64_t>()[i] = i;

    Task task;
    task.tuning.tile_group = 2;
    task.tuning.wide_blocks = task.tuning.line_blocks = 0;
    Problem& p = task.problem;
    p.queries = rows.view;
    p.square = p.mine_self_pair = false;
    p.dim = dim;
    p.scalar = scalar;
    p.formula = formula;
    p.similarity = similarity;
    std::copy_n(kParams[int(formula)], 3, p.params);
    p.mining = {mining, 0.1};
    const auto on = [&](size_t k) {
        p.refs = blocks[k].view;
        p.self_index = k == 0 ? self_index.as<int64_t>() : nullptr;
        return BlockEngine<Math>::sizes(task);
    };

    const Buffer state(state_numbers(n) * int64_t(sizeof(Acc))),
        weights(state_numbers(n) * int64_t(sizeof(Acc)));
    std::vector<Buffer> extremes, kept;
    for (size_t k = 0; k < blocks.size(); ++k) {
        const BlockSizes sizes = on(k);
        extremes.emplace_back(sizes.extremes);
        kept.emplace_back(sizes.kept);
        std::memset(kept.back().data.get(), 0, size_t(sizes.kept));
    }
    turn_rows(task, BlockStage::kStart, state.data.get(), nullptr);
    const auto pass = [&](BlockStage stage) {
        for (size_t k = 0; k < blocks.size(); ++k) {
            const BlockSizes sizes = on(k);
            const Buffer workspace(sizes.forward_workspace);
            BlockEngine<Math>::add(task, stage, state.data.get(), mining ? extremes[k].data.get() : nullptr,
                                   kept[k].data.get(), workspace.data.get(), nullptr);
        }
        turn_rows(task, stage, state.data.get(), nullptr);
    };
    if (mining) pass(BlockStage::kHardest);
    if (formula == FormulaId::nt_xent) {
        pass(BlockStage::kNegatives);
        pass(BlockStage::kPositives);
    } else {
        pass(BlockStage::kBoth);
    }
    const Buffer pairs(2 * n * int64_t(sizeof(int64_t))), flags(n), losses(4 * n * int64_t(sizeof(Acc))),
        above(2 * n * int64_t(sizeof(Acc)));
    std::fill_n(pairs.as<int64_t>(), 2 * n, 9);
    std::fill_n(above.as<Acc>(), 2 * n, Acc(0.5));
    finish_rows(task, state.data.get(), pairs.as<int64_t>(), losses.data.get(), weights.data.get(),
                flags.data.get(), nullptr);
    Acc sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += losses.as<Acc>()[i];
    if (!(sum > Acc(0))) {
        std::fprintf(stderr, "a loss of %g\n", double(sum));
        std::exit(1);
    }
    for (size_t k = 0; k < blocks.size(); ++k) {
        const BlockSizes sizes = on(k);
        if (p.refs.count == 0) continue;
        const Buffer workspace(sizes.backward_workspace), by_rows(n * dim * int64_t(sizeof(Acc))),
            by_block(p.refs.count * dim * int64_t(sizeof(Acc)));
        BlockEngine<Math>::backward(task, weights.data.get(), above.data.get(), kept[k].data.get(),
                                    by_rows.data.get(), by_block.data.get(), workspace.data.get(), nullptr);
    }
}

// formulas: all kinds of them; where two arithmetics differ is seen with two of them.
template <typename Math>
void run_all(Scalar scalar, bool formulas) {
    const Similarity cosine, raw = {true, false};
    run<Math>(scalar, 140, {140, 270, 0, 1}, 8, 8, FormulaId::multi_similarity, true, cosine);
    run<Math>(scalar, 37, {37, 5}, 21, 23, FormulaId::circle, false, cosine);
    if (!formulas) return;
    run<Math>(scalar, 130, {150}, 8, 8, FormulaId::contrastive, false, raw);
    run<Math>(scalar, 140, {150, 20}, 72, 72, FormulaId::nt_xent, true, cosine);
}

}  // namespace

int main() {
    return watched([] {
        run_all<HalfMath<__nv_bfloat16>>(Scalar::kBFloat16, false);
        run_all<ScaledMath<2>>(Scalar::kFloat32, true);
    });
}
