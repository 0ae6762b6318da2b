// Runs the engine, forward and backward, over every path for the sanitizers to watch: each buffer is a heap
// block of exactly the size that the engine asked for. Whether the results are right is tested elsewhere.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/pairs/engine.cuh"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

template <typename Math>
void run(Scalar scalar, int64_t n, int64_t m, int64_t dim, int64_t stride, FormulaId formula,
         Similarity similarity, const Tuning& tuning, bool learns = false,
         Reduction reduction = Reduction::kMean) {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    const Cloud<T> queries(n, dim, stride), refs(m > 0 ? m : 1, dim, dim);
    Task task;
    task.tuning = tuning;
    Problem& p = task.problem;
    p = problem_of(queries, refs, m, dim, formula, similarity);
    p.scalar = scalar;
    p.reduction = reduction;
    std::copy_n(kParams[int(formula)], 3, p.params);
    p.mining = {formula == FormulaId::multi_similarity || formula == FormulaId::nt_xent, 0.1};
    // Every query is the reference of its number, if there is one, and the last references are still empty.
    const Buffer self_index(n * int64_t(sizeof(int64_t))), num_valid_refs(sizeof(int64_t));
    for (int64_t i = 0; i < n; ++i) self_index.as<int64_t>()[i] = i;
    *num_valid_refs.as<int64_t>() = m - 3;
    if (!p.square) {
        p.self_index = self_index.as<int64_t>();
        p.num_valid_refs = num_valid_refs.as<int64_t>();
    }

    const int params = kFormulas[int(formula)].params;
    const Buffer values(params * int64_t(sizeof(double))), by_params((params + 1) * int64_t(sizeof(double)));
    std::copy_n(p.params, params, values.as<double>());
    if (learns) task.learned = {params, values.as<double>(), by_params.as<double>()};

    const Buffer saved(Engine<Math>::saved_bytes(task));
    const int64_t losses = reduction == Reduction::kNone ? n : 1;
    const Buffer result(losses * int64_t(sizeof(Acc))), upstream(losses * int64_t(sizeof(Acc))),
        grad_queries(n * dim * int64_t(sizeof(T))), grad_refs(m * dim * int64_t(sizeof(T)));
    std::fill_n(upstream.as<Acc>(), losses, Acc(1));
    const Buffer forward_space(Engine<Math>::forward_workspace_bytes(task));
    const Buffer backward_space(Engine<Math>::backward_workspace_bytes(task));
    Engine<Math>::forward(task, true, saved.data.get(), result.data.get(), forward_space.data.get(), nullptr);
    Engine<Math>::backward(task, saved.data.get(), upstream.data.get(), grad_queries.data.get(),
                           p.square ? nullptr : grad_refs.data.get(), backward_space.data.get(), nullptr);
    const Buffer counts(2 * n * int64_t(sizeof(int64_t))),
        count_space(Engine<Math>::count_workspace_bytes(task));
    Engine<Math>::count_pairs(task, counts.as<int64_t>(), count_space.data.get(), nullptr);
    if (!(*result.as<Acc>() > Acc(0))) {
        std::fprintf(stderr, "a loss of %g\n", double(*result.as<Acc>()));
        std::exit(1);
    }
}

// formulas: all kinds of them; where two arithmetics differ is seen with two of them.
template <typename Math>
void run_all(Scalar scalar, bool formulas) {
    const Tuning matrix;
    Tuning large_matrix, large, cached;
    large_matrix.small_tile_pairs = large_matrix.long_row = large_matrix.whole_line = 0;
    large_matrix.gradient_blocks = 6;
    large.matrix_bytes = cached.matrix_bytes = 0;
    large.tile_group = cached.tile_group = 2;
    // One tile of sums: where they are apart, gradients come in groups.
    large.cache_bytes = large.sum_bytes = large.wide_blocks = 0;
    cached.cache_bytes = 1 << 30;
    const Similarity cosine, raw = {true, false};
    run<Math>(scalar, 300, 0, 8, 8, FormulaId::multi_similarity, cosine, large);
    run<Math>(scalar, 37, 70, 24, 32, FormulaId::multi_similarity, cosine, matrix);
    run<Math>(scalar, 37, 0, 21, 21, FormulaId::circle, cosine, matrix);
    run<Math>(scalar, 140, 0, 136, 136, FormulaId::multi_similarity, cosine, large_matrix);
    run<Math>(scalar, 37, 140, 21, 21, FormulaId::circle, cosine, large_matrix);
    run<Math>(scalar, 140, 270, 21, 23, FormulaId::circle, cosine, cached);
    if (!formulas) return;
    for (const Tuning& tuning : {matrix, large}) {
        run<Math>(scalar, 140, 0, 8, 8, FormulaId::multi_similarity, cosine, tuning, true);
        run<Math>(scalar, 140, 150, 8, 8, FormulaId::contrastive, raw, tuning, true);
    }
    run<Math>(scalar, 140, 0, 8, 8, FormulaId::contrastive, raw, large);
    run<Math>(scalar, 140, 150, 8, 8, FormulaId::contrastive, raw, cached);
    run<Math>(scalar, 140, 0, 8, 8, FormulaId::binomial_deviance, cosine, cached);
    run<Math>(scalar, 260, 0, 8, 8, FormulaId::nt_xent, cosine, large);
    run<Math>(scalar, 37, 70, 8, 8, FormulaId::nt_xent, cosine, matrix);
    run<Math>(scalar, 70, 90, 8, 8, FormulaId::contrastive, raw, large_matrix);
    // A class head; parts of a line; a loss for each row.
    run<Math>(scalar, 4, 10000, 8, 8, FormulaId::multi_similarity, cosine, matrix);
    run<Math>(scalar, 37, 70, 264, 264, FormulaId::contrastive, cosine, matrix);
    for (const Tuning& tuning : {matrix, large})
        run<Math>(scalar, 140, 150, 8, 8, FormulaId::multi_similarity, cosine, tuning, false,
                  Reduction::kNone);
    run<Math>(scalar, 140, 150, 72, 72, FormulaId::sup_con, cosine, large);
}

}  // namespace

int main() {
    return watched([] {
        run_all<HalfMath<__nv_bfloat16>>(Scalar::kBFloat16, false);
        run_all<ScaledMath<2>>(Scalar::kFloat32, true);
    });
}
