// Launches the kernels of the matrix path on rows.
#include "cuda/common/launch.h"
#include "cuda/matrix/count.cuh"
#include "cuda/matrix/rows.h"
#include "cuda/pairs/task_arguments.cuh"

namespace dml::cuda {
namespace {

bool has_long_rows(const Task& task) { return task.problem.refs.count > task.tuning.long_row; }
int64_t blocks_of(int64_t rows, bool block_a_row) {
    const int64_t teams = block_a_row ? rows : (rows + kTeamWarps - 1) / kTeamWarps;
    return std::max<int64_t>(std::min(teams, kMostRowBlocks), 1);
}

template <typename Acc>
MatrixRows<Acc> matrix_rows(const Problem& p, const SavedMatrix<Acc>& saved, int64_t first) {
    return {saved,        first,    p.queries.labels, p.refs.labels, p.refs.count, p.num_valid_refs,
            p.self_index, p.square, p.mine_self_pair, p.mining};
}

template <typename Acc>
void launch_rows_of(const Task& task, const SavedMatrix<Acc>& saved, bool has_backward,
                    const RowsWorkspace<Acc>& space, Acc* loss, Launches& launches) {
    const Problem& p = task.problem;
    const FormulaFacts facts = formula_facts(p.formula);
    const bool block_a_row = has_long_rows(task);
    const int64_t blocks = blocks_of(p.queries.count, block_a_row);
    const RowsTask<Acc> of = {
        matrix_rows(p, saved, 0),
        p.similarity.euclidean,
        !(facts.counts_pairs && p.reduction == Reduction::kMeanNonzero),
        has_backward,
        {space.results, blocks, p.reduction == Reduction::kNone ? loss : nullptr, p.reduction,
         static_cast<const Acc*>(task.row_weights), rows_by_params<Acc>(task)},
        space.flags,
        space.ticket,
        {p.reduction, !p.return_sums, facts.parts},
        loss};
    launches(block_a_row ? finish_matrix_rows<true, Acc> : finish_matrix_rows<false, Acc>,
             dim3(unsigned(blocks)), dim3(kTeamThreads), RowsLayout<Acc>::kBytes, of,
             AnyFormula<Acc>(p, task.learned.made));
}

template <typename Acc>
void launch_counts_of(const Task& task, const SavedMatrix<Acc>& saved, int64_t first, int64_t* counts,
                      Launches& launches) {
    const Problem& p = task.problem;
    const bool block_a_row = has_long_rows(task);
    const CountTask<Acc> of = {matrix_rows(p, saved, first), p.queries.count, counts};
    launches(block_a_row ? count_kept_pairs<true, Acc> : count_kept_pairs<false, Acc>,
             dim3(unsigned(blocks_of(saved.rows, block_a_row))), dim3(kTeamThreads),
             RowsLayout<Acc>::kScratchSize * sizeof(Acc), of);
}

}  // namespace

void launch_rows(const Task& task, const SavedMatrix<float>& saved, bool has_backward,
                 const RowsWorkspace<float>& space, float* loss, Launches& launches) {
    launch_rows_of(task, saved, has_backward, space, loss, launches);
}
void launch_rows(const Task& task, const SavedMatrix<double>& saved, bool has_backward,
                 const RowsWorkspace<double>& space, double* loss, Launches& launches) {
    launch_rows_of(task, saved, has_backward, space, loss, launches);
}

void launch_counts(const Task& task, const SavedMatrix<float>& saved, int64_t first, int64_t* counts,
                   Launches& launches) {
    launch_counts_of(task, saved, first, counts, launches);
}
void launch_counts(const Task& task, const SavedMatrix<double>& saved, int64_t first, int64_t* counts,
                   Launches& launches) {
    launch_counts_of(task, saved, first, counts, launches);
}

}  // namespace dml::cuda
