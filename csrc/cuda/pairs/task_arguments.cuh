// Arguments of kernels that follow from a task on every path.
#pragma once

#include "cuda/pairs/row_weights.cuh"
#include "cuda/pairs/tile_policy.cuh"

namespace dml::cuda {

template <typename Acc>
Upstream<Acc> upstream_of(const Task& task, const Acc* grad_loss) {
    const Problem& p = task.problem;
    return {grad_loss, p.reduction, !p.return_sums, formula_facts(p.formula).parts - 1};
}

template <typename Acc>
RowsByParams<Acc> rows_by_params(const Task& task) {
    const LearnedParams& learned = task.learned;
    if (learned.count == 0) return {};
    return {learned.made, reinterpret_cast<Acc*>(learned.rows()), task.problem.queries.count};
}

}  // namespace dml::cuda
