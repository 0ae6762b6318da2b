// Launches the kernel of the matrix path on rows.
#include "cuda/common/launch.h"
#include "cuda/matrix/rows.cuh"
#include "cuda/matrix/rows.h"
#include "cuda/pairs/task_arguments.cuh"

namespace dml::cuda {
namespace {

template <typename Acc>
void launch_rows_of(const Task& task, const SavedMatrix<Acc>& saved, bool has_backward,
                    const RowsWorkspace<Acc>& space, Acc* loss, cudaStream_t stream) {
    const Problem& p = task.problem;
    const FormulaFacts facts = formula_facts(p.formula);
    const bool block_a_row = p.refs.count > task.tuning.long_row;
    const int64_t teams = block_a_row ? p.queries.count : (p.queries.count + kTeamWarps - 1) / kTeamWarps;
    const int64_t blocks = std::max<int64_t>(std::min(teams, RowsWorkspace<Acc>::kMostBlocks), 1);
    const RowsTask<Acc> of = {
        saved,
        p.queries.labels,
        p.refs.labels,
        p.refs.count,
        p.num_valid_refs,
        p.self_index,
        p.square,
        p.mine_self_pair,
        p.similarity.euclidean,
        p.mining,
        !(facts.counts_pairs && p.reduction == Reduction::kMeanNonzero),
        has_backward,
        {space.results, blocks, p.reduction == Reduction::kNone ? loss : nullptr, p.reduction,
         static_cast<const Acc*>(task.row_weights), rows_by_params<Acc>(task)},
        space.flags,
        space.ticket,
        {p.reduction, !p.return_sums, facts.parts},
        loss};
    launch_dependent(block_a_row ? finish_matrix_rows<true, Acc> : finish_matrix_rows<false, Acc>,
                     dim3(unsigned(blocks)), dim3(kTeamThreads), RowsLayout<Acc>::kBytes, stream, of,
                     AnyFormula<Acc>(p, task.learned.made));
}

}  // namespace

void launch_rows(const Task& task, const SavedMatrix<float>& saved, bool has_backward,
                 const RowsWorkspace<float>& space, float* loss, cudaStream_t stream) {
    launch_rows_of(task, saved, has_backward, space, loss, stream);
}
void launch_rows(const Task& task, const SavedMatrix<double>& saved, bool has_backward,
                 const RowsWorkspace<double>& space, double* loss, cudaStream_t stream) {
    launch_rows_of(task, saved, has_backward, space, loss, stream);
}

}  // namespace dml::cuda
